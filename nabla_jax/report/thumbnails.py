"""Small copies of pictures, written once: a file's name says what it shows, so what is there is not made again."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax import runs
from nabla_jax.conditioning.geometry import Box
from nabla_jax.images import read_mask, read_rgb, resize, write_image
from nabla_jax.metrics import oracle
from nabla_jax.metrics.references import stretch

Array = np.ndarray[Any, Any]

SIDE = 384
"""Longest side in pixels; a page shows less, a click all of it."""
FULL_SCALE = 128
"""Difference in grey levels that has the last colour of the scale."""
# From nothing (dark) to FULL_SCALE (light), even steps of lightness so that it also reads in grey.
_COLOURS = ((11, 16, 38), (52, 44, 110), (128, 50, 124), (205, 66, 98), (245, 128, 62), (252, 206, 92), (255, 250, 214))


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """What a file shows: its sources, and how they become one picture.

    ``box`` (top, left, bottom, right) is the part of a picture that is shown, None for all of it at the usual size;
    ``side`` is the longest side.
    """

    kind: str
    sources: tuple[Path, ...]
    box: Box | None = None
    side: int = SIDE

    @functools.cached_property
    def name(self) -> str:
        """File name: a hash of kind, sources, the sources' sizes and times, and the part that is shown."""
        part = "" if self.box is None else f" {self.box}"
        digest = hashlib.sha256(f"1 {self.kind} {self.side}{part}".encode())
        for path in self.sources:
            found = path.stat()
            # Answers of an oracle are named by what they are; their folder may move with the evaluation.
            where = "/".join(path.parts[-2:]) if path.suffix == ".npz" else os.path.abspath(path)
            digest.update(f"\n{where} {found.st_size} {found.st_mtime_ns}".encode())
        return f"{digest.hexdigest()[:20]}.webp"

    def paint(self) -> Array:
        """The picture. Raises UserError for a source that cannot be read."""
        if self.box is None:
            return _PAINT[self.kind](*self.sources)
        top, left, bottom, right = self.box
        return _small(read_rgb(self.sources[0])[top:bottom, left:right], self.side)


def write_missing(wanted: Iterable[Thumbnail], folder: Path, workers: int) -> int:
    """Writes those that `folder` does not have, in threads; returns how many there were to write.

    Raises UserError for a source that cannot be read and when a file cannot be written.
    """
    todo = [t for t in {t.name: t for t in wanted}.values() if not (folder / t.name).is_file()]
    if not todo:
        return 0
    pool = concurrent.futures.ThreadPoolExecutor(max(1, workers))
    try:
        for _ in runs.track(
            pool.map(lambda t: write_image(t.paint(), folder / t.name, quality=86), todo),
            "thumbnails",
            total=len(todo),
            unit="picture",
        ):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return len(todo)


def difference(generated: Array, target: Array, mask: Array) -> Array:
    """Root mean square over the colours of generated minus target, as colours; clear outside the mask.

    Args: pictures [H, W, 3] uint8, `generated` of any size, mask [H, W] bool. Returns [h, w, 4] uint8.
    """
    square = (stretch(generated, *mask.shape).astype(np.float32) - target) ** 2
    level = np.where(mask, np.sqrt(square.mean(axis=2)), 0).astype(np.uint8)
    height, width = _size(mask.shape)
    alpha = resize(np.where(mask, np.uint8(255), np.uint8(0)), height, width, "lanczos")
    # Averages run over the bird alone: divided by how much of each cell is bird.
    share = np.maximum(alpha.astype(np.float32), 1) / 255
    small = np.minimum(resize(level, height, width, "lanczos") / share, FULL_SCALE)
    colours = scale()[np.rint(small * (255 / FULL_SCALE)).astype(int)]
    return np.dstack([colours, alpha])


def scale() -> Array:
    """The colours of differences 0 to FULL_SCALE, [256, 3] uint8."""
    places = np.linspace(0, 255, len(_COLOURS))
    channels = [np.interp(np.arange(256), places, [c[i] for c in _COLOURS]) for i in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _size(shape: tuple[int, ...], side: int = SIDE) -> tuple[int, int]:
    height, width = shape[:2]
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _small(picture: Array, side: int = SIDE) -> Array:
    return resize(picture, *_size(picture.shape, side), "lanczos")


def _control(target: Path, mask: Path) -> Array:
    picture = read_rgb(target)
    return _small(np.where(read_mask(mask, picture.shape[:2])[:, :, None], np.uint8(0), picture))


def _difference(generated: Path, target: Path, mask: Path) -> Array:
    picture = read_rgb(target)
    return difference(read_rgb(generated), picture, read_mask(mask, picture.shape[:2]))


_PAINT: dict[str, Callable[..., Array]] = {
    "picture": lambda path: _small(read_rgb(path)),
    "control": _control,
    "difference": _difference,
    "answer": lambda path: _small(oracle.unpack(path)[0]),
}
