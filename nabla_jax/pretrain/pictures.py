"""Pictures for pre-training: views of fresh individuals, rendered once and kept as a memory map.

- ``render``: single individuals, each with two views and a disguise: the second view in a stranger's coat.
- ``render_families``: sibling species, one individual each, all in the same scenes.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
from collections.abc import Callable, Mapping
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


Chunk = tuple[dict[str, np.ndarray], list[Any]]
"""Arrays by name and, per picture, what goes into a JSON file beside them."""


def _draw(config: PictureConfig, start: int, stop: int) -> Chunk:
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
    return {"pictures": np.asarray(pictures, np.uint8), "masks": np.asarray(masks, bool)}, captions


def _draw_families(config: "FamilyConfig", start: int, stop: int) -> Chunk:
    world: Any = importlib.import_module(config.world)
    pictures, masks, canvases = [], [], []
    for index in range(start, stop):
        family = world.fresh_family(config.seed, index, config.size, config.species, config.views)
        pictures.append([[_square(v.rgb, 0, config.size) for v in views] for views in family])
        masks.append([_square(v.mask, False, config.size) for v in family[0]])
        canvases.append([v.mask.shape for v in family[0]])
    return {"pictures": np.asarray(pictures, np.uint8), "masks": np.asarray(masks, bool)}, canvases


def _square(picture: np.ndarray, fill: int | bool, size: int) -> np.ndarray:
    height, width = picture.shape[:2]
    return Placement.square(height, width, size).apply(picture, fill, "nearest")


def render(config: PictureConfig, folder: Path, workers: int) -> Pictures:
    """Draws the pictures into ``folder``, or opens them; an interrupted run continues after its last chunk.

    Raises:
      UserError: the folder holds pictures of other settings.
    """
    n, side = config.identities, config.size
    shapes = {"pictures": (np.uint8, (n, 3, side, side, 3)), "masks": (np.bool_, (n, 2, side, side))}
    arrays, captions = _draw_all(config, functools.partial(_draw, config), n, shapes, "captions", folder, workers)
    return Pictures(arrays["pictures"], arrays["masks"], [(first, second) for first, second in captions])


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """What families to draw.

    Attributes:
      world: importable module of a world with ``fresh_family``.
      seed: the families' seed; unlike any benchmark world's.
      families: number of families.
      species: sibling species per family, one individual each.
      views: scenes per family; every sibling poses in all of them.
      size: longer side of the pictures, pixels.
    """

    world: str
    seed: int
    families: int
    species: int
    views: int
    size: int


@dataclasses.dataclass(frozen=True)
class Families:
    """Sibling species in the same scenes.

    Attributes:
      pictures: uint8 [N, species, views, S, S, 3], padded black to squares.
      masks: bool [N, views, S, S]; siblings share a silhouette.
      canvases: int [N, views, 2], (height, width) of the pictures before padding.
    """

    pictures: np.ndarray
    masks: np.ndarray
    canvases: np.ndarray


def render_families(config: FamilyConfig, folder: Path, workers: int) -> Families:
    """As ``render``, but for families."""
    n, views, side = config.families, config.views, config.size
    shapes = {
        "pictures": (np.uint8, (n, config.species, views, side, side, 3)),
        "masks": (np.bool_, (n, views, side, side)),
    }
    draw = functools.partial(_draw_families, config)
    arrays, canvases = _draw_all(config, draw, n, shapes, "canvases", folder, workers)
    return Families(arrays["pictures"], arrays["masks"], np.asarray(canvases, int))


def _draw_all(
    config: Any,
    draw: Callable[[int, int], Chunk],
    n: int,
    shapes: Mapping[str, tuple[Any, tuple[int, ...]]],
    extra: str,
    folder: Path,
    workers: int,
) -> tuple[dict[str, np.memmap], list[Any]]:
    """Draws samples 0 to ``n`` in chunks; a chunk is done when its ``extra`` JSON file is there."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "settings.json"
    if described.exists():
        found = json.loads(described.read_text())
        if found != settings:
            raise UserError(f"{described}: found {found}, expected {settings}; choose another folder or remove it")
    else:
        write_json(described, settings)
    arrays = {name: _memmap(folder / f"{name}.npy", dtype, shape) for name, (dtype, shape) in shapes.items()}
    starts = [s for s in range(0, n, _CHUNK) if not (folder / f"{extra}-{s:07d}.json").exists()]
    if starts:
        context = multiprocessing.get_context("spawn")
        with (
            concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
            tqdm(total=n, initial=n - sum(min(_CHUNK, n - s) for s in starts), desc=folder.name) as bar,
        ):
            jobs = {pool.submit(draw, s, min(s + _CHUNK, n)): s for s in starts}
            for job in concurrent.futures.as_completed(jobs):
                start = jobs[job]
                drawn, rows = job.result()
                for name, values in drawn.items():
                    arrays[name][start : start + len(rows)] = values
                    arrays[name].flush()
                write_json(folder / f"{extra}-{start:07d}.json", rows)
                bar.update(len(rows))
    chunks = [json.loads((folder / f"{extra}-{s:07d}.json").read_text()) for s in range(0, n, _CHUNK)]
    return arrays, [row for chunk in chunks for row in chunk]


def _memmap(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
