"""Pipeline folders in the published layout.

- ``model_index.json``: the pipeline's class and the class of each component
- ``transformer/``, ``vae/``, ``text_encoder/`` (CLIP), ``text_encoder_2/`` (T5): config.json and safetensors,
  one file or shards with an index
- ``tokenizer/``, ``tokenizer_2/``, ``scheduler/``

The transformer and the autoencoder may also be read from and written to Black Forest Labs' single files
(``flux1-*.safetensors``, ``ae.safetensors``; see ``bfl``).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from nabla_jax import untrusted
from nabla_jax.checkpoints import bfl
from nabla_jax.checkpoints.safetensors_io import (
    Header,
    Layout,
    Table,
    load_tree,
    published_layout,
    read_header,
    save_tree,
)
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.models import clip, flux, layers, quantised, t5
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class SingleFile:
    """How a file that holds one whole model is laid out and how its configuration is told from its header."""

    layout: Layout
    config: Callable[[StrPath, Header], Any]


@dataclass(frozen=True)
class Part:
    """How one model of the folder is configured, built and named."""

    config: Any
    model: Callable[..., nnx.Module]
    file: str
    table: Table = ()
    stacked: tuple[str, ...] = ()
    single_file: SingleFile | None = None


PARTS = {
    "transformer": Part(
        flux.FluxConfig,
        flux.Flux,
        "diffusion_pytorch_model.safetensors",
        stacked=flux.STACKED,
        single_file=SingleFile(bfl.flux_layout, bfl.flux_config),
    ),
    "vae": Part(
        AutoencoderKLConfig,
        AutoencoderKL,
        "diffusion_pytorch_model.safetensors",
        single_file=SingleFile(bfl.vae_layout, bfl.vae_config),
    ),
    "text_encoder": Part(clip.CLIPTextConfig, clip.CLIPText, "model.safetensors", clip.TABLE),
    "text_encoder_2": Part(t5.T5Config, t5.T5Encoder, "model.safetensors", t5.TABLE),
}
# Files that must be there beside the models; each entry lists alternatives.
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "tokenizer": (
        ("tokenizer_config.json",),
        ("vocab.json", "tokenizer.json"),
        ("merges.txt", "tokenizer.json"),
    ),
    "tokenizer_2": (("tokenizer_config.json",), ("tokenizer.json",)),
    "scheduler": (("scheduler_config.json",),),
}
# The library and class that open each component, as model_index.json names them.
_LIBRARIES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PIPELINES = ("FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline")
# The published dev scheduler.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

SCHNELL: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}
"""What schnell's scheduler has instead: levels evenly spaced at every size."""


@dataclass(frozen=True)
class Component:
    """One model: its config, its static graph and its parameters (nested dict of arrays)."""

    config: Any
    graphdef: Any
    params: layers.Params


@dataclass(frozen=True)
class TextEncoders:
    """The CLIP encoder (``text_encoder``) and the T5 encoder (``text_encoder_2``)."""

    clip: Component
    t5: Component


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of CLIP (``tokenizer``) and T5 (``tokenizer_2``)."""

    clip: Any
    t5: Any


def load_part(
    path: StrPath, name: str, *, dtype: DTypeLike = "float32", sharding: Any = None, quantise: str = "none"
) -> Component:
    """Reads one model of a pipeline folder, or of its single file, with parameters in ``dtype``.

    ``sharding`` is a ``jax.sharding.Sharding``, a tree of them, or a function from the abstract parameters to
    such a tree; each device then receives its own part only. ``quantise`` (none, int8, fp8, nf4) keeps the weights of
    the stacked blocks' linears in that format, made from the numbers of the file while it is read; see
    ``models.quantised``. Raises UserError naming what does not fit.
    """
    alone = _single_file(path, name)
    if alone is None:
        return load_model(Path(path) / name, PARTS[name], dtype=dtype, sharding=sharding, quantise=quantise)
    return _load(Path(path), PARTS[name], _config(path, name), alone.layout, dtype, sharding, quantise)


def load_model(
    path: Path, part: Part, *, dtype: DTypeLike = "float32", sharding: Any = None, quantise: str = "none"
) -> Component:
    """Reads one model's folder (config.json and weights); see ``load_part``."""
    config = part.config.from_json(path / "config.json")
    return _load(path, part, config, published_layout, dtype, sharding, quantise)


