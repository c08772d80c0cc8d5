"""Silhouettes: SAM 2 by box, and Grounding DINO for the box where only words are known.

SAM 2 (Ravi et al. 2024), Grounding DINO (Liu et al. 2023). SAM 2's processor in transformers needs torchvision; its few
steps are made here with Pillow and numpy.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.conditioning.geometry import Box, clip_box
from nabla_jax.config import Extract
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints
from nabla_jax.images import resize

Array = np.ndarray[Any, Any]

# ImageNet's, which SAM 2 was trained with.
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


class NotFound(UserError):
    """The networks found nothing in this picture; another picture may be fine."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A silhouette and what the networks thought of it.

    Attributes:
      mask: [H, W] bool.
      box: what SAM 2 was shown (top, left, bottom, right).
      quality: SAM 2's estimate of the mask's intersection over union.
      score: Grounding DINO's confidence in the box; None where the box was given.
    """

    mask: Array
    box: Box
    quality: float
    score: float | None = None


def find(image: Array, prompt: Box | str, settings: Extract) -> Found:
    """The silhouette of what ``prompt`` says, see ``nabla_jax.extract.mask``. Raises NotFound, UserError."""
    score = None
    box = prompt
    if isinstance(box, str):
        box, score = detect(image, box, settings)
    mask, quality = segment(image, clip_box(box, *image.shape[:2]), settings)
    if not mask.any():
        raise NotFound(f"SAM 2 found an empty mask in box {box}")
    return Found(mask, box, quality, score)


def detect(image: Array, text: str, settings: Extract) -> tuple[Box, float]:
    """The best match of ``text`` (lower case, ends with a full stop) in a picture: its box and confidence.

    Raises NotFound if none is more confident than ``extract.box_threshold``.
    """
    if text != text.lower() or not text.endswith("."):
        raise UserError(f"extract.text: found {text!r}, expected lower case with a full stop, such as 'a bird.'")
    folder = checkpoints.find(settings, "grounding_dino")
    import torch
    from PIL import Image

    device = checkpoints.device(settings)
    model = checkpoints.load("GroundingDinoForObjectDetection", folder, device)
    processor = _detection_processor(folder)
    inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt").to(device)
    with torch.inference_mode():
        outputs = model(**inputs)
    (found,) = processor.post_process_grounded_object_detection(
        outputs,
        inputs["input_ids"],
        threshold=settings.box_threshold,
        text_threshold=settings.text_threshold,
        target_sizes=[image.shape[:2]],
    )
    if not len(found["scores"]):
        raise NotFound(f"Grounding DINO found no {text!r} above extract.box_threshold {settings.box_threshold}")
    best = int(found["scores"].argmax())
    left, top, right, bottom = (float(v) for v in found["boxes"][best])
    box = math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right)
    return clip_box(box, *image.shape[:2]), float(found["scores"][best])


@functools.cache
def _detection_processor(folder: Path) -> Any:
    from transformers import AutoTokenizer, GroundingDinoImageProcessorPil, GroundingDinoProcessor

    images = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return GroundingDinoProcessor(images, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def segment(image: Array, box: Box, settings: Extract) -> tuple[Array, float]:
    """SAM 2's mask [H, W] bool of what lies in ``box``, and its estimate of the mask's quality."""
    folder = checkpoints.find(settings, "sam2")
    import torch

    device = checkpoints.device(settings)
    model = checkpoints.load("Sam2Model", folder, device)
    side = _side(model.config.prompt_encoder_config.image_size)
    pixels, corners = prepare(image, box, side)
    with torch.inference_mode():
        outputs = model(
            pixel_values=torch.from_numpy(pixels[None]).to(device, model.dtype),
            input_boxes=torch.from_numpy(corners[None, None]).to(device),
            multimask_output=False,
        )
    logits = outputs.pred_masks.float().cpu().numpy()[0, 0, 0]
    return at_size(logits, *image.shape[:2]), float(outputs.iou_scores.float().cpu().reshape(-1)[0])


def prepare(image: Array, box: Box, side: int) -> tuple[Array, Array]:
    """What SAM 2 takes: pixels [3, side, side] float32, normalised; the box as (x0, y0, x1, y1) float32 on that square.

    The picture is squashed to a square, bilinear with smoothing, in whole grey levels.
    """
    from PIL import Image

    square = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    pixels = (square.astype(np.float32) / np.float32(255) - _MEAN) / _STD
    top, left, bottom, right = box
    scale = np.array([side / image.shape[1], side / image.shape[0]] * 2)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), (np.array([left, top, right, bottom]) * scale).astype("f4")


def at_size(logits: Array, height: int, width: int) -> Array:
    """Logits of the squashed picture [h, w] -> the mask [height, width] bool: bilinear, then above 0."""
    mask: Array = resize(logits, height, width, "bilinear") > 0
    return mask


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])
