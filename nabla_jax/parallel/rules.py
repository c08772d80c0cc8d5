"""Which axes of the mesh cut which parameters: regular expressions over their published names.

A weight is [out, in] ([layers, out, in] where blocks are stacked; layers are never cut). Linears that make heads or
hidden units are cut by ``tensor`` along ``out``, those that add them up along ``in`` (Shoeybi et al. 2019), the other
side by ``fsdp`` (Rajbhandari et al. 2020, stage 3). An adapter's matrices are cut along the side that they share with
their weight, ``lora_A`` [r, in] along ``in`` and ``lora_B`` [out, r] along ``out``: by what cuts the weight there, and
by ``fsdp`` in any case; the rank is never cut. Gradients and the optimizer's trees lie as their parameters do.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nabla_jax.errors import UserError
from nabla_jax.models.partitioning import FSDP, TENSOR

Sides = tuple[str | None, str | None]
"""The axes that cut (out, in) of a weight."""

_BLOCK = r"(single_)?transformer_blocks/"
LINEARS: Mapping[str, Sides] = {
    _BLOCK + r"attn/(to_[qkv]|add_[qkv]_proj)": (TENSOR, FSDP),
    _BLOCK + r"(proj_mlp|ff(_context)?/net/0/proj)": (TENSOR, FSDP),
    _BLOCK + r"attn/(to_out/0|to_add_out)": (FSDP, TENSOR),
    _BLOCK + r"(proj_out|ff(_context)?/net/2)": (FSDP, TENSOR),
    _BLOCK + r"norm(1|1_context)?/linear": (TENSOR, FSDP),
    r"(context_embedder|x_embedder|norm_out/linear)": (FSDP, None),
    r"time_text_embed/(timestep|guidance|text)_embedder/linear_[12]": (FSDP, None),
    r"proj_out": (None, FSDP),
}
"""Linears of the FLUX transformer; the first expression that fits a name's end counts."""
NORMS = _BLOCK + r"attn/norm_(added_)?[qk]/weight"
_STACKED = re.compile(rf"(^|/){_BLOCK}")


def name_of(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as names with slashes between them."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_of(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a leaf is cut, by the end of its name; scalars are not.

    Raises:
      ValueError: no rule for the name.
    """
    if not shape:
        return PartitionSpec()
    lead = (None,) if _STACKED.search(name) else ()
    if re.search(rf"(^|/){NORMS}$", name):
        return PartitionSpec()
    for pattern, (out, into) in LINEARS.items():
        if found := re.search(rf"(^|/){pattern}/(?P<leaf>weight|bias|lora_A|lora_B)(/codes|/scale)?$", name):
            entries = {
                "weight": (out, into),
                "bias": (out,),
                "lora_A": (None, _and_fsdp(into)),
                "lora_B": (_and_fsdp(out), None),
            }
            return PartitionSpec(*lead, *entries[found["leaf"]])
    raise ValueError(f"{name}: found no rule, expected one of parallel.rules.LINEARS to fit")


def _and_fsdp(axis: str | None) -> tuple[str, ...]:
    return (TENSOR, FSDP) if axis == TENSOR else (FSDP,)


def fit(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without axes that the mesh has not, or that do not divide what is left of their dimension."""

    def fitting(entry: str | tuple[str, ...] | None, length: int) -> tuple[str, ...] | None:
        kept: list[str] = []
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in sizes and length % sizes[axis] == 0:
                length //= sizes[axis]
                kept.append(axis)
        return tuple(kept) or None

    return PartitionSpec(*(fitting(entry, shape[i]) for i, entry in enumerate(spec)))


def parts(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Into how many parts a spec cuts an array."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return math.prod(sizes[axis] for entry in entries for axis in entry)


def device_bytes(tree: Any, sizes: Mapping[str, int]) -> int:
    """Bytes of a tree of arrays or their shapes on each device of a mesh of these ``sizes``."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        spec = fit(spec_of(name_of(path), leaf.shape), leaf.shape, sizes)
        total += leaf.size * leaf.dtype.itemsize // parts(spec, sizes)
    return total


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A ``NamedSharding`` for every leaf of a tree of arrays or their shapes.

    Raises:
      ValueError: leaves without a rule, all of them.
    """
    missing = []

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        try:
            spec = spec_of(name_of(path), leaf.shape)
        except ValueError:
            missing.append(name_of(path))
            spec = PartitionSpec()
        return NamedSharding(mesh, fit(spec, leaf.shape, mesh.shape))

    found = jax.tree_util.tree_map_with_path(one, tree)
    if missing:
        raise ValueError(f"parallel.rules: found no rule for {', '.join(missing)}")
    return found


def check_heads(heads: int, mesh: Mesh, base: object) -> None:
    """Raises UserError unless ``tensor`` divides the attention heads of ``base``."""
    if heads % mesh.shape.get(TENSOR, 1):
        raise UserError(f"mesh.tensor: found {mesh.shape[TENSOR]}, expected a divisor of the {heads} heads of {base}")
