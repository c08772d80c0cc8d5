"""What FLUX.1-Fill is asked to repaint, made from the bird's silhouette by a named policy.

A mask that is always the silhouette teaches the model to fill exactly that outline; looser masks teach it to find an
outline of its own. Every mask holds the whole silhouette. Importing this needs numpy only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nabla_jax.conditioning.geometry import mask_box, scale_box
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]
Policy = Callable[[Array, np.random.Generator], Array]

DILATION = 6
"""Pixels that ``dilated`` grows in every direction: two rounds of a 7x7 square."""
BOX_RATIOS = (1.1, 1.2)
"""``box`` is the box round the bird enlarged by a factor drawn between these."""
BULGE = 0.5
"""A side of ``bezier`` bulges by at most this share of the box."""
JITTER = 0.08
"""Each point of a curve is moved by at most this share of the box."""
POINTS = 18
"""Points along each of the four curves."""


def silhouette(mask: Array, _: np.random.Generator) -> Array:
    """The silhouette itself."""
    return mask.copy()


def dilated(mask: Array, _: np.random.Generator) -> Array:
    """The silhouette grown by ``DILATION`` pixels in every direction."""
    from skimage.morphology import dilation, footprint_rectangle

    side = 2 * DILATION + 1
    grown: Array = dilation(mask, footprint_rectangle((side, side), decomposition="separable"))
    return grown


def box(mask: Array, rng: np.random.Generator) -> Array:
    """A box round the bird, 1.1 to 1.2 times as large as the smallest."""
    top, left, bottom, right = scale_box(mask_box(mask), rng.uniform(*BOX_RATIOS), *mask.shape)
    result = np.zeros(mask.shape, bool)
    result[top:bottom, left:right] = True
    return result


def bezier(mask: Array, rng: np.random.Generator) -> Array:
    """The smallest box round the bird, each side bulging outwards along a quadratic Bezier curve with jitter.

    Curve: from corner to corner, drawn towards the middle of a side of a larger box (Yang et al. 2023, "Paint by
    Example").
    """
    from skimage.draw import polygon

    top, left, bottom, right = mask_box(mask)
    size = np.array([bottom - top, right - left])
    outwards = rng.uniform(0, BULGE, 4) * size[[0, 1, 0, 1]]
    middle = (np.array([top, left]) + np.array([bottom, right])) / 2
    corners = np.array([[top, left], [top, right], [bottom, right], [bottom, left]], float)
    # A quadratic curve reaches half-way to its control point.
    controls = np.array(
        [
            [top - 2 * outwards[0], middle[1]],
            [middle[0], right + 2 * outwards[1]],
            [bottom + 2 * outwards[2], middle[1]],
            [middle[0], left - 2 * outwards[3]],
        ]
    )
    t = np.linspace(0, 1, POINTS, endpoint=False)[:, None]
    outline = [
        (1 - t) ** 2 * corners[i] + 2 * t * (1 - t) * controls[i] + t**2 * corners[(i + 1) % 4] for i in range(4)
    ]
    points = np.concatenate(outline) + rng.uniform(-JITTER, JITTER, (4 * POINTS, 2)) * size
    result = np.zeros(mask.shape, bool)
    result[polygon(points[:, 0], points[:, 1], mask.shape)] = True
    result[top:bottom, left:right] = True
    return result


POLICIES: Mapping[str, Policy] = {"silhouette": silhouette, "dilated": dilated, "box": box, "bezier": bezier}
"""Mask policies by name."""


def repaint_mask(mask: Array, policy: str, rng: np.random.Generator) -> Array:
    """The part of a picture to repaint.

    Args:
      mask: [H, W] bool, the bird's silhouette.
      policy: a name of ``POLICIES``.
      rng: of this one mask, see ``draws.generator``; equal generators give equal masks.

    Returns:
      [H, W] bool, holds all of ``mask``.

    Raises:
      UserError: an unknown policy, or a mask without foreground.
    """
    if policy not in POLICIES:
        raise UserError(f"mask policy: found {policy!r}, expected one of {', '.join(POLICIES)}")
    if not mask.any():
        raise UserError("mask: found no foreground pixel, expected the bird's silhouette")
    return POLICIES[policy](mask, rng)
