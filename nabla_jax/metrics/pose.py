"""Pose fidelity: does the generated bird stand where the target's bird stands?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nabla_jax.images import resize
from nabla_jax.metrics.pixels import foreground

Array = np.ndarray[Any, Any]


NEAR = 0.1
"""How far from its place a keypoint may be found, over the longer side of the bird's box: PCK at 0.1."""


@dataclasses.dataclass(frozen=True)
class PoseError:
    """``distance`` is the mean distance of keypoints over the longer side of the bird's box, ``rate`` the share of them
    that are at most ``NEAR`` away.
    """

    distance: float
    rate: float


def keypoint_error(generated: Array, target: Array, side: float) -> PoseError | None:
    """How far keypoints of a generated picture are from the target's; None if none of the target's is visible.

    Args:
      generated: [P, >= 2] (row, column) in pixels of the target; which are visible there does not matter: a part that
        the target shows is looked for wherever the generated bird most likely has it.
      target: [P, 3] (row, column, visible).
      side: longer side of the target's box.
    """
    seen = target[:, 2] > 0.5
    if not seen.any():
        return None
    distances = np.linalg.norm(generated[seen, :2] - target[seen, :2], axis=1) / side
    return PoseError(float(distances.mean()), float(within(distances).mean()))


def within(distances: Array) -> Array:
    """Which distances, over the longer side of the bird's box, count as found (bool, same shape)."""
    near: Array = distances <= NEAR
    return near


def mask_iou(generated: Array, target: Array) -> float | None:
    """Intersection over union of two masks, 0..1; None if the target's is empty.

    ``generated`` [h, w] is the mask of the bird in the generated picture, brought to the size of ``target`` [H, W] by
    nearest pixel; an empty one scores 0.
    """
    target = foreground(target)
    if not target.any():
        return None
    height, width = target.shape
    generated = resize(foreground(generated), height, width, "nearest")
    return float((generated & target).sum() / (generated | target).sum())
