"""Adapter files: safetensors of other tools and of this one, with what later stages need to know in the header.

``adapter_formats`` knows how each tool names and fuses its tensors. The header's ``nabla_jax`` entry holds
``AdapterMetadata`` as JSON. A file without it says alpha in its tensors, in the header that diffusers writes or in the
``adapter_config.json`` that PEFT writes beside it; where none of them does, alpha = rank, which is what diffusers
assumes.
"""

import dataclasses
import json
import math
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from nabla_jax import untrusted
from nabla_jax.checkpoints import adapter_formats as formats
from nabla_jax.checkpoints.adapter_formats import Format, Pair
from nabla_jax.checkpoints.safetensors_io import DTYPES, Header, collapse, read_header, save_tree
from nabla_jax.errors import UserError
from nabla_jax.models.layers import Params
from nabla_jax.models.lora import Adapter, linears, module_names

_KEY = "nabla_jax"
# Where diffusers keeps the LoraConfig of an adapter that it saves.
_DIFFUSERS_KEY = "lora_adapter_metadata"
# Files in which PEFT keeps an adapter and its LoraConfig.
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_INPUT = "x_embedder"


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter was trained for; generation reads it instead of guessing.

    Attributes:
      rank: r.
      alpha: the adapter's contribution is multiplied by alpha / rank.
      base: name of the base model's folder.
      base_sha256: hash of the base transformer's files, empty when unknown.
      quantise: how the base's blocks were kept in training: none, int8, fp8 or nf4.
      in_channels: token channels of the base's picture embedding (64, or 384 for FLUX.1-Fill).
      control: spatial control: fill, depth, keypoints or none.
      skeleton, dot, line: how keypoints were drawn, where they are the control.
      caption: caption policy: fixed, background.
      prompt: the prompt when the caption policy is fixed.
      text_length: number of text tokens.
      size: side of the model's square pictures, pixels.
      guidance: guidance scale in training.
      sample_guidance: default guidance scale in sampling.
      sample_steps: default number of sampling steps.
      independent_conditions: whether conditions see only themselves.
      compact: conditions have 1 / compact of the picture's resolution.
      applies_to: condition branches only, the whole sequence, or unknown (files of other tools do not say).
      reads: which of the conditions the adapter is for, when subject and control have one each.
      targets: the adapted linears, ``*`` standing for every block; filled in when a file is written or read.
      step: training step.
      method: omini, native or insert. All that follows is of insert.
      redux: name of the FLUX.1-Redux folder, as the configuration gave it.
      redux_sha256: hash of its weights.
      mask_policies: of training, one drawn for each sample.
      expansion: range of the factors by which the subject's box was padded.
      window: what training saw of a target: a square so many times the bird's box, or 0 for the whole picture.
      sample_mask_policy, sample_expansion, sample_window, sample_feather: defaults in sampling, see ``config.Sample``.
    """

    rank: int
    alpha: float
    base: str = ""
    base_sha256: str = ""
    quantise: str = "none"
    in_channels: int = 0
    control: str = ""
    skeleton: str = "dense"
    dot: int = 15
    line: int = 10
    caption: str = ""
    prompt: str = ""
    text_length: int = 0
    size: int = 0
    guidance: float = 1.0
    sample_guidance: float = 1.0
    sample_steps: int = 28
    independent_conditions: bool = False
    compact: int = 1
    applies_to: Literal["condition", "all", "unknown"] = "condition"
    reads: Literal["both", "subject", "control"] = "both"
    targets: tuple[str, ...] = ()
    step: int = 0
    method: Literal["omini", "native", "insert"] = "omini"
    redux: str = ""
    redux_sha256: str = ""
    mask_policies: tuple[str, ...] = ()
    expansion: tuple[float, float] = (1.0, 1.0)
    window: float = 0.0
    sample_mask_policy: str = ""
    sample_expansion: float = 1.0
    sample_window: float = 0.0
    sample_feather: int = 0

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def from_json(cls, text: str, path: str | os.PathLike[str]) -> "AdapterMetadata":
        """Parses the header entry of the file at ``path``."""
        where = f"{path}: metadata {_KEY}"
        try:
            raw = untrusted.parse_json(text)
            untrusted.check(raw, dict[str, Any], where)
            lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
            found = cls(**raw | lists)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: cannot be read ({error}), expected AdapterMetadata") from error
        for name, kind in typing.get_type_hints(cls).items():
            untrusted.check(getattr(found, name), kind, where, name)
        if found.rank < 1:
            raise UserError(f"{where}: rank: found {found.rank}, expected at least 1")
        for name in ("alpha", "guidance", "sample_guidance", "window", "sample_expansion", "sample_window"):
            if not math.isfinite(getattr(found, name)):
                raise UserError(f"{where}: {name}: found {getattr(found, name)}, expected a finite number")
        return found


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter as a file holds it, independent of any base.

    Attributes:
      format: peft, kohya, comfyui or onetrainer.
      modules: a pair of matrices per linear, by diffusers' module names, in the file's dtype.
      metadata: ours, or what could be found out.
      header: the other entries of the file's header, as they are.
    """

    format: str
    modules: dict[str, Pair]
    metadata: AdapterMetadata
    header: dict[str, str]


