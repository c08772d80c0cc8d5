"""Reading pictures and masks, and making the model's inputs from them: one geometry for every command."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nabla_jax.conditioning.geometry import Placement
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]
PathLike = str | os.PathLike[str]

MAX_PIXELS = 80_000_000
"""Refused above this, before decoding: a small file can hold a picture that fills the memory."""

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width
WHITE = 255


def read_image(path: PathLike) -> Array:
    """The picture as [H, W, 3] uint8 RGB, turned upright by its EXIF orientation.

    Raises UserError naming the file when it is missing, truncated, no picture, too large, or of more than 8
    bits.
    """
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: found {image.mode} pixels of more than 8 bits, expected an 8-bit picture")
        return np.asarray(_upright(image, path).convert("RGB"))


def read_mask(path: PathLike, height: int, width: int) -> Array:
    """The mask as [height, width] bool: stored values above 127 are foreground.

    Raises UserError naming the file when it cannot be read, has another size than its picture, or is empty.
    """
    with _opened(path) as image:
        mask = np.asarray(_upright(image, path).convert("L")) > 127
    if mask.shape != (height, width):
        raise UserError(
            f"{path}: mask is {mask.shape[0]}x{mask.shape[1]} (height x width), expected {height}x{width}, "
            "the size of its picture"
        )
    if not mask.any():
        raise UserError(f"{path}: mask is empty, expected foreground pixels above 127")
    return mask


def picture_size(path: PathLike) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises UserError like ``read_image``."""
    with _opened(path) as image:
        rows, columns = image.height, image.width
        try:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not a readable picture ({error})") from error
    return (columns, rows) if turned else (rows, columns)


def _opened(path: PathLike) -> Image.Image:
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error
    if image.height * image.width > MAX_PIXELS:
        image.close()
        raise UserError(f"{path}: found {image.height}x{image.width} pixels, expected at most {MAX_PIXELS:,}")
    return image


def _upright(image: Image.Image, path: PathLike) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged picture ({error})") from error


def fill_control(image: Array, mask: Array) -> Array:
    """``image`` [H, W, 3] uint8 with the silhouette ``mask`` [H, W] bool cut out: black. Same size.

    The canvas round it is padded white, like that of every picture.
    """
    return np.where(mask[:, :, None], np.uint8(0), image)


CONTROLS: dict[str, Callable[[Array, Array], Array]] = {"fill": fill_control}
"""Name -> function of the target picture and its mask, at native size."""


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture on the model's square canvas and where it lies there."""

    pixels: Array  # [size, size, 3] uint8
    placement: Placement


def target_canvas(image: Array, size: int) -> Canvas:
    """The whole target picture, padded white, Lanczos: what the model learns to draw."""
    placement = Placement.square(image.shape[0], image.shape[1], size)
    return Canvas(placement.apply(image, WHITE, "lanczos"), placement)


def subject_canvas(image: Array, mask: Array, size: int) -> Canvas:
    """The box round the subject, background kept, padded white, Lanczos.

    Raises UserError for an empty mask.
    """
    placement = Placement.subject(mask, size)
    return Canvas(placement.apply(image, WHITE, "lanczos"), placement)


def control_canvas(kind: str, image: Array, mask: Array, size: int) -> Canvas:
    """The control ``kind`` of the target picture, padded white, bilinear.

    Raises UserError for an unknown kind.
    """
    if kind not in CONTROLS:
        raise UserError(f"conditioning.control: found {kind!r}, expected one of {', '.join(CONTROLS)}")
    placement = Placement.square(image.shape[0], image.shape[1], size)
    return Canvas(placement.apply(CONTROLS[kind](image, mask), WHITE, "bilinear"), placement)


def latent_mask(mask: Array, size: int, factor: int = 8) -> Array:
    """The target's foreground coverage of each latent, 0..255 uint8 [size / factor, size / factor]."""
    placement = Placement.square(mask.shape[0], mask.shape[1], size // factor)
    return placement.apply(mask.astype(np.uint8) * np.uint8(255), 0, "area")


def read_pair(image: PathLike, mask: PathLike) -> tuple[Array, Array]:
    """A picture [H, W, 3] uint8 and its mask [H, W] bool. Raises UserError like the two readers."""
    pixels = read_image(Path(image))
    return pixels, read_mask(Path(mask), *pixels.shape[:2])
