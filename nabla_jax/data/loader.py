"""Prepared folders, and endless, resumable batches of training pairs from them or from the pictures themselves.

A prepared folder holds ``manifest.json``, ArrayRecord shards, and ``text.safetensors`` with one row per distinct
caption. A shard holds a number of pictures in a row: one record for each role of each picture (so that a pair reads
what it needs and no more), then, where look-alikes were asked for, one record of features for each. Every record names
its picture, its role and the settings it was made with; a shard that was exchanged for another is noticed by the first
record that is read from it.

Pairs are drawn from the class index; nothing here imports jax.
"""

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from nabla_jax import draws, untrusted
from nabla_jax.data import pairs
from nabla_jax.data.dataset import class_index
from nabla_jax.data.pictures import CONTROL, REPAINT, Draw, Pictures
from nabla_jax.data.records import RecordReader
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256

Array = np.ndarray[Any, Any]
Batch = dict[str, Array]

SCHEMA = 2
MANIFEST = "manifest.json"
TEXT = "text.safetensors"
FEATURES = "features"
# Samples of a stream; any number beyond the longest run.
_ENDLESS = 2**48
# Batches that are ready before they are asked for, beside the one that each thread works on.
_AHEAD = 2


# ------------------------------------------------------------------------------------------------------------
# Prepared folders
# ------------------------------------------------------------------------------------------------------------


class _File(TypedDict):
    file: str
    bytes: int
    sha256: str


class _Shard(_File):
    pictures: int
    records: int


class _Class(TypedDict):
    taxonomy: list[str]


