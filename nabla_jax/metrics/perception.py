"""What the networks say about whole picture sets: batches shared by the processes, kept on disk, continued.

Batches are the same whoever works on them and whatever is already there, so an interrupted run, or one of several
processes, ends with the numbers of a single one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nabla_jax import runs
from nabla_jax.conditioning.geometry import Box, mask_box
from nabla_jax.errors import UserError
from nabla_jax.images import resize
from nabla_jax.metrics import networks as nets
from nabla_jax.metrics import patches, pose, retrieval
from nabla_jax.metrics.birds import MaskedBird, colours, masked_bird, masked_pair
from nabla_jax.metrics.references import stretch
from nabla_jax.parallel import processes

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
T = TypeVar("T")

RETRIEVAL = "dinov2_box"
"""The array of a description that retrieval compares."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A generated picture, read or drawn when it is needed, and the real ones it is compared with.

    ``picture`` gives uint8 [H, W, 3]; ``galleries`` are class id -> ids of real pictures, ``class_id`` among them, or
    empty where the bird's class has no sibling. ``keypoints`` [P, 3] (row, column, visible) are the target's, annotated
    or found, in its pixels; None where there are none to compare with.
    """

    pair: str
    subject_id: str
    target_id: str
    class_id: int
    picture: Callable[[], Array]
    galleries: Mapping[int, Sequence[str]]
    keypoints: Array | None = dataclasses.field(default=None, compare=False)


Reader = Callable[[str], tuple[Array, Array]]
"""Id of a real picture -> (picture uint8 [H, W, 3], mask bool [H, W])."""


def describe_real(
    networks: nets.Networks,
    ids: Sequence[str],
    names: Collection[str],
    read: Reader,
    fingerprint: Callable[[str], str],
    cache: Path,
) -> dict[str, nets.Description]:
    """Descriptions of real birds by id, with the arrays ``names`` (``keypoints`` and ``colours`` too, where they are
    named); birds without a foreground pixel are left out.

    Kept below ``cache`` by the networks' and the pictures' fingerprints: ``fingerprint`` is the hash of a picture and
    its mask. Raises UserError for a damaged file there.
    """

    def make(batch: Sequence[str]) -> Arrays:
        shown = {id: (picture, mask) for id in batch for picture, mask in [read(id)] if mask.any()}
        birds = [masked_bird(*pair) for pair in shown.values()]
        found = nets.describe(networks, birds, names) if shown else []
        if nets.COLOURS in names:
            found = [{**row, nets.COLOURS: colours(bird)} for row, bird in zip(found, birds, strict=True)]
        if shown and nets.KEYPOINTS in names and networks.keypoints is not None:
            points = networks.keypoints([p for p, _ in shown.values()], [mask_box(m) for _, m in shown.values()])
            found = [{**row, nets.KEYPOINTS: own} for row, own in zip(found, points, strict=True)]
        return _pack(dict(zip(shown, found, strict=True)))

    def key(batch: Sequence[str]) -> Any:
        return [networks.fingerprint, sorted(names), [(id, fingerprint(id)) for id in batch]]

    found: dict[str, nets.Description] = {}
    with runs.progress(len(ids), "real pictures", unit="picture") as bar:
        for arrays in _share(_batches(ids, networks.batch), make, key, cache, bar):
            found |= _unpack(arrays)
    return found


def score(
    networks: nets.Networks,
    cases: Sequence[Case],
    real: Mapping[str, nets.Description],
    read: Reader,
    inputs: str,
    cache: Path,
    bar: Any,
) -> dict[str, dict[str, float | int]]:
    """Pair -> column -> number; the columns are those of ``summary.PairScore`` that there are networks for.

    Pairs without foreground are left out. ``inputs`` names all that decides the pictures. ``bar`` is advanced by one
    for each case.
    """

    def make(batch: Sequence[Case]) -> Arrays:
        rows = _score_batch(networks, batch, real, read)
        text = json.dumps(rows).encode()
        return {"rows": np.frombuffer(text, np.uint8)}

    def key(batch: Sequence[Case]) -> Any:
        galleries = [[case.pair, {str(c): list(ids) for c, ids in case.galleries.items()}] for case in batch]
        found = [None if case.keypoints is None else case.keypoints.tolist() for case in batch]
        return [networks.fingerprint, inputs, galleries, *([] if networks.keypoints is None else [found])]

    found: dict[str, dict[str, float | int]] = {}
    for arrays in _share(_batches(cases, networks.batch), make, key, cache, bar):
        found |= json.loads(arrays["rows"].tobytes())
    return found


def _score_batch(
    networks: nets.Networks, cases: Sequence[Case], real: Mapping[str, nets.Description], read: Reader
) -> dict[str, dict[str, float | int]]:
    shown: list[tuple[Case, MaskedBird, MaskedBird, bool]] = []
    posed: list[tuple[Case, Array, Box]] = []
    for case, (generated, target, mask) in zip(cases, _read_ahead(cases, read), strict=True):
        pair = masked_pair(generated, target, mask) if _left(generated, mask) else None
        if pair is not None and case.subject_id in real and case.target_id in real:
            shown.append((case, *pair, generated.shape == target.shape))
            if case.keypoints is not None:
                posed.append((case, stretch(generated, *mask.shape), mask_box(mask)))
    if not shown:
        return {}
    made = nets.describe(networks, [bird for _, bird, _, _ in shown])
    resized = [target for _, _, target, same in shown if not same]
    resized_found = iter(nets.describe(networks, resized, (*nets.WHOLE, *nets.BOX)) if resized else [])
    rows: dict[str, dict[str, float | int]] = {}
    for (case, _, _, same), mine in zip(shown, made, strict=True):
        of_target = real[case.target_id] if same else next(resized_found)
        rows[case.pair] = _compare(case, mine, of_target, real)
    if networks.lpips is not None:
        sides = [bird for _, bird, _, _ in shown], [bird for _, _, bird, _ in shown]
        for name, distances in (
            ("lpips", nets.whole_distances(networks, *sides)),
            ("lpips_box", nets.box_distances(networks, *sides)),
        ):
            for (case, *_), distance in zip(shown, distances, strict=True):
                rows[case.pair][name] = float(distance)
    for case, error in _pose_errors(networks, posed):
        rows[case.pair] |= {"keypoint_distance": error.distance, "keypoint_rate": error.rate}
    return rows


def _pose_errors(
    networks: nets.Networks, posed: Sequence[tuple[Case, Array, Box]]
) -> Iterator[tuple[Case, pose.PoseError]]:
    """How far the generated birds' keypoints are from the targets'; pictures have the targets' sizes."""
    if networks.keypoints is None or not posed:
        return
    found = networks.keypoints([picture for _, picture, _ in posed], [box for _, _, box in posed])
    for (case, _, box), points in zip(posed, found, strict=True):
        assert case.keypoints is not None
        error = pose.keypoint_error(points, case.keypoints, max(box[2] - box[0], box[3] - box[1]))
        if error is not None:
            yield case, error