def _load(
    path: Path, part: Part, config: Any, layout: Layout, dtype: DTypeLike, sharding: Any, quantise: str
) -> Component:
    graphdef, abstract = abstract_model(part, config, dtype=dtype, quantise=quantise)
    if callable(sharding):
        sharding = sharding(abstract)
    params = load_tree(path, abstract, part.table, stacked=part.stacked, sharding=sharding, layout=layout)
    return Component(config, graphdef, params)


def abstract_model(
    part: Part, config: Any, *, dtype: DTypeLike = "float32", quantise: str = "none"
) -> tuple[Any, layers.Params]:
    """Graph and abstract parameters (``jax.ShapeDtypeStruct``) of a model as ``load_part`` makes it.

    Raises UserError for an unknown format and for one that the model's widths do not fit.
    """
    graphdef, abstract = layers.abstract(lambda rngs: part.model(config, rngs=rngs, dtype=dtype))
    if quantise != "none":
        abstract = quantised.abstract(abstract, quantised.find_format(quantise), part.stacked)
    return graphdef, abstract


def load_transformer(
    path: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None, quantise: str = "none"
) -> Component:
    """The FLUX transformer of a pipeline folder or of a ``flux1-*.safetensors`` file; see ``load_part``."""
    return load_part(path, "transformer", dtype=dtype, sharding=sharding, quantise=quantise)


def load_vae(path: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> Component:
    """The autoencoder of a pipeline folder or of an ``ae.safetensors`` file; see ``load_part``."""
    return load_part(path, "vae", dtype=dtype, sharding=sharding)


def load_text_encoders(folder: StrPath, *, dtype: DTypeLike = "float32", sharding: Any = None) -> TextEncoders:
    """Both text encoders of a pipeline folder; see ``load_part``."""
    return TextEncoders(
        clip=load_part(folder, "text_encoder", dtype=dtype, sharding=sharding),
        t5=load_part(folder, "text_encoder_2", dtype=dtype, sharding=sharding),
    )


def load_tokenizers(folder: StrPath) -> Tokenizers:
    """Both tokenizers of a pipeline folder, from its files alone (no network, no torch)."""
    problems = [p for name in ("tokenizer", "tokenizer_2") for p in _missing_files(Path(folder), name)]
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}")
    # Imported here: transformers takes a second, and only text needs it.
    from transformers import CLIPTokenizer, T5Tokenizer

    def read(kind: Any, name: str) -> Any:
        try:
            return kind.from_pretrained(str(Path(folder) / name), local_files_only=True)
        except Exception as error:  # the compiled tokenizers raise bare Exception for a damaged file
            raise UserError(f"{Path(folder) / name}: the tokenizer cannot be read: {_line(error)}") from error

    return Tokenizers(clip=read(CLIPTokenizer, "tokenizer"), t5=read(T5Tokenizer, "tokenizer_2"))


def transformer_config(path: StrPath) -> flux.FluxConfig:
    """The transformer's config of a pipeline folder or single file, without its weights."""
    config: flux.FluxConfig = _config(path, "transformer")
    return config


def vae_config(path: StrPath) -> AutoencoderKLConfig:
    """The autoencoder's config of a pipeline folder or single file, without its weights."""
    config: AutoencoderKLConfig = _config(path, "vae")
    return config


