"""Adapter files: PEFT/diffusers safetensors with what later stages need to know in the header.

Tensors are named ``transformer.<module>.lora_A.weight`` [r, in] and ``….lora_B.weight`` [out, r], as
``save_lora_weights`` of diffusers writes them. The header's ``nabla_jax`` entry holds ``AdapterMetadata`` as JSON; a
file without it is read with alpha = rank, which is what diffusers assumes.
"""

import dataclasses
import json
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nabla_jax.checkpoints.safetensors_io import Header, load_tree, read_header, save_tree
from nabla_jax.errors import UserError
from nabla_jax.models.layers import Params
from nabla_jax.models.lora import Adapter, linears, module_names

_ROOT = "transformer"
_KEY = "nabla_jax"


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter was trained for; generation reads it instead of guessing.

    Attributes:
      rank: r.
      alpha: the adapter's contribution is multiplied by alpha / rank.
      base: name of the base model's folder.
      base_sha256: hash of the base transformer's files, empty when unknown.
      in_channels: token channels of the base's picture embedding (64, or 384 for FLUX.1-Fill).
      control: spatial control: fill, depth, keypoints or none.
      caption: caption policy: fixed, background.
      prompt: the prompt when the caption policy is fixed.
      text_length: number of text tokens.
      size: side of the model's square pictures, pixels.
      guidance: guidance scale in training.
      sample_guidance: default guidance scale in sampling.
      sample_steps: default number of sampling steps.
      independent_conditions: whether conditions see only themselves.
      applies_to: condition branches only, or the whole sequence.
      step: training step.
    """

    rank: int
    alpha: float
    base: str = ""
    base_sha256: str = ""
    in_channels: int = 0
    control: str = ""
    caption: str = ""
    prompt: str = ""
    text_length: int = 0
    size: int = 0
    guidance: float = 1.0
    sample_guidance: float = 1.0
    sample_steps: int = 28
    independent_conditions: bool = False
    applies_to: Literal["condition", "all"] = "condition"
    step: int = 0

    @classmethod
    def from_json(cls, text: str, path: str | os.PathLike[str]) -> "AdapterMetadata":
        """Parses the header entry of the file at ``path``."""
        try:
            raw = json.loads(text)
            return cls(**raw)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}: metadata {_KEY}: cannot be read ({error}), expected AdapterMetadata") from error


def _published(params: Params) -> Params:
    """``{"lora_A": array}`` leaves become ``{"lora_A": {"weight": array}}``."""
    return {k: {"weight": v} if k in ("lora_A", "lora_B") else _published(v) for k, v in params.items()}


def _own(params: Params) -> Params:
    return {k: v["weight"] if k in ("lora_A", "lora_B") else _own(v) for k, v in params.items()}


def save_adapter(
    path: str | os.PathLike[str], adapter: Adapter, metadata: AdapterMetadata, *, stacked: tuple[str, ...]
) -> None:
    """Writes one adapter atomically, one tensor per linear and block, float32."""
    prefixes = tuple(f"{_ROOT}.{name}" for name in stacked)
    text = json.dumps(dataclasses.asdict(metadata), sort_keys=True)
    save_tree({_ROOT: _published(adapter.params)}, path, {_KEY: text}, stacked=prefixes)


def read_metadata(path: str | os.PathLike[str]) -> AdapterMetadata:
    """The adapter's metadata; rank from the shapes and alpha = rank for files of other tools."""
    header = read_header(path)
    if _KEY in header.metadata:
        return AdapterMetadata.from_json(header.metadata[_KEY], path)
    ranks = {entry.shape[0] for name, entry in header.tensors.items() if name.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{path}: expected lora_A tensors of one rank, found ranks {sorted(ranks) or 'none'}")
    rank = ranks.pop()
    return AdapterMetadata(rank=rank, alpha=float(rank))


def load_adapter(
    path: str | os.PathLike[str], base: Params, *, stacked: tuple[str, ...]
) -> tuple[Adapter, AdapterMetadata]:
    """Reads one adapter for the base whose parameter tree (arrays or shapes) is given.

    Raises:
      UserError: a tensor belongs to no linear of the base, is missing in some block, or has another shape.
    """
    metadata = read_metadata(path)
    abstract = _abstract(path, read_header(path), base, metadata.rank, stacked)
    prefixes = tuple(f"{_ROOT}.{name}" for name in stacked)
    tree = load_tree(path, {_ROOT: _published(abstract)}, stacked=prefixes, dtype=jnp.float32)
    return Adapter(_own(tree[_ROOT]), metadata.alpha / metadata.rank), metadata


def _abstract(path: Any, header: Header, base: Params, rank: int, stacked: tuple[str, ...]) -> Params:
    """Shapes of the adapter: every linear of the base for which the file names at least one block."""
    tree: Params = {}
    for where, shape in linears(base, stacked):
        names = module_names(where, shape, stacked)
        if not any(f"{_ROOT}.{name}.lora_A.weight" in header.tensors for name in names):
            continue
        *lead, out_features, in_features = shape
        node = tree
        for name in where:
            node = node.setdefault(name, {})
        node["lora_A"] = jax.ShapeDtypeStruct((*lead, rank, in_features), jnp.float32)
        node["lora_B"] = jax.ShapeDtypeStruct((*lead, out_features, rank), jnp.float32)
    if not tree:
        first = next(iter(header.tensors), "none")
        raise UserError(f"{path}: no tensor named {_ROOT}.<module>.lora_A.weight for this base, found e.g. {first}")
    return tree
