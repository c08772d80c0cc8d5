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
    """Moves a tree of host arrays to the mesh, cut along their leading axis."""
    return jax.device_put(batch, batched(mesh))


def check_batch(batch: int, mesh: Mesh, key: str) -> None:
    """Raises UserError unless the devices divide the batch."""
    if batch % mesh.size:
        raise UserError(f"{key}: found {batch}, expected a multiple of the {mesh.size} devices")
