"""Which pictures of a class look most alike: disjoint pairs by features, and classes that vary unusually much.

Features of two kinds count, each divided by its mean over all pairs of one class, so that distance 1 is that of an
average pair and distances of different classes compare.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]

_BLOCK = 512  # rows of distances at a time: a class of 20,000 pictures then needs 80 MB


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Two pictures, by position, and how far apart they are; 1 is an average pair of one class."""

    first: int
    second: int
    distance: float


@dataclasses.dataclass(frozen=True)
class ClassProposals:
    """A class's pairs, most alike first.

    ``spread`` is the mean distance of all its pairs, ``varied`` whether that is unusually large.
    """

    class_id: int
    pictures: int
    spread: float
    varied: bool
    pairs: tuple[Proposal, ...]


@dataclasses.dataclass(frozen=True)
class Looks:
    """Pictures as vectors [N, D] of one length: their distance is ``radius`` minus their product."""

    vectors: Array
    radius: float

    def spread(self, members: Sequence[int]) -> float:
        """The mean distance of all pairs of different members."""
        n = len(members)
        total = self.vectors[np.asarray(members)].sum(axis=0)
        return self.radius - float(total @ total - n * self.radius) / (n * (n - 1))


def combine(parts: Sequence[tuple[float, Array]], classes: Mapping[int, Sequence[int]]) -> Looks:
    """One vector a picture from several kinds of features.

    Args:
      parts: (weight, unit vectors [N, d]) of each kind; weights are at least 0 and add up to 1. One minus the product
        of two unit vectors is their distance, which is divided by its mean over all pairs of one class.
      classes: class id -> positions of its pictures.

    Raises UserError where pictures of one class do not differ at all.
    """
    scaled, radius = [], 0.0
    for weight, vectors in parts:
        plain = Looks(vectors.astype(np.float64), 1.0)
        counts = {c: len(own) * (len(own) - 1) for c, own in classes.items() if len(own) > 1}
        mean = sum(n * plain.spread(classes[c]) for c, n in counts.items()) / max(sum(counts.values()), 1)
        if weight and not mean > 0:
            raise UserError("features: found no two pictures of one class that differ, expected some")
        if weight:
            scaled.append(np.sqrt(weight / mean) * plain.vectors)
            radius += weight / mean
    return Looks(np.concatenate(scaled, axis=1), radius)


def propose(
    looks: Looks,
    classes: Mapping[int, Sequence[int]],
    counts: Mapping[int, int],
    *,
    varied: float = 1.5,
    refused: Collection[frozenset[int]] = (),
    taken: Collection[int] = (),
) -> list[ClassProposals]:
    """For each class pairs that share no picture, the most alike first.

    Args:
      looks: the pictures.
      classes: class id -> positions of its pictures; those of one picture have no pair.
      counts: class id -> how many pairs, at most.
      varied: a class whose spread is more than so many times the median class's is marked.
      refused: pairs that are not proposed.
      taken: pictures that are not proposed; they count for the spread.
    """
    spreads = {c: looks.spread(own) for c, own in classes.items() if len(own) > 1}
    limit = varied * float(np.median([*spreads.values()])) if spreads else 0.0
    found = []
    for class_id, own in classes.items():
        free = [position for position in own if position not in taken]
        pairs = disjoint(looks, free, counts[class_id], refused)
        spread = spreads.get(class_id, 0.0)
        found.append(ClassProposals(class_id, len(own), spread, spread > limit, tuple(pairs)))
    return found


def disjoint(
    looks: Looks, members: Sequence[int], count: int, refused: Collection[frozenset[int]] = ()
) -> list[Proposal]:
    """At most ``count`` pairs of members: again and again the closest two that are left.

    Exact in memory of the size of members times ``count``: before the last pair is chosen, 2 (count - 1) pictures are
    gone, so a picture's closest one that is left is among its 2 count - 1 closest.
    """
    own = np.asarray(sorted(members))
    if len(own) < 2 or count < 1:
        return []
    near = min(2 * count, len(own) - 1)
    place = {int(position): row for row, position in enumerate(own)}
    barred = [(place[a], place[b]) for a, b in map(sorted, refused) if a in place and b in place]
    rows, columns, distances = [], [], []
    for start in range(0, len(own), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(own)))
        distance = looks.radius - looks.vectors[own[block]] @ looks.vectors[own].T
        distance[block - start, block] = np.inf
        for a, b in (*barred, *((b, a) for a, b in barred)):
            if start <= a <= block[-1]:
                distance[a - start, b] = np.inf
        closest = np.argpartition(distance, near - 1, axis=1)[:, :near]
        rows.append(np.repeat(block, near))
        columns.append(closest.reshape(-1))
        distances.append(np.take_along_axis(distance, closest, axis=1).reshape(-1))
    row, column, distance = (np.concatenate(parts) for parts in (rows, columns, distances))
    low, high = np.minimum(row, column), np.maximum(row, column)
    chosen: list[Proposal] = []
    used: set[int] = set()
    for k in np.lexsort((high, low, distance)):
        i, j = int(low[k]), int(high[k])
        if not np.isfinite(distance[k]) or len(chosen) == count:
            break
        if i not in used and j not in used:
            used |= {i, j}
            # Rounding may leave the distance of two equal pictures a little below nothing.
            chosen.append(Proposal(int(own[i]), int(own[j]), max(float(distance[k]), 0.0)))
    return chosen
