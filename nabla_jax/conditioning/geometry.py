"""How a picture gets onto the model's square canvas and back: crop, pad, resize, as one invertible value.

Sizes and boxes are (height, width) and (top, left, bottom, right) everywhere; boxes are half-open, so that
``bottom - top`` is the height and a box round a mask holds the whole bird.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.images import Array, Method, resample, resize, to_dtype

Box = tuple[int, int, int, int]

MIN_MASK_PIXELS = 10
"""A mask of fewer pixels says nothing about where the bird is; the whole picture is the subject then."""


def mask_box(mask: Array) -> Box:
    """The smallest half-open box (top, left, bottom, right) holding all foreground of ``mask`` [H, W].

    Raises ValueError for a mask without foreground.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("the mask has no foreground pixel, expected at least one")
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def clip_box(box: Box, height: int, width: int) -> Box:
    """The part of ``box`` inside a height x width picture, at least one pixel in each direction."""
    top, left, bottom, right = box
    top, left = min(max(top, 0), height - 1), min(max(left, 0), width - 1)
    return top, left, min(max(bottom, top + 1), height), min(max(right, left + 1), width)


def scale_box(box: Box, ratio: float, height: int, width: int) -> Box:
    """``box`` enlarged ``ratio`` times about its centre, to whole pixels outwards, inside a height x width picture."""
    top, left, bottom, right = box
    rows, columns = (bottom - top) * (ratio - 1) / 2, (right - left) * (ratio - 1) / 2
    grown = math.floor(top - rows), math.floor(left - columns), math.ceil(bottom + rows), math.ceil(right + columns)
    return clip_box(grown, height, width)


