"""Masks, depth maps and captions by other networks: the optional extra ``nabla_jax[extract]`` (torch). Keypoints by a
head of our own, without torch.

    from nabla_jax import extract
    silhouette = extract.mask(image, "a bird.")            # Grounding DINO, then SAM 2
    silhouette = extract.mask(image, (40, 60, 300, 420))   # SAM 2 by box (top, left, bottom, right)
    depth_map = extract.depth(image)                       # Depth Anything V2
    text = extract.caption(image).text                     # Qwen2.5-VL, the background alone
    points = extract.keypoints(image, silhouette)          # DINOv2 and a head on it

``python -m nabla_jax.extract --config FILE`` makes the files of a whole dataset folder. Everything is read from local
checkpoint folders; nothing is downloaded. Importing this is light: torch and transformers load with the first call.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax.conditioning.geometry import Box
from nabla_jax.config import Extract

if TYPE_CHECKING:
    from nabla_jax.extract.captions import Caption

__all__ = ["caption", "depth", "keypoints", "mask"]

Array = np.ndarray[Any, Any]


def mask(image: Array, prompt: Box | str, settings: Extract | None = None) -> Array:
    """The silhouette of one thing in a picture.

    Args:
      image: [H, W, 3] uint8, upright.
      prompt: its box (top, left, bottom, right), half-open, in pixels; or words for it, in lower case with a full stop,
        of which the best match is taken.
      settings: which checkpoints, and thresholds.

    Returns:
      [H, W] bool.

    Raises:
      UserError: torch or a checkpoint is missing; nothing that matches the words; an empty mask.
    """
    from nabla_jax.extract import segmentation

    return segmentation.find(image, prompt, settings or Extract()).mask


def depth(image: Array, settings: Extract | None = None) -> Array:
    """Relative inverse depth of a still [H, W, 3] uint8 as [H, W] uint8: 0 is the farthest, 255 the nearest point.

    Raises UserError when torch or the checkpoint is missing.
    """
    from nabla_jax.extract import depths

    return depths.to_grey(depths.estimate(image, settings or Extract()))


def keypoints(image: Array, place: Array | Box, settings: Extract | None = None) -> Array:
    """The eleven parts of a bird, in the order of ``nabla_jax.data.skeleton.PARTS``.

    Args:
      image: [H, W, 3] uint8, upright.
      place: its mask [H, W] bool, or its box (top, left, bottom, right).
      settings: which head, and the DINOv2 that it was trained on.

    Returns:
      [11, 3] int32 (row, column, visible).

    Raises:
      UserError: a checkpoint is missing or of other parts; an empty mask.
    """
    from nabla_jax.extract import parts

    return parts.find(image, place, settings or Extract())


def caption(image: Array, names: Iterable[str] = (), settings: Extract | None = None, seed: int = 0) -> "Caption":
    """A sentence on the background of a picture [H, W, 3] uint8; the bird's species and plumage are never named.

    Args:
      image: the picture.
      names: of the species and groups which must not occur.
      settings: checkpoint, prompt, limits.
      seed: of the attempts after the first, which draw words at random.

    Raises:
      UserError: torch or the checkpoint is missing; nothing is left when what must not be said is taken out.
    """
    from nabla_jax.extract import captions
    from nabla_jax.extract.wording import Wording

    return captions.describe(image, Wording(names), settings or Extract(), seed)
