"""Pictures as arrays: reading, writing and resizing. uint8, (height, width[, 3]), RGB, everywhere.

Importing this needs numpy only; Pillow is imported by the functions that use it.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nabla_jax.errors import UserError

if TYPE_CHECKING:
    import PIL.Image

Array = np.ndarray[Any, Any]
PathLike = str | os.PathLike[str]
Method = Literal["area", "bilinear", "lanczos", "nearest"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""What is read. Pillow knows more, some of them through other programs: none that a photo, mask or depth map is in."""
MAX_PIXELS = 80_000_000
"""Refused above this, before decoding: a small file can hold a picture that fills the memory."""

_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width


def read_rgb(path: PathLike) -> Array:
    """The picture at `path` as [H, W, 3] uint8, turned upright by its EXIF orientation.

    Raises UserError naming the file when it is missing, truncated, no picture, too large, or of more than 8
    bits.
    """
    return _pixels(path, "RGB", "picture")


def read_grey(path: PathLike, size: tuple[int, int] | None = None, what: str = "depth map") -> Array:
    """The grey picture at `path` as [H, W] uint8, turned upright like the picture it belongs to.

    `size` is that picture's (height, width), `what` the file's name in errors. Raises UserError when the file cannot
    be read, has more than 8 bits, or is of another size: resized, it would silently shift what it shows.
    """
    grey = _pixels(path, "L", what)
    if size is not None and grey.shape != tuple(size):
        raise UserError(
            f"{path}: {what} is {grey.shape[0]}x{grey.shape[1]} (height x width), "
            f"expected {size[0]}x{size[1]}, the size of its picture"
        )
    return grey


def read_mask(path: PathLike, size: tuple[int, int] | None = None) -> Array:
    """The mask at `path` as [H, W] bool: stored values above 127 (of 255) are foreground; see `read_grey`."""
    return read_grey(path, size, "mask") > 127


