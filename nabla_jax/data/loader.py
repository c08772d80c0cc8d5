"""Prepared folders, and endless, resumable batches of training pairs from them.

A prepared folder holds ``manifest.json``, ArrayRecord shards with one record per picture, and
``text.safetensors`` with one row per distinct caption. Pairs are drawn from the manifest's class index;
nothing here imports jax.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.data import pairs
from nabla_jax.data.dataset import class_index
from nabla_jax.data.records import RecordReader
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]

SCHEMA = 1
MANIFEST = "manifest.json"
TEXT = "text.safetensors"
# Batches of a stream; any number beyond the longest run.
_ENDLESS = 2**40


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An opened prepared folder.

    ``manifest``: ``schema``, ``settings`` (everything the content depends on), ``counts``, ``shards`` (file,
    records, bytes), ``moments`` ([2C, h, w]), ``ids``, ``class_ids`` and ``captions`` (row in the text file)
    per record, and ``classes`` (class id -> name and positions).
    """

    folder: Path
    manifest: dict[str, Any]
    records: RecordReader
    prompt_embeds: Array  # [captions, T, d] float32
    pooled: Array  # [captions, p] float32

    @property
    def classes(self) -> dict[int, tuple[int, ...]]:
        """Class id -> positions of its records."""
        return class_index(self.manifest["class_ids"])


def shard_name(index: int, count: int) -> str:
    """File name of shard ``index`` of ``count``."""
    return f"shard-{index:05d}-of-{count:05d}.array_record"


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises UserError when it is absent, damaged or of another schema."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected the folder that prepare writes") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema: found {schema}, expected {SCHEMA}; delete the folder and prepare it again")
    return manifest


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Opens a prepared folder.

    Raises UserError naming the file when something is missing, cut short or does not fit the manifest.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    for shard in shards:
        path = folder / shard["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            what = "no such shard" if found is None else f"corrupt or truncated shard: found {found} bytes"
            raise UserError(f"{path}: {what}, expected {shard['bytes']} bytes")
    records = RecordReader([folder / s["file"] for s in shards], [s["records"] for s in shards])
    path = folder / TEXT
    try:
        text = load_file(path)
        embeds, pooled = text["prompt_embeds"], text["pooled"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not the text embeddings that prepare writes ({error})") from error
    if len(embeds) != len(pooled) or len(embeds) <= max(manifest["captions"]):
        raise UserError(f"{path}: found {len(embeds)} captions, expected {max(manifest['captions']) + 1}")
    return Prepared(folder, manifest, records, embeds, pooled)


def make_loader(
    prepared_folder: str | os.PathLike[str] | Prepared,
    sampler: str,
    batch: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 4,
) -> Any:
    """An endless iterator of batches, the same for every number of threads.

    Process i of ``shard`` = (i, n) gets rows i * batch to (i + 1) * batch of each global batch of n * batch
    consecutive samples of the stream, so the stream does not depend on how many processes share a global
    batch. ``get_state`` / ``set_state`` save and restore the position, which counts batches.

    A batch is a dict of numpy arrays: target, subject, control [B, 2C, h, w] float32 (VAE moments: mean, then
    log variance), mask [B, h, w] float32 (the target's foreground coverage, 0..1), prompt_embeds [B, T, d],
    pooled [B, p] float32, sample [B] int64 (position in the stream), subject_index, target_index [B] int64
    (positions in the manifest).

    Raises UserError for a damaged folder, an unknown sampler, or classes without two pictures.
    """
    import grain

    prepared = prepared_folder if isinstance(prepared_folder, Prepared) else open_prepared(prepared_folder)
    process, processes = shard
    if not 0 <= process < processes or batch < 1:
        raise ValueError(f"shard {shard} and batch {batch}: expected 0 <= i < n and a batch of at least 1")
    draw = pairs.sampler(sampler, prepared.classes)

    def sample(local: int) -> dict[str, Array]:
        step, row = divmod(local, batch)
        return read_sample(prepared, draw, seed, (step * processes + process) * batch + row)

    dataset = grain.MapDataset.range(_ENDLESS * batch).map(sample).batch(batch, drop_remainder=True)
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * max(threads, 1)))
    )


def read_sample(prepared: Prepared, draw: pairs.Sampler, seed: int, position: int) -> dict[str, Array]:
    """The sample at ``position`` of the stream, without the batch axis; see ``make_loader``."""
    pair = draw(seed, position)
    meta, target = prepared.records.record(pair.target)
    _, subject = prepared.records.record(pair.subject)
    return {
        "target": target["target"].astype(np.float32),
        "subject": subject["subject"].astype(np.float32),
        "control": target["control"].astype(np.float32),
        "mask": target["mask"].astype(np.float32) / 255,
        **text_of(prepared, meta),
        "sample": np.asarray(position, np.int64),
        "subject_index": np.asarray(pair.subject, np.int64),
        "target_index": np.asarray(pair.target, np.int64),
    }


def text_of(prepared: Prepared, meta: Mapping[str, Any]) -> dict[str, Array]:
    """The embeddings of a record's caption: prompt_embeds [T, d] and pooled [p], float32."""
    row = meta["caption"]
    return {"prompt_embeds": prepared.prompt_embeds[row], "pooled": prepared.pooled[row]}
