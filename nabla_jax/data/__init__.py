"""Pictures, pairs and records: from a dataset folder to batches of latents."""

import os
from collections.abc import Callable
from pathlib import Path

from nabla_jax.data import clips, inat21, inaturalist, keypoint_file, manifest, nabirds, tfds
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError

__all__ = ["Dataset", "Example", "read_dataset", "scan_dataset"]

# In the order in which a folder is recognised: a list that was written for us goes before another project's files.
_LAYOUTS: dict[str, tuple[Callable[[Path], bool], str]] = {
    "manifest": (manifest.is_layout, manifest.LIST),
    "nabirds": (nabirds.is_layout, "images.txt"),
    "inaturalist": (inaturalist.is_layout, inaturalist.LISTS[0]),
    "tfds": (tfds.is_layout, tfds.INFO),
    "inat21": (inat21.is_layout, "train.json"),
    "clips": (clips.is_layout, f"{clips.LIST} or videos"),
}


def read_dataset(
    root: str | os.PathLike[str],
    *,
    source: str = "auto",
    taxon: str = "Aves",
    frame_gap: float = 1.0,
    frame_rate: float = 0.0,
) -> Dataset:
    """Reads the dataset folder ``root``, of the source named or, with 'auto', recognised by the files it holds.

    ``taxon`` restricts inat21, ``frame_gap`` (seconds) and ``frame_rate`` (frames per second, 0: unknown) concern
    clips; the others ignore them. Raises UserError for a folder that is of no source, and for anything wrong in its
    lists.
    """
    problems = Problems()
    options = {"source": source, "taxon": taxon, "frame_gap": frame_gap, "frame_rate": frame_rate}
    dataset = scan_dataset(root, problems, **options)  # type: ignore[arg-type]
    problems.refuse(root)
    return dataset


def scan_dataset(
    root: str | os.PathLike[str],
    problems: Problems,
    *,
    source: str = "auto",
    taxon: str = "Aves",
    frame_gap: float = 1.0,
    frame_rate: float = 0.0,
) -> Dataset:
    """Like ``read_dataset``, but adds what is wrong in the lists to ``problems`` and returns the rest.

    Raises UserError for a folder that is of no source.
    """
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, expected a dataset")
    return keypoint_file.add(_scan(path, problems, source, taxon, frame_gap, frame_rate), problems)


def _scan(path: Path, problems: Problems, source: str, taxon: str, frame_gap: float, frame_rate: float) -> Dataset:
    match _recognise(path) if source == "auto" else source:
        case "manifest":
            return manifest.scan(path, problems)
        case "nabirds":
            return nabirds.scan(path, problems)
        case "inaturalist":
            return inaturalist.scan(path, problems)
        case "tfds":
            return tfds.scan(path, problems)
        case "inat21":
            return inat21.scan(path, problems, taxon)
        case "clips":
            return clips.scan(path, problems, frame_gap, frame_rate)
        case _:
            raise UserError(f"data.source: found {source!r}, expected one of auto, {', '.join(_LAYOUTS)}")


def _recognise(path: Path) -> str:
    for name, (is_layout, _) in _LAYOUTS.items():
        if is_layout(path):
            return name
    marks = ", ".join(f"{mark} ({name})" for name, (_, mark) in _LAYOUTS.items())
    raise UserError(f"{path}: found none of {marks}; for frame sequences without a list set data.source=clips")