def picture_size(path: PathLike) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header alone. Raises UserError like `read_rgb`."""
    with _opened(path) as image:
        rows, columns = image.height, image.width
        with _decoding(path, "not a readable picture"):
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (columns, rows) if turned else (rows, columns)


def check_upload(path: PathLike, folder: PathLike, megabytes: float) -> pathlib.Path:
    """`path` as a picture from people nobody knows, from its header alone; the readers above then decode it.

    Raises UserError as `check_file` does, and for what `read_rgb` would not begin to decode.
    """
    found = check_file(path, folder, megabytes)
    _opened(found).close()
    return found


def check_file(path: PathLike, folder: PathLike, megabytes: float) -> pathlib.Path:
    """`path` as a file from people nobody knows.

    Raises UserError for a path that does not lead into `folder`, links followed; for what is no file, and for more
    than `megabytes`.
    """
    path = pathlib.Path(path)
    found = path.resolve()
    if not (found.is_relative_to(pathlib.Path(folder).resolve()) and found.is_file()):
        raise UserError(f"{path}: no uploaded file")
    size = found.stat().st_size
    if size > megabytes * 1e6:
        raise UserError(f"{path}: found {size / 1e6:.1f} MB, expected at most {megabytes:g} MB")
    return path


def write_image(image: Array, path: PathLike, **options: Any) -> None:
    """Writes [H, W] or [H, W, 3] uint8 to `path` in one step: the file is either whole or not there.

    `options` go to Pillow's encoder, the format follows the suffix. Raises UserError when `path` cannot be
    written.
    """
    from PIL import Image

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
    """`image` [H, W] or [H, W, C] at (height, width), same dtype; uint8 is rounded and clipped.

    'area', 'bilinear' and 'nearest' are OpenCV's, so that numbers agree with pipelines built on it (to one
    grey level): 'area' averages the covered source pixels when shrinking (INTER_AREA; when either side grows,
    OpenCV's linear blend of the two nearest cells), 'bilinear' samples at half-pixel centres without smoothing
    (INTER_LINEAR), 'nearest' takes the source pixel floor(i * H / height) (INTER_NEAREST; any dtype, bool
    too). 'lanczos' is Pillow's windowed sinc of three lobes, widened when shrinking.
    """
    if height < 1 or width < 1:
        raise ValueError(f"resize: found size {height}x{width}, expected at least 1x1")
    rows, columns = image.shape[:2]
    if method == "nearest":
        return image[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    if method not in ("area", "bilinear", "lanczos"):
        raise ValueError(f"resize: found method {method!r}, expected 'area', 'bilinear', 'lanczos' or 'nearest'")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"resize: found {image.dtype}, expected uint8 or a float type for method {method!r}")
    if (rows, columns) == (height, width):
        return image.copy()
    if method == "lanczos":
        return _lanczos(image, height, width)
    result: Array = image.astype(np.float64)
    if method == "area" and (height > rows or width > columns):
        result = _grow_area(_grow_area(result, 0, height), 1, width)
    else:
        result = resample(resample(result, 0, 0, rows, height, method), 1, 0, columns, width, method)
    # OpenCV rounds halves to even, except in its own path for exact halving, which rounds them up.
    halved = method == "area" and (rows, columns) == (2 * height, 2 * width)
    return to_dtype(result if halved or image.dtype != np.uint8 else np.rint(result), image.dtype)


def to_dtype(image: Array, dtype: np.dtype[Any]) -> Array:
    """Float values as `dtype`; for integers rounded, halves up, and clipped to its range."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.clip(np.floor(image + 0.5), limits.min, limits.max).astype(dtype)
    return image.astype(dtype)


def resample(
    image: Array,
    axis: int,
    start: float,
    stop: float,
    n: int,
    method: Literal["area", "bilinear"],
    whole: bool = False,
) -> Array:
    """The stretch [start, stop) of `axis` (0 or 1) of float `image`, in pixels, as `n` samples.

    'area' gives means over the samples' areas, 'bilinear' values at their centres. With `whole`, pixels that
    lie only partly in the stretch are left out whenever it holds whole ones.
    """
    edges = start + (stop - start) * np.arange(n + 1) / n
    low, high = 0.0, float(image.shape[axis])
    if whole:
        # Rounding of padding * scale must not turn an exact edge into a fractional one.
        inside = math.ceil(start - 1e-9), math.floor(stop + 1e-9)
        low, high = inside if inside[1] > inside[0] else (math.floor(start), math.ceil(stop))
    if method == "area":
        return _means(image, axis, np.clip(edges, low, high))
    centres = np.clip((edges[:-1] + edges[1:]) / 2, low + 0.5, high - 0.5) - 0.5
    return _interpolate(image, axis, centres)


def _interpolate(image: Array, axis: int, places: Array) -> Array:
    last = image.shape[axis] - 1
    first = np.clip(np.floor(places).astype(int), 0, last)
    share = np.clip(places - first, 0.0, 1.0).reshape((-1,) + (1,) * (image.ndim - axis - 1))
    following = np.take(image, np.minimum(first + 1, last), axis)
    return np.take(image, first, axis) * (1 - share) + following * share


def _means(image: Array, axis: int, edges: Array) -> Array:
    """Means over [edges[i], edges[i + 1]), from differences of the running integral."""
    widths = np.diff(edges)
    total = np.concatenate([np.zeros_like(np.take(image, [0], axis)), np.cumsum(image, axis)], axis)
    integral = _interpolate(total, axis, edges)
    shape = (-1,) + (1,) * (image.ndim - axis - 1)
    empty = widths < 1e-9
    means = np.diff(integral, axis=axis) / np.where(empty, 1.0, widths).reshape(shape)
    if not empty.any():
        return means
    # A pixel that lies wholly in a clipped margin takes the nearest whole canvas pixel.
    places = np.clip((edges[:-1] + edges[1:]) / 2, edges[0] + 0.5, edges[-1] - 0.5) - 0.5
    return np.where(empty.reshape(shape), _interpolate(image, axis, places), means)


def _grow_area(image: Array, axis: int, n: int) -> Array:
    # OpenCV does not average when a side grows: it blends two neighbours, and only in the output pixel that
    # straddles their border.
    size = image.shape[axis]
    first = np.arange(n) * size // n
    share = (np.arange(n) + 1) - (first + 1) * n / size
    share = np.where(share <= 0, 0.0, share - np.floor(share))
    return _interpolate(image, axis, first + share)


def _lanczos(image: Array, height: int, width: int) -> Array:
    from PIL import Image

    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2] == 3):
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    planes = image[:, :, None] if image.ndim == 2 else image
    resized = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(planes[:, :, c], np.float32)).resize(
                (width, height), Image.Resampling.LANCZOS
            )
        )
        for c in range(planes.shape[2])
    ]
    result = resized[0] if image.ndim == 2 else np.stack(resized, axis=2)
    return to_dtype(result, image.dtype)


def _opened(path: PathLike) -> PIL.Image.Image:
    from PIL import Image, UnidentifiedImageError

    with _decoding(path, "not a readable picture"):
        try:
            Image.init()  # of what is not registered yet, Pillow opens nothing by name
            image = Image.open(path, formats=FORMATS)
        except FileNotFoundError:
            raise UserError(f"{path}: no such picture") from None
        except UnidentifiedImageError:
            raise UserError(f"{path}: not a picture in a known format") from None
    if image.height * image.width > MAX_PIXELS or not image.height * image.width:
        image.close()
        raise UserError(f"{path}: found {image.height}x{image.width} pixels, expected 1 to {MAX_PIXELS:,}")
    return image


def _pixels(path: PathLike, mode: str, what: str) -> Array:
    """The picture upright as [H, W] ('L') or [H, W, 3] ('RGB') uint8."""
    from PIL import ImageOps

    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: found {image.mode} pixels of more than 8 bits, expected an 8-bit {what}")
        with _decoding(path, "truncated or damaged picture"):
            image.load()
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))


@contextlib.contextmanager
def _decoding(path: PathLike, what: str) -> Iterator[None]:
    """Turns whatever Pillow raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # for damaged bytes its decoders raise what they meet: struct.error, KeyError, ...
        raise UserError(f"{path}: {what} ({str(error) or type(error).__name__})") from error
