"""The square crop in which keypoints are found: where it lies, how points get into it and back, how it is varied.

Points are (row, column) in pixels of a picture, the centre of the first pixel at 0 0, as annotations give them; inside
a crop they run from 0 to 1, from edge to edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nabla_jax.conditioning.geometry import Box, Placement, clip_box, mask_box, scale_box, square_box
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.images import picture_size, read_mask

Array = np.ndarray[Any, Any]

FILL = 0
"""Grey level where a crop leaves the picture."""


@dataclasses.dataclass(frozen=True)
class Variation:
    """How training crops differ from those of use.

    Attributes:
      flip: chance of a mirrored crop.
      scale: the margin is multiplied by a factor between 1 / scale and scale.
      shift: how far the crop is moved either way, over the longer side of the box.
      colour: largest change of brightness, contrast and of each channel, as a share.
      soft: chance of blur.
    """

    flip: float = 0.5
    scale: float = 1.25
    shift: float = 0.1
    colour: float = 0.2
    soft: float = 0.3


def place(box: Box, height: int, width: int, margin: float, size: int) -> Placement:
    """The square round ``box``, ``margin`` times its longer side as far as the picture reaches, on ``size`` pixels."""
    window = scale_box(clip_box(box, height, width), margin, height, width)
    return Placement.crop(height, width, square_box(window, height, width), size)


def cut(image: Array, placement: Placement) -> Array:
    """The crop of a picture [H, W, 3] uint8: [size, size, 3] uint8."""
    return placement.apply(image, FILL, "lanczos")


def to_crop(points: Array, placement: Placement) -> Array:
    """(row, column) [..., 2] in pixels of the picture -> 0 to 1 in the crop, float64."""
    corner = np.subtract(placement.box[:2], placement.padding[:2])
    found: Array = (np.asarray(points, np.float64) + 0.5 - corner) / placement.side
    return found


def to_picture(points: Array, placement: Placement) -> Array:
    """The inverse of ``to_crop``."""
    corner = np.subtract(placement.box[:2], placement.padding[:2])
    found: Array = np.asarray(points, np.float64) * placement.side - 0.5 + corner
    return found


def bird_box(example: Example) -> Box:
    """The bird's box, or the one round its mask. Raises UserError for an example that has neither."""
    if example.box is not None:
        return example.box
    if example.mask is None:
        raise UserError(f"{example.image}: has neither box nor mask, expected one to find the bird by")
    mask = read_mask(example.mask, picture_size(example.image))
    if not mask.any():
        raise UserError(f"{example.mask}: mask is empty, expected foreground pixels above 127")
    return mask_box(mask)


def mirror_order(parts: Sequence[str]) -> Array:
    """Row of each part in a mirrored picture, int [P]: 'left X' and 'right X' change places, the others stay.

    Raises UserError for a side without its other side.
    """
    other = {"left": "right", "right": "left"}
    order = []
    for part in parts:
        side, _, rest = part.partition(" ")
        partner = f"{other[side]} {rest}" if side in other else part
        if partner not in parts:
            raise UserError(f"parts: found {part!r} without {partner!r}: a mirrored picture would have no name for it")
        order.append(list(parts).index(partner))
    return np.array(order)


def mirror(crop: Array, points: Array, visible: Array, order: Array) -> tuple[Array, Array, Array]:
    """A crop [S, S, 3], its points [P, 2] (0 to 1) and which are visible [P], mirrored: left parts become right."""
    turned = np.stack([points[:, 0], 1 - points[:, 1]], axis=1)
    return crop[:, ::-1], turned[order], visible[order]


def vary_place(rng: np.random.Generator, box: Box, variation: Variation) -> tuple[Box, float]:
    """``box`` moved, and the factor of the margin."""
    longer = max(box[2] - box[0], box[3] - box[1])
    rows, columns = np.rint(rng.uniform(-variation.shift, variation.shift, 2) * longer).astype(int).tolist()
    factor = float(np.exp(rng.uniform(-1, 1) * np.log(variation.scale)))
    return (box[0] + rows, box[1] + columns, box[2] + rows, box[3] + columns), factor


def vary_colour(rng: np.random.Generator, crop: Array, variation: Variation) -> Array:
    """A crop [S, S, 3] uint8 of another brightness, contrast and tint, now and then blurred."""
    from PIL import Image, ImageFilter

    if rng.random() < variation.soft:
        radius = rng.uniform(0.2, 1.2) * len(crop) / 64
        crop = np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(radius)))
    gains = 1 + variation.colour * rng.uniform(-1, 1, 3) / 2
    contrast, brightness = 1 + variation.colour * rng.uniform(-1, 1, 2)
    middle = crop.mean()
    values = ((crop - middle) * contrast + middle * brightness) * gains
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
