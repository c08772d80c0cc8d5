"""Pictures as arrays: reading, writing and resizing. uint8, (height, width[, 3]), RGB, everywhere."""

from __future__ import annotations

import os
import pathlib
import tempfile
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]
Method = Literal["area", "bilinear", "nearest"]


def read_rgb(path: str | os.PathLike[str]) -> Array:
    """The picture at `path` as [H, W, 3] uint8, turned upright by its EXIF orientation.

    Raises UserError naming the file when it is missing, truncated or no picture.
    """
    return np.asarray(_open(path).convert("RGB"))


def read_mask(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Array:
    """The mask at `path` as [H, W] bool: stored values above 127 (of 255) are foreground.

    `size` is the (height, width) of the picture it belongs to. Raises UserError when the file cannot be read
    or when its size is another one: a resized mask would silently shift the silhouette.
    """
    mask = np.asarray(_open(path).convert("L")) > 127
    if size is not None and mask.shape != tuple(size):
        raise UserError(
            f"{path}: mask is {mask.shape[0]}x{mask.shape[1]} (height x width), "
            f"expected {size[0]}x{size[1]}, the size of its picture"
        )
    return mask


def write_image(image: Array, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes [H, W] or [H, W, 3] uint8 to `path` in one step: the file is either whole or not there.

    `options` go to Pillow's encoder, the format follows the suffix. Raises UserError when `path` cannot be
    written.
    """
    path = pathlib.Path(path)
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as handle:
            Image.fromarray(image).save(handle, **options)
        os.chmod(handle.name, 0o644)
        os.replace(handle.name, path)
    except OSError as error:
        if handle is not None:
            pathlib.Path(handle.name).unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def resize(image: Array, height: int, width: int, method: Method = "area") -> Array:
    """`image` [H, W] or [H, W, C] at (height, width), same dtype; integers are rounded and clipped to uint8.

    The three rules are OpenCV's, so that numbers agree with pipelines built on it (to one grey level): 'area'
    averages the covered source pixels when shrinking (INTER_AREA; when either side grows, OpenCV's linear
    blend of the two nearest cells), 'bilinear' samples at half-pixel centres without smoothing
    (INTER_LINEAR), 'nearest' takes the source pixel floor(i * H / height) (INTER_NEAREST; any dtype, bool
    too).
    """
    if height < 1 or width < 1:
        raise ValueError(f"resize: found size {height}x{width}, expected at least 1x1")
    if image.shape[:2] == (height, width):
        return image.copy()
    if method == "nearest":
        rows = np.minimum(np.arange(height) * image.shape[0] // height, image.shape[0] - 1)
        columns = np.minimum(np.arange(width) * image.shape[1] // width, image.shape[1] - 1)
        return image[rows[:, None], columns[None, :]]
    if method not in ("area", "bilinear"):
        raise ValueError(f"resize: found method {method!r}, expected 'area', 'bilinear' or 'nearest'")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"resize: found {image.dtype}, expected uint8 or a float type for method {method!r}")
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    weights = _linear_weights if method == "bilinear" else _area_weights if shrinks else _grown_area_weights
    # Two small matrix products: each output row is a weighted mean of source rows, then the same for columns.
    result = np.tensordot(weights(image.shape[0], height), image.astype(np.float64), axes=(1, 0))
    result = np.moveaxis(np.tensordot(weights(image.shape[1], width), result, axes=(1, 1)), 0, 1)
    if image.dtype == np.uint8:
        # OpenCV rounds halves to even, except in its own path for exact halving, which rounds them up.
        halved = method == "area" and image.shape[:2] == (2 * height, 2 * width)
        return np.clip(np.floor(result + 0.5) if halved else np.rint(result), 0, 255).astype(np.uint8)
    return result.astype(image.dtype)


def _area_weights(size: int, new: int) -> Array:
    """[new, size]: row i holds the share of source cell j inside [i, i+1) * size / new."""
    scale = size / new
    starts = np.arange(new)[:, None] * scale
    cells = np.arange(size)[None, :]
    overlap = np.minimum(cells + 1, starts + scale) - np.maximum(cells, starts)
    return np.maximum(overlap, 0.0) / scale


def _linear_weights(size: int, new: int) -> Array:
    """[new, size]: linear interpolation at half-pixel centres, borders repeated."""
    place = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
    low = np.floor(place).astype(int)
    return _two_taps(size, low, place - low)


def _grown_area_weights(size: int, new: int) -> Array:
    """[new, size]: what OpenCV's INTER_AREA does when a side grows: blends only where a cell border is
    crossed.
    """
    low = np.arange(new) * size // new
    share = np.arange(1, new + 1) - (low + 1) * new / size
    return _two_taps(size, low, np.where(share <= 0, 0.0, share - np.floor(share)))


def _two_taps(size: int, low: Array, share: Array) -> Array:
    weights = np.zeros((len(low), size))
    rows = np.arange(len(low))
    weights[rows, low] += 1 - share
    weights[rows, np.minimum(low + 1, size - 1)] += share
    return weights


def _open(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such picture") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error
