"""Device meshes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nabla_jax.errors import UserError


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along one axis ``data``: batches are cut, parameters are copied to each device."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a tree of host arrays to the mesh, cut along their leading axis.

    Among several processes each gives its own rows; the result is all of them, in the order of the processes.
    """
    sharding = batched(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Moves a tree of host arrays, the same in every process, to each device of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape), tree)


def check_batch(batch: int, mesh: Mesh, key: str) -> None:
    """Raises UserError unless the devices divide the batch."""
    if batch % mesh.size:
        raise UserError(f"{key}: found {batch}, expected a multiple of the {mesh.size} devices")
