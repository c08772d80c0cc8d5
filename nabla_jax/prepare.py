"""Encodes a dataset once, so that training never does: ``python -m nabla_jax.prepare --config
configs/omk_fill.py``.

Everything is checked first: lists, pictures, masks, weights, room on the disk. Then each picture of
``data.split`` is encoded as target, as subject crop and as each control (that of ``conditioning.control`` and any
others in ``data.controls``) on all devices, each distinct caption once, and with ``data.vision`` each bird's look for
the search of look-alikes. ``data.prepared`` gets:

    manifest.json                 settings, counts, sizes and hashes of the shards, the class index
    shard-00000-of-00008.array_record ...
                                  for each picture one record a role: moments [2C, h, w] float16 (VAE moments: mean,
                                  then log variance; of compact conditions fewer), with the target's also mask
                                  [h, w] uint8 (foreground coverage of each latent); after all of them, with
                                  data.vision, features [D] float32 (DINOv2)
    text.safetensors              prompt_embeds [captions, T, d] and pooled [captions, p], float32
    settings.json                 what the content depends on, written first

The same command continues an interrupted run: whole shards are kept, and the folder ends byte for byte as if
nothing had happened. A folder made with other settings is refused; --overwrite empties it first. Several processes
(NABLA_COORDINATOR, see parallel/processes.py) write disjoint shards of one folder that all of them see.

--dry_run writes nothing and prints what a run would: counts, bytes, and time measured on a few pictures.
--check compares every byte of a prepared folder with its manifest and names each file that differs.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nabla_jax import config as configs
from nabla_jax import runs, untrusted
from nabla_jax.data import Example, controls, read_dataset
from nabla_jax.data.dataset import class_index
from nabla_jax.data.loader import FEATURES, MANIFEST, SCHEMA, TEXT, check_files, shard_name
from nabla_jax.data.pictures import Pictures, captions_sha256, distinct_captions, inputs, look, ordered, roles
from nabla_jax.data.records import RecordReader, encode_record, write_shard
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256

Array = np.ndarray[Any, Any]
T = TypeVar("T")
R = TypeVar("R")

SETTINGS = "settings.json"
PICTURES_PER_SHARD = 256
# Pixels in one call of the encoder on each device: at 1024 x 1024 one picture's activations fill several GB.
PIXELS_PER_CALL = 2**18
# Captions whose embeddings are in memory at once: 0.5 GB for FLUX.1's 512 tokens of 4,096.
CAPTIONS_PER_CALL = 64
LOOKS_PER_CALL = 16  # of the vision network on each device


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen networks as functions, and what identifies them."""

    weights: Mapping[str, str]  # component -> sha256
    channels: int  # of a latent
    factor: int  # pixels per latent position
    images: Callable[[Array], Array]  # [n, 3, H, W] uint8 -> moments [n, 2C, h, w] float32
    prompts: Callable[[list[str]], tuple[Array, Array]]  # -> [n, T, d], [n, p] float32
    devices: int = 1  # that share a call of ``images``: its number of pictures is a multiple of this
    vision: "Vision | None" = None


@dataclasses.dataclass(frozen=True)
class Vision:
    """The network that look-alikes are found by."""

    weights: str  # sha256
    width: int  # of a feature vector
    pixels: Callable[[Array], Array]  # one look [S, S, 3] uint8 -> [3, h, w] float32
    features: Callable[[Array], Array]  # [n, 3, h, w] float32 -> [n, width] float32


