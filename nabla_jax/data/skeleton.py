"""Keypoints as a picture: the bird's skeleton in colours that tell its parts apart.

Lines first, then a dot for each part, both in hues evenly spaced on the HUSL wheel. Parts that are hidden, and lines
that lead to them, are left out.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]

PARTS = (
    "bill", "crown", "nape", "left eye", "right eye", "belly", "breast", "back", "tail", "left wing", "right wing"
)  # fmt: skip
"""NABirds' parts in the order of their ids."""

DENSE = (
    ("crown", "bill"), ("crown", "nape"), ("crown", "left eye"), ("crown", "right eye"), ("bill", "left eye"),
    ("bill", "right eye"), ("bill", "breast"), ("nape", "left eye"), ("nape", "right eye"), ("nape", "back"),
    ("nape", "left wing"), ("nape", "right wing"), ("back", "left wing"), ("back", "right wing"), ("tail", "back"),
    ("tail", "right wing"), ("tail", "left wing"), ("breast", "left eye"), ("breast", "right eye"),
    ("breast", "belly"), ("belly", "tail"), ("breast", "right wing"), ("breast", "left wing"),
    ("belly", "right wing"), ("belly", "left wing"),
)  # fmt: skip
SPARSE = (
    ("bill", "crown"), ("crown", "nape"), ("left eye", "bill"), ("right eye", "bill"), ("belly", "breast"),
    ("breast", "bill"), ("back", "nape"), ("tail", "back"), ("left wing", "back"), ("right wing", "back"),
)  # fmt: skip
SKELETONS: Mapping[str, Sequence[tuple[str, str]]] = {"dense": DENSE, "sparse": SPARSE, "dots": ()}
"""Name -> lines between parts, in the order in which they are drawn."""


def draw(keypoints: Array, height: int, width: int, skeleton: str = "dense", dot: int = 15, line: int = 10) -> Array:
    """The skeleton on black.

    Args:
      keypoints: [11, 3] int (row, column, visible), parts in the order of ``PARTS``; points may lie outside.
      height, width: of the picture in pixels.
      skeleton: name of the lines between parts.
      dot: diameter of a part's dot in pixels.
      line: width of a line in pixels.

    Returns:
      [height, width, 3] uint8.

    Raises:
      UserError: an unknown skeleton, or another number of parts.
    """
    from PIL import Image, ImageDraw

    if skeleton not in SKELETONS:
        raise UserError(f"conditioning.skeleton: found {skeleton!r}, expected one of {', '.join(SKELETONS)}")
    if keypoints.shape != (len(PARTS), 3):
        raise UserError(f"keypoints: found shape {keypoints.shape}, expected ({len(PARTS)}, 3): row, column, visible")
    canvas = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(canvas)
    places = {part: (int(x), int(y)) for part, (y, x, visible) in zip(PARTS, keypoints, strict=True) if visible}
    edges = SKELETONS[skeleton]
    for (start, end), colour in zip(edges, husl_palette(len(edges)), strict=True):
        if start in places and end in places:
            pen.line([places[start], places[end]], fill=colour, width=line)
    for part, colour in zip(PARTS, husl_palette(len(PARTS)), strict=True):
        if part in places:
            x, y = places[part]
            pen.ellipse((x - dot / 2, y - dot / 2, x + dot / 2, y + dot / 2), fill=colour)
    return np.asarray(canvas)


@functools.cache
def husl_palette(count: int) -> tuple[Colour, ...]:
    """``count`` colours of equal lightness 0.65 and saturation 0.9, hues evenly spaced from 0.01 turns on.

    HUSL (hsluv.org, A. Boronine): the largest chroma of a hue and lightness inside sRGB is a saturation of 100.
    """
    hues = (np.linspace(0, 1, count + 1)[:-1] + 0.01) % 1 * 359
    return tuple(_husl(float(hue), 0.9 * 99, 0.65 * 99) for hue in hues)


# CIE 1976 L*u*v* under D65, and linear sRGB from XYZ; the digits are those of HUSL's definition.
_WHITE_U, _WHITE_V = 0.19784, 0.46834
_RGB_OF_XYZ = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))
_KAPPA, _EPSILON = 903.3, 0.008856


def _husl(hue: float, saturation: float, lightness: float) -> Colour:
    chroma = _largest_chroma(hue, lightness) * saturation / 100
    u = chroma * math.cos(math.radians(hue)) / (13 * lightness) + _WHITE_U
    v = chroma * math.sin(math.radians(hue)) / (13 * lightness) + _WHITE_V
    y = _luminance(lightness)
    x = 9 * y * u / (4 * v)
    z = (9 * y - 15 * v * y - v * x) / (3 * v)
    red, green, blue = (_encoded(row[0] * x + row[1] * y + row[2] * z) for row in _RGB_OF_XYZ)
    return red, green, blue


def _luminance(lightness: float) -> float:
    cubed = ((lightness + 16) / 116) ** 3
    return cubed if cubed > _EPSILON else lightness / _KAPPA


def _largest_chroma(hue: float, lightness: float) -> float:
    """Distance along a hue to the nearest of the six lines at which a channel of linear sRGB is 0 or 1."""
    y = _luminance(lightness)
    sine, cosine = math.sin(math.radians(hue)), math.cos(math.radians(hue))
    found = math.inf
    for a, b, c in _RGB_OF_XYZ:
        for limit in (0.0, 1.0):
            # a x + b y + c z = limit with x = 9 y u / 4 v, z = y (12 - 3 u - 20 v) / 4 v: linear in u and v.
            along_u = y * (9 * a - 3 * c)
            along_v = 4 * (b * y - limit) - 20 * c * y
            constant = 12 * c * y
            at_white = along_u * _WHITE_U + along_v * _WHITE_V + constant
            slope = (along_u * cosine + along_v * sine) / (13 * lightness)
            if slope and -at_white / slope > 0:
                found = min(found, -at_white / slope)
    return found


def _encoded(linear: float) -> int:
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    # Truncated, not rounded: the published colours.
    return int(255 * min(max(value, 0.0), 1.0))
