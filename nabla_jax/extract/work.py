"""Extraction for a whole dataset folder: cached files beside the data, provenance, shards, resumption.

    masks/CLASS/FILE.png (mask/... in the iNaturalist layout), depth/..., captions.json (captions_short.json),
    keypoints.json
    extraction/masks.json               settings, checkpoints with their hashes, versions
    extraction/masks-0-of-1.jsonl       a row per picture that this process made, or could not make and why

Files that were there before are never touched: a user's own silhouettes stay. A row is written before its file, so that
a run that was killed in between makes the file again; the same command continues.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from nabla_jax import draws, runs, untrusted
from nabla_jax.config import Config, Extract
from nabla_jax.data import Dataset, Example, inaturalist, keypoint_file, read_dataset
from nabla_jax.data.dataset import control_file
from nabla_jax.data.nabirds import read_captions
from nabla_jax.errors import UserError
from nabla_jax.extract import captions, checkpoints, depths, parts, segmentation
from nabla_jax.extract.wording import Wording
from nabla_jax.images import read_rgb
from nabla_jax.keypoints.crops import bird_box
from nabla_jax.untrusted import below

Array = np.ndarray[Any, Any]
What = Literal["masks", "depth", "captions", "keypoints"]
Row = dict[str, Any]


class _Row(TypedDict):
    """What every row has."""

    id: str


class _Checkpoint(TypedDict):
    sha256: str


class _Sidecar(TypedDict):
    """What the files of a kind depend on."""

    schema: int
    settings: dict[str, Any]
    checkpoints: dict[str, _Checkpoint]


SCHEMA = 1
FOLDER = "extraction"
TASKS: tuple[What, ...] = ("masks", "depth", "captions", "keypoints")
CHECKPOINTS: dict[What, tuple[str, ...]] = {
    "masks": ("sam2", "grounding_dino"),
    "depth": ("depth_anything",),
    "captions": ("captioner",),
    "keypoints": ("keypoints", "dinov2"),
}
SETTINGS: dict[What, tuple[str, ...]] = {
    "masks": ("text", "box_threshold", "text_threshold"),
    "depth": (),
    "captions": ("caption_prompt", "caption_tokens", "caption_retries"),
    "keypoints": (),
}
"""Task -> the fields of ``Extract`` that its files depend on."""
LISTED: dict[What, str] = {"captions": "caption", "keypoints": "keypoints"}
"""Task whose results go into one file for all pictures -> the field of a row that holds one."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's part of the pictures: every ``count``-th from ``index`` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """'0/4' is the first of four. Raises UserError."""
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
            raise UserError(f"--shard: found {text!r}, expected i/n with i from 0 to n - 1")
        return cls(int(index), int(count))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A dataset folder and where its extracted files go: the official layouts."""

    dataset: Dataset
    masks: str
    captions: str

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> "Folder":
        """Raises UserError for a folder that is no dataset."""
        dataset = read_dataset(root)
        if inaturalist.is_layout(dataset.root):
            return cls(dataset, "mask", "captions_short.json")
        return cls(dataset, "masks", "captions.json")

    @property
    def root(self) -> Path:
        """The dataset's folder."""
        return self.dataset.root

    def file(self, what: What, example: Example) -> Path:
        """Where the mask or depth map of an example goes, as PNG: where the reader of its layout looks for it."""
        name = self.masks if what == "masks" else "depth"
        try:
            relative = example.image.relative_to(self.root)
        except ValueError:
            raise UserError(f"{example.image}: lies outside {self.root}, expected below it") from None
        if inaturalist.is_layout(self.root):
            # The first folder is exchanged, whatever it is called.
            return self.root.joinpath(name, *relative.parts[1:]).with_suffix(".png")
        return control_file(self.root, example.image, name)

    def list_file(self, what: What) -> Path:
        """The file that holds all captions or keypoints."""
        return self.root / (self.captions if what == "captions" else keypoint_file.FILE)

    def missing(self, what: What) -> list[Example]:
        """The examples without the file, caption or keypoints, in the order of their ids."""
        field = {"masks": "mask", "depth": "depth", "captions": "caption", "keypoints": "keypoints"}[what]
        return sorted((e for e in self.dataset.examples if getattr(e, field) is None), key=lambda e: e.id)


def needed(config: Config) -> tuple[What, ...]:
    """What ``config`` conditions on."""
    found: list[What] = ["masks"]
    if "depth" in (config.conditioning.control, *config.data.controls):
        found.append("depth")
    if config.conditioning.caption == "background":
        found.append("captions")
    if "keypoints" in (config.conditioning.control, *config.data.controls):
        found.append("keypoints")
    return tuple(found)