def main(argv: Sequence[str]) -> None:
    """The command."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--overwrite", action="store_true", help="empty a folder made with other settings")
        parser.add_argument(
            "--validate",
            action="store_true",
            help="list what is wrong with data folders, or with pair lists after --pairs; --strict_unseen writes the "
            "strictly unseen rows of one (see --validate --help)",
        )
        parser.add_argument("--dry_run", action="store_true", help="print counts, bytes and time; write nothing")
        parser.add_argument("--check", action="store_true", help="compare a prepared folder with its manifest")

    if "--validate" in argv:
        from nabla_jax.data import validate

        validate.main(argv)
        return
    config, options = configs.parse_command(argv, "Encodes a dataset for training.", arguments)
    if options.check:
        files = check_files(config.data.prepared, lambda rows: runs.track(rows, "check", unit="file"))
        print(f"{config.data.prepared}: {files} files are as the manifest says")
        return
    configs.check_inputs(config, "prepare")
    from nabla_jax.parallel import processes

    processes.initialize()
    encoders = load_encoders(config)
    if options.dry_run:
        print(estimate(config, encoders))
        return
    complete(config, processes.part())
    prepare(config, encoders, overwrite=options.overwrite, part=processes.part())


def complete(config: configs.Config, part: tuple[int, int] = (0, 1)) -> None:
    """Makes the masks and controls that the dataset lacks, where there are checkpoints to make them with.

    Each of several processes, ``part`` (number, count), makes its share; all return when everything is there.
    """
    from nabla_jax.extract import work

    work.complete(config, config.data.root, work.Shard(*part))
    _meet("completed", part[1])


def load_encoders(config: configs.Config) -> Encoders:
    """The base model's autoencoder and text encoders. Hashes are read now, weights on first use."""
    import jax

    from nabla_jax.checkpoints import pipeline
    from nabla_jax.models.autoencoder import AutoencoderKLConfig
    from nabla_jax.parallel import mesh as meshes

    folder = configs.resolve_base(config)
    vae = AutoencoderKLConfig.from_json(folder / "vae" / "config.json")
    # Each process encodes pictures of its own, on its own devices.
    mesh = meshes.data_mesh(jax.local_devices())

    @functools.cache
    def encoder() -> Callable[[Array], Array]:
        return compile_encoder(pipeline.load_vae(folder, sharding=meshes.replicated(mesh)), mesh)

    def prompts(texts: list[str]) -> tuple[Array, Array]:
        from nabla_jax.conditioning.text import encode_prompts

        embeds, pooled = encode_prompts(folder, texts, config.conditioning.text_length)
        return np.asarray(embeds, np.float32), np.asarray(pooled, np.float32)

    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    weights = {part: pipeline.folder_hash(folder / part, everything=True) for part in parts}
    return Encoders(
        weights, vae.latent_channels, vae.factor, lambda images: encoder()(images), prompts, mesh.size,
        load_vision(Path(config.data.vision), mesh) if config.data.vision else None,
    )  # fmt: skip