def scheduler(folder: StrPath) -> dict[str, Any]:
    """The content of ``scheduler/scheduler_config.json``. Raises UserError naming it when it is no JSON object."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    found: dict[str, Any] = untrusted.read_json(path)
    untrusted.check(found, dict[str, Any], str(path))
    return found


def is_kontext(folder: StrPath) -> bool:
    """Whether a pipeline folder holds FLUX.1-Kontext, by the class that its index names.

    Raises:
      UserError: the folder has no index, or one that names no FLUX pipeline.
    """
    if problems := _index_problems(Path(folder)):
        raise UserError(f"{folder}: {'; '.join(problems)}")
    index = untrusted.read_json(Path(folder) / "model_index.json")
    return bool(index["_class_name"] == "FluxKontextPipeline")


def check_channels(path: StrPath, method: str) -> None:
    """Raises UserError unless the transformer reads what ``method`` gives a token.

    ``insert`` gives noisy latents, those of the masked picture and the mask, as FLUX.1-Fill takes them; ``omini`` and
    ``native`` give noisy latents alone, the latter to a base that knows references in its stream. Only configurations
    are read.
    """
    latents = 4 * vae_config(path).latent_channels
    fill = 2 * latents + 4 * vae_config(path).factor ** 2
    found, expected = transformer_config(path).in_channels, fill if method == "insert" else latents
    if found != expected:
        kind = {latents: "FLUX.1 schnell, dev or Kontext", fill: "FLUX.1-Fill"}
        raise UserError(
            f"{path}: method {method} needs {kind[expected]} ({expected} channels a token), found "
            f"{kind.get(found, 'another base')} ({found})"
        )
    if method == "native" and not is_kontext(path):
        raise UserError(
            f"{path}: method native needs FLUX.1-Kontext, found a base that knows no reference pictures; expected "
            "FluxKontextPipeline in model_index.json"
        )


def check_sides(path: StrPath, size: int, compact: int = 1) -> None:
    """Raises UserError unless pictures of ``size`` and conditions of ``size / compact`` are whole numbers of tokens."""
    token = 2 * vae_config(path).factor
    if size % compact or size // compact % token:
        raise UserError(
            f"{path}: conditioning.compact: found {compact} for conditioning.size {size}, expected a divisor that "
            f"leaves conditions of a multiple of {token} pixels, the side of a token"
        )


def check_folder(folder: StrPath) -> None:
    """Raises one UserError listing everything that is missing or does not fit, without reading weights.

    Looked at are the index, all configs and whether the models' sizes agree with each other, the headers of
    all weight files (a shard that is missing or cut short is found), the tokenizers' and scheduler's files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected a pipeline folder with model_index.json)")
    problems = _index_problems(folder)
    configs: dict[str, Any] = {}
    for name in PARTS:
        if not (folder / name).is_dir():
            problems.append(f"{name}/ is missing")
            continue
        for check in (lambda n: configs.update({n: _config(folder, n)}), lambda n: read_header(folder / n)):
            try:
                check(name)
            except UserError as error:
                problems.append(str(error).removeprefix(f"{folder}/"))
    for name in FILES:
        problems += _missing_files(folder, name)
    problems += _disagreements(configs)
    if problems:
        raise UserError(f"{folder}: not a complete pipeline folder: {'; '.join(problems)}")


def check_quantised(path: StrPath, quantise: str) -> None:
    """Raises UserError unless the transformer can be kept in this format; only its configuration is read."""
    if quantise != "none":
        abstract_model(PARTS["transformer"], transformer_config(path), quantise=quantise)


def folder_hash(folder: StrPath, *, everything: bool = False) -> str:
    """SHA-256 (hex) of a pipeline folder or of one model's folder, read in pieces.

    Covered are names, sizes and contents (headers included) of the safetensors files that would be loaded; with
    ``everything`` those of all files, configs and tokenizers too.
    """
    folder = Path(folder)
    parts = [folder / name for name in PARTS] if (folder / "model_index.json").is_file() else [folder]
    if everything:
        files = [(folder, file) for file in sorted(file for file in folder.rglob("*") if file.is_file())]
    else:
        files = [(part, file) for part in parts for file in read_header(part).files]
    total = hashlib.sha256()
    for root, file in files:
        name = file.relative_to(root.parent).as_posix()
        total.update(f"{name} {file.stat().st_size} {file_sha256(file)}\n".encode())
    return total.hexdigest()


def save_part(
    folder: StrPath, name: str, config: Any, params: layers.Params, *, dtype: DTypeLike | None = None
) -> None:
    """Writes one model (a name of ``PARTS``) with its config.json; the inverse of ``load_part``."""
    save_model(Path(folder) / name, PARTS[name], config, params, dtype=dtype)


