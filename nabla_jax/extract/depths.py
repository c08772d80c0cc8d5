"""Depth maps: Depth Anything V2 (Yang et al. 2024) for stills, an external command for the frames of a clip."""

import functools
import shlex
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.config import Extract
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints
from nabla_jax.images import resize, write_image

Array = np.ndarray[Any, Any]


def estimate(image: Array, settings: Extract) -> Array:
    """Relative inverse depth [H, W] float32 of a still [H, W, 3] uint8; larger is nearer, scale and shift unknown."""
    folder = checkpoints.find(settings, "depth_anything")
    import torch
    from PIL import Image

    device = checkpoints.device(settings)
    model = checkpoints.load("DepthAnythingForDepthEstimation", folder, device)
    processor = _processor(folder)
    inputs = processor(images=Image.fromarray(image), return_tensors="pt").to(device, model.dtype)
    with torch.inference_mode():
        outputs = model(**inputs)
    (found,) = processor.post_process_depth_estimation(outputs, target_sizes=[image.shape[:2]])
    depth: Array = found["predicted_depth"].float().cpu().numpy()
    return depth.reshape(image.shape[:2])


@functools.cache
def _processor(folder: Path) -> Any:
    from transformers import DPTImageProcessorPil

    return DPTImageProcessorPil.from_pretrained(folder, local_files_only=True)


def to_grey(depth: Array, limits: tuple[float, float] | None = None) -> Array:
    """Inverse depth as uint8, ``limits`` (default: its smallest and largest value) becoming 0 and 255.

    Raises UserError for values that are not finite.
    """
    if not np.isfinite(depth).all():
        raise UserError("depth: found values that are not finite")
    low, high = (float(depth.min()), float(depth.max())) if limits is None else limits
    if high <= low:
        return np.zeros(depth.shape, np.uint8)
    scaled = (depth.astype(np.float64) - low) / (high - low)
    grey: Array = np.floor(np.clip(scaled, 0, 1) * 255 + 0.5).astype(np.uint8)
    return grey


def of_clip(frames: Sequence[Array], settings: Extract) -> list[Array]:
    """Depth maps [H, W] uint8 of the frames of one clip, on one scale, by the user's command ``extract.clip_depth``.

    The command is a template, run without a shell. ``{frames}`` stands for a folder with 000000.png, 000001.png, ...;
    in the folder ``{output}`` it must leave one file ``*.npz`` whose array ``depths`` [T, h, w] holds inverse depth
    (larger is nearer), as Video-Depth-Anything's --save_npz does.

    Raises UserError when the command fails or leaves something else.
    """
    try:
        words = [word.format(frames="{frames}", output="{output}") for word in shlex.split(settings.clip_depth)]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"extract.clip_depth: {settings.clip_depth!r} is no command template ({error})") from error
    if not all(any(f"{{{name}}}" in word for word in words) for name in ("frames", "output")):
        raise UserError(f"extract.clip_depth: found {settings.clip_depth!r}, expected {{frames}} and {{output}} in it")
    with tempfile.TemporaryDirectory(prefix="nabla_clip_") as folder:
        places = {name: Path(folder, name) for name in ("frames", "output")}
        for place in places.values():
            place.mkdir()
        for number, frame in enumerate(frames):
            write_image(frame, places["frames"] / f"{number:06d}.png")
        command = [word.format(**places) for word in words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(f"extract.clip_depth: {command[0]}: cannot be run: {error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"extract.clip_depth: {command[0]} ended with status {done.returncode}: {last}")
        depths = _read_npz(places["output"], len(frames))
    limits = float(depths.min()), float(depths.max())
    return [
        to_grey(resize(depth.astype(np.float64), frame.shape[0], frame.shape[1], "bilinear"), limits)
        for depth, frame in zip(depths, frames, strict=True)
    ]


def _read_npz(folder: Path, count: int) -> Array:
    files = sorted(folder.rglob("*.npz"))
    if len(files) != 1:
        raise UserError(f"extract.clip_depth: found {len(files)} .npz files in {{output}}, expected one")
    try:
        with np.load(files[0], allow_pickle=False) as archive:
            depths: Array = archive["depths"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"extract.clip_depth: {files[0].name}: found no array 'depths' ({error})") from error
    if depths.ndim != 3 or len(depths) != count:
        raise UserError(f"extract.clip_depth: depths has shape {depths.shape}, expected [{count}, height, width]")
    return depths