# ----------------------------------------------------------------------------------------------------- reading


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter in any known format into host memory; fused matrices are split, exactly.

    Args:
      path: a safetensors file, or a folder that PEFT's ``save_pretrained`` wrote.

    Raises:
      UserError: the file is damaged, is no LoRA of a FLUX transformer, or its linears differ in rank or in
        alpha / rank.
    """
    path = _file(path)
    header = read_header(path)
    style, entries = formats.recognise(header.tensors, path)
    own = AdapterMetadata.from_json(header.metadata[_KEY], path) if _KEY in header.metadata else None
    modules: dict[str, Pair] = {}
    scales: dict[str, float] = {}
    stated = _stated_scale(path, header)
    try:
        with safe_open(path, framework="numpy") as file:
            for entry in entries:
                pair = _pair(path, file, header, entry)
                if "alpha" in entry.names:
                    name = entry.names["alpha"]
                    scales[name] = _alpha(path, file, header, name) / pair.lora_A.shape[0]
                try:
                    parts = formats.split(
                        pair,
                        entry.parts,
                        original=style in formats.ORIGINAL,
                        rank=own.rank if own else None,
                        targets=own.targets if own else (),
                    )
                except ValueError as error:
                    raise UserError(f"{path}: {entry.names['lora_B']}: {error}") from error
                modules.update(parts)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    rank = _one_rank(path, {pair.lora_A.shape[0] for pair in modules.values()})
    scale = _one_scale(path, scales, own.scale if own else stated)
    if own is None:
        metadata = AdapterMetadata(rank=rank, alpha=scale * rank, applies_to="unknown")
    elif own.rank == rank:
        metadata = own
    else:
        raise UserError(f"{path}: metadata {_KEY}: rank is {own.rank}, but the tensors have rank {rank}")
    metadata = dataclasses.replace(metadata, targets=formats.patterns(modules))
    others = {k: v for k, v in header.metadata.items() if k not in (_KEY, "format")}
    return AdapterFile(style, modules, metadata, others)


def read_metadata(path: str | os.PathLike[str]) -> AdapterMetadata:
    """The adapter's metadata; for files of other tools rank, alpha and targets from the tensors."""
    header = read_header(_file(path))
    if _KEY in header.metadata:
        return AdapterMetadata.from_json(header.metadata[_KEY], path)
    return read_adapter(path).metadata


def load_adapter(
    path: str | os.PathLike[str], base: Params, *, stacked: tuple[str, ...]
) -> tuple[Adapter, AdapterMetadata]:
    """Reads one adapter, float32, for the base whose parameter tree (arrays or shapes) is given.

    Raises:
      UserError: a tensor belongs to no linear of the base, is missing in some block, or has another shape.
    """
    file = read_adapter(path)
    check_fits(path, file.modules, base, stacked=stacked)
    tree: Params = {}
    for where, shape in linears(base, stacked):
        names = module_names(where, shape, stacked)
        if names[0] not in file.modules:
            continue
        node = tree
        for name in where:
            node = node.setdefault(name, {})
        for i, matrix in enumerate(Pair._fields):
            rows = [np.asarray(file.modules[n][i], np.float32) for n in names]
            node[matrix] = jax.device_put(np.stack(rows) if where[0] in stacked else rows[0])
    return Adapter(tree, file.metadata.scale), file.metadata


