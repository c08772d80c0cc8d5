"""Configuration: a Python file with ``get_config(arg)``, typed overrides, and frozen dataclasses.

``load("configs/omk_fill.py:small,steps=200", {"optim.lr": "0.5"})`` runs the file's
``get_config("small")``, applies ``steps=200`` and then ``optim.lr=0.5``, and returns a ``Config``. A key
without a field, a missing key and a value of the wrong type are errors that name the key, what was found
and what was expected. Nothing here imports jax, so that everything a user can get wrong is said before a
framework is loaded.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen pipeline."""

    path: str  # a diffusers-layout folder, or asset:NAME
    obtain: str = ""  # told to a user who does not have it
    redux: str = ""  # a FLUX.1-Redux folder, or asset:NAME; only method insert reads it
    quantise: str = "none"  # or int8, fp8, nf4: how the weights of the transformer's blocks are kept in memory
    # The transformer's attention kernel: xla, chunked, cudnn (NVIDIA), splash (TPU), splash:QUERIESxKEYS with the most
    # tokens of a block; auto: the platform's.
    attention: str = "auto"


@dataclasses.dataclass(frozen=True)
class Data:
    """Where pictures come from and where ``prepare`` puts what it encoded."""

    root: str  # dataset folder in one of the known layouts
    prepared: str  # ArrayRecord folder written by prepare and read by train
    split: str = "train"
    obtain: str = ""
    source: str = "auto"  # the layout of root; auto: recognised by its files
    taxon: str = "Aves"  # inat21: only this taxon or supercategory; empty: everything
    frame_gap: float = 1.0  # clips: least seconds between two frames
    frame_rate: float = 0.0  # clips: frames per second of sequences that clips.csv gives none for; 0: unknown
    controls: tuple[str, ...] = ()  # encoded by prepare beside conditioning.control, for runs that share a folder
    vision: str = ""  # a DINOv2 folder; prepare then stores what look-alikes are found by
    mode: str = "precomputed"  # or on_the_fly: pictures are encoded when they are drawn, and prepare is not needed
    levels: tuple[str, ...] = ("0 class",)  # of train.sampler level: "STEP LEVEL[=WEIGHT] ..." from each step on
    similarity: float = 0.5  # of train.sampler mined: the smallest cosine of a look-alike
    per_class: int = 0  # training draws from so many pictures of every class, of 5 the 1 is one; 0: from all
    threads: int = 4  # that read ahead of training
    workers: int = 0  # processes that do so instead

    @property
    def reading(self) -> dict[str, Any]:
        """How ``root`` is read: the keyword arguments of ``nabla_jax.data.read_dataset``."""
        return {name: getattr(self, name) for name in ("source", "taxon", "frame_gap", "frame_rate")}


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the model is shown beside the noise. Stored in the adapter's metadata."""

    size: int  # side in pixels of the square model canvas; of one half of a diptych
    control: str = "fill"
    skeleton: str = "dense"  # lines between keypoints; this and the next two are for control keypoints alone
    dot: int = 15  # diameter of a keypoint in pixels of the picture
    line: int = 10  # width of a skeleton's line in pixels of the picture
    caption: str = "fixed"  # prompt for every picture; background: the target's own caption
    prompt: str = "A photo of a bird."
    text_length: int = 512  # T5 tokens
    independent_conditions: bool = False  # conditions attend to themselves only
    compact: int = 1  # subject and control are encoded at size // compact, and their positions scaled up
    # Conditions as tokens of their own; native: references in the noise's own stream, as FLUX.1-Kontext's are; insert:
    # a diptych that FLUX.1-Fill repaints.
    method: str = "omini"
    # The next three are for method insert alone: what it is trained with. What it draws with: see Sample.
    mask_policies: tuple[str, ...] = ("silhouette", "dilated", "box", "bezier")  # one drawn for each sample
    expansion: tuple[float, float] = (1.1, 1.4)  # the subject's box is padded by a factor drawn between these
    window: float = 0.0  # a square round the bird, so many times its box; 0: the whole picture

    @property
    def condition_size(self) -> int:
        """Side in pixels of the canvases of subject and control."""
        return self.size // self.compact


