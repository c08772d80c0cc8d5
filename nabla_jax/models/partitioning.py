"""How arrays lie on a mesh of devices: the axes' names and constraints on what is computed.

Four axes. ``data`` and ``fsdp`` cut the batch, ``tensor`` cuts heads and hidden units, ``sequence`` cuts tokens; what
``fsdp`` and ``tensor`` cut of the parameters is said in ``nabla_jax.parallel.rules``. Outside ``jax.set_mesh``, on one
device, and for axes that a mesh does not have, nothing here does anything.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

DATA, FSDP, TENSOR, SEQUENCE = "data", "fsdp", "tensor", "sequence"
AXES = (DATA, FSDP, TENSOR, SEQUENCE)
BATCH = (DATA, FSDP)
"""What cuts the batch."""

Axes = str | tuple[str, ...] | None


def current_mesh() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` if it has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def spec(mesh: AbstractMesh, *axes: Axes) -> PartitionSpec:
    """One entry a dimension, without the axes that the mesh does not have."""

    def there(entry: Axes) -> Axes:
        names = (entry,) if isinstance(entry, str) else entry or ()
        kept = tuple(name for name in names if name in mesh.shape)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*map(there, axes))


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """x, cut by the mesh's axes as said, one entry a dimension; dimensions need not be divisible."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(mesh, *axes))


def stream(x: jax.Array) -> jax.Array:
    """Token streams [B, N, D]: batch and tokens cut, features whole."""
    return constrain(x, BATCH, SEQUENCE, None)


def hidden(x: jax.Array) -> jax.Array:
    """What a linear made for the next one to add up [B, N, D]: features cut, too."""
    return constrain(x, BATCH, SEQUENCE, TENSOR)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def attend_locally(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None) -> jax.Array:
    """``attend(q, k, v, valid)`` on every device: its samples, heads and queries, and all keys.

    No kernel is asked to cut itself. Keys and values are gathered along ``sequence``; queries are filled up with zeros
    to a multiple of its size.

    Args:
      attend: softmax attention over the keys of its arguments.
      q: [B, S, H, E].
      k, v: [B, T, H, E].
      valid: [B, T] bool or None.

    Returns:
      [B, S, H, E].
    """
    mesh = current_mesh()
    if mesh is None:
        return attend(q, k, v, valid)
    length = q.shape[1]
    missing = -length % mesh.shape.get(SEQUENCE, 1)
    if missing:
        q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0)))
    queries, keys = spec(mesh, BATCH, SEQUENCE, TENSOR, None), spec(mesh, BATCH, None, TENSOR, None)
    cut = (queries, keys, keys, None if valid is None else spec(mesh, BATCH, None))
    # Nothing is checked: kernels do not say over which axes their results differ.
    return jax.shard_map(attend, in_specs=cut, out_specs=queries, check_vma=False)(q, k, v, valid)[:, :length]
