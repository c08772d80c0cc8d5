"""What the networks are shown: a bird on black ground, in its whole picture and cut out.

The whole picture is the published evaluation's; its score depends on how much of the picture the bird fills, and
DINOv2's processor crops the ends of long pictures. The cut-out shows every bird whole and at one size.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from nabla_jax.metrics import pixels
from nabla_jax.metrics.references import box_of

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class MaskedBird:
    """One bird on black ground.

    ``whole`` [H, W, 3] uint8 is the picture, ``box`` [S, S, 3] uint8 the smallest square around the mask's box (black
    where it leaves the picture), ``inside`` [S, S] bool the mask in it.
    """

    whole: Array
    box: Array
    inside: Array


def masked_bird(picture: Array, mask: Array) -> MaskedBird:
    """A picture [H, W, 3] uint8 times its mask [H, W] bool. Raises UserError if the mask is empty."""
    whole = np.where(mask[..., None], picture, np.uint8(0))
    rows, columns = box_of(mask)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    side = max(height, width)
    box, inside = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), bool)
    top, left = (side - height) // 2, (side - width) // 2
    place = (slice(top, top + height), slice(left, left + width))
    # Of what surrounds the box nothing is foreground: the square around it needs no more of the picture.
    box[place], inside[place] = whole[rows, columns], mask[rows, columns]
    return MaskedBird(whole, box, inside)


def masked_pair(generated: Array, target: Array, mask: Array) -> tuple[MaskedBird, MaskedBird]:
    """(generated, target), both times the target's mask and at the generated size, as the published evaluation does.

    Raises UserError if no pixel of the mask is left at that size.
    """
    target, inside = pixels.at_size_of(generated, target, mask)
    return masked_bird(generated, inside), masked_bird(target, inside)


def patch_shares(inside: Array, grid: tuple[int, int]) -> Array:
    """The foreground's share of each patch, [h * w] float64 in row-major order, of a grid (h, w) laid over ``inside``.

    ``inside`` [H, W] bool of any size; pixels on a patch's border count in parts.
    """
    rows, columns = (_cover(size, n) for size, n in zip(inside.shape, grid, strict=True))
    shares: Array = rows @ inside.astype(np.float64) @ columns.T
    return shares.reshape(-1)


def colours(bird: MaskedBird, bins: int = 6) -> Array:
    """Square roots of the shares of the bird's pixels in each colour, [bins ** 3] float32: a unit vector.

    The product of two birds' vectors is the Bhattacharyya coefficient of their colours (1: equal shares). A pixel is
    shared out to the eight nearest of the bins' centres, which lie evenly from 0 to 255 in red, green and blue, by its
    nearness to each (trilinear weights): no colour is cut off from a similar one.
    """
    places = bird.box[bird.inside].astype(np.float64) * ((bins - 1) / 255)
    first = np.minimum(places.astype(int), bins - 2)
    share = places - first
    counts = np.zeros(bins**3)
    for corner in itertools.product((0, 1), repeat=3):
        weights = np.where(np.array(corner, bool), share, 1 - share).prod(axis=1)
        counts += np.bincount((first + corner) @ (bins**2, bins, 1), weights, bins**3)
    shares: Array = np.sqrt(counts / counts.sum()).astype(np.float32)
    return shares


def _cover(size: int, n: int) -> Array:
    """[n, size]: row i averages the pixels of part i of n."""
    edges = np.arange(n + 1) * (size / n)
    places = np.arange(size)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return np.clip(overlap, 0, None) * (n / size)
