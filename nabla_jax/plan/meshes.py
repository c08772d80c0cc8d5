"""Meshes as numbers: parsing, and how many bytes of a tree each device of one holds."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nabla_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
"""The batch is cut over data and fsdp, parameters over fsdp and tensor, tokens over sequence."""

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


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sharded_bytes(tree: Any, specs: Any, mesh: MeshShape) -> int:
    """Bytes of ``tree`` (arrays or shapes) that one device holds.

    Args:
      tree: of arrays or ``jax.ShapeDtypeStruct``.
      specs: a ``PartitionSpec`` for each leaf, or one for all of them.
      mesh: size of each axis.

    Raises ValueError for a spec with more entries than its leaf has axes.
    """
    if isinstance(specs, PartitionSpec):
        whole = specs
        specs = jax.tree.map(lambda _: whole, tree)
    leaves = jax.tree.leaves(tree)
    wanted = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    total = 0
    for leaf, spec in zip(leaves, wanted, strict=True):
        if len(spec) > len(leaf.shape):
            raise ValueError(f"{spec} has more axes than an array of shape {leaf.shape}")
        cuts = [_cut(entry, mesh) for entry in spec] + [1] * (len(leaf.shape) - len(spec))
        shape = [-(-size // cut) for size, cut in zip(leaf.shape, cuts, strict=True)]
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _cut(entry: Any, mesh: MeshShape) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh[name] for name in names)


def even_specs(tree: Any, mesh: MeshShape, axes: tuple[str, ...] = ("fsdp", "tensor")) -> Any:
    """Specs that cut every leaf along its largest axis that each of ``axes`` divides, each mesh axis once.

    Leading axes of stacked blocks stay whole: a scan takes one block at a time. Vectors stay whole, too.
    """

    def spec(leaf: Any) -> PartitionSpec:
        entries: list[str | None] = [None] * len(leaf.shape)
        if len(leaf.shape) < 2:
            return PartitionSpec()
        for name in axes:
            free = [
                axis
                for axis in range(len(leaf.shape) - 2, len(leaf.shape))
                if entries[axis] is None and mesh[name] > 1 and leaf.shape[axis] % mesh[name] == 0
            ]
            if free:
                entries[max(free, key=lambda axis: leaf.shape[axis])] = name
        return PartitionSpec(*entries)

    return jax.tree.map(spec, tree)
