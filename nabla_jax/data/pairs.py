"""Who is paired with whom: benchmark lists, and the samplers of training.

Two pictures of one leaf class stand for one individual (proxy identity). Benchmarks are lists on disk, used
in both directions. Training pairs are drawn by index arithmetic: sample n of a stream is a function of (seed,
n) alone, so a stream can be cut over processes, resumed anywhere, and is never stored.
"""

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

from nabla_jax.data import clips, inaturalist, manifest, nabirds
from nabla_jax.data import taxonomy as tax
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import read_csv
from nabla_jax.errors import UserError
from nabla_jax.untrusted import whole_number

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

    An iNaturalist folder has a list of its own, any other ``pairs.csv``: image_1,image_2 and, for NABirds, class_id.
    ``root`` may also be another list in such a folder, for example of strictly unseen species. Clips need none: without
    one, frames of one clip are paired, see ``clips.frame_pairs``. Repeated rows are kept, since published numbers count
    them; ``duplicate_rows`` counts them and a line is logged. ``dataset`` saves reading the folder again.

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


def lists_observations(folder: Path) -> bool:
    """Whether a row of the folder's list is an observation of iNaturalist: two photos of it, never of two birds."""
    return inaturalist.is_layout(folder) and not (nabirds.is_layout(folder) or manifest.is_layout(folder))


def _rows(folder: Path, path: Path | None, dataset: Dataset) -> list[tuple[int, str, str]]:
    """(row number, id of image_1, id of image_2) of every row."""
    if lists_observations(folder):
        return _inat_rows(folder, path)
    if path is None and clips.is_layout(folder) and not (folder / "pairs.csv").is_file():
        return [(number, first, second) for number, (first, second) in enumerate(clips.frame_pairs(dataset))]
    return _listed_rows(folder, path or folder / "pairs.csv", dataset)


def duplicate_rows(pairs: Sequence[Pair]) -> int:
    """How many rows repeat an earlier one, in either order of its two pictures."""
    forward = Counter(frozenset((p.subject_id, p.target_id)) for p in pairs if p.key.endswith("_1in2"))
    return sum(count - 1 for count in forward.values())


def _listed_rows(root: Path, path: Path, dataset: Dataset) -> list[tuple[int, str, str]]:
    columns = ("class_id", "image_1", "image_2") if nabirds.is_layout(root) else ("image_1", "image_2")
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a list of pairs with columns {','.join(columns)}")
    problems = Problems()
    rows = read_csv(path, columns, problems)
    problems.refuse()
    by_file = {e.image.relative_to(root).as_posix(): e for e in dataset.examples}
    found = []
    for index, (line, values) in enumerate(rows):
        where = f"{path}:{line}"
        sides = []
        for column in ("image_1", "image_2"):
            # Lists write ./images/0295/…; PurePosixPath drops the leading dot.
            example = by_file.get(PurePosixPath(values[column]).as_posix())
            if example is None:
                raise UserError(f"{where}: {column}: {values[column]} is not in the lists of {root}")
            stated = values.get("class_id", str(example.class_id))
            if whole_number(stated) != example.class_id:
                raise UserError(f"{where}: class_id {stated}, but {column} is of class {example.class_id}")
            sides.append(example.id)
        if sides[0] == sides[1]:
            raise UserError(f"{where}: image_1 and image_2 are one picture, expected two")
        found.append((index, sides[0], sides[1]))
    if not found:
        raise UserError(f"{path}: found no pair, expected at least one")
    return found


def _inat_rows(root: Path, path: Path | None) -> list[tuple[int, str, str]]:
    return [(row.number, row.id("image_1"), row.id("image_2")) for row in inaturalist.rows(root, path)]


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


LEVELS = ("self", "class", "species", "family", "order")
"""What two pictures may share, finest first: the picture itself, the leaf class, the species (the leaf without its
qualifier), and the nodes two and one below the root."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """One training pair: positions of two pictures, and the finest of ``LEVELS`` that they share."""

    subject: int
    target: int
    level: str = "class"


Sampler = Callable[[int, int], Draw]
"""(seed, n) -> the n-th pair of that stream."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What some samplers need beside the classes; see ``level`` and ``mined``."""

    taxonomy: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)  # class id -> root to leaf
    levels: Sequence[str] = ("0 class",)  # schedule: "STEP LEVEL[=WEIGHT] ..."
    batch: int = 1  # samples of the stream that make one step
    features: Callable[[], Array] | None = None  # -> [positions, D], read only by the sampler that needs them
    similarity: float = 0.0  # smallest cosine of a look-alike


def _groups(classes: Mapping[Any, Sequence[int]]) -> list[Array]:
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


def _draw_bits(seed: int, n: int, count: int) -> list[int]:
    return [int(b) for b in np.atleast_1d(_philox(_stream(seed), n).random_raw(count))]


