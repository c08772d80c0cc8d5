"""Meshes as numbers."""

import math
from collections.abc import Mapping

from nabla_jax.errors import UserError
from nabla_jax.models.partitioning import AXES

MeshShape = Mapping[str, int]


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """``fsdp=4,tensor=2`` to the size of every axis; empty: all devices on ``data``.

    Raises UserError for an unknown axis, a size that is no number, and a product that is not ``devices``.
    """
    shape = dict.fromkeys(AXES, 1)
    if not text:
        return shape | {"data": devices}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or not int(size):
            raise UserError(f"--mesh: found {part!r}, expected AXIS=SIZE with an axis of {', '.join(AXES)}")
        shape[name] = int(size)
    if math.prod(shape.values()) != devices:
        raise UserError(f"--mesh: found {text!r} of {math.prod(shape.values())} devices, expected {devices}")
    return shape


def mesh_text(shape: MeshShape) -> str:
    """The inverse of ``parse_mesh``, without axes of one."""
    return ",".join(f"{axis}={shape[axis]}" for axis in AXES if shape[axis] > 1) or "data=1"