@dataclasses.dataclass(frozen=True)
class Lora:
    """The trained adapter."""

    rank: int = 16
    alpha: float = 16.0
    init: str = "gaussian"
    name: str = "omk_fill"
    start: str = ""  # an adapter of any known format that training begins with; empty: a fresh one
    frozen: str = ""  # an adapter of any known format beneath the trained one; what is exported holds the sum of both
    dtype: str = "float32"  # that the trained adapter, its gradients and the optimizer's state are kept in


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimizer by name, and global-norm clipping."""

    name: str = "prodigy"
    lr: float = 1.0
    d0: float = 1e-6  # Prodigy's first distance estimate; unused by adamw
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Train:
    """The training run."""

    workdir: str
    steps: int
    batch: int
    accumulate: int = 1  # parts of a batch that are computed one after another, for a memory that holds one of them
    seed: int = 42
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 1000  # 0: never
    dtype: str = "bfloat16"  # of the frozen base and of activations; the adapter's is lora.dtype
    remat: str = "full"
    guidance: float = 1.0
    sampler: str = "all_pairs"
    time_mean: float = 0.0  # of the logit of the training times; above 0 favours noise, where the subject matters
    foreground_weight: float = 1.0  # of the loss on the target's bird against its surroundings
    ema: float = 0.0  # decay of the running average that is exported instead of the newest weights; 0: none
    nonfinite: str = "stop"  # at the first loss, gradient or parameter that is not; skip: such a step changes nothing


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are arranged; the product of the sizes is their number (see ``nabla_jax.parallel``)."""

    data: int = 0  # parts of a batch, parameters copied; 0: as many as the others leave
    fsdp: int = 1  # parts of a batch, parameters cut
    tensor: int = 1  # parts of heads and hidden units
    sequence: int = 1  # parts of the tokens


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The networks that judge pictures: folders in their published layouts, or asset:NAME; empty: none.

    Metrics of a network that is not named are left out.
    """

    dinov2: str = ""
    siglip: str = ""
    patches: str = ""  # a SigLIP or SigLIP 2 for patch matching
    lpips: str = ""
    keypoints: str = ""  # a keypoint head of that very dinov2
    batch: int = 32  # pictures at a time
    box: int = 224  # side in pixels that LPIPS sees a cut-out bird at
    obtain: str = ""  # told to a user who does not have them

    @property
    def folders(self) -> dict[str, str]:
        """Network -> folder, of those that are named."""
        named = {name: getattr(self, name) for name in ("dinov2", "siglip", "patches", "lpips", "keypoints")}
        return {name: path for name, path in named.items() if path}


@dataclasses.dataclass(frozen=True)
class Sample:
    """How pictures are drawn, by generate and inside training."""

    steps: int = 28
    guidance: float = 2.5
    seed: int = 42
    batch: int = 4
    image_guidance: float = (
        1.0  # how strongly the pictures are followed, against black ones; other than 1: twice the work
    )
    sibling_guidance: float = 1.0  # how strongly the subject is, against a related species; other than 1: the same
    # The rest is for method insert alone.
    mask_policy: str = "silhouette"  # the policy by which the part to repaint is made from the bird's silhouette
    expansion: float = 1.3  # the subject's box is padded by this factor
    window: float = 2.4  # the part of the target that is painted: a square round the bird, so many times its box
    feather: int = 16  # width in pixels of the seam between the painted window and the rest of the picture


@dataclasses.dataclass(frozen=True)
class Watch:
    """When train and generate take a step, or a wait for its input, for hanging and end (``nabla_jax.watchdog``)."""

    factor: float = 20.0  # times as long as such steps took before
    seconds: float = 600.0  # and at least so long; 0: they never end


@dataclasses.dataclass(frozen=True)
class Extract:
    """Masks, depth maps, captions and keypoints made by other networks (``python -m nabla_jax.extract``)."""

    sam2: str = "checkpoints/sam2.1-hiera-large"  # folders of transformers checkpoints
    grounding_dino: str = "checkpoints/grounding-dino-base"
    depth_anything: str = "checkpoints/Depth-Anything-V2-Small-hf"
    captioner: str = "checkpoints/Qwen2.5-VL-7B-Instruct"
    keypoints: str = "checkpoints/keypoints-dinov2-base"  # a keypoint head, or asset:NAME
    dinov2: str = "checkpoints/dinov2-base"  # the one that the head was trained on
    device: str = ""  # as torch names it; empty: a GPU where there is one
    text: str = "a bird."  # what grounding_dino looks for where no box is known
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    clip_depth: str = ""  # command with {frames} and {output} for the depth of a clip's frames
    caption_prompt: str = (
        "Describe only the background and the surroundings of this photo of a bird in one short sentence. "
        "Do not mention the bird's species, colours or plumage."
    )
    caption_tokens: int = 60  # CLIP reads 77
    caption_retries: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a verb needs to know."""

    base: Base
    data: Data
    conditioning: Conditioning
    lora: Lora
    optim: Optim
    train: Train
    sample: Sample = Sample()
    mesh: Mesh = Mesh()
    watch: Watch = Watch()
    extract: Extract = Extract()
    benchmarks: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> dataset folder, or pair list in one
    metrics: Metrics = Metrics()
    preview: str = ""  # a command that shows the same run at a size that needs nothing
    source: str = ""  # the file and argument it was read from; filled in by load


