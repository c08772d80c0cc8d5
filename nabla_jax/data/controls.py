"""Reading pictures and masks, and making the model's inputs from them: one geometry for every command."""

import dataclasses
from collections.abc import Callable

import numpy as np

from nabla_jax import images
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.errors import UserError
from nabla_jax.images import Array, PathLike

WHITE = 255

read_image = images.read_rgb
picture_size = images.picture_size


def read_mask(path: PathLike, height: int, width: int) -> Array:
    """The mask as [height, width] bool: stored values above 127 are foreground.

    Raises UserError naming the file when it cannot be read, has another size than its picture, or is empty.
    """
    mask = images.read_mask(path, (height, width))
    if not mask.any():
        raise UserError(f"{path}: mask is empty, expected foreground pixels above 127")
    return mask


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
    pixels = read_image(image)
    return pixels, read_mask(mask, *pixels.shape[:2])
