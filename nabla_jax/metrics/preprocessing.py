"""From pictures to what a vision network takes: the published processors, number for number.

The processors are those of transformers' ``SiglipImageProcessor`` and ``BitImageProcessor`` in their PIL form, which
the published evaluation used; the torchvision form differs by a grey level in single pixels. Settings come from the
checkpoint's ``preprocessor_config.json``, or from the class methods where there is no such file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_counts, known_fields, read_config

Array = np.ndarray[Any, Any]

# Pillow's numbers of the filters that published processors use.
BILINEAR, BICUBIC = 2, 3
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# Names of the file's ``image_processor_type``, less the ending "Fast".
_TYPES = ("SiglipImageProcessor", "BitImageProcessor")
# Pixels of a side: sixteen times what any published network takes; more is no size but a mistake that fills memory.
_MOST = 8192
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resizing, cropping and normalising of a checkpoint's processor.

    ``size`` is (height, width), which ignores the picture's shape, or the length of the shorter side, which keeps it
    (the longer one is rounded down). ``crop`` is the (height, width) then cut from the centre, or None. ``resample``
    is Pillow's number of a filter. ``mean`` and ``std`` are per channel, in units of ``1 / rescale`` grey levels.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None = None
    resample: int = BICUBIC
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    rescale: float = 1 / 255

    @classmethod
    def siglip(cls, side: int = 224) -> ImageProcessor:
        """``google/siglip-*``; with 384 pixels that of FLUX.1-Redux."""
        return cls((side, side))

    @classmethod
    def siglip2(cls, side: int = 224) -> ImageProcessor:
        """``google/siglip2-*`` at fixed resolution, whose published filter is bilinear."""
        return cls((side, side), resample=BILINEAR)

    @classmethod
    def dinov2(cls) -> ImageProcessor:
        """``facebook/dinov2-*``: shorter side 256, then the central 224 pixels; long pictures lose their ends."""
        return cls(256, (224, 224), BICUBIC, IMAGENET_MEAN, IMAGENET_STD)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> ImageProcessor:
        """Reads a published preprocessor_config.json (path or its dict). Raises UserError for another processor."""
        where, raw = read_config(source, "image processor")
        kind = raw.get("image_processor_type", _TYPES[0])
        if not isinstance(kind, str) or kind.removesuffix("Fast") not in _TYPES:
            raise UserError(f"{where}: image_processor_type: found {kind!r}, expected {' or '.join(_TYPES)}")
        names = ("size", "resample", "image_mean", "image_std", "rescale_factor")
        values = known_fields(where, raw, names, required=names, fixed=_FIXED)
        crop = _height_width(where, "crop_size", raw.get("crop_size")) if raw.get("do_center_crop") else None
        result = cls(
            size=_size(where, values["size"]),
            crop=crop,
            resample=values["resample"],
            mean=_channels(where, "image_mean", values["image_mean"]),
            std=_channels(where, "image_std", values["image_std"]),
            rescale=values["rescale_factor"],
        )
        result.check(where)
        return result

    def check(self, where: str = "image processor") -> None:
        """Raises UserError for a filter or size that no network has, or a crop larger than the resized picture."""
        if self.resample not in (BILINEAR, BICUBIC):
            raise UserError(
                f"{where}: resample: found {self.resample!r}, expected {BILINEAR} (bilinear) or {BICUBIC} (bicubic)"
            )
        if not isinstance(self.rescale, float) or self.rescale <= 0:
            raise UserError(f"{where}: rescale_factor: found {self.rescale!r}, expected a positive number")
        smallest = (self.size, self.size) if isinstance(self.size, int) else self.size
        if max(smallest) > _MOST:
            raise UserError(f"{where}: size: found {self.size}, expected at most {_MOST} pixels")
        if self.crop is not None and (self.crop[0] > smallest[0] or self.crop[1] > smallest[1]):
            raise UserError(f"{where}: crop_size: found {self.crop}, expected at most the resized picture's {smallest}")

    def to_json(self) -> dict[str, Any]:
        """The published preprocessor_config.json's content, as transformers reads it."""
        shortest = isinstance(self.size, int)
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else _sides(self.size)
        crop = {"do_center_crop": True, "crop_size": _sides(self.crop)} if self.crop is not None else {}
        if shortest and not crop:
            crop = {"do_center_crop": False}  # this type crops unless told otherwise
        return {
            "image_processor_type": _TYPES[1 if shortest or crop else 0],
            **_FIXED,
            "size": size,
            **crop,
            "resample": self.resample,
            "rescale_factor": self.rescale,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def resize(self, image: Array) -> Array:
        """uint8 RGB [H, W, 3] -> resized and cropped, uint8 [h, w, 3]."""
        from PIL import Image

        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"picture: found {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
        height, width = self._resized(*image.shape[:2])
        picture = Image.fromarray(image).resize((width, height), Image.Resampling(self.resample))
        resized = np.asarray(picture)
        if self.crop is None:
            return resized
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return resized[top : top + self.crop[0], left : left + self.crop[1]]

    def __call__(self, images: Sequence[Array]) -> Array:
        """Network input of pictures of any sizes.

        Args:
          images: uint8 RGB [H, W, 3] each.

        Returns:
          [B, 3, h, w] float32.

        Raises:
          ValueError: a picture has another type or shape, there is none, or without a crop their sizes come out
            different.
        """
        resized = [self.resize(image) for image in images]
        if len({x.shape for x in resized}) != 1:
            raise ValueError(f"pictures: found sizes {[x.shape for x in resized]}, expected one for all")
        # The published order of roundings: product in float64, then float32 for the rest.
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        pixels: Array = (np.stack(resized) * np.float64(self.rescale)).astype(np.float32)
        pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        long = int(self.size * max(height, width) / min(height, width))
        return (self.size, long) if height <= width else (long, self.size)


def lpips_pixels(images: Sequence[Array]) -> Array:
    """LPIPS' input: uint8 RGB pictures [H, W, 3] of one size -> [B, 3, H, W] float32 in [-1, 1].

    Raises ValueError when a picture is not uint8 [H, W, 3] or sizes differ.
    """
    shapes = {(image.dtype, *image.shape) for image in images}
    if len(shapes) != 1 or any(i.dtype != np.uint8 or i.ndim != 3 or i.shape[2] != 3 for i in images):
        raise ValueError(f"pictures: found {sorted(map(str, shapes))}, expected uint8 [H, W, 3] of one size")
    pixels = np.stack(list(images)).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _size(where: str, raw: Any) -> tuple[int, int] | int:
    if isinstance(raw, dict) and set(raw) == {"shortest_edge"}:
        check_counts(f"{where}: size", **raw)
        return int(raw["shortest_edge"])
    return _height_width(where, "size", raw)


def _height_width(where: str, key: str, raw: Any) -> tuple[int, int]:
    if not isinstance(raw, dict) or set(raw) != {"height", "width"}:
        raise UserError(f"{where}: {key}: found {raw!r}, expected height and width")
    check_counts(f"{where}: {key}", **raw)
    return raw["height"], raw["width"]


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _channels(where: str, key: str, raw: Any) -> tuple[float, ...]:
    # Neither NaN nor a whole number that no float holds is less.
    if not isinstance(raw, list) or len(raw) != 3 or not all(type(x) in (int, float) and abs(x) < 2**63 for x in raw):
        raise UserError(f"{where}: {key}: found {raw!r}, expected three numbers")
    return tuple(float(x) for x in raw)
