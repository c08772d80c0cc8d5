"""Low-rank adapters (LoRA, Hu et al. 2021) in a tree of their own beside the frozen base.

An adapter's parameters mirror the base's tree down to the linears it targets, each of which holds ``lora_A`` and
``lora_B`` under PEFT's names; linears of stacked blocks carry the same leading axis as the base.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nabla_jax.errors import UserError
from nabla_jax.models.layers import LowRank, Params

# The linears that OminiControl, Insert Anything and NABLA adapt: 343 of FLUX.1's.
FLUX_TARGETS = (
    r"x_embedder"
    r"|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: a tree of ``lora_A`` [.., r, in] and ``lora_B`` [.., out, r], and alpha / r."""

    params: Params
    scale: float = dataclasses.field(metadata={"static": True})

    def at(self, *path: str) -> "Adapter":
        """The part of the adapter below a module; empty when it targets nothing there."""
        node: Any = self.params
        for name in path:
            node = node.get(name, {})
        return Adapter(node, self.scale)

    def linear(self, *path: str) -> LowRank | None:
        """The matrices for the linear at ``path``, or None when the adapter leaves it alone."""
        node = self.at(*path).params
        return LowRank(node["lora_A"], node["lora_B"], self.scale) if node else None

    @property
    def rank(self) -> int:
        """r."""
        node = self.params
        while "lora_A" not in node:
            node = next(iter(node.values()))
        return int(node["lora_A"].shape[-2])


def add(first: Adapter, second: Adapter) -> Adapter:
    """One adapter that does what both do together, in float32; ranks add up.

    ``s B A + s' B' A' = [s B, s' B'] [A; A']``: nothing is rounded but the products of B and alpha / r, where that is
    no power of two; the sum's own alpha / r is 1. Both have the same linears, in any dtypes.
    """

    def join(one: Params, other: Params) -> Params:
        if "lora_A" not in one:
            return {name: join(child, other[name]) for name, child in one.items()}
        down = [node["lora_A"].astype(jnp.float32) for node in (one, other)]
        up = [scale * node["lora_B"].astype(jnp.float32) for node, scale in ((one, first.scale), (other, second.scale))]
        return {"lora_A": jnp.concatenate(down, axis=-2), "lora_B": jnp.concatenate(up, axis=-1)}

    return Adapter(join(first.params, second.params), 1.0)


Adapters = Mapping[str, Adapter]


def linears(params: Params, stacked: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yields (path, weight shape) of every linear in a base tree; stacked ones carry their leading axis."""

    def walk(node: Params, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
        for name, child in node.items():
            if name == "weight":
                if len(child.shape) == (3 if path[0] in stacked else 2):
                    yield path, tuple(child.shape)
            elif isinstance(child, dict):
                yield from walk(child, (*path, name))

    return walk(params, ())


def module_names(path: tuple[str, ...], shape: tuple[int, ...], stacked: tuple[str, ...]) -> list[str]:
    """The published module name(s) of a linear: one per block for stacked ones."""
    if path[0] not in stacked:
        return [".".join(path)]
    return [".".join((path[0], str(i), *path[1:])) for i in range(shape[0])]


def targets(params: Params, pattern: str, stacked: tuple[str, ...]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The linears whose published names fully match ``pattern``, as {path: weight shape}.

    Raises:
      UserError: an alternative of the pattern matches nothing, or a pattern selects some blocks of a stack only.
    """
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for path, shape in linears(params, stacked):
        hits = [bool(re.fullmatch(pattern, name)) for name in module_names(path, shape, stacked)]
        if any(hits) and not all(hits):
            raise UserError(
                f"lora.targets: {pattern!r} matches {'.'.join(path)} in some blocks only, expected all or none"
            )
        if all(hits):
            found[path] = shape
    if not found:
        raise UserError(f"lora.targets: {pattern!r} matches no linear of the base model")
    return found


def initialize(
    key: jax.Array, params: Params, *, rank: int, alpha: float, stacked: tuple[str, ...], pattern: str = FLUX_TARGETS
) -> Adapter:
    """A fresh adapter: A normal with standard deviation 1/r (PEFT's "gaussian"), B zero; float32 masters.

    Args:
      key: PRNG key; each linear draws from it folded with the order of its path.
      params: the base's tree (arrays or shapes).
      rank: r, at least 1.
      alpha: the adapter's contribution is multiplied by alpha / r.
      stacked: names of the stacked block lists in ``params``.
      pattern: regular expression over published module names.
    """
    tree: Params = {}
    for index, (path, shape) in enumerate(sorted(targets(params, pattern, stacked).items())):
        *lead, out_features, in_features = shape
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        draw = jax.random.normal(jax.random.fold_in(key, index), (*lead, rank, in_features), jnp.float32)
        node["lora_A"] = draw / rank
        node["lora_B"] = jnp.zeros((*lead, out_features, rank), jnp.float32)
    return Adapter(tree, alpha / rank)