T = typing.TypeVar("T")
Verb = typing.Literal["prepare", "train", "generate", "evaluate"]

CONTROLS = ("fill", "depth", "keypoints")
"""The spatial controls that are built in."""
CONTROL_GROUP = "nabla_jax.controls"
"""Entry points of the controls that other packages bring; see docs/extending.md."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "base.quantise": ("none", "int8", "fp8", "nf4"),
    "conditioning.method": ("omini", "native", "insert"),
    "conditioning.skeleton": ("dense", "sparse", "dots"),
    "conditioning.caption": ("fixed", "background"),
    "lora.init": ("gaussian",),
    "lora.dtype": ("float32", "bfloat16"),
    "optim.name": ("prodigy", "adamw"),
    "train.dtype": ("bfloat16", "float32"),
    "train.nonfinite": ("stop", "skip"),
    "train.remat": ("none", "full", "save_attention", "offload"),
    "data.split": ("train", "test", "all"),
    "data.source": ("auto", "manifest", "nabirds", "inaturalist", "tfds", "inat21", "clips"),
    "data.mode": ("precomputed", "on_the_fly"),
}


_ATTENTION = re.compile(r"auto|xla|chunked|cudnn|splash(:[1-9]\d*x[1-9]\d*)?")


def known_controls() -> dict[str, importlib.metadata.EntryPoint | None]:
    """Name -> entry point of every spatial control that there is; None for those that are built in.

    Raises UserError where a package takes the name of a built-in one.
    """
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=CONTROL_GROUP)}
    taken = sorted(set(found) & set(CONTROLS))
    if taken:
        raise UserError(
            f"entry points of {CONTROL_GROUP}: {found[taken[0]].value} is called {taken[0]!r}, which is built in; "
            "expected a name of its own"
        )
    return dict.fromkeys(CONTROLS) | dict(sorted(found.items()))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready for JSON; ``from_dict`` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """Nested plain values to ``Config``.

    Raises UserError naming the first key that is unknown, missing, of another type or outside its range.
    """
    config = _build(Config, values, "", where)
    assert isinstance(config, Config)
    _check_ranges(config, where)
    return config


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults() -> dict[str, Any]:
    """Dotted key -> default, of every field of a section that has one."""
    kinds = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    return {
        f"{section}.{field.name}": field.default
        for section, kind in kinds.items()
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def load(spec: str, overrides: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> Config:
    """Reads ``FILE[:arg]`` and applies ``overrides`` (dotted key -> text) last.

    ``arg`` is a comma-separated list of the sizes that the file's ``get_config`` knows and of ``key=value``
    overrides; a key without a dot is a field of ``train``, or else the only field of that name.

    Raises UserError for a missing file, a file without ``get_config``, and every mistake in a key or value.
    """
    file, _, arg = spec.partition(":")
    items = [item.strip() for item in arg.split(",") if item.strip()]
    sizes = [item for item in items if "=" not in item]
    values = _plain(_run(Path(file), ",".join(sizes)))
    if not isinstance(values, dict):
        raise _type_error(spec, "get_config()", values, "a section with keys")
    pairs = [(_full_key(key, spec), text) for key, text in (item.split("=", 1) for item in items if "=" in item)]
    pairs += list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
    for key, text in pairs:
        _override(values, key, text, spec)
    config = from_dict(values, spec)
    return dataclasses.replace(config, source=spec)


def read_values(file: str) -> dict[str, Any]:
    """What ``FILE[:arg]`` says, as nested plain values; nothing is checked."""
    path, _, arg = file.partition(":")
    return _plain(_run(Path(path), arg))


def load_as(kind: type[T], file: str) -> T:
    """Reads a configuration file into another dataclass than ``Config``, with the same checks of keys and types."""
    built = _build(kind, read_values(file), "", file)
    assert isinstance(built, kind)
    return built


def parse_command(
    argv: Sequence[str],
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The command line all verbs share: ``--config FILE[:arg]`` and any number of ``--config.a.b=value``.

    Returns the configuration and the verb's own arguments.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Anything in the configuration can be set with --config.SECTION.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="for example configs/omk_fill.py")
    if add_arguments is not None:
        add_arguments(parser)
    own, overrides = _take_overrides(argv)
    arguments = parser.parse_args(own)
    return load(arguments.config, overrides), arguments


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    own: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            own.append(word)
            continue
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError(f"{word}: found no value, expected {word}=VALUE")
            text = value
        overrides.append((key, text))
    return own, overrides


def _run(file: Path, arg: str) -> Any:
    if not file.is_file():
        raise UserError(f"--config: found no file {file}, expected a Python file such as configs/omk_fill.py")
    # A configuration may share code with its neighbours through `from configs import common`.
    root = str(file.resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        module_spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"--config: {file} is not a Python file")
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except (SyntaxError, ImportError, NameError) as error:
            raise UserError(f"{file}: cannot be run: {error}") from error
    finally:
        sys.path.remove(root)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file}: found no function get_config(arg)")
    return module.get_config(arg)


def _plain(value: Any) -> Any:
    # ConfigDict and its neighbours behave like mappings; ml_collections itself is needed by the files only.
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _sections() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            yield name, typing.get_type_hints(kind)


def _known_keys() -> list[str]:
    keys = [f"{section}.{field}" for section, fields in _sections() for field in fields]
    return keys + [n for n, kind in typing.get_type_hints(Config).items() if not dataclasses.is_dataclass(kind)]


def _closest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, 1, 0.5)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f"the closest is {close[0]}" if close else "known are " + ", ".join(known)


def _full_key(key: str, where: str) -> str:
    if "." in key:
        return key
    known = _known_keys()
    if f"train.{key}" in known:
        return f"train.{key}"
    homes = [k for k in known if k.rsplit(".", 1)[-1] == key]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise UserError(f"{where}: key {key} is ambiguous, expected one of {', '.join(homes)}")
    raise UserError(f"{where}: unknown key {key}; {_closest(key, known)}")


def _override(values: dict[str, Any], key: str, text: str, where: str) -> None:
    kind = _type_of(key, where)
    parsed = _parse(text, kind, key, where)
    node = values
    *sections, leaf = key.split(".", 1)  # a benchmark's name may itself hold dots
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise _type_error(where, section, node, "a section with keys")
    node[leaf] = parsed


def _type_of(key: str, where: str) -> Any:
    section, _, leaf = key.partition(".")
    hints = typing.get_type_hints(Config)
    kind = hints.get(section)
    if kind is not None and not leaf and not dataclasses.is_dataclass(kind):
        return kind
    if kind is not None and leaf and dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        if leaf in fields:
            return fields[leaf]
    if kind is not None and leaf and typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    raise UserError(f"{where}: unknown key {key}; {_closest(key, _known_keys())}")


def _parse(text: str, kind: Any, key: str, where: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _type_error(where, key, text, "true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise _type_error(where, key, text, _type_name(kind)) from None
    if typing.get_origin(kind) is tuple:
        parts = text.strip("()[] ")
        return tuple(_parse(part.strip(), typing.get_args(kind)[0], key, where) for part in parts.split(",") if part)
    raise _type_error(where, key, text, f"one entry at a time, --config.{key}.NAME=VALUE")


def _build(kind: type, values: Any, prefix: str, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise _type_error(where, prefix.rstrip(".") or "get_config()", values, "a section with keys")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {prefix}{key}; {_closest(f'{prefix}{key}', _known_keys())}")
    built = {}
    for field in dataclasses.fields(kind):
        full = prefix + field.name
        if field.name not in values:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UserError(f"{where}: missing key {full}, expected {_type_name(hints[field.name])}")
            continue
        built[field.name] = _value(hints[field.name], values[field.name], full, where)
    return kind(**built)


def _value(kind: Any, value: Any, key: str, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _build(kind, value, key + ".", where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _type_error(where, key, value, _type_name(kind)) from None
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return None if value is None else _value(next(a for a in args if a is not type(None)), value, key, where)
    if origin is tuple and isinstance(value, list | tuple) and args[1:] == (...,):
        return tuple(_value(args[0], v, key, where) for v in value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        return tuple(_value(a, v, key, where) for a, v in zip(args, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, f"{key}.{k}", where) for k, v in value.items()}
    raise _type_error(where, key, value, _type_name(kind))


def _type_name(kind: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    if isinstance(kind, type) and kind in names:
        return names[kind]
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        return "a list of texts" if args == (str, ...) else f"{len(args)} numbers"
    if isinstance(kind, types.GenericAlias):
        return "a table of name = folder"
    return "a section with keys"


def _type_error(where: str, key: str, found: Any, expected: str) -> UserError:
    return UserError(f"{where}: {key}: found {found!r}, expected {expected}")


def _check_ranges(config: Config, where: str) -> None:
    flat = flatten(to_dict(config))
    for key, value in flat.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{where}: {key}: found {value!r}, expected a finite number")
            if type(number) is int and abs(number) >= 2**63:
                raise UserError(f"{where}: {key}: found a number of {len(str(number))} digits, expected fewer")
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{where}: {key}: found {flat[key]!r}, expected one of {', '.join(choices)}")
    positive = (
        "conditioning.size conditioning.compact conditioning.dot conditioning.line conditioning.text_length "
        "lora.rank lora.alpha optim.lr optim.d0 optim.clip "
        "train.steps train.batch train.accumulate train.log_every train.save_every train.foreground_weight "
        "sample.steps sample.batch extract.caption_tokens mesh.fsdp mesh.tensor mesh.sequence"
    )
    for key in positive.split():
        if not flat[key] > 0:
            raise UserError(f"{where}: {key}: found {flat[key]!r}, expected more than 0")
    if not _ATTENTION.fullmatch(config.base.attention):
        raise UserError(
            f"{where}: base.attention: found {config.base.attention!r}, expected one of auto, xla, chunked, cudnn, "
            "splash or splash:QUERIESxKEYS, two multiples of 128"
        )
    named = [("data.controls", control, "some") for control in config.data.controls]
    for key, control, expected in [("conditioning.control", config.conditioning.control, "one"), *named]:
        known = known_controls()
        if control not in known:
            raise UserError(f"{where}: {key}: found {control!r}, expected {expected} of {', '.join(known)}")
    if not -1 <= config.data.similarity <= 1:
        raise UserError(f"{where}: data.similarity: found {config.data.similarity!r}, expected a cosine, -1 to 1")
    if config.train.sampler == "mined" and config.data.mode != "precomputed":
        raise UserError(f"{where}: train.sampler: mined needs stored features, expected data.mode precomputed")
    nonnegative = "train.sample_every train.seed sample.seed optim.weight_decay extract.caption_retries"
    nonnegative += " watch.seconds"
    nonnegative += " data.frame_gap data.frame_rate data.threads data.workers data.per_class sample.feather mesh.data"
    for key in nonnegative.split():
        if not flat[key] >= 0:
            raise UserError(f"{where}: {key}: found {flat[key]!r}, expected 0 or more")
    for name, least in (("batch", 1), ("box", 16)):
        if not flat[f"metrics.{name}"] >= least:
            raise UserError(f"{where}: metrics.{name}: found {flat[f'metrics.{name}']!r}, expected {least} or more")
    if config.train.batch % config.train.accumulate:
        raise UserError(
            f"{where}: train.accumulate: found {config.train.accumulate}, expected a divisor of train.batch, "
            f"{config.train.batch}"
        )
    if not config.watch.factor > 1:
        raise UserError(f"{where}: watch.factor: found {config.watch.factor!r}, expected more than 1")
    if not 0 <= config.train.ema < 1:
        raise UserError(f"{where}: train.ema: found {config.train.ema!r}, expected a number from 0 to below 1")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"{where}: optim.betas: found {config.optim.betas!r}, expected two numbers from 0 to below 1")
    if config.conditioning.size % 16:
        raise UserError(
            f"{where}: conditioning.size: found {config.conditioning.size}, expected a multiple of 16 "
            "(8 pixels a latent, 2 latents a token)"
        )
    if config.conditioning.size % config.conditioning.compact:
        raise UserError(
            f"{where}: conditioning.compact: found {config.conditioning.compact}, expected a divisor of "
            f"conditioning.size, {config.conditioning.size}"
        )
    if config.sample.image_guidance != 1 and config.sample.sibling_guidance != 1:
        raise UserError(
            f"{where}: sample.sibling_guidance: found {config.sample.sibling_guidance} beside sample.image_guidance "
            f"{config.sample.image_guidance}, expected 1.0 for one of them"
        )
    if config.conditioning.method == "native" and config.conditioning.independent_conditions:
        raise UserError(
            f"{where}: conditioning.independent_conditions: found True, expected False for method native: its "
            "references are in the noise's own stream"
        )
    if config.data.per_class == 1:
        _check_single(config, where)
    _check_diptych(config, where)
    if config.conditioning.method == "insert":
        _check_insert(config, where)


def _check_single(config: Config, where: str) -> None:
    """Whether a sampler finds pairs where every class has one picture."""
    from nabla_jax.data import pairs

    found = f"train.sampler {config.train.sampler}"
    if config.train.sampler == "level":
        _, weights = pairs.schedule(config.data.levels)
        if not any(row[pairs.LEVELS.index("class")] for row in weights):
            return
        found = f"data.levels {config.data.levels!r}"
    raise UserError(
        f"{where}: data.per_class: found 1 with {found}, which needs two pictures of a class; expected train.sampler "
        "level with data.levels of self (a picture with itself) or of species, family or order"
    )


def _check_diptych(config: Config, where: str) -> None:
    """The ranges of what only method insert reads."""
    from nabla_jax.conditioning.masks import POLICIES as known

    policies = [("conditioning.mask_policies", policy) for policy in config.conditioning.mask_policies]
    for key, policy in [*policies, ("sample.mask_policy", config.sample.mask_policy)]:
        if policy not in known:
            raise UserError(f"{where}: {key}: found {policy!r}, expected {', '.join(known)}")
    if not config.conditioning.mask_policies:
        raise UserError(f"{where}: conditioning.mask_policies: found none, expected some of {', '.join(known)}")
    least, most = config.conditioning.expansion
    if not 1 <= least <= most:
        found = config.conditioning.expansion
        raise UserError(f"{where}: conditioning.expansion: found {found!r}, expected two rising numbers from 1 on")
    if not config.sample.expansion >= 1:
        raise UserError(f"{where}: sample.expansion: found {config.sample.expansion!r}, expected 1 or more")
    for key, window in (("conditioning.window", config.conditioning.window), ("sample.window", config.sample.window)):
        if window and not window >= 1:
            raise UserError(f"{where}: {key}: found {window!r}, expected 1 or more, or 0 for the whole picture")


def _check_insert(config: Config, where: str) -> None:
    """What method insert needs and what it has no use for."""
    needed = (
        ("data.mode", config.data.mode, "on_the_fly", "a diptych is one picture of two, with another mask every time"),
        ("conditioning.control", config.conditioning.control, "fill", "the part to repaint is the control"),
        ("conditioning.caption", config.conditioning.caption, "fixed", "the subject's picture takes the text's place"),
        ("conditioning.prompt", config.conditioning.prompt, "", "the subject's picture takes the text's place"),
        ("conditioning.independent_conditions", config.conditioning.independent_conditions, False, "it has none"),
        ("conditioning.compact", config.conditioning.compact, 1, "it has none"),
        ("sample.image_guidance", config.sample.image_guidance, 1.0, "it has no conditions to leave out"),
        ("sample.sibling_guidance", config.sample.sibling_guidance, 1.0, "it has no conditions to leave out"),
    )
    for key, found, expected, why in needed:
        if found != expected:
            raise UserError(f"{where}: {key}: found {found!r}, expected {expected!r} for method insert: {why}")
    if not config.base.redux:
        raise UserError(f"{where}: base.redux: found '', expected a FLUX.1-Redux folder for method insert")


# ----------------------------------------------------------------------------------------------------------
# Checks of what the configuration names, before anything expensive
# ----------------------------------------------------------------------------------------------------------


def check_inputs(config: Config, verb: Verb, benchmarks: Sequence[str] | None = None) -> None:
    """Checks every path that ``verb`` needs, without loading weights.

    ``benchmarks`` restricts generate and evaluate to some of the configured ones.

    Raises one UserError naming all that is missing, how to get it, where to put it, and the command in
    ``config.preview``; or naming what is wrong with a folder that is there.
    """
    wanted: list[str] = []
    if verb == "prepare" and config.conditioning.method == "insert":
        raise UserError(
            f"{config.source or 'configuration'}: conditioning.method: insert encodes pictures when they are drawn: "
            "there is nothing to prepare, train at once"
        )
    if verb in ("prepare", "train", "generate"):
        wanted += _base_problem(config)
    if verb == "prepare" and config.data.vision and not (Path(config.data.vision) / "config.json").is_file():
        wanted.append(f"the vision network (data.vision: found no {config.data.vision}/config.json)")
    prepared = Path(config.data.prepared) / "manifest.json"
    reads = config.data.mode == "precomputed"
    if verb == "prepare" or (verb == "train" and not (reads and prepared.is_file())):
        wanted += _data_problem(config)
    if verb == "train":
        wanted += _adapter_problems(config)
    if verb in ("generate", "evaluate"):
        wanted += _benchmark_problems(config, benchmarks)
    if verb == "evaluate":
        wanted += _metrics_problems(config)
    if wanted:
        missing = "; ".join(f"({i}) {text}" for i, text in enumerate(wanted, 1))
        preview = f"; to see it run now, without any of these: {config.preview}" if config.preview else ""
        raise UserError(f"{config.source or 'configuration'}: {verb} is missing {missing}{preview}")
    if verb == "train" and reads and not prepared.is_file():
        raise UserError(
            f"data.prepared: found no {prepared}, expected the folder that prepare writes; run "
            f"python -m nabla_jax.prepare --config {config.source}"
        )
    if verb == "evaluate" and config.metrics.folders:
        from nabla_jax.metrics import networks

        networks.check_networks(config.metrics)
    if verb in ("prepare", "train", "generate"):
        from nabla_jax.checkpoints import pipeline

        pipeline.check_folder(resolve_base(config))
        check_method(config)


def check_method(config: Config) -> None:
    """Raises UserError if the base, or the Redux beside it, is not what ``conditioning.method`` takes."""
    from nabla_jax import assets
    from nabla_jax.checkpoints import pipeline, transformers_folder

    folder, method = resolve_base(config), config.conditioning.method
    pipeline.check_channels(folder, method)
    pipeline.check_sides(folder, config.conditioning.size, config.conditioning.compact)
    pipeline.check_quantised(folder, config.base.quantise)
    if method == "insert":
        width = pipeline.transformer_config(folder).joint_attention_dim
        transformers_folder.check_redux(assets.resolve(config.base.redux), width)


def resolve_base(config: Config) -> Path:
    """The folder of ``base.path``. Raises UserError for an unknown asset."""
    from nabla_jax import assets

    return assets.resolve(config.base.path)


def _base_problem(config: Config) -> list[str]:
    from nabla_jax import assets

    folder, problems = resolve_base(config), []
    if not (folder / "model_index.json").is_file():
        found = "a folder without model_index.json" if folder.is_dir() else "nothing"
        problems.append(f"the base model (base.path: found {found} at {folder}, expected a diffusers-layout folder)")
    redux = assets.resolve(config.base.redux)
    if config.conditioning.method == "insert" and not (redux / "image_encoder" / "config.json").is_file():
        problems.append(f"FLUX.1-Redux (base.redux: found no {redux}/image_encoder/config.json)")
    return [f"{problem}: {config.base.obtain}" if config.base.obtain else problem for problem in problems]


def _adapter_problems(config: Config) -> list[str]:
    from nabla_jax import assets

    problems = []
    path = assets.resolve(config.lora.start)
    # A run that has begun goes on from its own checkpoint.
    if config.lora.start and not path.exists() and not (Path(config.train.workdir) / "checkpoints").is_dir():
        obtain = f": {config.base.obtain}" if config.base.obtain else ""
        problems.append(
            f"the adapter to begin with (lora.start: found nothing at {path}, lora.start= begins afresh){obtain}"
        )
    path = assets.resolve(config.lora.frozen)
    if config.lora.frozen and not path.exists():
        problems.append(
            f"the adapter beneath the trained one (lora.frozen: found nothing at {path}, expected a safetensors file "
            "or the folder of a training run)"
        )
    return problems


def _data_problem(config: Config) -> list[str]:
    root = Path(config.data.root)
    if root.is_dir() and any(root.iterdir()):
        return []
    found = "an empty folder" if root.is_dir() else "nothing"
    obtain = f": {config.data.obtain}" if config.data.obtain else ""
    return [f"the pictures (data.root: found {found} at {root}, expected a dataset folder){obtain}"]


def _benchmark_problems(config: Config, names: Sequence[str] | None) -> list[str]:
    wanted = list(config.benchmarks if names is None else names)
    for name in wanted:
        if name not in config.benchmarks:
            known = ", ".join(config.benchmarks) or "none"
            raise UserError(f"{config.source}: unknown benchmark {name}, configured are {known}")
    missing = {name: root for name in wanted if not Path(root := config.benchmarks[name]).exists()}
    if not missing:
        return []
    listed = ", ".join(f"{name} (found nothing at {root})" for name, root in missing.items())
    obtain = f": {config.data.obtain}" if config.data.root in missing.values() and config.data.obtain else ""
    there = " ".join(f"--benchmark {name}" for name in wanted if name not in missing)
    without = f"; {there} leaves {'it' if len(missing) == 1 else 'them'} out" if there else ""
    return [f"the benchmark{'s' * (len(missing) > 1)} {listed}, see docs/data.md{without}{obtain}"]


def _metrics_problems(config: Config) -> list[str]:
    from nabla_jax import assets

    absent = []
    for name, path in config.metrics.folders.items():
        folder = assets.resolve(path)
        if not (folder / "config.json").is_file():
            found = "a folder without config.json" if folder.is_dir() else "nothing"
            absent.append(f"metrics.{name} (found {found} at {folder})")
    if not absent:
        return []
    obtain = f": {config.metrics.obtain}" if config.metrics.obtain else ""
    first = absent[0].split(" ")[0]
    return [f"networks that judge pictures: {', '.join(absent)}{obtain}; --config.{first}= leaves its metrics out"]