def all_pairs(classes: Mapping[int, Sequence[int]], _: Options = Options()) -> Sampler:
    """Uniform over all ordered same-class pairs, as the reference enumerates them: a class weighs n(n-1)."""
    groups = _groups(classes)
    ends = np.cumsum([len(g) * (len(g) - 1) for g in groups])

    def sample(seed: int, n: int) -> Draw:
        (bits,) = _draw_bits(seed, n, 1)
        rank = below(bits, int(ends[-1]))
        place = int(np.searchsorted(ends, rank, side="right"))
        return _within(groups[place], rank - (int(ends[place - 1]) if place else 0))

    return sample


def class_uniform(classes: Mapping[int, Sequence[int]], _: Options = Options()) -> Sampler:
    """Uniform over classes with two or more pictures, then uniform over the class's ordered pairs."""
    groups = _groups(classes)

    def sample(seed: int, n: int) -> Draw:
        first, second = _draw_bits(seed, n, 2)
        group = groups[below(first, len(groups))]
        return _within(group, below(second, len(group) * (len(group) - 1)))

    return sample


def _target_first(classes: Mapping[Any, Sequence[int]]) -> Callable[[int, int], Draw]:
    """(64 bits, 64 bits) -> a target uniform over the pictures with a partner, a subject uniform over its group."""
    groups = _groups(classes)
    ends = np.cumsum([len(g) for g in groups])

    def pick(first: int, second: int) -> Draw:
        rank = below(first, int(ends[-1]))
        place = int(np.searchsorted(ends, rank, side="right"))
        group, target = groups[place], rank - (int(ends[place - 1]) if place else 0)
        subject = below(second, len(group) - 1)
        return Draw(int(group[subject + (subject >= target)]), int(group[target]))

    return pick


def image_uniform(classes: Mapping[int, Sequence[int]], _: Options = Options()) -> Sampler:
    """Target uniform over the pictures that have a partner, subject uniform over the others of its class."""
    pick = _target_first(classes)
    return lambda seed, n: pick(*_draw_bits(seed, n, 2))


