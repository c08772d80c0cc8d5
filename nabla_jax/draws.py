"""Random draws that depend on what they are for, never on batch size, order or number of devices.

Every draw comes from the run's seed folded with the number of a sample (its position in the training
stream, or a hash of a pair's key, which names the pair and its direction) and with one of the purposes
below. Draws on the host need numpy only; jax is imported where it is used.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

# Purposes. Their values are part of every result: never renumber them.
TARGET_LATENT = 0
NOISE = 1
TIME = 2
SUBJECT_LATENT = 3
CONTROL_LATENT = 4
ADAPTER_INIT = 5
REPAINT_MASK = 6
MASKED_LATENT = 7
EXPANSION = 8

RUN = 0xFFFFFFFF  # the number for draws that belong to a whole run


def number(text: str) -> int:
    """A pair's key as an unsigned 32-bit number."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def keys(seed: "int | jax.Array", numbers: "np.ndarray | jax.Array", purpose: int) -> "jax.Array":
    """One key per sample: ``numbers`` [B] (taken modulo 2**32) -> keys [B]."""
    import jax
    import jax.numpy as jnp

    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda n: jax.random.fold_in(root, n))(jnp.asarray(numbers).astype(jnp.uint32))


def key(seed: int, purpose: int) -> "jax.Array":
    """The key of a draw that belongs to a whole run."""
    return keys(seed, np.asarray([RUN], np.uint32), purpose)[0]


def normal(keys: "jax.Array", shape: tuple[int, ...]) -> "jax.Array":
    """Standard normal float32 [B, *shape], one independent draw per key."""
    import jax
    import jax.numpy as jnp

    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    """A generator on the host for one sample and purpose, for draws that shape pictures and masks."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose << 32 | number], np.uint64)))