class _Manifest(TypedDict):
    """What is read of manifest.json; see ``Prepared``."""

    made: str
    roles: list[str]
    features: int
    shards: list[_Shard]
    text: _File
    ids: list[str]
    class_ids: list[int]
    captions: list[int]
    classes: dict[str, _Class]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An opened prepared folder.

    ``manifest``: ``schema``; ``settings`` (everything the content depends on) and ``made``, their hash; ``counts``;
    ``roles``; ``features`` (their width, 0 for none); ``moments`` ([2C, h, w]); ``shards`` (file, pictures, records,
    bytes, sha256); ``text`` (file, bytes, sha256); ``ids``, ``class_ids`` and ``captions`` (row in the text file) by
    picture; and ``classes`` (class id -> name, taxonomy from the root to the leaf, positions).
    """

    folder: Path
    manifest: dict[str, Any]
    records: RecordReader
    prompt_embeds: Array  # [captions, T, d] float32
    pooled: Array  # [captions, p] float32

    @property
    def ids(self) -> Sequence[str]:
        """By picture, its id."""
        ids: Sequence[str] = self.manifest["ids"]
        return ids

    @functools.cached_property
    def classes(self) -> dict[int, tuple[int, ...]]:
        """Class id -> positions of its pictures."""
        return class_index(self.manifest["class_ids"])

    @functools.cached_property
    def taxonomy(self) -> dict[int, tuple[str, ...]]:
        """Class id -> names from the root to the leaf."""
        return {int(c): tuple(entry["taxonomy"]) for c, entry in self.manifest["classes"].items()}

    @functools.cached_property
    def captions(self) -> tuple[int, ...]:
        """By picture, the row of its caption."""
        return tuple(self.manifest["captions"])

    @functools.cached_property
    def _layout(self) -> tuple[list[int], list[int]]:
        shards = self.manifest["shards"]
        pictures = [0, *itertools.accumulate(s["pictures"] for s in shards)]
        return pictures, [0, *itertools.accumulate(s["records"] for s in shards)]

    @property
    def features(self) -> Callable[[], Array] | None:
        """Reads the features of all pictures, [pictures, D] float32; None where they were not asked for."""
        return self._read_features if self.manifest["features"] else None

    def _read_features(self) -> Array:
        rows = np.empty((len(self.captions), self.manifest["features"]), np.float32)
        for position in range(len(rows)):
            rows[position] = self._record(position, FEATURES)[FEATURES]
        return rows

    def read(self, position: int, wanted: Sequence[str], draw: Draw | None = None) -> dict[str, Array]:
        """The VAE moments [2C, h, w] float16 of each role in ``wanted``; ``mask`` [h, w] uint8 with the target.

        What is stored was made once: nothing is drawn.
        Raises UserError naming the shard when it is damaged or is another shard than its name says.
        """
        found: dict[str, Array] = {}
        for role in wanted:
            arrays = self._record(position, role)
            found[role] = arrays["moments"]
            if role == "target":
                found["mask"] = arrays["mask"]
        return found

    def _record(self, position: int, role: str) -> dict[str, Array]:
        pictures, records = self._layout
        shard = bisect.bisect_right(pictures, position) - 1
        place, held = position - pictures[shard], pictures[shard + 1] - pictures[shard]
        roles = self.manifest["roles"]
        row = held * len(roles) + place if role == FEATURES else place * len(roles) + roles.index(role)
        meta, arrays = self.records.record(records[shard] + row)
        expected = (self.manifest["made"], position, role)
        if (meta.get("made"), meta.get("index"), meta.get("role")) != expected:
            raise UserError(
                f"{self.folder / self.manifest['shards'][shard]['file']}: swapped shard: found {meta.get('role')} of "
                f"picture {meta.get('index')} made with {str(meta.get('made'))[:12]}, expected {role} of picture "
                f"{position} made with {self.manifest['made'][:12]}"
            )
        return arrays

    def check_swaps(self) -> None:
        """Reads one record of each shard. Raises UserError naming a shard that is another than its name says."""
        for first in self._layout[0][:-1]:
            self._record(first, self.manifest["roles"][0])


def shard_name(index: int, count: int) -> str:
    """File name of shard ``index`` of ``count``."""
    return f"shard-{index:05d}-of-{count:05d}.array_record"


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises UserError when it is absent, damaged or of another schema."""
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = untrusted.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected the folder that prepare writes") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        found = str(schema)[:20]
        raise UserError(f"{path}: schema: found {found}, expected {SCHEMA}; delete the folder and prepare it again")
    untrusted.check(manifest, _Manifest, str(path))
    if wrong := _disagreement(manifest):
        raise UserError(f"{path}: {wrong}; delete the folder and prepare it again")
    return manifest


def _disagreement(manifest: dict[str, Any]) -> str:
    """What in a manifest does not fit the rest of it, or ''."""
    shards, roles, pictures = manifest["shards"], manifest["roles"], len(manifest["ids"])
    for file in [*shards, manifest["text"]]:
        if not untrusted.is_file_name(file["file"]):
            return f"file: found {file['file'][:100]!r}, expected the name of a file of the folder"
    if len(set(roles)) != len(roles) or not roles or not shards:
        return f"roles, shards: found {len(roles)} roles and {len(shards)} shards, expected distinct ones"
    each = len(roles) + bool(manifest["features"])
    for shard in shards:
        if shard["pictures"] < 1 or shard["records"] != each * shard["pictures"]:
            found = f"{shard['records']} records of {shard['pictures']} pictures"
            return f"{shard['file']}: found {found}, expected {each} for each"
    counts = {name: len(manifest[name]) for name in ("ids", "class_ids", "captions")}
    counts["shards"] = sum(shard["pictures"] for shard in shards)
    if set(counts.values()) != {pictures}:
        return f"found other numbers of pictures in {', '.join(f'{k} ({v})' for k, v in counts.items())}"
    if min(manifest["captions"]) < 0 or not 0 <= manifest["features"] < 2**20:
        return "captions, features: found numbers out of range"
    lacking = {str(c) for c in manifest["class_ids"]} ^ manifest["classes"].keys()
    if lacking:
        return f"classes: found other classes than those of class_ids, such as {min(lacking)[:20]!r}"
    return ""


