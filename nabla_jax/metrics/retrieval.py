"""Retrieval identity: is the generated bird nearest to real pictures of its own class, among its siblings?

The siblings of a class are the classes (species and plumages) of the nearest taxonomic group that has another species.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax.data.dataset import Dataset, Example

Array = np.ndarray[Any, Any]

# Pictures that stand for a class: more change its mean little, and a large data set has 50,000.
PER_CLASS = 8


def leaves(dataset: Dataset) -> list[Example]:
    """One example of each class that has a picture with a mask."""
    first: dict[int, Example] = {}
    for example in dataset.examples:
        if example.mask is not None:
            first.setdefault(example.class_id, example)
    return list(first.values())


def siblings(leaves: Sequence[Example], example: Example) -> list[int]:
    """Class ids of the nearest taxonomic group above ``example`` that has another species, its own among them.

    Its own alone where there is a single species. ``leaves`` is one example of each class.
    """
    for depth in range(len(example.taxonomy) - 1, -1, -1):
        node = example.taxonomy[:depth]
        members = [e for e in leaves if e.taxonomy[:depth] == node]
        if any(e.species != example.species for e in members):
            return sorted({e.class_id for e in members} | {example.class_id})
    return [example.class_id]


def gallery(dataset: Dataset, class_id: int) -> list[str]:
    """Ids of up to ``PER_CLASS`` + 2 pictures with a mask that stand for a class, in a fixed order without meaning.

    Two more than are compared with, because a pair's own two are left out.
    """
    found = [dataset.examples[i] for i in dataset.classes.get(class_id, ())]
    ids = sorted((hashlib.sha256(e.id.encode()).digest(), e.id) for e in found if e.mask is not None)
    return [id for _, id in ids[: PER_CLASS + 2]]


def members(ids: Sequence[str], subject_id: str, target_id: str) -> list[str]:
    """Those of a gallery that a pair is compared with: without its own two pictures.

    Where the class has no other picture, its subject; never the target, whose silhouette the generated bird has.
    """
    others = [id for id in ids if id not in (subject_id, target_id)]
    return others[:PER_CLASS] or [id for id in ids if id != target_id]


def rank(query: Array, vectors: Mapping[int, Array], own: int) -> int:
    """Place of the class ``own`` by mean cosine with the query, 1 is nearest; a tie counts against it.

    Args:
      query: [D] of unit length.
      vectors: class id -> unit vectors [n, D] of its pictures, n at least 1.
      own: a class id of ``vectors``.
    """
    scores = {class_id: float(np.mean(found @ query)) for class_id, found in vectors.items()}
    return 1 + sum(score >= scores[own] for class_id, score in scores.items() if class_id != own)