def check_fits(
    path: str | os.PathLike[str],
    modules: Mapping[str, Pair],
    base: Params,
    *,
    stacked: tuple[str, ...],
) -> None:
    """Checks that a base has every linear of an adapter, in the same size, and an adapter every block of a linear.

    Raises:
      UserError: listing everything that does not fit; first of all another number of input channels, with both
        shapes, because that is what an adapter of FLUX.1-Fill on another FLUX.1 (or the reverse) meets.
    """
    every = [(module_names(where, shape, stacked), shape[-2:]) for where, shape in linears(base, stacked)]
    expected = {name: shape for names, shape in every for name in names}
    _check_channels(path, modules, expected)
    extra = [name for name in modules if name not in expected]
    if len(extra) == len(modules):
        raise UserError(f"{path}: no tensor for this base, found e.g. {extra[0]}, expected e.g. {next(iter(expected))}")
    partly = [names for names, _ in every if any(name in modules for name in names)]
    missing = [name for names in partly for name in names if name not in modules]
    wrong = []
    for name, pair in modules.items():
        out_features, in_features = expected.get(name, (pair.lora_B.shape[0], pair.lora_A.shape[1]))
        rank = pair.lora_A.shape[0]
        for matrix, shape in zip(Pair._fields, ((rank, in_features), (out_features, rank)), strict=True):
            if getattr(pair, matrix).shape != shape:
                found = getattr(pair, matrix).shape
                wrong.append(f"transformer.{name}.{matrix}.weight: found {found}, expected {shape}")
    problems = [f"{len(missing)} linears missing: {collapse(missing)}"] if missing else []
    if extra:
        problems.append(f"{len(extra)} not expected: {collapse(extra)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {', '.join(wrong)}")
    if problems:
        raise UserError(f"{path}: the adapter does not fit the base; {'; '.join(problems)}")


def _check_channels(
    path: str | os.PathLike[str], modules: Mapping[str, Pair], expected: Mapping[str, tuple[int, ...]]
) -> None:
    if _INPUT not in modules or _INPUT not in expected:
        return
    found, wanted = modules[_INPUT].lora_A.shape, (modules[_INPUT].lora_A.shape[0], expected[_INPUT][1])
    if found == wanted:
        return
    which = {64: "FLUX.1 schnell, dev or Kontext", 384: "FLUX.1-Fill"}
    theirs, ours = (which.get(n, f"a base with {n} input channels") for n in (found[1], wanted[1]))
    raise UserError(
        f"{path}: {_INPUT}.lora_A has shape {found}, this base takes {wanted}: the adapter was trained on {theirs} "
        f"({found[1]} input channels) and does not fit {ours} ({wanted[1]})"
    )


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / _PEFT_FILE if (path / _PEFT_FILE).is_file() else path


def _pair(path: Path, file: Any, header: Header, entry: formats.Entry) -> Pair:
    names = [entry.names[matrix] for matrix in Pair._fields]
    for name in names:
        if header.tensors[name].dtype not in DTYPES:
            raise UserError(f"{path}: {name}: found dtype {header.tensors[name].dtype}, expected {', '.join(DTYPES)}")
    shapes = [header.tensors[name].shape for name in names]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise UserError(
            f"{path}: {names[0]} and {names[1]} have shapes {shapes[0]} and {shapes[1]}, expected [r, in] and [out, r]"
        )
    if not all(size for shape in shapes for size in shape):
        raise UserError(f"{path}: {names[0]} and {names[1]} have shapes {shapes[0]} and {shapes[1]}, expected no 0")
    pair = Pair(*(file.get_tensor(name) for name in names))
    for name, matrix in zip(names, pair, strict=True):
        if not np.isfinite(matrix).all():
            raise UserError(f"{path}: {name}: found NaN or infinity, expected numbers: the adapter is of no use")
    return pair


def _alpha(path: Path, file: Any, header: Header, name: str) -> float:
    """The number of a file's tensor ``alpha``."""
    entry = header.tensors[name]
    if math.prod(entry.shape) != 1 or entry.dtype not in DTYPES:
        raise UserError(f"{path}: {name}: found {entry.dtype} of shape {entry.shape}, expected one number")
    value = float(file.get_tensor(name).item())
    if not math.isfinite(value):
        raise UserError(f"{path}: {name}: found {value}, expected a finite number")
    return value