def open_prepared(folder: str | os.PathLike[str]) -> Prepared:
    """Opens a prepared folder: sizes of all files, lengths of all shards and the first record of each are checked.

    Raises UserError naming the file when something is missing, cut short or does not fit the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            what = "no such shard" if found is None else f"corrupt or truncated shard: found {found} bytes"
            raise UserError(f"{path}: {what}, expected {shard['bytes']} bytes")
    records = RecordReader([folder / s["file"] for s in manifest["shards"]], [s["records"] for s in manifest["shards"]])
    path = folder / TEXT
    try:
        text = _mapped(path, ("prompt_embeds", "pooled"))
    except (OSError, KeyError, ValueError, UserError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: not the text embeddings that prepare writes ({why})") from error
    prepared = Prepared(folder, manifest, records, *text)
    captions = len(prepared.prompt_embeds)
    if captions != len(prepared.pooled) or captions <= max(prepared.captions):
        raise UserError(f"{path}: found {captions} captions, expected {max(prepared.captions) + 1}")
    prepared.check_swaps()
    return prepared


def check_files(folder: str | os.PathLike[str], track: Callable[[Sequence[Any]], Iterator[Any]] = iter) -> int:
    """Compares every byte of a prepared folder with its manifest and returns the number of files.

    ``track`` wraps the list of files, for progress. Raises UserError naming each file that differs, and by which one
    it was replaced where that is known.
    """
    folder = Path(folder)
    prepared_files = read_manifest(folder)
    rows = [*prepared_files["shards"], prepared_files["text"]]
    by_hash = {row["sha256"]: row["file"] for row in rows}
    mistakes = []
    for row in track(rows):
        path = folder / row["file"]
        if not path.is_file():
            mistakes.append(f"{path}: no such file")
            continue
        size, digest = path.stat().st_size, file_sha256(path)
        if digest in by_hash and by_hash[digest] != row["file"]:
            mistakes.append(f"{path}: swapped: holds what {by_hash[digest]} should hold")
        elif size != row["bytes"]:
            mistakes.append(f"{path}: truncated or foreign: found {size} bytes, expected {row['bytes']}")
        elif digest != row["sha256"]:
            mistakes.append(f"{path}: corrupt: found sha256 {digest[:12]}, expected {row['sha256'][:12]}")
    if mistakes:
        raise UserError(f"{'; '.join(mistakes)}; delete what is named and run prepare again to make it anew")
    open_prepared(folder).records.close()
    return len(rows)


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


Source = Prepared | Pictures
Encode = Callable[[Sequence[Array]], Sequence[Array]]
"""Pictures [3, S, S] uint8 -> VAE moments [2C, h, w] float16 of each; compact conditions have a smaller S."""


class Loader(Iterator[Batch]):
    """An endless iterator of batches whose whole state is the number of batches it gave; see ``make_loader``."""

    def __init__(self, start: Callable[[int], Any], finish: Callable[[Batch], Batch]) -> None:
        self._start, self._finish = start, finish
        self._step = 0
        self._running: Any = None

    def __next__(self) -> Batch:
        """The batch of the next step."""
        if self._running is None:
            self._running = self._start(self._step)
        batch = self._finish(next(self._running))
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, as JSON values: it fits any number of processes, workers and threads."""
        return {"step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where ``get_state`` was asked. Raises UserError for anything else than such a state."""
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise UserError(f"loader position: found {dict(state)}, expected a step")
        self.close()
        self._step = step

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts new ones."""
        if self._running is not None and hasattr(self._running, "close"):
            self._running.close()
        self._running = None


def make_loader(
    source: str | os.PathLike[str] | Source,
    sampler: str,
    batch: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    *,
    control: str = "fill",
    levels: Sequence[str] = ("0 class",),
    similarity: float = 0.0,
    per_class: int = 0,
    threads: int = 4,
    workers: int = 0,
    encode: Encode | None = None,
) -> Loader:
    """An endless iterator of batches, the same for every number of threads, workers and processes.

    Process i of ``shard`` = (i, n) gets rows i * batch to (i + 1) * batch of each global batch of n * batch
    consecutive samples of the stream, so the stream does not depend on how many processes share a global
    batch. ``get_state`` / ``set_state`` save and restore the position, which counts batches.

    With ``per_class`` pairs are drawn from so many pictures of each class, see ``pairs.few``.

    ``threads`` of this process read ahead, or ``workers`` processes instead where there are any. From ``Pictures``,
    ``encode`` makes in this process the moments that a prepared folder stores; for method insert there is none, since
    the pictures of a pair are encoded together, later.

    A batch is a dict of numpy arrays: target, subject, control [B, 2C, h, w] float16 (VAE moments: mean, then
    log variance; of compact conditions fewer), mask [B, h, w] float32 (the target's foreground coverage, 0..1),
    prompt_embeds [B, T, d], pooled [B, p] float32 (read-only), sample [B] int64 (position in the stream),
    subject_index, target_index [B] int64 (positions of the pictures), level [B] int64 (the finest of
    ``pairs.LEVELS`` that the two share), caption [B] int64 (row of the target's caption). For method insert: target,
    subject [B, 3, S, S] uint8, and instead of the control repaint [B, S, S] uint8, 1 where the target is to be
    repainted.

    Raises UserError for a damaged folder, an unknown sampler or control, or classes without two pictures.
    """
    source = open_prepared(source) if isinstance(source, str | os.PathLike) else source
    process, processes = shard
    if not 0 <= process < processes or batch < 1:
        raise ValueError(f"shard {shard} and batch {batch}: expected 0 <= i < n and a batch of at least 1")
    pixels = isinstance(source, Pictures) and source.conditioning.method == "insert"
    if isinstance(source, Pictures) and (encode is None) != pixels:
        raise ValueError("encode: expected a function for pictures that are not prepared, and none for method insert")
    if isinstance(source, Prepared) and CONTROL + control not in source.manifest["roles"]:
        made = ", ".join(r.removeprefix(CONTROL) for r in source.manifest["roles"] if r.startswith(CONTROL))
        raise UserError(f"{source.folder}: conditioning.control: found {control!r}, prepared are {made}")
    options = pairs.Options(
        taxonomy=source.taxonomy,
        levels=levels,
        batch=batch * processes,
        features=source.features,
        similarity=similarity,
    )
    classes = pairs.few(source.classes, source.ids, per_class) if per_class else source.classes
    draw = pairs.sampler(sampler, classes, options)
    # Text is added by this process: a worker need not load it, nor hand over megabytes that are all the same.
    bare = dataclasses.replace(source, prompt_embeds=source.prompt_embeds[:0], pooled=source.pooled[:0])
    reading = Reading(bare, draw, seed, (REPAINT, REPAINT) if pixels else ("control", CONTROL + control))

    def finish(read: Batch) -> Batch:
        moments = read if encode is None else _encoded(read, encode)
        return moments | text_of(source, moments["caption"])

    numbers = Numbers(batch, shard)
    return Loader(lambda step: _iterate(reading, numbers, step, threads, workers), finish)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Which sample of the stream is where in the batches of a process; see ``make_loader``."""

    batch: int
    shard: tuple[int, int]
    step: int = 0  # of the first batch
    workers: int = 1

    def __call__(self, index: int) -> int:
        """The sample that worker ``index`` % workers reads as its number ``index`` // workers.

        Grain deals single elements to its workers, which make batches of what they get, and then takes a batch of
        each in turn. Numbered like this, worker w makes the batches w, w + workers, ... of one and the same stream.
        """
        place, worker = divmod(int(index), self.workers)
        step = self.step + place // self.batch * self.workers + worker
        process, processes = self.shard
        return (step * processes + process) * self.batch + place % self.batch


def _iterate(reading: "Reading", numbers: Numbers, step: int, threads: int, workers: int) -> Any:
    import grain

    numbers = dataclasses.replace(numbers, step=step, workers=max(workers, 1))
    if not workers:
        batches = grain.MapDataset.range(_ENDLESS).map(lambda place: _assemble(reading, numbers, place))
        return iter(batches.to_iter_dataset(grain.ReadOptions(threads, threads + _AHEAD if threads else 0)))
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers, and refuses unparsed ones
    # Batches are made last: Grain then stacks them in memory that is shared with this process.
    samples = grain.MapDataset.range(_ENDLESS).map(numbers).map(reading).to_iter_dataset(grain.ReadOptions(0, 0))
    batches = samples.batch(numbers.batch, drop_remainder=True)
    return iter(batches.mp_prefetch(grain.MultiprocessingOptions(workers, _AHEAD)))


def _assemble(reading: "Reading", numbers: Numbers, place: int) -> Batch:
    # Row by row: a record is copied while it is in the processor's cache, and its memory serves the next one.
    batch: Batch = {}
    for row in range(numbers.batch):
        sample = reading(numbers(place * numbers.batch + row))
        if not row:
            batch = {name: np.empty((numbers.batch, *value.shape), value.dtype) for name, value in sample.items()}
        for name, value in sample.items():
            batch[name][row] = value
    return batch


@dataclasses.dataclass(frozen=True)
class Reading:
    """The pairs of a stream and what is read of them; a function that worker processes can run."""

    source: Source
    draw: pairs.Sampler
    seed: int
    spatial: tuple[str, str]  # name in a batch, and role, of what says where the bird is

    def __call__(self, number: int) -> Batch:
        """A sample of the stream, without text, in the source's dtype; see ``make_loader``."""
        pair = self.draw(self.seed, number)
        draw = functools.partial(draws.generator, self.seed, number)
        name, role = self.spatial
        target = self.source.read(pair.target, ("target", role), draw)
        numbers = {
            "sample": number,
            "subject_index": pair.subject,
            "target_index": pair.target,
            "level": pairs.LEVELS.index(pair.level),
            "caption": self.source.captions[pair.target],
        }
        return {
            "target": target["target"],
            "subject": self.source.read(pair.subject, ("subject",), draw)["subject"],
            name: target[role],
            "mask": target["mask"].astype(np.float32) / 255,
            **{name: np.asarray(value, np.int64) for name, value in numbers.items()},
        }


def _mapped(path: Path, names: Sequence[str]) -> list[Array]:
    """Float32 tensors of a safetensors file, mapped: pages are read when rows are used."""
    from nabla_jax.checkpoints.safetensors_io import read_header

    entries = [read_header(path).tensors[name] for name in names]
    wrong = [entry.dtype for entry in entries if entry.dtype != "F32"]
    if wrong:
        raise ValueError(f"dtype {wrong[0]}, expected F32")
    return [np.memmap(path, "<f4", "r", entry.offset, entry.shape) for entry in entries]


def _encoded(batch: Batch, encode: Encode) -> Batch:
    names, rows = ("target", "subject", "control"), len(batch["target"])
    moments = encode([image for name in names for image in batch[name]])
    return batch | {name: np.stack(moments[i * rows : (i + 1) * rows]) for i, name in enumerate(names)}


def text_of(source: Source, rows: Array) -> Batch:
    """The embeddings of the captions ``rows`` [B]: prompt_embeds [B, T, d] and pooled [B, p], float32, read-only."""
    tables = {"prompt_embeds": source.prompt_embeds, "pooled": source.pooled}
    if (rows == rows[0]).all():
        # One caption for all is the usual case; eight megabytes a row need not be copied for it.
        return {k: np.broadcast_to(table[rows[0]], (len(rows), *table.shape[1:])) for k, table in tables.items()}
    return {k: table[rows] for k, table in tables.items()}