def complete(config: Config, root: str | os.PathLike[str], shard: Shard | None = None) -> None:
    """Makes what ``config`` needs and a dataset folder lacks, where the checkpoints for it are there.

    ``shard`` is this process's part; the whole by default.

    Without the checkpoints nothing is done: whoever needs the files names those that are missing.
    """
    folder = Folder.open(root)
    for what in needed(config):
        if folder.missing(what) and checkpoints.is_there(config.extract, CHECKPOINTS[what][0]):
            extract(folder, what, config.extract, shard)
            # Keypoints are looked for in the masks that have just been made.
            folder = Folder.open(root)


def extract(
    folder: Folder,
    what: What,
    settings: Extract,
    shard: Shard | None = None,
    *,
    overwrite: bool = False,
    clips: bool = False,
) -> Counter[str]:
    """Makes the missing masks, depth maps, captions or keypoints of a dataset folder.

    Args:
      folder: of the dataset.
      what: masks, depth, captions or keypoints.
      settings: checkpoints, thresholds, prompt.
      shard: this process's part; all processes have the same settings and each its own shard.
      overwrite: whether files that were made with other settings are deleted first; allowed in a single process.
      clips: pictures of one folder are the frames of a clip in the order of their names: their depth is made by
        ``extract.clip_depth``, on one scale for the clip.

    Returns:
      How many pictures of this shard were there before ('kept'), 'made' and 'failed'.

    Raises:
      UserError: torch, a checkpoint or a box is missing; files of other settings; another process with this shard.
    """
    shard = shard or Shard()
    if clips and (what != "depth" or not settings.clip_depth):
        raise UserError("--clips: found no command in extract.clip_depth for depth, expected one")
    place = folder.root / FOLDER
    rows_file = place / f"{what}-{shard.index}-of-{shard.count}.jsonl"
    with runs.lock(place / f".{rows_file.name}.lock", f"{place}: shard {shard.index}/{shard.count} of {what}"):
        if _claim(folder, what, _settings(folder, what, settings, clips), overwrite, shard):
            folder = Folder.open(folder.root)
        before = _rows(place, what)
        rows = runs.JsonLines(rows_file, _Row)
        todo, kept = _todo(folder, what, before, shard, clips)
        counts = Counter(kept=kept, made=0, failed=sum("reason" in row for row in rows.rows))
        makers = {"masks": _make_mask, "depth": _make_depth, "captions": _make_caption, "keypoints": _make_keypoints}
        groups = _clips(todo) if clips else [[example] for example in todo]
        context = _Context(folder, settings, Wording(_names(folder.dataset)) if what == "captions" else None)
        maker = _make_clip if clips else makers[what]
        try:
            with runs.progress(len(todo), f"{what} {shard.index}/{shard.count}", unit="picture") as bar:
                for group, pictures in _read_ahead(groups):
                    for row, data in _attempt(maker, context, group, pictures):
                        rows.append(row)
                        if data is not None:
                            runs.write_atomic(folder.root / row["file"], data)
                        counts["failed" if "reason" in row else "made"] += 1
                    bar.update(len(group))
        finally:
            rows.close()
            if what in LISTED:
                _merge(folder, what)
    print(
        f"{folder.root}: {what}: {counts['made']} made, {counts['kept']} were there"
        + (f", {counts['failed']} failed: see {rows_file}" if counts["failed"] else ""),
        flush=True,
    )
    return counts


# ------------------------------------------------------------------------------------------------------------
# One picture
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Context:
    folder: Folder
    settings: Extract
    wording: Wording | None


Made = Iterator[tuple[Row, bytes | None]]
Maker = Callable[[_Context, Sequence[Example], Sequence[Array]], Made]


def _make_mask(context: _Context, examples: Sequence[Example], pictures: Sequence[Array]) -> Made:
    (example,), (image,) = examples, pictures
    found = segmentation.find(image, example.box or context.settings.text, context.settings)
    row: Row = {"box": list(found.box), "quality": round(found.quality, 4)}
    if found.score is not None:
        row["score"] = round(found.score, 4)
    yield _file_row(context, "masks", example, np.uint8(255) * found.mask, row)


def _make_depth(context: _Context, examples: Sequence[Example], pictures: Sequence[Array]) -> Made:
    depth = depths.estimate(pictures[0], context.settings)
    limits = {"low": float(depth.min()), "high": float(depth.max())}
    yield _file_row(context, "depth", examples[0], depths.to_grey(depth), limits)


