"""Pictures for pre-training: views of fresh individuals, rendered once and kept as a memory map.

Each individual has two views and a disguise: the second view with the bird in a stranger's coat.
"""

import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nabla_jax.conditioning.geometry import Placement
from nabla_jax.errors import UserError
from nabla_jax.runs import write_json

_CHUNK = 250


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """What to draw.

    Attributes:
      world: importable module of a world with ``fresh_pair``, ``fresh_disguise`` and ``fresh_captions``.
      seed: the pictures' seed; unlike any benchmark world's.
      identities: number of individuals.
      size: side of the pictures, padded white to squares, pixels.
      pose_ranges: share of individuals drawn with each pose range, as (range, share) pairs.
      mirror_probability: chance that the second view faces the other way.
    """

    world: str
    seed: int
    identities: int
    size: int
    pose_ranges: tuple[tuple[float, float], ...] = ((0.3, 0.2), (0.6, 0.3), (1.0, 0.5))
    mirror_probability: float = 0.5


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Two views and the disguise of the second: uint8 [N, 3, H, W, 3]; the views' masks, bool [N, 2, H, W], and
    captions [N][2]. A disguise has the mask of its view.
    """

    pictures: np.ndarray
    masks: np.ndarray
    captions: list[tuple[str, str]]


def pose_range(config: PictureConfig, index: int) -> float:
    """The pose range of one individual; shares are spread evenly over the indices."""
    place = (index * 0.6180339887498949) % 1.0
    for value, share in config.pose_ranges:
        if place < share:
            return value
        place -= share
    return config.pose_ranges[-1][0]


def _draw(config: PictureConfig, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    world: Any = importlib.import_module(config.world)
    pictures, masks, captions = [], [], []
    for index in range(start, stop):
        spread = pose_range(config, index)
        args = (config.seed, index, config.size, 2, spread, config.mirror_probability)
        views = world.fresh_pair(*args)
        pictures.append([_square(v.rgb, 255, config.size) for v in (*views, world.fresh_disguise(*args))])
        masks.append([_square(v.mask, False, config.size) for v in views])
        first, second = world.fresh_captions(*args)
        captions.append((first, second))
    return np.asarray(pictures, np.uint8), np.asarray(masks, bool), captions


def _square(picture: np.ndarray, fill: int | bool, size: int) -> np.ndarray:
    height, width = picture.shape[:2]
    return Placement.square(height, width, size).apply(picture, fill, "nearest")


def render(config: PictureConfig, folder: Path, workers: int) -> Pictures:
    """Draws the pictures into ``folder``, or opens them; an interrupted run continues after its last chunk.

    Raises:
      UserError: the folder holds pictures of other settings.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "settings.json"
    if described.exists():
        found = json.loads(described.read_text())
        if found != settings:
            raise UserError(f"{described}: found {found}, expected {settings}; choose another folder or remove it")
    else:
        write_json(described, settings)
    n, side = config.identities, config.size
    pictures = _memmap(folder / "pictures.npy", np.uint8, (n, 3, side, side, 3))
    masks = _memmap(folder / "masks.npy", np.bool_, (n, 2, side, side))
    starts = [s for s in range(0, n, _CHUNK) if not (folder / f"captions-{s:07d}.json").exists()]
    if starts:
        context = multiprocessing.get_context("spawn")
        with (
            concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
            tqdm(total=n, initial=n - len(starts) * _CHUNK, desc="pictures", unit="bird") as bar,
        ):
            jobs = {pool.submit(_draw, config, s, min(s + _CHUNK, n)): s for s in starts}
            for job in concurrent.futures.as_completed(jobs):
                start = jobs[job]
                rgb, mask, captions = job.result()
                pictures[start : start + len(rgb)] = rgb
                masks[start : start + len(rgb)] = mask
                pictures.flush()
                masks.flush()
                write_json(folder / f"captions-{start:07d}.json", captions)
                bar.update(len(rgb))
    chunks = [json.loads((folder / f"captions-{s:07d}.json").read_text()) for s in range(0, n, _CHUNK)]
    captions = [(first, second) for chunk in chunks for first, second in chunk]
    return Pictures(pictures, masks, captions)


def _memmap(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