def save_model(path: Path, part: Part, config: Any, params: layers.Params, *, dtype: DTypeLike | None = None) -> None:
    """Writes one model's folder; the inverse of ``load_model``."""
    save_tree(params, path / part.file, dtype=dtype, stacked=part.stacked)
    write_json(path / "config.json", config.to_json())


def save_single_file(
    file: StrPath, name: str, config: Any, params: layers.Params, *, dtype: DTypeLike | None = None
) -> None:
    """Writes the transformer or the autoencoder as one file in Black Forest Labs' layout.

    The configuration goes into the header's metadata: ``load_part`` reads every size back.
    """
    part = PARTS[name]
    if part.single_file is None:
        raise ValueError(f"{name}: has no single-file layout")
    save_tree(params, file, bfl.metadata(config), dtype=dtype, stacked=part.stacked, layout=part.single_file.layout)


def write_index(
    folder: StrPath, pipeline: str = "FluxKontextPipeline", scheduler: Mapping[str, Any] | None = None
) -> None:
    """Writes ``model_index.json`` for a pipeline class and ``scheduler/scheduler_config.json``.

    ``scheduler`` replaces keys of ``SCHEDULER``, e.g. ``{"use_dynamic_shifting": False, "shift": 1.0}``.
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline: found {pipeline!r}, expected one of {', '.join(PIPELINES)}")
    components: dict[str, Any] = dict(_LIBRARIES)
    if pipeline != "FluxFillPipeline":
        components |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    index = {"_class_name": pipeline, "_diffusers_version": "0.35.1", **components}
    write_json(Path(folder) / "model_index.json", index)
    write_json(Path(folder) / "scheduler" / "scheduler_config.json", SCHEDULER | dict(scheduler or {}))


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(path: StrPath, name: str) -> Any:
    alone = _single_file(path, name)
    if alone:
        return alone.config(path, read_header(path))
    return PARTS[name].config.from_json(Path(path) / name / "config.json")


def _single_file(path: StrPath, name: str) -> SingleFile | None:
    """How the file at ``path`` is laid out, None for a folder. Raises UserError for a model without such a layout."""
    if not Path(path).is_file():
        return None
    if PARTS[name].single_file is None:
        raise UserError(f"{path}: {name} is read from a pipeline folder, found a file")
    return PARTS[name].single_file


def _index_problems(folder: Path) -> list[str]:
    path = folder / "model_index.json"
    if not path.is_file():
        return ["model_index.json is missing"]
    try:
        index = untrusted.parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        return [f"model_index.json: not valid JSON ({error})"]
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name not in PIPELINES:
        return [f"model_index.json: _class_name: found {name!r}, expected one of {', '.join(PIPELINES)}"]
    return []


def _missing_files(folder: Path, name: str) -> list[str]:
    if not (folder / name).is_dir():
        return [f"{name}/ is missing"]
    return [
        f"{name}/{' or '.join(alternatives)} is missing"
        for alternatives in FILES[name]
        if not any((folder / name / file).is_file() for file in alternatives)
    ]


def _disagreements(configs: Mapping[str, Any]) -> list[str]:
    """Sizes that two models' configs must share but do not; models without a config are passed over."""
    transformer = configs.get("transformer")
    if transformer is None:
        return []
    problems = []
    shared = (
        ("joint_attention_dim", transformer.joint_attention_dim, "text_encoder_2", "d_model"),
        ("pooled_projection_dim", transformer.pooled_projection_dim, "text_encoder", "hidden_size"),
    )
    for field, size, other, key in shared:
        found = getattr(configs[other], key) if other in configs else size
        if found != size:
            problems.append(f"transformer/config.json: {field} is {size}, but {other}/config.json: {key} is {found}")
    if "vae" in configs:
        # A token is a square of 2 x 2 latent pixels.
        packed = 4 * configs["vae"].latent_channels
        if transformer.velocity_channels != packed:
            problems.append(
                f"transformer/config.json: {transformer.velocity_channels} channels per token, but "
                f"vae/config.json: latent_channels {configs['vae'].latent_channels} makes {packed}"
            )
    return problems


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
