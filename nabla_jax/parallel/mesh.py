"""Device meshes."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nabla_jax.errors import UserError
from nabla_jax.models.partitioning import AXES, BATCH, DATA


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along one axis ``data``: batches are cut, parameters are copied to each device."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def fill_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of every axis, in their order; ``data`` 0 is as many of ``count`` devices as the others leave.

    Raises UserError unless the product of the sizes is ``count``.
    """
    others = math.prod(size for axis, size in sizes.items() if axis != DATA)
    shape = {axis: sizes[axis] for axis in AXES} | {DATA: sizes[DATA] or max(count // others, 1)}
    if math.prod(shape.values()) != count:
        said = ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)
        raise UserError(f"mesh: found {said}, expected sizes whose product is the {count} devices")
    return shape


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along ``partitioning.AXES``; ``data`` 0 stands for what the others leave.

    Raises UserError unless the product of the sizes is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = fill_sizes(sizes, len(devices))
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process's devices hold the i-th of n equal parts of a batch; several processes may hold the same.

    Raises UserError where the parts of one process do not lie side by side.
    """
    parts = batch_parts(mesh)
    numbers = np.arange(parts).reshape([mesh.shape[axis] if axis in BATCH else 1 for axis in mesh.axis_names])
    numbers = np.broadcast_to(numbers, mesh.devices.shape)
    process = jax.process_index()
    own = sorted({int(n) for device, n in zip(mesh.devices.flat, numbers.flat, strict=True)
                  if device.process_index == process})  # fmt: skip
    count = parts // len(own)
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own) or parts % len(own):
        raise UserError(
            f"mesh: found parts {', '.join(map(str, own))} of the batch on the devices of process {process}, expected "
            "parts side by side: choose data times fsdp, or tensor times sequence, a multiple of a process's devices"
        )
    return own[0] // len(own), count


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The leading axis cut by ``partitioning.BATCH``."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in BATCH if axis in mesh.shape)))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a tree of host arrays to the mesh, cut along their leading axis.

    Among several processes each gives its own rows, see ``batch_share``; the result is all of them.
    """
    sharding = batched(mesh)
    with _meant():
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Moves a tree of host arrays, the same in every process, to each device of the mesh."""
    sharding = replicated(mesh)
    with _meant():
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape), tree)


def _meant() -> contextlib.AbstractContextManager[None]:
    # Among several processes a transfer guard takes what makes arrays of their parts for a hidden transfer.
    return jax.transfer_guard_host_to_device("allow")


def to_host(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays on the mesh as whole NumPy arrays, in every process; all must call it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    tree = _gather(mesh)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    # One function a mesh: a new one would be compiled at every checkpoint.
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def local_parts(mesh: Mesh) -> int:
    """How many parts of a batch this process's devices hold."""
    return batch_parts(mesh) // batch_share(mesh)[1]


def highest(value: int, mesh: Mesh) -> jax.Array:
    """The highest value that any process gave, in all of them; all must call it. Nobody waits before it is read."""
    return _highest(put_batch(np.full((local_parts(mesh),), value, np.int32), mesh))


_highest = jax.jit(jnp.max)


def check_batch(batch: int, mesh: Mesh, key: str, accumulate: int = 1) -> None:
    """Raises UserError unless the mesh divides each of the ``accumulate`` parts of the batch."""
    parts = batch_parts(mesh)
    if batch % (parts * accumulate):
        what = "devices" if parts == mesh.size else "parts of the mesh's data and fsdp"
        times = f" times train.accumulate {accumulate}" if accumulate > 1 else ""
        raise UserError(f"{key}: found {batch}, expected a multiple of the {parts} {what}{times}")
