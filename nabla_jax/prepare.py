"""Encodes a dataset once, so that training never does: ``python -m nabla_jax.prepare --config
configs/omk_fill.py``.

Everything is checked first: lists, pictures, masks, weights, room on the disk. Then each picture of
``data.split`` is encoded three times (as target, as subject crop, as control) on the device, each distinct
caption once, and written to ``data.prepared``:

    manifest.json                 settings, counts, shards, the class index
    shard-00000-of-00008.array_record ...
                                  one record per picture: target, subject, control [2C, h, w] float16 (VAE
                                  moments: mean, then log variance), mask [h, w] uint8 (foreground coverage of
                                  each latent)
    text.safetensors              prompt_embeds [captions, T, d] and pooled [captions, p], float32
    settings.json                 what the content depends on, written first

The same command continues an interrupted run: whole shards are kept, and the folder ends byte for byte as if
nothing had happened. A folder made with other settings is refused; --overwrite empties it first.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.data import Example, controls, read_dataset
from nabla_jax.data.dataset import class_index
from nabla_jax.data.loader import MANIFEST, SCHEMA, TEXT, shard_name
from nabla_jax.data.records import RecordReader, encode_record, write_shard
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]
T = TypeVar("T")
R = TypeVar("R")

SETTINGS = "settings.json"
RECORDS_PER_SHARD = 256
# Pixels in one call of the encoder: at 1024 x 1024 one picture's activations fill several GB.
PIXELS_PER_CALL = 2**18
_ROLES = ("target", "subject", "control")


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen networks as functions, and what identifies them."""

    weights: Mapping[str, str]  # component -> sha256
    channels: int  # of a latent
    factor: int  # pixels per latent position
    images: Callable[[Array], Array]  # [n, 3, H, W] uint8 -> moments [n, 2C, h, w] float32
    prompts: Callable[[list[str]], tuple[Array, Array]]  # -> [n, T, d], [n, p] float32


def main(argv: Sequence[str]) -> None:
    """The command."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--overwrite", action="store_true", help="empty a folder made with other settings")
        parser.add_argument(
            "--validate",
            action="store_true",
            help="list what is wrong with data folders, or with pair lists after --pairs (see --validate --help)",
        )

    if "--validate" in argv:
        from nabla_jax.data import validate

        validate.main(argv)
        return
    config, options = configs.parse_command(argv, "Encodes a dataset for training.", arguments)
    configs.check_inputs(config, "prepare")
    complete(config)
    prepare(config, load_encoders(config), overwrite=options.overwrite)


def complete(config: configs.Config) -> None:
    """Makes the masks and controls that the dataset lacks, where there are checkpoints to make them with."""
    from nabla_jax.extract import work

    work.complete(config, config.data.root)


def load_encoders(config: configs.Config) -> Encoders:
    """The base model's autoencoder and text encoders. Hashes are read now, weights on first use."""
    from nabla_jax.checkpoints import pipeline
    from nabla_jax.models.autoencoder import AutoencoderKLConfig

    folder = configs.resolve_base(config)
    vae = AutoencoderKLConfig.from_json(folder / "vae" / "config.json")

    @functools.cache
    def encoder() -> Callable[[Array], Array]:
        return compile_encoder(pipeline.load_vae(folder))

    def prompts(texts: list[str]) -> tuple[Array, Array]:
        from nabla_jax.conditioning.text import encode_prompts

        embeds, pooled = encode_prompts(folder, texts, config.conditioning.text_length)
        return np.asarray(embeds, np.float32), np.asarray(pooled, np.float32)

    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    weights = {part: pipeline.folder_hash(folder / part, everything=True) for part in parts}
    return Encoders(weights, vae.latent_channels, vae.factor, lambda images: encoder()(images), prompts)


