"""Pose fidelity: does the generated bird stand where the target's bird stands?"""

from __future__ import annotations

from typing import Any

import numpy as np

from nabla_jax.images import resize
from nabla_jax.metrics.pixels import foreground

Array = np.ndarray[Any, Any]


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
