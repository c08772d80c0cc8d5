"""Who is paired with whom: benchmark lists, and the samplers of training.

Two pictures of one leaf class stand for one individual (proxy identity). Benchmarks are lists on disk, used
in both directions. Training pairs are drawn by index arithmetic: sample n of a stream is a function of (seed,
n) alone, so a stream can be cut over processes, resumed anywhere, and is never stored.
"""

import csv
import dataclasses
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nabla_jax.data import clips, inaturalist, nabirds
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]


# ------------------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """Put the bird of one picture into another: the subject takes the target's pose and place."""

    # "<row>_1in2": image_1 of that row (from 0) is the subject, image_2 the target; "<row>_2in1": reversed
    key: str
    subject_id: str
    target_id: str
    class_id: int


def benchmark_pairs(root: str | os.PathLike[str], dataset: Dataset | None = None) -> list[Pair]:
    """The pair list of a dataset folder, each row in both directions, in the list's order.

    ``root`` may also be another list in such a folder, for example of strictly unseen species. Clips without a list
    are paired by ``clips.frame_pairs``. Repeated rows are kept, since published numbers count them; ``duplicate_rows``
    counts them and a line is logged. ``dataset`` saves reading the folder again.

    Raises UserError naming file and line for a malformed row or a picture that is not in the folder.
    """
    from nabla_jax.data import read_dataset

    folder, path = split_list(root)
    dataset = read_dataset(folder) if dataset is None else dataset
    pairs = []
    for number, first, second in _rows(folder, path, dataset):
        class_id = dataset.by_id[second].class_id
        pairs += [
            Pair(f"{number}_1in2", first, second, class_id),
            Pair(f"{number}_2in1", second, first, class_id),
        ]
    repeated = duplicate_rows(pairs)
    if repeated:
        logging.getLogger(__name__).info("%s: %d repeated pairs, kept", root, repeated)
    return pairs


def split_list(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(dataset folder, None), or (its folder, the list) where ``path`` is a pair list in it."""
    path = Path(path)
    return (path.parent, path) if path.is_file() else (path, None)


def spread(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """``limit`` pairs for a quick look, as many classes as possible, in the list's order; all where it is None.

    The choice is fixed and a smaller one is part of a larger one. Both directions of a row come together, but for the
    last one of an odd limit.
    """
    if limit is None:
        return list(pairs)
    rows: dict[int, dict[str, list[int]]] = {}
    for position, pair in enumerate(pairs):
        rows.setdefault(pair.class_id, {}).setdefault(pair.key.rpartition("_")[0], []).append(position)
    drawn = []
    for of_class in rows.values():
        order = sorted((_fold(0, pairs[found[0]].subject_id, pairs[found[0]].target_id), found)
                       for found in of_class.values())  # fmt: skip
        drawn += [(turn, draw, found) for turn, (draw, found) in enumerate(order)]
    chosen = [position for _, _, found in sorted(drawn) for position in found][:limit]
    return [pairs[position] for position in sorted(chosen)]


def _rows(folder: Path, path: Path | None, dataset: Dataset) -> list[tuple[int, str, str]]:
    if inaturalist.is_layout(folder):
        return _inat_rows(folder, path)
    if path is None and not (folder / "pairs.csv").is_file() and clips.is_layout(folder):
        return [(number, *pair) for number, pair in enumerate(clips.frame_pairs(dataset))]
    return _class_rows(folder, path or folder / "pairs.csv", dataset)


def duplicate_rows(pairs: Sequence[Pair]) -> int:
    """How many rows repeat an earlier one, in either order of its two pictures."""
    forward = Counter(frozenset((p.subject_id, p.target_id)) for p in pairs if p.key.endswith("_1in2"))
    return sum(count - 1 for count in forward.values())


def _class_rows(root: Path, path: Path, dataset: Dataset) -> list[tuple[int, str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a list of pairs with columns class_id,image_1,image_2")
    numbered = list(nabirds.lines(path))
    by_file = {e.image.relative_to(root).as_posix(): e for e in dataset.examples}
    reader = csv.reader(text for _, text in numbered)
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in ("class_id", "image_1", "image_2") if name not in header]
    if missing:
        raise UserError(f"{path}:1: missing column {', '.join(missing)}")
    found = []
    for index, words in enumerate(reader):
        where = f"{path}:{numbered[index + 1][0]}"
        if len(words) != len(header):
            raise UserError(f"{where}: found {len(words)} fields, expected {len(header)}")
        values = dict(zip(header, words, strict=True))
        sides = []
        for column in ("image_1", "image_2"):
            # Lists write ./images/0295/…; PurePosixPath drops the leading dot.
            example = by_file.get(PurePosixPath(values[column].strip()).as_posix())
            if example is None:
                raise UserError(f"{where}: {column}: {values[column]} is not in images.txt")
            if not values["class_id"].strip().isdigit() or int(values["class_id"]) != example.class_id:
                raise UserError(f"{where}: class_id {values['class_id']}, but {column} is of class {example.class_id}")
            sides.append(example.id)
        if sides[0] == sides[1]:
            raise UserError(f"{where}: image_1 and image_2 are one picture, expected two")
        found.append((index, sides[0], sides[1]))
    if not found:
        raise UserError(f"{path}: found no pair, expected at least one")
    return found


def _inat_rows(root: Path, path: Path | None) -> list[tuple[int, str, str]]:
    found = [(row.number, row.id("image_1"), row.id("image_2")) for row in inaturalist.rows(root, path)]
    for number, first, second in found:
        if first == second:
            where = path or inaturalist.list_path(root)
            raise UserError(f"{where}: row {number}: image_1 and image_2 are one picture")
    return found


def shuffled_subjects(pairs: Sequence[Pair], dataset: Dataset, seed: int) -> dict[str, str]:
    """Pair key -> id of a subject picture of another species, to measure whether the subject matters at all.

    Drawn uniformly from the pictures of the pair's split that have a mask; each draw depends on (seed, pair
    key) alone, so that a part of a benchmark gets the same subjects as the whole. Raises UserError when the
    folder holds a single species.
    """
    pools: dict[str, list[Example]] = {}
    chosen = {}
    for pair in pairs:
        subject, target = dataset.by_id[pair.subject_id], dataset.by_id[pair.target_id]
        if subject.split not in pools:
            pool = [e for e in dataset.of_split(subject.split) if e.mask is not None]
            pools[subject.split] = sorted(pool, key=lambda e: e.id)
        pool = pools[subject.split]
        own = {subject.species, target.species}
        if all(e.species in own for e in pool):
            raise UserError(
                f"{dataset.root}: pair {pair.key}: found no picture with a mask of a species other than "
                f"{', '.join(sorted(own))}"
            )
        bits = _bits(_fold(seed, pair.key, "shuffled subject"))
        while (other := pool[below(next(bits), len(pool))]).species in own:
            pass
        chosen[pair.key] = other.id
    return chosen


# ------------------------------------------------------------------------------------------------------------
# Counter-based draws
# ------------------------------------------------------------------------------------------------------------


def _fold(seed: int, *purpose: int | str) -> tuple[int, int]:
    """128 bits that depend on everything given."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _philox(key: tuple[int, int], counter: int) -> np.random.Philox:
    # Philox4x64-10 (Salmon et al. 2011): block n is a pure function of (key, n); its raw output is stable
    # across NumPy releases, unlike that of the distributions built on it. NumPy steps the counter before the
    # first block.
    return np.random.Philox(key=np.array(key, np.uint64), counter=np.array([0, counter, 0, 0], np.uint64))