def compile_encoder(vae: Any, mesh: Any = None) -> Callable[[Array], Array]:
    """[n, 3, H, W] uint8 -> VAE moments [n, 2C, h, w] float32, compiled once per shape, cut over a mesh if given."""
    import jax
    import jax.numpy as jnp

    from nabla_jax.models import layers
    from nabla_jax.parallel import mesh as meshes

    @jax.jit
    def encode(params: layers.Params, images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / 127.5 - 1
        return layers.bind(vae.graphdef, params).encode(pixels).astype(jnp.float32)

    place = (lambda x: x) if mesh is None else functools.partial(jax.device_put, device=meshes.batched(mesh))
    return lambda images: np.asarray(encode(vae.params, place(images)))


def load_vision(folder: Path, mesh: Any) -> Vision:
    """A DINOv2 folder, with its processor's settings where it holds them. Weights are read on first use.

    Raises UserError, before weights are read, for a folder of another network.
    """
    import jax

    from nabla_jax.checkpoints import pipeline, transformers_folder
    from nabla_jax.metrics.preprocessing import ImageProcessor
    from nabla_jax.models import layers
    from nabla_jax.models.dinov2 import Dinov2Config
    from nabla_jax.parallel import mesh as meshes

    transformers_folder.check_network(folder, "dinov2")
    described = folder / "preprocessor_config.json"
    processor = ImageProcessor.from_json(described) if described.is_file() else ImageProcessor.dinov2()

    @functools.cache
    def encoder() -> Callable[[Array], Array]:
        network = transformers_folder.load_dinov2(folder, sharding=meshes.replicated(mesh))
        run = jax.jit(lambda params, pixels: layers.bind(network.graphdef, params)(pixels).pooled)
        return lambda pixels: np.asarray(run(network.params, jax.device_put(pixels, meshes.batched(mesh))))

    return Vision(
        pipeline.folder_hash(folder, everything=True),
        Dinov2Config.from_json(folder / "config.json").hidden_size,
        lambda picture: processor([picture])[0],
        lambda pixels: encoder()(pixels),
    )


# ------------------------------------------------------------------------------------------------------------
# The work
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some pictures in a row, and the file they go to."""

    name: str
    first: int  # position of the first picture
    examples: Sequence[Example]
    captions: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Work:
    """What every shard's content depends on beside its pictures."""

    conditioning: configs.Conditioning
    roles: tuple[str, ...]
    made: str  # hash of the settings
    encoders: Encoders
    pool: ThreadPoolExecutor

    def records(self, count: int) -> int:
        """How many records hold so many pictures."""
        return count * (len(self.roles) + (self.encoders.vision is not None))


def prepare(
    config: configs.Config, encoders: Encoders, *, overwrite: bool = False, part: tuple[int, int] = (0, 1)
) -> Path:
    """Writes ``config.data.prepared`` and returns it; does only what is missing.

    ``part`` = (i, n): this is process i of n joined ones, which all call this. Each writes every n-th shard; the
    first checks the data and writes everything else when all are done.

    Raises UserError for anything wrong with the data, listed before the first encoding, and for a folder that
    was made with other settings (unless ``overwrite``) or cannot be written.
    """
    index, count = part
    folder = Path(config.data.prepared)
    examples = ordered(read_dataset(config.data.root, **config.data.reading), config.data.split)
    captions, rows = captions_of(config, examples)
    shards = cut(examples, rows)
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = folder / (f".lock-{index}" if index else ".lock")
    with runs.lock(lock, f"data.prepared {folder}"), _thread_pool() as pool:
        settings = _settings(config, encoders, captions)
        if index == 0:
            settings["data"] = check(examples, kinds(config), pool)
            _claim(folder, settings, overwrite)
        _meet("claimed", count)
        if index:
            settings = _joined(folder, settings)
        work = Work(config.conditioning, roles(kinds(config)), made_with(settings), encoders, pool)
        missing = {shard.name for shard in shards if not _is_whole(folder, shard, work, say=index == 0)}
        finished = not missing and (folder / MANIFEST).is_file() and (folder / TEXT).is_file()
        _meet("looked", count)
        if finished:
            print(f"{folder}: {len(examples)} pictures are already prepared", flush=True)
            return folder
        if index == 0:
            _check_room(folder, sum(len(s.examples) for s in shards if s.name in missing), _bytes_per_picture(work))
        own = [shard for shard in shards[index::count] if shard.name in missing]
        _decode_all([e for shard in own for e in shard.examples], work)
        if index == 0 and not (folder / TEXT).is_file():
            _write_text(folder / TEXT, encoders.prompts, captions)
        done = sum(len(s.examples) for s in shards[index::count]) - sum(len(s.examples) for s in own)
        with runs.progress(done + sum(len(s.examples) for s in own), "encode", done=done, unit="picture") as bar:
            for shard in own:
                records = _counted(shard_records(shard, work), len(shard.examples), len(work.roles), bar)
                write_shard(folder / shard.name, records)
        _meet("encoded", count)
        if index == 0:
            absent = [s.name for s in shards if not _is_whole(folder, s, work)]
            if absent:
                raise UserError(f"{folder / absent[0]}: no such shard; expected one folder that all processes see")
            runs.write_json(folder / MANIFEST, _manifest(folder, settings, shards, work, len(captions)))
        _meet("done", count)
    if index == 0:
        classes = len(class_index(e.class_id for e in examples))
        print(f"{folder}: {len(examples)} pictures of {classes} classes", flush=True)
    return folder


def _meet(name: str, count: int) -> None:
    if count > 1:
        from nabla_jax.parallel import processes

        processes.wait_for_all(f"prepare {name}")


def cut(examples: Sequence[Example], captions: Sequence[int]) -> list[Shard]:
    """The shards of ``examples``; ``captions`` holds each one's row in the text file."""
    starts = range(0, len(examples), PICTURES_PER_SHARD)
    return [
        Shard(shard_name(i, len(starts)), a, examples[a : a + PICTURES_PER_SHARD], captions[a : a + PICTURES_PER_SHARD])
        for i, a in enumerate(starts)
    ]


def kinds(config: configs.Config) -> tuple[str, ...]:
    """The controls to encode, in the order of their names."""
    return tuple(sorted({config.conditioning.control, *config.data.controls}))


def made_with(settings: Mapping[str, Any]) -> str:
    """What every record names its settings by."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def captions_of(config: configs.Config, examples: Sequence[Example]) -> tuple[list[str], list[int]]:
    """The distinct captions, and for each example its row in them.

    Raises UserError for examples without a caption, if the policy is to use it.
    """
    if config.conditioning.caption == "background":
        return distinct_captions(examples)
    return [config.conditioning.prompt], [0] * len(examples)


def check(examples: Sequence[Example], kinds: Sequence[str], pool: ThreadPoolExecutor) -> str:
    """Checks that every picture has a non-empty mask, and what the controls are made of, of its size.

    Returns a hash of all of it. Raises one UserError with the number of examples that are wrong and the first of them.
    """
    controls.require(examples, *kinds)
    hashes = _all(pool, lambda example: controls.check(example, *kinds), examples, "check")
    digest = hashlib.sha256()
    for example, line in zip(examples, hashes, strict=True):
        digest.update(f"{example.id} {example.class_id} {line}\n".encode())
    return digest.hexdigest()


def _decode_all(examples: Sequence[Example], work: Work) -> None:
    # A cut picture shows only when it is decoded; better now than hours into the encoding.
    def decode(example: Example) -> None:
        controls.read_image(example.image)

    if examples:  # one whole example first: a control that cannot be made is the same for all
        inputs(examples[0], work.roles, work.conditioning, work.encoders.factor)
    _all(work.pool, decode, examples, "decode")


def _all(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """``function`` of every item; one UserError with the first mistake and their number, if there are any."""

    def attempt(item: T) -> R | UserError:
        try:
            return function(item)
        except UserError as error:
            return error

    results, mistakes = [], []
    for result in runs.track(pool.map(attempt, items), what, total=len(items), unit="picture"):
        if isinstance(result, UserError):
            mistakes.append(result)
        else:
            results.append(result)
    if mistakes:
        more = f" (and {len(mistakes) - 1} more like it)" if len(mistakes) > 1 else ""
        raise UserError(f"{mistakes[0]}{more}")
    return results


@contextlib.contextmanager
def _thread_pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1))
    try:
        yield pool
    finally:
        # An interrupt must not wait for thousands of pictures that are still in the queue.
        pool.shutdown(cancel_futures=True)


def _settings(config: configs.Config, encoders: Encoders, captions: Sequence[str]) -> dict[str, Any]:
    """What the content depends on; the hash of the pictures, ``data``, is yet to be filled in."""
    kept = ["size", "caption", "text_length"]
    if "keypoints" in kinds(config):
        kept += ["skeleton", "dot", "line"]
    if config.conditioning.compact != 1:  # folders of whole conditions stay what they are
        kept.append("compact")
    return {
        "schema": SCHEMA,
        "conditioning": {name: getattr(config.conditioning, name) for name in kept},
        "controls": list(kinds(config)),
        "captions": captions_sha256(captions),
        "split": config.data.split,
        "data": "",
        "weights": dict(encoders.weights),
        "vision": encoders.vision.weights if encoders.vision else "",
        "pictures_per_shard": PICTURES_PER_SHARD,
    }


def _joined(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the first process wrote, which must be this one's too."""
    found = runs.read_json(folder / SETTINGS)
    untrusted.check(found, dict[str, Any], str(folder / SETTINGS))
    if found != settings | {"data": found.get("data")}:
        raise UserError(f"{folder / SETTINGS}: the first process has other settings: {_changes(found, settings)}")
    return dict(found)


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes ``folder`` ours: empty or begun with the same settings, and free of half-written files."""
    path = folder / SETTINGS
    others = [p.name for p in folder.iterdir() if not _is_ours(p.name)]
    if others:
        raise UserError(
            f"{folder}: holds {others[0]}, which prepare did not write; expected an empty or a prepared folder"
        )
    found = runs.read_json(path) if path.is_file() else None
    untrusted.check(found, dict[str, Any] | None, str(path))
    if found is None and (folder / MANIFEST).is_file():
        found = {}
    if found is not None and found != settings:
        if not overwrite:
            raise UserError(
                f"{folder}: was prepared with other settings ({_changes(found, settings)}); "
                "choose another data.prepared or add --overwrite"
            )
        # The settings go last: killed half-way, the rest is still recognised as the old folder's.
        for part in sorted(folder.iterdir(), key=lambda p: p.name == SETTINGS):
            if not part.name.startswith(".lock"):
                part.unlink()
    for part in folder.glob("*.tmp"):
        part.unlink()
    if found != settings:
        runs.write_json(path, settings)


def _changes(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    before, now = configs.flatten(found), configs.flatten(settings)
    keys = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    return "; ".join(f"{k}: {_short(before.get(k))} there, {_short(now.get(k))} here" for k in keys)


def _is_ours(name: str) -> bool:
    shard = name.startswith("shard-") and name.removesuffix(".tmp").endswith(".array_record")
    return (
        shard
        or name in (SETTINGS, MANIFEST, TEXT)
        or name.startswith(".lock")
        or (name.startswith(".") and name.endswith(".tmp"))
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _is_whole(folder: Path, shard: Shard, work: Work, *, say: bool = False) -> bool:
    path = folder / shard.name
    if not path.is_file():
        return False
    try:
        reader = RecordReader([path], [work.records(len(shard.examples))])
        meta, _ = reader.record(0)
        reader.close()
        if (meta.get("made"), meta.get("index")) != (work.made, shard.first):
            raise UserError(f"{path}: swapped shard: holds picture {meta.get('index')}, expected {shard.first}")
    except UserError as error:
        if say:
            print(f"{error}; written again", flush=True)
        return False
    return True


def moments_shape(size: int, encoders: Encoders) -> tuple[int, int, int]:
    """[2C, h, w] of an encoded square picture."""
    side = size // encoders.factor
    return 2 * encoders.channels, side, side


def _bytes_per_picture(work: Work) -> int:
    channels, height, width = moments_shape(work.conditioning.size, work.encoders)
    conditions = (len(work.roles) - 1) * math.prod(moments_shape(work.conditioning.condition_size, work.encoders))
    vision = 4 * work.encoders.vision.width if work.encoders.vision else 0
    # Headers, names and checksums of a record come to less than a kilobyte.
    return height * width * (2 * channels + 1) + 2 * conditions + vision + 2**10 * work.records(1)


def _check_room(folder: Path, count: int, size: int, what: str = "pictures") -> None:
    needed = count * size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: disk too full: {count} {what} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


def _write_text(path: Path, prompts: Callable[[list[str]], tuple[Array, Array]], captions: Sequence[str]) -> None:
    """Embeds the captions a group at a time: at 8 MB a caption the table of a large dataset fits no memory."""
    groups = [list(captions[i : i + CAPTIONS_PER_CALL]) for i in range(0, len(captions), CAPTIONS_PER_CALL)]
    embeds, pooled = prompts(groups[0])
    shapes = {
        name: (len(captions), *array.shape[1:]) for name, array in (("prompt_embeds", embeds), ("pooled", pooled))
    }
    ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
    _check_room(path.parent, len(captions), ends[-1] // len(captions), "captions")
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        for (name, shape), start, end in zip(shapes.items(), [0, *ends], ends, strict=False)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        rest = (prompts(group) for group in groups[1:])
        vectors = []
        total = len(groups)
        for tokens, vector in runs.track(itertools.chain([(embeds, pooled)], rest), "captions", total=total):
            vectors.append(vector)
            yield np.ascontiguousarray(tokens, "<f4").tobytes()
        yield np.ascontiguousarray(np.concatenate(vectors), "<f4").tobytes()

    runs.write_atomic(path, pieces())


def pictures_per_call(size: int, devices: int) -> int:
    """How many pictures one call of the encoder takes: as many for ``prepare`` as for training without it."""
    return max(1, PIXELS_PER_CALL // (size * size)) * devices


def stored_moments(encode: Callable[[Array], Array], images: Sequence[Array], per_call: int) -> list[Array]:
    """Moments of images [3, S, S] uint8, of any sides S, as they are stored: [2C, h, w] float16 each.

    ``encode`` is called with one shape only for each S, so that it is compiled once and equal pictures give equal bits.
    """
    stored: dict[int, Array] = {}
    for shape in dict.fromkeys(image.shape for image in images):
        places = [place for place, image in enumerate(images) if image.shape == shape]
        for start in range(0, len(places), per_call):
            part = places[start : start + per_call]
            moments = encode(_padded(np.stack([images[place] for place in part]), per_call))[: len(part)]
            with np.errstate(over="ignore"):  # infinities are for the caller to find
                stored.update(zip(part, moments.astype(np.float16), strict=True))
    return [stored[place] for place in range(len(images))]


def _padded(part: Array, count: int) -> Array:
    return np.concatenate([part, np.zeros((count - len(part), *part.shape[1:]), part.dtype)])


def shard_records(shard: Shard, work: Work) -> Iterator[bytes]:
    """The records of a shard, in order; threads decode pictures ahead of the device."""
    vision, per_call = work.encoders.vision, pictures_per_call(work.conditioning.size, work.encoders.devices)

    def load(example: Example) -> dict[str, Array]:
        found = inputs(example, work.roles, work.conditioning, work.encoders.factor)
        return found if vision is None else found | {FEATURES: vision.pixels(look(example, work.conditioning.size))}

    def record(row: int, role: str, arrays: dict[str, Array]) -> bytes:
        example = shard.examples[row]
        meta = {
            "id": example.id,
            "class_id": example.class_id,
            "caption": shard.captions[row],
            "index": shard.first + row,
            "role": role,
            "made": work.made,
        }
        return encode_record(meta, arrays)

    features: list[Array] = []
    waiting: list[Array] = []
    per_look = LOOKS_PER_CALL * work.encoders.devices

    def look_at(least: int) -> None:
        while vision is not None and len(waiting) >= least:
            part, waiting[:] = waiting[:per_look], waiting[per_look:]
            features.extend(vision.features(_padded(np.stack(part), per_look))[: len(part)])

    def items() -> Iterator[tuple[int, str, dict[str, Array]]]:
        for row, loaded in enumerate(_ahead(work.pool, load, shard.examples, 2 + 2 * per_call // len(work.roles))):
            if vision is not None:
                waiting.append(loaded.pop(FEATURES))
                look_at(per_look)
            yield from ((row, role, loaded) for role in work.roles)

    source = items()
    # Compact conditions are encoded apart from targets: so many records that calls with either are full.
    at_once = per_call if work.conditioning.compact == 1 else per_call * len(work.roles)
    while part := list(itertools.islice(source, at_once)):
        stored = stored_moments(work.encoders.images, [loaded[role] for _, role, loaded in part], per_call)
        for (row, role, loaded), moments in zip(part, stored, strict=True):
            if not np.isfinite(moments).all():
                raise UserError(f"{shard.examples[row].image}: the autoencoder gives values that float16 cannot hold")
            yield record(row, role, {"moments": moments} | ({"mask": loaded["mask"]} if role == "target" else {}))
    if vision is not None:
        look_at(1)
        for row, vector in enumerate(features):
            if not np.isfinite(vector).all():
                raise UserError(f"{shard.examples[row].image}: the vision network gives values that are not finite")
            yield record(row, FEATURES, {FEATURES: vector.astype(np.float32)})


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """``function`` of each item, in order, with so many under way."""
    pending: deque[Future[R]] = deque()
    source = iter(items)
    for item in source:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _counted(records: Iterable[bytes], count: int, per_picture: int, bar: Any) -> Iterator[bytes]:
    for number, record in enumerate(records, 1):
        yield record
        if number % per_picture == 0 and number <= count * per_picture:  # features follow
            bar.update(1)


def _manifest(
    folder: Path, settings: dict[str, Any], shards: Sequence[Shard], work: Work, captions: int
) -> dict[str, Any]:
    examples = [e for shard in shards for e in shard.examples]
    of_class = {e.class_id: e for e in examples}
    index = class_index(e.class_id for e in examples)
    files = [folder / shard.name for shard in shards] + [folder / TEXT]
    hashes = list(runs.track(work.pool.map(file_sha256, files), "hash", total=len(files), unit="file"))

    def entry(path: Path, sha256: str) -> dict[str, Any]:
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}

    return {
        "schema": SCHEMA,
        "settings": settings,
        "made": work.made,
        "counts": {
            "pictures": len(examples),
            "classes": len(index),
            "captions": captions,
            "shards": len(shards),
            "records": work.records(len(examples)),
        },
        "roles": list(work.roles),
        "features": work.encoders.vision.width if work.encoders.vision else 0,
        "moments": list(moments_shape(work.conditioning.size, work.encoders)),
        "shards": [
            entry(path, sha256) | {"pictures": len(s.examples), "records": work.records(len(s.examples))}
            for s, path, sha256 in zip(shards, files[:-1], hashes[:-1], strict=True)
        ],
        "text": entry(files[-1], hashes[-1]),
        "ids": [e.id for e in examples],
        "class_ids": [e.class_id for e in examples],
        "captions": [row for shard in shards for row in shard.captions],
        "classes": {
            str(c): {"name": of_class[c].class_name, "taxonomy": list(of_class[c].taxonomy), "positions": list(p)}
            for c, p in index.items()
        },
    }


# ------------------------------------------------------------------------------------------------------------
# Without writing
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run of ``prepare`` would take. Seconds are of this process alone, on its devices."""

    folder: str
    pictures: int
    classes: int
    captions: int
    shards: int
    roles: tuple[str, ...]
    bytes: int  # of all records
    measured: int  # pictures that were encoded for the measure
    seconds: float  # for one picture: read, resized, encoded

    def __str__(self) -> str:
        total = self.seconds * self.pictures
        return (
            f"{self.folder}: {self.pictures} pictures of {self.classes} classes, {self.captions} captions\n"
            f"on disk: {self.shards} shards of records for {', '.join(self.roles)}: about {self.bytes / 2**30:.3f} GiB "
            "and the captions' embeddings\n"
            f"time: about {total / 3600:.2f} h, from {self.seconds:.3f} s a picture, measured on {self.measured} "
            "pictures in one process; checking the files, compiling and the text encoders come on top"
        )


def estimate(config: configs.Config, encoders: Encoders) -> Estimate:
    """Encodes a few pictures, twice, and writes nothing: the second round is measured.

    Raises UserError for data that cannot be read.
    """
    examples = ordered(read_dataset(config.data.root, **config.data.reading), config.data.split)
    captions, rows = captions_of(config, examples)
    wanted = roles(kinds(config))
    per_call = pictures_per_call(config.conditioning.size, encoders.devices)
    few = min(len(examples), max(2, 2 * per_call // len(wanted)))
    controls.require(examples, *kinds(config))
    with _thread_pool() as pool:
        work = Work(config.conditioning, wanted, made_with({}), encoders, pool)
        sample = Shard("", 0, examples[:few], rows[:few])
        for _ in range(2):
            start = time.perf_counter()
            sizes = [len(record) for record in shard_records(sample, work)]
            seconds = time.perf_counter() - start
    return Estimate(
        config.data.prepared, len(examples), len(class_index(e.class_id for e in examples)), len(captions),
        len(cut(examples, rows)), (*wanted, *([FEATURES] if encoders.vision else [])),
        sum(sizes) * len(examples) // few, few, seconds / few,
    )  # fmt: skip


def pictures_source(
    config: configs.Config, prompts: Callable[[list[str]], tuple[Array, Array]], factor: int
) -> Pictures:
    """The pictures of ``data.root`` as training reads them with ``data.mode`` on_the_fly: encoded when drawn.

    ``prompts`` encodes captions, as that of ``Encoders``; ``factor``: pixels per latent position.
    Raises UserError for pictures without a mask.
    """
    examples = ordered(read_dataset(config.data.root, **config.data.reading), config.data.split)
    controls.require(examples, *kinds(config))
    captions, rows = captions_of(config, examples)
    embeds, pooled = prompts(captions)
    return Pictures(examples, tuple(rows), embeds, pooled, config.conditioning, factor)


if __name__ == "__main__":
    runs.run_main(main)
