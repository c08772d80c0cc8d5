"""Pictures and captions encoded once for the transformer's pre-training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from nabla_jax.checkpoints.pipeline import Component, Tokenizers
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.text import tokenize
from nabla_jax.models import layers
from nabla_jax.pretrain.pictures import Pictures
from nabla_jax.pretrain.transformer import Latents
from nabla_jax.runs import progress, write_atomic

_BATCH = 64
_CHUNK = 1024


def encode(
    pictures: Pictures, vae: Component, tokenizers: Tokenizers, folder: Path, *, size: int, prompt: str,
    text_length: int, clip_length: int,
) -> Latents:  # fmt: skip
    """Encodes whole views, crops of the birds and disguises; finished chunks in ``folder`` are kept.

    Args:
      pictures: rendered views and disguises, [N, 3, H, W, 3].
      vae: the autoencoder with its measured shift and scale.
      tokenizers: of the checkpoint folder being made.
      folder: where the encoded chunks are kept.
      size: side of the model's pictures, pixels.
      prompt: the plain caption.
      text_length: T5 tokens.
      clip_length: CLIP tokens.
    """
    config = vae.config

    @jax.jit
    def run(params: layers.Params, images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        mean, _ = jnp.split(layers.bind(vae.graphdef, params).encode(images), 2, axis=1)
        return ((mean - config.shift_factor) * config.scaling_factor).astype(jnp.float16)

    def encode_all(images: np.ndarray) -> np.ndarray:
        pad = -len(images) % _BATCH
        padded = np.concatenate([images, np.zeros((pad, *images.shape[1:]), images.dtype)])
        parts = [np.asarray(run(vae.params, padded[i : i + _BATCH])) for i in range(0, len(padded), _BATCH)]
        return np.concatenate(parts)[: len(images)]

    folder.mkdir(parents=True, exist_ok=True)
    whole, crop, cover, disguise = [], [], [], []
    with progress(len(pictures.pictures), "latents", unit="bird") as bar:
        for start in range(0, len(pictures.pictures), _CHUNK):
            path = folder / f"chunk-{start:07d}.safetensors"
            views, disguised = np.split(pictures.pictures[start : start + _CHUNK], [2], axis=1)
            masks = pictures.masks[start : start + _CHUNK]
            if not path.exists():
                flat, shown = views.reshape(-1, *views.shape[2:]), masks.reshape(-1, *masks.shape[2:])
                birds = [
                    Placement.subject(mask, size).apply(picture, 255, "area")
                    for picture, mask in zip(flat, shown, strict=True)
                ]
                arrays = {
                    "whole": encode_all(flat),
                    "crop": encode_all(np.stack(birds)),
                    "cover": _cover(shown, config.factor * 2),
                    "disguise": encode_all(disguised[:, 0]),
                }
                write_atomic(path, save(arrays))
            chunk = load_file(path)
            whole.append(chunk["whole"])
            crop.append(chunk["crop"])
            cover.append(chunk["cover"])
            disguise.append(chunk["disguise"])
            bar.update(len(views))
    captions = [caption for pair in pictures.captions for caption in pair]
    clip, t5 = tokenize(tokenizers, captions, text_length, clip_length)
    plain_clip, plain_t5 = tokenize(tokenizers, [prompt], text_length, clip_length)
    black = encode_all(np.zeros((1, size, size, 3), np.uint8))[0]
    return Latents(
        whole=_pairs(whole), crop=_pairs(crop), disguise=np.concatenate(disguise), blank=black.astype(np.float32),
        cover=_pairs(cover),
        t5=np.asarray(t5, np.int32).reshape(-1, 2, text_length),
        clip=np.asarray(clip, np.int32).reshape(-1, 2, np.shape(clip)[-1]),
        plain_t5=np.asarray(plain_t5, np.int32)[0], plain_clip=np.asarray(plain_clip, np.int32)[0],
    )  # fmt: skip


def _pairs(chunks: Sequence[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(chunks)
    return joined.reshape(-1, 2, *joined.shape[1:])


def _cover(masks: np.ndarray, patch: int) -> np.ndarray:
    n, h, w = masks.shape
    shares = masks.reshape(n, h // patch, patch, w // patch, patch).mean((2, 4))
    return np.round(255 * shares).astype(np.uint8)


def report_to(path: Path) -> Any:
    """A function that appends one JSON line per report to a log file."""

    def report(row: dict[str, float]) -> None:
        with path.open("a") as log:
            log.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")

    return report
