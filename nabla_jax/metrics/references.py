"""Reference points: pictures that no model made, for a table to be readable.

Each takes uint8 RGB pictures [H, W, 3] and bool masks [H, W] and returns a picture of the target's size. None
shows a pixel of the target's bird, except `copy_target`, which is all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.images import resize

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")


def copy_target(target: Array) -> Array:
    """The target's own picture: the same bird or another of its class, in the right place."""
    return target.copy()


def flat_colour(subject: Array, subject_mask: Array, target: Array, target_mask: Array) -> Array:
    """The target's picture, its bird painted in the mean colour of the subject's bird.

    Raises UserError if the subject's mask is empty.
    """
    box_of(subject_mask)
    picture = target.copy()
    picture[target_mask] = np.floor(subject[subject_mask].mean(0) + 0.5).astype(np.uint8)
    return picture


def paste_subject(subject: Array, subject_mask: Array, target: Array, target_mask: Array) -> Array:
    """The subject cropped to its mask's box, stretched to the box of the target's mask and pasted there.

    The bird is pasted whole; where it leaves some of the target's silhouette open, its own background fills
    it. Raises UserError if a mask is empty.
    """
    from_rows, from_columns = box_of(subject_mask)
    rows, columns = box_of(target_mask)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    bird = stretch(subject[from_rows, from_columns], height, width)
    outline = resize(subject_mask[from_rows, from_columns], height, width, "nearest")
    picture = target.copy()
    shown = outline | target_mask[rows, columns]
    picture[rows, columns][shown] = bird[shown]
    return picture


def stretch(image: Array, height: int, width: int) -> Array:
    """`image` at exactly (height, width): averaged along a side that shrinks, interpolated along one that
    grows.
    """
    down = resize(image, min(height, image.shape[0]), min(width, image.shape[1]), "area")
    return resize(down, height, width, "bilinear")


def box_of(mask: Array) -> tuple[slice, slice]:
    """(rows, columns) of the smallest box that holds the mask; UserError if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise UserError("mask is empty, expected at least one foreground pixel")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def choose(items: Sequence[Item], seed: int, pair: str, purpose: str) -> Item:
    """One of `items`, drawn from a key made of (seed, pair, purpose) alone: order of work does not matter."""
    digest = hashlib.sha256(f"{seed}/{pair}/{purpose}".encode()).digest()
    return items[int.from_bytes(digest[:8], "big") % len(items)]