def compile_encoder(vae: Any) -> Callable[[Array], Array]:
    """[n, 3, H, W] uint8 -> VAE moments [n, 2C, h, w] float32, compiled once per shape."""
    import jax
    import jax.numpy as jnp

    from nabla_jax.models import layers

    @jax.jit
    def encode(params: layers.Params, images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / 127.5 - 1
        return layers.bind(vae.graphdef, params).encode(pixels).astype(jnp.float32)

    return lambda images: np.asarray(encode(vae.params, images))


# ------------------------------------------------------------------------------------------------------------
# The work
# ------------------------------------------------------------------------------------------------------------


def prepare(config: configs.Config, encoders: Encoders, *, overwrite: bool = False) -> Path:
    """Writes ``config.data.prepared`` and returns it; does only what is missing.

    Raises UserError for anything wrong with the data, listed before the first encoding, and for a folder that
    was made with other settings (unless ``overwrite``) or cannot be written.
    """
    folder = Path(config.data.prepared)
    dataset = read_dataset(config.data.root, **config.data.reading)
    examples = sorted(dataset.of_split(config.data.split), key=lambda e: e.id)
    captions, rows = captions_of(config, examples)
    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with runs.lock(folder / ".lock", f"data.prepared {folder}"), _thread_pool() as pool:
        settings = _settings(config, encoders, check(examples, config.conditioning.control, pool), captions)
        _claim(folder, settings, overwrite)
        chunks = [examples[i : i + RECORDS_PER_SHARD] for i in range(0, len(examples), RECORDS_PER_SHARD)]
        names = [shard_name(i, len(chunks)) for i in range(len(chunks))]
        missing = [i for i, chunk in enumerate(chunks) if not _is_whole(folder / names[i], len(chunk))]
        if not missing and (folder / MANIFEST).is_file() and (folder / TEXT).is_file():
            print(f"{folder}: {len(examples)} pictures are already prepared", flush=True)
            return folder
        moments = _moments_shape(config, encoders)
        _check_room(folder, sum(len(chunks[i]) for i in missing), moments)
        _decode_all([e for i in missing for e in chunks[i]], pool)
        if not (folder / TEXT).is_file():
            _write_text(folder / TEXT, *encoders.prompts(captions), len(captions))
        with runs.progress(len(examples), "encode", unit="picture") as bar:
            bar.update(sum(len(chunk) for i, chunk in enumerate(chunks) if i not in missing))
            start = 0
            for i, chunk in enumerate(chunks):
                if i in missing:
                    records = _encode(chunk, rows[start : start + len(chunk)], start, config, encoders, pool)
                    write_shard(folder / names[i], _counted(records, bar))
                start += len(chunk)
        shards = [_shard_row(folder / name, len(chunk)) for name, chunk in zip(names, chunks, strict=True)]
        runs.write_json(folder / MANIFEST, _manifest(settings, examples, rows, shards, moments, len(captions)))
    print(
        f"{folder}: {len(examples)} pictures of {len(class_index(e.class_id for e in examples))} classes",
        flush=True,
    )
    return folder


def captions_of(config: configs.Config, examples: Sequence[Example]) -> tuple[list[str], list[int]]:
    """The distinct captions, and for each example its row in them. Raises UserError for an unknown policy."""
    if config.conditioning.caption != "fixed":
        raise UserError(f"conditioning.caption: found {config.conditioning.caption!r}, expected 'fixed'")
    return [config.conditioning.prompt], [0] * len(examples)


def check(examples: Sequence[Example], control: str, pool: ThreadPoolExecutor) -> str:
    """Checks that every picture has a non-empty mask, and what ``control`` is made of, of its size.

    Returns a hash of all of it. Raises one UserError with the number of examples that are wrong and the first of them.
    """
    controls.require(examples, control)
    hashes = _all(pool, functools.partial(controls.check, kind=control), examples, "check")
    digest = hashlib.sha256()
    for example, line in zip(examples, hashes, strict=True):
        digest.update(f"{example.id} {example.class_id} {line}\n".encode())
    return digest.hexdigest()


def _decode_all(examples: Sequence[Example], pool: ThreadPoolExecutor) -> None:
    # A cut picture shows only when it is decoded; better now than hours into the encoding.
    def decode(example: Example) -> None:
        controls.read_image(example.image)

    _all(pool, decode, examples, "decode")


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


def _settings(config: configs.Config, encoders: Encoders, data: str, captions: Sequence[str]) -> dict[str, Any]:
    kept = ["size", "control", "caption", "text_length"]
    if config.conditioning.control == "keypoints":
        kept += ["skeleton", "dot", "line"]
    return {
        "schema": SCHEMA,
        "conditioning": {name: getattr(config.conditioning, name) for name in kept},
        "captions": hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest(),
        "split": config.data.split,
        "data": data,
        "weights": dict(encoders.weights),
        "records_per_shard": RECORDS_PER_SHARD,
    }


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes ``folder`` ours: empty or begun with the same settings, and free of half-written files."""
    path = folder / SETTINGS
    others = [p.name for p in folder.iterdir() if not _is_ours(p.name)]
    if others:
        raise UserError(
            f"{folder}: holds {others[0]}, which prepare did not write; expected an empty or a prepared folder"
        )
    found = runs.read_json(path) if path.is_file() else None
    if found is None and (folder / MANIFEST).is_file():
        found = {}
    if found is not None and found != settings:
        if not overwrite:
            before, now = configs.flatten(found), configs.flatten(settings)
            keys = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
            changes = "; ".join(f"{k}: {_short(before.get(k))} there, {_short(now.get(k))} here" for k in keys)
            raise UserError(
                f"{folder}: was prepared with other settings ({changes}); "
                "choose another data.prepared or add --overwrite"
            )
        # The settings go last: killed half-way, the rest is still recognised as the old folder's.
        for part in sorted(folder.iterdir(), key=lambda p: p.name == SETTINGS):
            if part.name != ".lock":
                part.unlink()
    for part in folder.glob("*.tmp"):
        part.unlink()
    if found != settings:
        runs.write_json(path, settings)


def _is_ours(name: str) -> bool:
    shard = name.startswith("shard-") and name.removesuffix(".tmp").endswith(".array_record")
    return shard or name in (SETTINGS, MANIFEST, TEXT, ".lock") or (name.startswith(".") and name.endswith(".tmp"))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def _is_whole(path: Path, count: int) -> bool:
    if not path.is_file():
        return False
    try:
        RecordReader([path], [count]).close()
    except UserError as error:
        print(f"{error}; written again", flush=True)
        return False
    return True


def _moments_shape(config: configs.Config, encoders: Encoders) -> tuple[int, int, int]:
    side = config.conditioning.size // encoders.factor
    return 2 * encoders.channels, side, side


def _check_room(folder: Path, pictures: int, moments: tuple[int, int, int]) -> None:
    channels, height, width = moments
    needed = pictures * height * width * (len(_ROLES) * channels * 2 + 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: disk too full: {pictures} pictures need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free"
        )


def _write_text(path: Path, embeds: Array, pooled: Array, count: int) -> None:
    from safetensors.numpy import save

    if len(embeds) != count or len(pooled) != count:
        raise ValueError(f"found {len(embeds)} and {len(pooled)} embeddings, expected {count}")
    tensors = {
        "prompt_embeds": np.ascontiguousarray(embeds, np.float32),
        "pooled": np.ascontiguousarray(pooled, np.float32),
    }
    runs.write_atomic(path, save(tensors))


def _encode(
    examples: Sequence[Example],
    captions: Sequence[int],
    first: int,
    config: configs.Config,
    encoders: Encoders,
    pool: ThreadPoolExecutor,
) -> Iterator[bytes]:
    """The records of ``examples``, in order; threads decode pictures one batch ahead of the device."""
    size = config.conditioning.size
    per_batch = max(1, PIXELS_PER_CALL // (size * size) // len(_ROLES))
    batches = [range(i, min(i + per_batch, len(examples))) for i in range(0, len(examples), per_batch)]

    def submit(batch: Iterable[int]) -> list[Future[dict[str, Array]]]:
        return [pool.submit(inputs, examples[i], config.conditioning, encoders.factor) for i in batch]

    ahead = submit(batches[0])
    for number, batch in enumerate(batches):
        loaded = [future.result() for future in ahead]
        ahead = submit(batches[number + 1]) if number + 1 < len(batches) else []
        pictures = np.stack([item[role] for item in loaded for role in _ROLES])
        moments = _encode_padded(encoders.images, pictures, per_batch * len(_ROLES), size)
        stored = moments.astype(np.float16).reshape(len(loaded), len(_ROLES), *moments.shape[1:])
        for row, i in enumerate(batch):
            if not np.isfinite(stored[row]).all():
                raise UserError(f"{examples[i].image}: the autoencoder gives values that float16 cannot hold")
            meta = {
                "id": examples[i].id,
                "class_id": examples[i].class_id,
                "caption": captions[i],
                "index": first + i,
            }
            arrays = {role: stored[row, k] for k, role in enumerate(_ROLES)}
            yield encode_record(meta, arrays | {"mask": loaded[row]["mask"]})


def inputs(example: Example, conditioning: configs.Conditioning, factor: int) -> dict[str, Array]:
    """An example on the model's canvas: target, subject, control [3, size, size] uint8, mask [h, w] uint8."""
    view, size = controls.read_view(example, conditioning.control), conditioning.size
    canvases = {
        "target": controls.target_canvas(view.image, size),
        "subject": controls.subject_canvas(view.image, view.mask, size),
        "control": controls.control_canvas(view, conditioning),
    }
    pictures = {role: np.ascontiguousarray(canvas.pixels.transpose(2, 0, 1)) for role, canvas in canvases.items()}
    return pictures | {"mask": controls.latent_mask(view.mask, size, factor)}


def _encode_padded(encode: Callable[[Array], Array], pictures: Array, per_batch: int, size: int) -> Array:
    """``encode`` in calls of one fixed shape, so that it is compiled once."""
    count = per_batch if per_batch * size * size <= PIXELS_PER_CALL else 1
    results = []
    for start in range(0, len(pictures), count):
        part = pictures[start : start + count]
        padded = np.concatenate([part, np.zeros((count - len(part), *part.shape[1:]), part.dtype)])
        results.append(encode(padded)[: len(part)])
    return np.concatenate(results)


def _counted(records: Iterable[bytes], bar: Any) -> Iterator[bytes]:
    for record in records:
        yield record
        bar.update(1)


def _shard_row(path: Path, records: int) -> dict[str, Any]:
    return {"file": path.name, "records": records, "bytes": path.stat().st_size}


def _manifest(
    settings: dict[str, Any],
    examples: Sequence[Example],
    rows: Sequence[int],
    shards: Sequence[dict[str, Any]],
    moments: tuple[int, int, int],
    captions: int,
) -> dict[str, Any]:
    names = {e.class_id: e.class_name for e in examples}
    index = class_index(e.class_id for e in examples)
    return {
        "schema": SCHEMA,
        "settings": settings,
        "counts": {
            "pictures": len(examples),
            "classes": len(index),
            "captions": captions,
            "shards": len(shards),
        },
        "moments": list(moments),
        "shards": list(shards),
        "ids": [e.id for e in examples],
        "class_ids": [e.class_id for e in examples],
        "captions": list(rows),
        "classes": {str(c): {"name": names[c], "positions": list(p)} for c, p in index.items()},
    }


if __name__ == "__main__":
    runs.run_main(main)
