"""Pictures, pairs and records: from a dataset folder to batches of latents."""

import os
from pathlib import Path

from nabla_jax.data import inaturalist, nabirds
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.errors import UserError

__all__ = ["Dataset", "Example", "read_dataset"]


def read_dataset(root: str | os.PathLike[str]) -> Dataset:
    """Reads the dataset folder ``root``, NABirds or iNaturalist by the files it holds.

    Raises UserError for a folder that is neither, and for anything wrong in its lists.
    """
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, expected a dataset")
    if nabirds.is_layout(path):
        return nabirds.read(path)
    if inaturalist.is_layout(path):
        return inaturalist.read(path)
    raise UserError(f"{path}: found neither images.txt (NABirds) nor {inaturalist.LISTS[0]} (iNaturalist)")
