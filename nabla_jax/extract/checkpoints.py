"""Local checkpoint folders, most of them transformers': loading them whole, and naming exactly what was loaded."""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from nabla_jax import assets
from nabla_jax.config import Extract
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256

OBTAIN = {
    "sam2": "facebook/sam2.1-hiera-large",
    "grounding_dino": "IDEA-Research/grounding-dino-base",
    "depth_anything": "depth-anything/Depth-Anything-V2-Small-hf",
    "captioner": "Qwen/Qwen2.5-VL-7B-Instruct",
    "dinov2": "facebook/dinov2-base",
}
"""Field of ``Extract`` -> the repository on huggingface.co that its default folder is a copy of."""
OWN = {"keypoints": "python -m nabla_jax.keypoints --config configs/keypoints.py"}
"""Field of ``Extract`` -> the command that makes its default folder."""
WITHOUT_TORCH = ("keypoints", "dinov2")
"""Fields of ``Extract`` whose networks run in JAX."""

_MODEL_FILES = (".bin", ".jinja", ".json", ".model", ".pt", ".safetensors", ".txt")


def folder_of(settings: Extract, field: str) -> Path:
    """The folder that a field of ``settings`` names, there or not. Raises UserError for an unknown asset."""
    return assets.resolve(getattr(settings, field))


def is_there(settings: Extract, *fields: str) -> bool:
    """Whether the checkpoint folders of all ``fields`` are there."""
    return all((folder_of(settings, field) / "config.json").is_file() for field in fields)


def find(settings: Extract, field: str) -> Path:
    """The checkpoint folder of a field of ``settings``. Raises UserError when it, or torch for it, is missing."""
    folder = folder_of(settings, field)
    if not is_there(settings, field):
        how = (
            f"`{OWN[field]}` makes one"
            if field in OWN
            else f"`hf download {OBTAIN[field]} --local-dir {folder}` fetches one"
        )
        raise UserError(f"extract.{field}: found no {folder / 'config.json'}, expected a checkpoint folder; {how}")
    if field in WITHOUT_TORCH:
        return folder
    if importlib.util.find_spec("torch") is None:
        raise UserError("extraction needs torch, which is not installed: pip install 'nabla_jax[extract]'")
    return folder


@functools.cache
def load(kind: str, folder: Path, device: str) -> Any:
    """The transformers model of class ``kind`` in ``folder``, on a torch device, ready to predict.

    Raises UserError if the folder's weights are of another model: weights that are missing would be random.
    """
    import transformers

    try:
        # The checkpoint's own precision; every one of these is float32 or bfloat16.
        model, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype="auto", use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be loaded as {kind}: {' '.join(str(error).split())[:300]}") from error
    missing = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights of {kind} are missing or misshapen, first {missing[0]}")
    return model.to(device).eval().requires_grad_(False)


def device(settings: Extract) -> str:
    """The torch device that is asked for, or else a GPU where there is one. Raises UserError for an unknown one."""
    import torch

    if not settings.device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"extract.device: {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return settings.device


@functools.cache
def identity(folder: Path) -> dict[str, str]:
    """What names the content of a checkpoint folder: its name, a hash of its files, the hub's revision where known."""
    total = hashlib.sha256()
    files = sorted(p for p in folder.rglob("*") if p.suffix in _MODEL_FILES and p.is_file())
    for file in files:
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            total.update(f"{name.as_posix()} {file_sha256(file)}\n".encode())
    found = {"name": folder.resolve().name, "sha256": total.hexdigest()}
    # `hf download --local-dir` notes the commit of every file.
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if note.is_file():
        found["revision"] = note.read_text(encoding="utf-8").split("\n")[0].strip()
    return found