def _one_rank(path: Path, ranks: set[int]) -> int:
    if len(ranks) != 1:
        raise UserError(f"{path}: expected matrices of one rank, found ranks {', '.join(map(str, sorted(ranks)))}")
    return ranks.pop()


def _one_scale(path: Path, scales: Mapping[str, float], stated: float | None) -> float:
    """alpha / rank of the whole file, from its alphas (by tensor name) and from what the metadata state."""
    found = dict(scales) if stated is None else {"the metadata": stated, **scales}
    if not found:
        return 1.0
    first = next(iter(found.items()))
    for name, scale in found.items():
        # alpha is stored in as few as 8 bits.
        if abs(scale - first[1]) > 4e-3 * abs(first[1]):
            raise UserError(
                f"{path}: expected one alpha / rank, found {first[1]:g} in {first[0]} and {scale:g} in {name}"
            )
    return first[1]


def _stated_scale(path: Path, header: Header) -> float | None:
    """alpha / rank as diffusers (in the header) or PEFT (in a file beside it) state it."""
    prefix, where = "", path.parent / _PEFT_CONFIG
    if _DIFFUSERS_KEY in header.metadata:
        text, prefix, where = header.metadata[_DIFFUSERS_KEY], "transformer.", path
    elif path.name == _PEFT_FILE and where.is_file():
        text = where.read_bytes().decode("utf-8", "replace")
    else:
        return None
    try:
        config = {str(k).removeprefix(prefix): v for k, v in untrusted.parse_json(text).items()}
        if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
            raise UserError(f"{where}: use_dora, rank_pattern and alpha_pattern are not supported, expected plain LoRA")
        if "r" not in config:
            return None
        rank = int(config["r"])
        alpha = float(config.get("lora_alpha") or rank)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if rank < 1 or not math.isfinite(scale):
            raise ValueError(f"r: {rank}, lora_alpha: {alpha}")
        return scale
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: LoRA configuration cannot be read: {error}") from error


# ----------------------------------------------------------------------------------------------------- writing


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    metadata: AdapterMetadata,
    *,
    stacked: tuple[str, ...],
    format: Format = "peft",
) -> None:
    """Writes one adapter atomically, one pair of tensors per linear and block (``peft``), in its own dtypes."""
    modules: dict[str, Pair] = {}

    def walk(node: Params, where: tuple[str, ...]) -> None:
        if "lora_A" in node:
            a, b = (np.asarray(jax.device_get(node[matrix])) for matrix in Pair._fields)
            lead = where[0] in stacked
            for i, name in enumerate(module_names(where, a.shape, stacked)):
                modules[name] = Pair(a[i], b[i]) if lead else Pair(a, b)
            return
        for name, child in node.items():
            walk(child, (*where, name))

    walk(adapter.params, ())
    write_adapter(path, modules, metadata, format=format)


def write_adapter(
    path: str | os.PathLike[str],
    modules: Mapping[str, Pair],
    metadata: AdapterMetadata,
    *,
    format: Format = "peft",
    header: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes pairs of matrices by module name atomically, in the names of ``format``.

    Args:
      path: of the file.
      modules: as in ``AdapterFile``.
      metadata: goes into the header; ``targets`` is filled in.
      format: peft, kohya or comfyui.
      header: further entries of the header.
      dtype: of the matrices; None keeps theirs.
    """
    metadata = dataclasses.replace(metadata, targets=formats.patterns(modules))
    kept = {k: v for k, v in (header or {}).items() if k != _DIFFUSERS_KEY}
    text = json.dumps(dataclasses.asdict(metadata), sort_keys=True)
    if dtype is not None:
        modules = {n: Pair(*(m.astype(jnp.dtype(dtype)) for m in pair)) for n, pair in modules.items()}
    save_tree(formats.write(modules, metadata.scale, format), path, kept | {_KEY: text})


def dtypes(modules: Mapping[str, Pair]) -> Iterable[str]:
    """The distinct dtypes of an adapter's matrices."""
    return sorted({str(matrix.dtype) for pair in modules.values() for matrix in pair})