def _make_clip(context: _Context, examples: Sequence[Example], pictures: Sequence[Array]) -> Made:
    for example, depth in zip(examples, depths.of_clip(pictures, context.settings), strict=True):
        yield _file_row(context, "depth", example, depth, {"clip": example.image.parent.name})


def _make_caption(context: _Context, examples: Sequence[Example], pictures: Sequence[Array]) -> Made:
    (example,) = examples
    assert context.wording is not None
    # The words of one picture depend on the picture's id alone, not on the shard or its place in it.
    found = captions.describe(pictures[0], context.wording, context.settings, draws.number(example.id))
    row = {"id": example.id, "caption": found.text, "attempts": found.attempts}
    yield row | ({"removed": list(found.removed)} if found.removed else {}), None


def _make_keypoints(context: _Context, examples: Sequence[Example], pictures: Sequence[Array]) -> Made:
    (example,) = examples
    try:
        box = bird_box(example)
    except UserError as error:
        raise segmentation.NotFound(str(error)) from error
    found = parts.estimate(pictures[0], box, context.settings)
    rows = keypoint_file.to_rows(parts.rounded(found, *pictures[0].shape[:2]))
    yield (
        {"id": example.id, "box": list(box), "keypoints": rows, "visible": [round(float(v), 4) for v in found[:, 2]]},
        None,
    )


def _file_row(context: _Context, what: What, example: Example, pixels: Array, row: Row) -> tuple[Row, bytes]:
    data = _png(pixels)
    file = context.folder.file(what, example).relative_to(context.folder.root).as_posix()
    return {"id": example.id, "file": file, "sha256": hashlib.sha256(data).hexdigest(), **row}, data


def _attempt(
    maker: Maker, context: _Context, examples: Sequence[Example], pictures: Sequence[Array] | UserError
) -> Made:
    """What a maker yields; a picture that cannot be read, or in which nothing is found, gives a row with the reason."""
    try:
        if isinstance(pictures, UserError):
            raise segmentation.NotFound(str(pictures))
        yield from maker(context, examples, pictures)
    except segmentation.NotFound as error:
        for example in examples:
            yield {"id": example.id, "reason": str(error)}, None


def _png(pixels: Array) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _read_ahead(groups: Sequence[Sequence[Example]]) -> Iterator[tuple[Sequence[Example], list[Array] | UserError]]:
    """Each group with its decoded pictures, the next group being decoded meanwhile."""

    def read(group: Sequence[Example]) -> list[Array] | UserError:
        try:
            return [read_rgb(example.image) for example in group]
        except UserError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for number, group in enumerate(groups):
            current = ahead or pool.submit(read, group)
            ahead = pool.submit(read, groups[number + 1]) if number + 1 < len(groups) else None
            yield group, current.result()


# ------------------------------------------------------------------------------------------------------------
# What there is to do
# ------------------------------------------------------------------------------------------------------------


def _todo(folder: Folder, what: What, rows: Sequence[Row], shard: Shard, clips: bool) -> tuple[list[Example], int]:
    """The examples that this process has to make, and how many of its share are there already.

    What failed with these settings would fail again and is left out.
    """
    everything = sorted(folder.dataset.examples, key=lambda e: e.id)
    if clips:
        # A clip is made by one process.
        names = sorted({example.image.parent for example in everything})
        mine = set(names[shard.index :: shard.count])
        share = [example for example in everything if example.image.parent in mine]
    else:
        share = everything[shard.index :: shard.count]
    settled = {row["id"] for row in rows if "reason" in row or LISTED.get(what, "") in row}
    missing = {example.id for example in folder.missing(what)}
    todo = [example for example in share if example.id in missing - settled]
    if clips:
        broken = {example.image.parent for example in todo}
        todo = [example for example in share if example.image.parent in broken]
    failed = sum("reason" in row for row in rows if row["id"] in {example.id for example in share})
    return todo, len(share) - len(todo) - failed


