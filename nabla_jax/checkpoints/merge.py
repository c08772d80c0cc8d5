"""Adding an adapter to the weights of its base: ``W + alpha / r * B A`` in every linear that it targets."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.adapter_formats import Pair
from nabla_jax.checkpoints.adapters import AdapterMetadata, check_fits, read_adapter
from nabla_jax.checkpoints.safetensors_io import DTYPES, Entry, read_header, save_tree
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.models import flux, layers

_KEY = "nabla_jax_merged"


@dataclasses.dataclass(frozen=True)
class _Merged:
    """One tensor of the merged checkpoint, made when it is written: the host holds one at a time."""

    entry: Entry
    name: str
    pair: Pair | None
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.entry.dtype]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with safe_open(self.entry.file, framework="numpy") as file:
            weight = np.asarray(file.get_tensor(self.name))
        if self.pair is None:
            return weight
        # float32: in bfloat16 most of a small change would be lost before it is added.
        change = self.pair.lora_B.astype(np.float32) @ self.pair.lora_A.astype(np.float32)
        return (weight.astype(np.float32) + np.float32(self.scale) * change).astype(self.dtype)


def merge_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    applies_to: str | None = None,
) -> Path:
    """Writes a copy of a pipeline folder whose transformer has the adapter in its weights.

    Dtypes, shards and all other files stay as they are; sums are float32, rounded once to the weight's dtype. The
    folder appears under its name when it is complete.

    Args:
      adapter: file in any format that ``read_adapter`` knows.
      base: pipeline folder.
      out: folder to make.
      applies_to: ``all`` vouches for a file that does not say on which tokens it acts.

    Raises:
      UserError: the adapter acts on condition tokens only, does not say on which, was trained on another base or
        does not fit this one, or ``out`` exists.
    """
    base, out = Path(base), Path(out)
    file = read_adapter(adapter)
    _check_mergeable(adapter, file.metadata, applies_to)
    pipeline.check_folder(base)
    if out.exists():
        raise UserError(f"{out}: exists, expected a folder that is to be made")
    sha256 = pipeline.folder_hash(base / "transformer")
    if file.metadata.base_sha256 not in ("", sha256):
        raise UserError(
            f"{adapter}: adapter for another base: trained on {file.metadata.base or 'unnamed'} (transformer sha256 "
            f"{file.metadata.base_sha256[:12]}), found {base} ({sha256[:12]})"
        )
    config = pipeline.transformer_config(base)
    _, abstract = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs, dtype=jnp.float32))
    check_fits(adapter, file.modules, abstract, stacked=flux.STACKED)

    header = read_header(base / "transformer")
    unknown = sorted(entry.dtype for entry in header.tensors.values() if entry.dtype not in DTYPES)
    if unknown:
        raise UserError(f"{base / 'transformer'}: found dtype {unknown[0]}, expected {', '.join(DTYPES)}")
    weights = {source.name for source in header.files}
    absent = [f"{module}.weight" for module in file.modules if f"{module}.weight" not in header.tensors]
    if absent:
        raise UserError(f"{base / 'transformer'}: no tensor {absent[0]}, expected diffusers' names")
    note = {"adapter": Path(adapter).name, "sha256": file_sha256(Path(adapter)), **dataclasses.asdict(file.metadata)}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(
            base,
            temporary,
            ignore=lambda folder, names: [n for n in names if Path(folder) == base / "transformer" and n in weights],
        )
        for source in header.files:
            tensors = {name: entry for name, entry in header.tensors.items() if entry.file == source}
            merged = {
                name: _Merged(entry, name, file.modules.get(name.removesuffix(".weight")), file.metadata.scale)
                for name, entry in tensors.items()
            }
            metadata = {_KEY: json.dumps(note, sort_keys=True)}
            save_tree(merged, temporary / "transformer" / source.name, metadata)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _check_mergeable(path: str | os.PathLike[str], metadata: AdapterMetadata, applies_to: str | None) -> None:
    if metadata.applies_to == "condition":
        raise UserError(
            f"{path}: acts on condition tokens only (applies_to: condition): merged weights would act on text and "
            "noise too, which it was not trained for; use it beside its base"
        )
    if metadata.applies_to == "unknown" and applies_to != "all":
        raise UserError(
            f"{path}: does not say on which tokens it acts; if it is for the whole sequence (not an OminiControl "
            "adapter, which acts on condition tokens only and cannot be merged), say --applies-to all"
        )