def square_box(box: Box, height: int, width: int) -> Box:
    """``box`` with its shorter side grown to the longer, as far as a height x width picture reaches."""
    top, left, bottom, right = box
    side = max(bottom - top, right - left)
    top, left = (top + bottom - side) // 2, (left + right - side) // 2
    return clip_box((top, left, top + side, left + side), height, width)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a picture lies on the model's square canvas.

    A picture of ``height`` x ``width`` is cropped to ``box``, padded by ``padding`` (pixels before the top,
    left and after the bottom, right of the crop) to a square, and resized to ``size`` x ``size``.
    """

    height: int
    width: int
    box: Box
    padding: Box
    size: int

    def __post_init__(self) -> None:
        top, left, bottom, right = self.box
        if not (0 <= top < bottom <= self.height and 0 <= left < right <= self.width):
            raise ValueError(f"box {self.box} is not a non-empty box of a {self.height}x{self.width} picture")
        if min(self.padding) < 0 or self.size < 1:
            raise ValueError(f"padding {self.padding} and size {self.size} must not be negative or zero")
        if bottom - top + self.padding[0] + self.padding[2] != right - left + self.padding[1] + self.padding[3]:
            raise ValueError(f"box {self.box} with padding {self.padding} is not square")

    @classmethod
    def crop(cls, height: int, width: int, box: Box, size: int) -> "Placement":
        """``box`` of a height x width picture, centred on the square; an odd pixel of padding comes after."""
        rows, columns = box[2] - box[0], box[3] - box[1]
        side = max(rows, columns)
        top, left = (side - rows) // 2, (side - columns) // 2
        return cls(height, width, box, (top, left, side - rows - top, side - columns - left), size)

    @classmethod
    def square(cls, height: int, width: int, size: int) -> "Placement":
        """The whole picture, padded to a square."""
        return cls.crop(height, width, (0, 0, height, width), size)

    @classmethod
    def subject(cls, mask: Array, size: int, ratio: float = 1.0) -> "Placement":
        """The box round the foreground of ``mask`` [H, W]; the background inside the box is kept.

        The box is padded to ``ratio`` times its height and width, and then to a square. A mask of 1 to 9 pixels gives
        the whole picture. Raises UserError for an empty mask.
        """
        height, width = mask.shape
        return cls.crop(height, width, _bird_box(mask), size).padded(ratio)

    @classmethod
    def around(cls, mask: Array, size: int, ratio: float = 2.4) -> "Placement":
        """A square window of the picture round the foreground of ``mask`` [H, W], to repaint at a larger scale.

        The box round the bird is enlarged ``ratio`` times; where the picture ends, the window is padded. A mask of 1 to
        9 pixels gives the whole picture. Raises UserError for an empty mask.
        """
        height, width = mask.shape
        window = scale_box(_bird_box(mask), ratio, height, width)
        return cls.crop(height, width, square_box(window, height, width), size)

    def padded(self, ratio: float) -> "Placement":
        """The same crop on a square ``ratio`` times as high and wide, centred; every pixel count is rounded down."""
        rows, columns = self.crop_size
        larger = int(rows * ratio), int(columns * ratio)
        side = max(larger)
        # First to the larger rectangle, then to its square: two roundings.
        top = (larger[0] - rows) // 2 + (side - larger[0]) // 2
        left = (larger[1] - columns) // 2 + (side - larger[1]) // 2
        return dataclasses.replace(self, padding=(top, left, side - rows - top, side - columns - left))

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of the crop, which is what ``invert`` returns."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @property
    def side(self) -> int:
        """Side in source pixels of the padded square."""
        return self.crop_size[0] + self.padding[0] + self.padding[2]

    def region(self, size: int | None = None) -> tuple[float, float, float, float]:
        """The un-padded part of a canvas of ``size`` (default: the placement's), with fractional edges."""
        scale = (self.size if size is None else size) / self.side
        top, left = self.padding[0] * scale, self.padding[1] * scale
        return top, left, top + self.crop_size[0] * scale, left + self.crop_size[1] * scale

    def apply(self, image: Array, fill: float = 255, filter: Method = "bilinear") -> Array:
        """``image`` [height, width(, C)], uint8 or float, on the canvas [size, size(, C)].

        The padding has the value ``fill``.
        """
        if image.shape[:2] != (self.height, self.width):
            found = f"{image.shape[0]}x{image.shape[1]}"
            raise ValueError(f"found a {found} picture, expected {self.height}x{self.width} (height x width)")
        top, left, bottom, right = self.box
        square = np.full((self.side, self.side, *image.shape[2:]), fill, image.dtype)
        rows, columns = self.crop_size
        square[self.padding[0] :, self.padding[1] :][:rows, :columns] = image[top:bottom, left:right]
        return resize(square, self.size, self.size, filter)

    def invert(self, image: Array) -> Array:
        """The un-padded region of a canvas [S, S(, C)] of any size S, resampled to exactly the crop's size.

        Each source pixel is read at its own place on the canvas: bilinear at its centre where the canvas is
        coarser than the picture, the mean over its area where it is finer. Canvas pixels that are partly
        padding are left out whenever the region holds whole ones, so that padding never bleeds in.
        """
        if image.shape[0] != image.shape[1]:
            raise ValueError(f"found a canvas of {image.shape[0]}x{image.shape[1]}, expected a square")
        top, left, bottom, right = self.region(image.shape[0])
        rows, columns = self.crop_size
        kind: Literal["area", "bilinear"] = "area" if image.shape[0] >= self.side else "bilinear"
        result = resample(image.astype(np.float64), 0, top, bottom, rows, kind, whole=True)
        result = resample(result, 1, left, right, columns, kind, whole=True)
        return to_dtype(result, image.dtype)

    def paste(self, image: Array, picture: Array, feather: int = 0, keep: Array | None = None) -> Array:
        """``picture`` [height, width(, C)] with its box replaced by the inverse of the canvas ``image``.

        Outside the box not a bit changes. Along the box's sides that lie inside the picture, the new picture fades in
        over ``feather`` pixels; ``keep`` [height, width] bool shows whole: where it comes closer to a side, the seam
        there is narrower.
        """
        result = picture.copy()
        top, left, bottom, right = self.box
        pasted = self.invert(image)
        if feather:
            share = self._seam(feather, keep)
            share = share.reshape(*share.shape, *[1] * (picture.ndim - 2))
            under = picture[top:bottom, left:right].astype(np.float64)
            pasted = to_dtype(under + share * (pasted.astype(np.float64) - under), picture.dtype)
        result[top:bottom, left:right] = pasted
        return result

    def _seam(self, feather: int, keep: Array | None) -> Array:
        """The share of the new picture in each pixel of the box, float64 [rows, columns], in (0, 1]."""
        inner = self.box if keep is None or not keep.any() else mask_box(keep)
        ends = (self.height, self.width)
        shares = []
        for axis in (0, 1):
            first, last = self.box[axis], self.box[axis + 2]
            places = np.arange(last - first)
            share = np.ones(last - first)
            for distance, at_border, room in (
                (places, first == 0, inner[axis] - first),
                (places[::-1], last == ends[axis], last - inner[axis + 2]),
            ):
                width = feather if keep is None else min(feather, max(room, 0))
                if not at_border and width:
                    # The first pixel inside is a step above the last one outside, which has share 0.
                    share = np.minimum(share, (distance + 1) / (width + 1))
            shares.append(share)
        return np.minimum(shares[0][:, None], shares[1][None])

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; ``from_json`` is the inverse."""
        return {
            "height": self.height,
            "width": self.width,
            "box": list(self.box),
            "padding": list(self.padding),
            "size": self.size,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Placement":
        """The inverse of ``to_json``. Raises UserError naming a missing key or a box that does not fit."""
        missing = {field.name for field in dataclasses.fields(cls)} - set(values)
        if missing:
            raise UserError(f"placement: missing {', '.join(sorted(missing))}")
        try:
            numbers = {k: int(values[k]) for k in ("height", "width", "size")}
            box, padding = (tuple(int(v) for v in values[k]) for k in ("box", "padding"))
            return cls(**numbers, box=_four(box), padding=_four(padding))
        except (TypeError, ValueError) as error:
            raise UserError(f"placement: {error}") from error


def _bird_box(mask: Array) -> Box:
    count = int(np.count_nonzero(mask))
    if not count:
        raise UserError("subject mask: found no foreground pixel, expected the bird's silhouette")
    return mask_box(mask) if count >= MIN_MASK_PIXELS else (0, 0, *mask.shape)


def _four(values: tuple[int, ...]) -> Box:
    top, left, bottom, right = values
    return top, left, bottom, right