def level(classes: Mapping[int, Sequence[int]], options: Options) -> Sampler:
    """A curriculum over taxonomic levels: each sample's level is drawn by the weights of its step.

    ``options.levels`` holds entries "STEP LEVEL[=WEIGHT] ...", valid from that step on; the first begins at step 0,
    and sample n belongs to step n // ``options.batch``. At level ``self`` a picture is paired with itself, uniform
    over all pictures. At any other level the target is uniform over the pictures whose group has another one, and the
    subject uniform over the others of that group: pairs of a coarse level include those of the finer ones, and the
    draw's own ``level`` says what its two pictures share.

    Raises UserError for a malformed schedule, and for a level that a class's taxonomy does not have.
    """
    starts, weights = schedule(options.levels)
    used = [name for k, name in enumerate(LEVELS) if any(row[k] for row in weights)]
    keys = {c: _level_keys(c, options.taxonomy.get(c, ()), used) for c in classes}
    class_of = {int(position): c for c, members in classes.items() for position in members}
    positions = np.array(sorted(class_of))
    picks = {name: _target_first(_merge(classes, keys, name)) for name in used if name != "self"}
    cumulative = [np.cumsum(row) / sum(row) for row in weights]

    def sample(seed: int, n: int) -> Draw:
        first, second, third = _draw_bits(seed, n, 3)
        place = int(np.searchsorted(starts, n // options.batch, side="right")) - 1
        # 53 bits: the last of them decide nothing, and the sum of the weights is never reached.
        name = LEVELS[int(np.searchsorted(cumulative[place], (third >> 11) * 2.0**-53, side="right"))]
        if name == "self":
            position = int(positions[below(first, len(positions))])
            return Draw(position, position, "self")
        draw = picks[name](first, second)
        own, other = keys[class_of[draw.target]], keys[class_of[draw.subject]]
        shared = next(
            each for each in LEVELS[1 : LEVELS.index(name) + 1] if each in own and own[each] == other.get(each)
        )
        return dataclasses.replace(draw, level=shared)

    return sample


def schedule(entries: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """First steps, and the weights of ``LEVELS`` from each on. Raises UserError naming the entry that is wrong."""
    starts: list[int] = []
    weights: list[list[float]] = []
    for entry in entries:
        step, *items = entry.split()[:1] or [""], *entry.split()[1:]
        row = dict.fromkeys(LEVELS, 0.0)
        for item in items:
            name, equals, text = item.partition("=")
            weight = _weight(text) if equals else 1.0
            if name not in row or weight is None or row[name]:
                raise UserError(
                    f"data.levels: {entry!r}: found {item!r}, expected LEVEL or LEVEL=WEIGHT, once each, of "
                    f"{', '.join(LEVELS)}"
                )
            row[name] = weight
        first = int(step[0]) if step[0].isdecimal() else -1
        if first < 0 or (first <= starts[-1] if starts else first > 0) or not sum(row.values()) > 0:
            raise UserError(
                f"data.levels: {entry!r}: expected 'STEP LEVEL[=WEIGHT] ...' with rising steps from 0 and a weight "
                "above 0"
            )
        starts.append(first)
        weights.append(list(row.values()))
    if not starts:
        raise UserError("data.levels: found no entry, expected at least '0 class'")
    return starts, weights


def _weight(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _level_keys(class_id: int, path: Sequence[str], used: Sequence[str]) -> dict[str, Any]:
    """Level -> what identifies the class's group there, from ``class`` up to the coarsest level that is used."""
    keys: dict[str, Any] = {"class": class_id}
    for name in LEVELS[2 : 1 + max(LEVELS.index(each) for each in used)]:
        # The root is at depth 0, and a leaf is no group above itself.
        depth = {"species": 0, "family": 2, "order": 1}[name]
        if len(path) > depth + (name != "species"):
            keys[name] = tax.species_name(path[-1]) if name == "species" else tuple(path[: depth + 1])
        elif name in used:
            found = " > ".join(path) or "no taxonomy"
            raise UserError(f"data.levels: {name}: class {class_id} has none (found {found})")
    return keys


def _merge(
    classes: Mapping[int, Sequence[int]], keys: Mapping[int, Mapping[str, Any]], name: str
) -> dict[Any, Sequence[int]]:
    merged: dict[Any, list[int]] = {}
    for c in sorted(classes):
        merged.setdefault(keys[c][name], []).extend(classes[c])
    return {key: sorted(members) for key, members in merged.items()}


# Rows of one block of similarities: a class of 20,000 pictures then needs 40 MB.
_BLOCK = 512


def mined(classes: Mapping[int, Sequence[int]], options: Options) -> Sampler:
    """Look-alikes: target uniform over the pictures that have one, subject uniform over the target's look-alikes.

    A look-alike is another picture of the same class whose features have a cosine of at least ``options.similarity``
    with the target's. Similarities are computed class by class, in blocks of rows, and a target's row again when it
    is drawn: nothing of the size of the pairs is kept. Raises UserError without features or look-alikes.
    """
    if options.features is None:
        raise UserError("train.sampler: mined needs features, found none; set data.vision and prepare again")
    features = unit_grid(options.features())
    members = {c: np.asarray(sorted(classes[c])) for c in sorted(classes)}
    targets = []
    for own in members.values():
        for start in range(0, len(own), _BLOCK):
            rows = own[start : start + _BLOCK]
            similar = _similarities(features, rows, own) >= options.similarity
            similar[np.arange(len(rows)), start + np.arange(len(rows))] = False
            targets.append(rows[similar.any(1)])
    usable = np.concatenate(targets)
    if not len(usable):
        raise UserError(
            f"data.similarity: found no two pictures of a class with a cosine of {options.similarity} or more"
        )
    total = sum(map(len, members.values()))
    logging.getLogger(__name__).info("mined: %d of %d pictures have a look-alike", len(usable), total)
    class_of = {int(position): c for c, own in members.items() for position in own}

    def sample(seed: int, n: int) -> Draw:
        first, second = _draw_bits(seed, n, 2)
        target = int(usable[below(first, len(usable))])
        own = members[class_of[target]]
        similar = _similarities(features, np.array([target]), own)[0] >= options.similarity
        similar[np.searchsorted(own, target)] = False
        partners = own[similar]
        return Draw(int(partners[below(second, len(partners))]), target)

    return sample


def unit_grid(features: Array) -> Array:
    """Features [N, D] at unit length, rounded to multiples of 2^-11: [N, D] float16.

    Products of such numbers are multiples of 2^-22 and their sums stay below 4, so that float32 holds every partial
    sum exactly: a cosine, and with it the stream of pairs, is the same in any order of summation and on any machine.
    The rounding moves a cosine by about 2e-4.
    """
    length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not (length > 0).all() or not np.isfinite(length).all():
        raise UserError("features: found a picture whose features are zero or not finite")
    return (np.round(features / length * 2**11) / 2**11).astype(np.float16)


def _similarities(features: Array, rows: Array, columns: Array) -> Array:
    similarities: Array = features[rows].astype(np.float32) @ features[columns].astype(np.float32).T
    return similarities


SAMPLERS: dict[str, Callable[[Mapping[int, Sequence[int]], Options], Sampler]] = {
    "all_pairs": all_pairs,
    "class_uniform": class_uniform,
    "image_uniform": image_uniform,
    "level": level,
    "mined": mined,
}


def sampler(name: str, classes: Mapping[int, Sequence[int]], options: Options = Options()) -> Sampler:
    """The sampler ``name`` over class id -> positions.

    Raises UserError for an unknown name, no possible pair, or options that do not fit the sampler.
    """
    if name not in SAMPLERS:
        raise UserError(f"train.sampler: found {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](classes, options)


def few(classes: Mapping[int, Sequence[int]], ids: Sequence[str], count: int) -> dict[int, tuple[int, ...]]:
    """``count`` positions of each class, chosen by the pictures' ``ids``; all of a class that has no more.

    The choice is fixed, does not depend on what else there is, and a smaller one is part of a larger one.
    """
    return {
        c: tuple(sorted(sorted(members, key=lambda position: _fold(0, ids[position], "few"))[:count]))
        for c, members in classes.items()
    }


def count_pairs(classes: Mapping[int, Sequence[int]]) -> int:
    """How many ordered pairs of different pictures of one class there are; none is made."""
    return sum(len(members) * (len(members) - 1) for members in classes.values())