def _compare(
    case: Case, mine: nets.Description, target: nets.Description, real: Mapping[str, nets.Description]
) -> dict[str, float | int]:
    subject = real[case.subject_id]
    row: dict[str, float | int] = {}
    for name in (*nets.WHOLE, *nets.BOX):
        if name in mine:
            row[name] = float(mine[name] @ target[name])
    for name in nets.BOX:
        if name in mine:
            row[name.replace("_box", "_subject")] = float(mine[name] @ subject[name])
    if nets.PATCHES in mine:
        found = patches.match(mine[nets.PATCHES], subject[nets.PATCHES])
        row |= {"patch_precision": found.precision, "patch_recall": found.recall}
    if RETRIEVAL in mine:
        members = {c: [real[i][RETRIEVAL] for i in ids if i in real] for c, ids in case.galleries.items()}
        vectors = {c: np.stack(rows) for c, rows in members.items() if rows}
        if case.class_id in vectors and len(vectors) > 1:
            place = retrieval.rank(mine[RETRIEVAL], vectors, case.class_id)
            row |= {"retrieval_rank": place, "retrieval_classes": len(vectors)}
    return row


def _left(generated: Array, mask: Array) -> bool:
    """Whether the mask has a pixel left at the generated picture's size."""
    height, width = generated.shape[:2]
    return bool(resize(mask, height, width, "nearest").any())


def _read_ahead(cases: Sequence[Case], read: Reader) -> Iterator[tuple[Array, Array, Array]]:
    """(generated, target, mask) of every case; files are decoded by two threads."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda case: (case.picture(), *read(case.target_id)), cases)


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _share(
    batches: Sequence[Sequence[T]],
    make: Callable[[Sequence[T]], Arrays],
    key: Callable[[Sequence[T]], Any],
    cache: Path,
    bar: Any,
) -> list[Arrays]:
    """``make`` of every batch in order: each process makes its share of those that ``cache`` does not hold."""
    own = []
    for batch in processes.own_share(batches):
        name = hashlib.sha256(json.dumps(key(batch)).encode()).hexdigest()[:32]
        own.append(_cached(cache / f"{name}.npz", functools.partial(make, batch)))
        bar.update(len(batch))
    if len(own) == len(batches):
        return own
    parts = [_from_bytes(part) for part in processes.gather(_to_bytes(own))]
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(batches))]


def _cached(path: Path, make: Callable[[], Arrays]) -> Arrays:
    if not path.is_file():
        arrays = make()
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        runs.write_atomic(path, stream.getvalue())
        return arrays
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged cache file ({error}), delete it to have it made again") from error


def _to_bytes(batches: Sequence[Arrays]) -> bytes:
    stream = io.BytesIO()
    named = {f"{i}/{name}": array for i, arrays in enumerate(batches) for name, array in arrays.items()}
    np.savez(stream, allow_pickle=False, **named)
    return stream.getvalue()


def _from_bytes(data: bytes) -> list[Arrays]:
    found: dict[int, Arrays] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        for name in stored.files:
            number, _, own = name.partition("/")
            found.setdefault(int(number), {})[own] = stored[name]
    return [found[i] for i in sorted(found)]


def _pack(descriptions: Mapping[str, nets.Description]) -> Arrays:
    """One array for each name; patches, of which birds have different numbers, one after the other."""
    ids = np.array(list(descriptions), dtype=str) if descriptions else np.zeros(0, "<U1")
    arrays: Arrays = {"ids": ids}
    for name in next(iter(descriptions.values()), {}):
        rows = [description[name] for description in descriptions.values()]
        if name == nets.PATCHES:
            arrays["patch_counts"] = np.array([len(row) for row in rows])
            arrays[name] = np.concatenate(rows)
        else:
            arrays[name] = np.stack(rows)
    return arrays


def _unpack(arrays: Arrays) -> dict[str, nets.Description]:
    columns: dict[str, Sequence[Array]] = {k: list(v) for k, v in arrays.items() if k not in ("ids", "patch_counts")}
    if nets.PATCHES in columns:
        columns[nets.PATCHES] = np.split(arrays[nets.PATCHES], np.cumsum(arrays["patch_counts"])[:-1])
    return {str(id): {name: rows[i] for name, rows in columns.items()} for i, id in enumerate(arrays["ids"])}