def _bits(key: tuple[int, int]) -> Any:
    generator = _philox(key, 0)
    while True:
        yield int(generator.random_raw())


def below(bits: int, n: int) -> int:
    """A uniform integer in [0, n) from 64 random bits; no value is favoured by more than n / 2^64."""
    return bits * n >> 64


# ------------------------------------------------------------------------------------------------------------
# Samplers
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Draw:
    """One training pair: positions of two different pictures of one class."""

    subject: int
    target: int


Sampler = Callable[[int, int], Draw]
"""(seed, n) -> the n-th pair of that stream."""


def _groups(classes: Mapping[int, Sequence[int]]) -> list[Array]:
    groups = [np.asarray(classes[c]) for c in sorted(classes) if len(classes[c]) > 1]
    if not groups:
        raise UserError(
            f"found {len(classes)} classes, none with two pictures, expected at least one to draw pairs from"
        )
    return groups


def _within(group: Array, rank: int) -> Draw:
    """Pair number ``rank`` of the n(n-1) ordered pairs of different members."""
    subject, target = divmod(rank, len(group) - 1)
    return Draw(int(group[subject]), int(group[target + (target >= subject)]))


@functools.lru_cache(maxsize=16)
def _stream(seed: int) -> tuple[int, int]:
    return _fold(seed, "training pairs")


def all_pairs(classes: Mapping[int, Sequence[int]]) -> Sampler:
    """Uniform over all ordered same-class pairs, as the reference enumerates them: a class weighs n(n-1)."""
    groups = _groups(classes)
    ends = np.cumsum([len(g) * (len(g) - 1) for g in groups])

    def sample(seed: int, n: int) -> Draw:
        rank = below(int(_philox(_stream(seed), n).random_raw()), int(ends[-1]))
        place = int(np.searchsorted(ends, rank, side="right"))
        return _within(groups[place], rank - (int(ends[place - 1]) if place else 0))

    return sample


def class_uniform(classes: Mapping[int, Sequence[int]]) -> Sampler:
    """Uniform over classes with two or more pictures, then uniform over the class's ordered pairs."""
    groups = _groups(classes)

    def sample(seed: int, n: int) -> Draw:
        first, second = (int(b) for b in _philox(_stream(seed), n).random_raw(2))
        group = groups[below(first, len(groups))]
        return _within(group, below(second, len(group) * (len(group) - 1)))

    return sample


def image_uniform(classes: Mapping[int, Sequence[int]]) -> Sampler:
    """Target uniform over the pictures that have a partner, subject uniform over the others of its class."""
    groups = _groups(classes)
    ends = np.cumsum([len(g) for g in groups])

    def sample(seed: int, n: int) -> Draw:
        first, second = (int(b) for b in _philox(_stream(seed), n).random_raw(2))
        rank = below(first, int(ends[-1]))
        place = int(np.searchsorted(ends, rank, side="right"))
        group, target = groups[place], rank - (int(ends[place - 1]) if place else 0)
        subject = below(second, len(group) - 1)
        return Draw(int(group[subject + (subject >= target)]), int(group[target]))

    return sample


SAMPLERS: dict[str, Callable[[Mapping[int, Sequence[int]]], Sampler]] = {
    "all_pairs": all_pairs,
    "class_uniform": class_uniform,
    "image_uniform": image_uniform,
}


def sampler(name: str, classes: Mapping[int, Sequence[int]]) -> Sampler:
    """The sampler ``name`` over class id -> positions.

    Raises UserError for an unknown name or no possible pair.
    """
    if name not in SAMPLERS:
        raise UserError(f"train.sampler: found {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](classes)
