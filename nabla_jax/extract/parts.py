"""Keypoints of birds by a head on DINOv2 (``nabla_jax.keypoints``). In JAX: torch is not needed."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax.conditioning.geometry import Box, mask_box
from nabla_jax.config import Extract
from nabla_jax.data import Dataset, skeleton
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints

if TYPE_CHECKING:
    from nabla_jax.metrics.networks import Detector

Array = np.ndarray[Any, Any]


def find(image: Array, place: Array | Box, settings: Extract) -> Array:
    """See ``nabla_jax.extract.keypoints``."""
    if isinstance(place, np.ndarray):
        if not place.any():
            raise UserError("keypoints: the mask is empty, expected the bird's silhouette")
        place = mask_box(place)
    return rounded(estimate(image, place, settings), image.shape[0], image.shape[1])


def estimate(image: Array, box: Box, settings: Extract) -> Array:
    """[11, 3] float32: (row, column) in pixels, and the probability of being visible."""
    head, dinov2 = checkpoints.find(settings, "keypoints"), checkpoints.find(settings, "dinov2")
    found: Array = _detector(head, dinov2)([image], [box])[0]
    return found


def rounded(keypoints: Array, height: int, width: int) -> Array:
    """[11, 3] int32 (row, column, visible), inside a height x width picture."""
    places = np.clip(np.rint(keypoints[:, :2]), 0, (height - 1, width - 1))
    return np.concatenate([places, keypoints[:, 2:] > 0.5], axis=1).astype(np.int32)


def check(settings: Extract, dataset: Dataset | None = None) -> None:
    """Raises UserError unless the head is there, of this DINOv2 and of the parts that controls are drawn of.

    Annotated parts of a ``dataset``, where it has any, must be the same.
    """
    _detector(checkpoints.find(settings, "keypoints"), checkpoints.find(settings, "dinov2"))
    if dataset is not None and dataset.parts and dataset.parts != skeleton.PARTS:
        raise UserError(
            f"{dataset.root}: has other parts ({', '.join(dataset.parts)}) than the keypoints that are looked for "
            f"({', '.join(skeleton.PARTS)})"
        )


@functools.cache
def _detector(head: Path, dinov2: Path) -> "Detector":
    from nabla_jax.metrics import networks

    found = networks.load_detector(head, dinov2)
    if found.config.parts != skeleton.PARTS:
        raise UserError(f"{head}: head of {', '.join(found.config.parts)}, expected {', '.join(skeleton.PARTS)}")
    return found
