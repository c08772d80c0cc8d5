"""Tokens beside tokens: text, noise and conditions as branches of one forward pass.

OminiControl (Tan et al. 2024) puts the tokens of each condition after the noisy tokens, as branches of their own at
time 0 that carry the adapter; FLUX.1-Kontext's own use of a reference picture puts its tokens into the noisy stream.
Both are lists of branches for ``models.flux``.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax.models.flux import Branch


@dataclasses.dataclass(frozen=True)
class Condition:
    """A picture that guides the generation.

    Attributes:
      tokens: [B, N, C] packed latents.
      ids: [N, 3] positions.
      adapter: name of the adapter that reads it, or None for the bare base.
    """

    tokens: jax.Array
    ids: np.ndarray
    adapter: str | None


def grid_ids(height: int, width: int, *, index: int = 0, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Positions (index, row, column) of a grid of tokens in row-major order, float32 [height * width, 3].

    The subject's index is 1 on FLUX.1-Kontext; on FLUX.1-schnell the subject is shifted by ``offset`` (rows, columns)
    = (0, -width) instead. A spatial control shares the noise's own positions.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    ids = np.stack([np.full_like(rows, index), rows + offset[0], columns + offset[1]], axis=-1)
    return ids.reshape(-1, 3).astype(np.float32)


def _scale(value: float | None, batch: int) -> jax.Array | None:
    return None if value is None else jnp.full((batch,), value, jnp.float32)


def branches(
    prompt: jax.Array,
    pooled: jax.Array,
    noisy: jax.Array,
    noisy_ids: np.ndarray,
    time: jax.Array,
    *,
    guidance: float | jax.Array | None,
    conditions: Sequence[Condition] = (),
    independent: bool = False,
    adapter: str | None = None,
) -> list[Branch]:
    """The branches text, noise, condition 0, condition 1, …

    Conditions enter at time 0 with guidance 1 and do not see each other. By default they see text and noise; with
    ``independent`` they see only themselves, so that their keys and values do not depend on time.

    Args:
      prompt: [B, T, E] text embeddings.
      pooled: [B, P] pooled text vector.
      noisy: [B, N, C] noisy tokens.
      noisy_ids: [N, 3].
      time: [B] in [0, 1].
      guidance: scale for text and noise ([B] or a number); None for models without guidance embedding.
      conditions: the pictures, in order.
      independent: whether conditions are cut off from text and noise.
      adapter: adapter on text and noise (None, as OminiControl does, leaves the base untouched there).
    """
    batch = noisy.shape[0]
    scale = _scale(guidance, batch) if isinstance(guidance, int | float) else guidance
    ones = None if guidance is None else jnp.ones((batch,), jnp.float32)
    zeros = jnp.zeros((batch,), jnp.float32)
    out = [
        Branch(prompt, np.zeros((prompt.shape[1], 3), np.float32), time, scale, pooled, adapter, kind="text"),
        Branch(noisy, noisy_ids, time, scale, pooled, adapter),
    ]
    for i, condition in enumerate(conditions, start=2):
        sees = (i,) if independent else (0, 1, i)
        out.append(Branch(condition.tokens, condition.ids, zeros, ones, pooled, condition.adapter, sees))
    return out


def native(
    prompt: jax.Array,
    pooled: jax.Array,
    noisy: jax.Array,
    noisy_ids: np.ndarray,
    time: jax.Array,
    *,
    guidance: float | jax.Array | None,
    references: Sequence[tuple[jax.Array, np.ndarray]] = (),
) -> list[Branch]:
    """FLUX.1-Kontext's own formulation: reference tokens in the noisy stream, at the same time.

    Args: as in ``branches``; references: (tokens [B, N', C], ids [N', 3]) with index 1, 2, … per picture.

    Only the first N tokens of the noise branch's velocity belong to the picture being made.
    """
    tokens = jnp.concatenate([noisy, *(t for t, _ in references)], axis=1)
    ids = np.concatenate([noisy_ids, *(i for _, i in references)], axis=0)
    return branches(prompt, pooled, tokens, ids, time, guidance=guidance)