def _clips(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[Path, list[Example]] = {}
    for example in sorted(examples, key=lambda e: e.image):
        groups.setdefault(example.image.parent, []).append(example)
    return list(groups.values())


def _names(dataset: Dataset) -> set[str]:
    """Every name of the taxonomy below its root."""
    return {name for example in dataset.examples for name in (*example.taxonomy[1:], example.class_name)}


def _rows(place: Path, what: What) -> list[Row]:
    """The rows of all processes; of several for one picture the last."""
    rows = [row for file in sorted(place.glob(f"{what}-*-of-*.jsonl")) for row in runs.read_rows(file, _Row)]
    return list({row["id"]: row for row in rows}.values())


# ------------------------------------------------------------------------------------------------------------
# Provenance
# ------------------------------------------------------------------------------------------------------------


def _settings(folder: Folder, what: What, settings: Extract, clips: bool) -> dict[str, Any]:
    """What the files depend on. Raises UserError when torch or a checkpoint is missing."""
    if clips:
        return {"schema": SCHEMA, "settings": {"clip_depth": settings.clip_depth}, "checkpoints": {}}
    if what == "keypoints":
        parts.check(settings, folder.dataset)
    used = list(CHECKPOINTS[what])
    if what == "masks" and all(example.box is not None for example in folder.dataset.examples):
        used.remove("grounding_dino")
    chosen = {name: checkpoints.identity(checkpoints.find(settings, name)) for name in used}
    fields = SETTINGS[what] if what != "masks" or "grounding_dino" in used else ()
    return {"schema": SCHEMA, "settings": {name: getattr(settings, name) for name in fields}, "checkpoints": chosen}


def _claim(folder: Folder, what: What, wanted: dict[str, Any], overwrite: bool, shard: Shard) -> bool:
    """Makes the sidecar ours, or refuses if the files of ``what`` were made with other settings.

    Returns whether such files were deleted.
    """
    path = folder.root / FOLDER / f"{what}.json"
    found = runs.read_json(path) if path.is_file() else None
    untrusted.check(found, _Sidecar | None, str(path))
    if found is not None and _comparable(found) != _comparable(wanted):
        if not overwrite:
            told = _differences(_comparable(found), _comparable(wanted))
            raise UserError(
                f"{path}: {what} were made with other settings ({told}); go back to them, or make "
                "the files again with --overwrite"
            )
        if shard.count > 1:
            raise UserError(f"--overwrite: found shard {shard.index}/{shard.count}, expected a single process")
        _delete(folder, what)
    deleted = found is not None and not path.is_file()
    if found is None or deleted:
        torch = {} if what == "keypoints" else {"torch": _versions()}
        runs.write_json(path, {**wanted, "environment": runs.environment() | torch})
    return deleted


def _comparable(sidecar: dict[str, Any]) -> dict[str, Any]:
    # A checkpoint's folder may be moved and its revision be unknown; its content counts.
    hashes = {name: row["sha256"] for name, row in sidecar["checkpoints"].items()}
    return {"schema": sidecar["schema"], **sidecar["settings"], **{f"checkpoint {k}": v for k, v in hashes.items()}}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    return "; ".join(f"{key}: {str(there.get(key))[:40]} there, {str(here.get(key))[:40]} here" for key in keys)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")}


def _delete(folder: Folder, what: What) -> None:
    """Removes what earlier runs made, and nothing else: a file that was changed since is the user's."""
    place = folder.root / FOLDER
    rows = _rows(place, what)
    made_files = []
    for row in (row for row in rows if "file" in row):
        file = below(folder.root, str(row["file"]))
        if file is None:
            raise UserError(
                f"{place}: {what}: file {str(row['file'])[:100]!r} leaves {folder.root}: nothing is deleted"
            )
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == row.get("sha256"):
            made_files.append(file)
    for file in made_files:
        file.unlink(missing_ok=True)
    if what in LISTED:
        made = {row["id"]: row.get(LISTED[what]) for row in rows}
        kept = {id: value for id, value in _read_list(folder, what).items() if made.get(id) != value}
        _write_list(folder, what, kept)
    # The sidecar goes first: killed half-way, the next run makes the rest again.
    for file in (place / f"{what}.json", *place.glob(f"{what}-*-of-*.jsonl")):
        file.unlink(missing_ok=True)


def _merge(folder: Folder, what: What) -> None:
    """Writes what all processes made into the dataset's file, beside what was there."""
    with (folder.root / FOLDER / f".{what}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        found = _read_list(folder, what)
        field = LISTED[what]
        made = {row["id"]: row[field] for row in _rows(folder.root / FOLDER, what) if field in row}
        merged = made | found
        if merged != found:
            _write_list(folder, what, dict(sorted(merged.items())))


def _read_list(folder: Folder, what: What) -> dict[str, Any]:
    path = folder.list_file(what)
    return dict(read_captions(path) if what == "captions" else keypoint_file.read(path))


def _write_list(folder: Folder, what: What, values: dict[str, Any]) -> None:
    if what == "captions":
        runs.write_json(folder.list_file(what), values)
    else:
        keypoint_file.write(folder.list_file(what), values)
