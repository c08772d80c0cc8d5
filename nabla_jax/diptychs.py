"""From pictures to what method insert takes: diptychs encoded, the subject as prompt tokens.

One encoder serves training, the samples drawn during training and generation. Letters in shapes: B batch, S side of
half a diptych in pixels, C latent channels, h w latent height and width of a whole one, N its tokens, R Redux tokens,
E width of a text token, P of the pooled vector.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nabla_jax import assets
from nabla_jax.checkpoints import pipeline, transformers_folder
from nabla_jax.conditioning import diptych
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import flux, layers
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.parallel import mesh as meshes
from nabla_jax.prepare import PIXELS_PER_CALL

Array = np.ndarray[Any, Any]
DeviceBatch = dict[str, jax.Array]

KEYS = ("subject", "target", "repaint", "sample")
"""What the encoder reads of a batch; of training also ``mask``."""


@dataclasses.dataclass(frozen=True)
class DiptychEncoder:
    """The frozen networks of a diptych, made by ``load_encoder``.

    Attributes:
      vae: autoencoder, float32.
      redux: SigLIP tower and embedder.
      processor: how the tower sees a picture.
      mesh: whose devices share each call.
      run: compiled, see ``make_run``.
      weights: hash of the Redux folder's weights.
    """

    vae: pipeline.Component
    redux: pipeline.Component
    processor: ImageProcessor
    mesh: Mesh
    run: Callable[..., DeviceBatch]
    path: Path
    weights: str

    def __call__(self, batch: Mapping[str, Any]) -> DeviceBatch:
        """Pictures to what ``reposing`` takes, on the mesh.

        A few pictures at a time, so that memory does not grow with the batch.

        Args:
          batch: ``subject``, ``target`` [B, 3, S, S] uint8; ``repaint`` [B, S, S], 1 where the target is repainted;
            ``sample`` [B]; in training ``mask`` [B, S / factor, S / factor], the bird's coverage of the target.

        Returns:
          ``masked`` [B, 2C, h, w] moments of the diptych with its hole; ``repaint`` [B, N, 4 factor**2];
          ``prompt_embeds`` [B, T + R, E]; ``pooled`` [B, P] zeros; ``sample``; with ``mask`` also ``target``, moments
          of the whole diptych, and ``mask`` [B, h, w], 0 on the reference.
        """
        names = [*KEYS, *(["mask"] if "mask" in batch else [])]
        chosen = {name: np.asarray(batch[name]) for name in names}
        # Sample numbers are 64 bits wide on the host; keys fold in 32.
        chosen["sample"] = chosen["sample"].astype(np.uint32)
        chosen["seen"] = self.processor(list(np.moveaxis(chosen["subject"], 1, -1)))
        rows = len(chosen["sample"])
        step = pictures_per_call(rows, chosen["target"].shape[-1], meshes.local_parts(self.mesh))
        parts = []
        for start in range(0, rows, step):
            part = {name: value[start : start + step] for name, value in chosen.items()}
            parts.append(self.run(self.vae.params, self.redux.params, meshes.put_batch(part, self.mesh)))
        if len(parts) == 1:
            return parts[0]
        whole = _join(parts)
        return jax.device_put(whole, meshes.batched(self.mesh))


@jax.jit
def _join(parts: list[DeviceBatch]) -> DeviceBatch:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def pictures_per_call(rows: int, size: int, devices: int) -> int:
    """How many of ``rows`` diptychs, of halves of ``size`` pixels, are encoded at once on ``devices``.

    The calls are of one size where the devices allow it, so that one program serves them all.
    """
    most = max(1, PIXELS_PER_CALL // (2 * size * size)) * devices
    calls = -(-rows // most)
    return -(-rows // calls // devices) * devices


def load_encoder(
    base: Path, redux: str | os.PathLike[str], text_length: int, mesh: Mesh, dtype: str, vae: pipeline.Component
) -> DiptychEncoder:
    """The encoder for a FLUX.1-Fill folder and a FLUX.1-Redux folder (or ``asset:NAME``).

    Args:
      base: pipeline folder.
      redux: ``image_encoder/`` and ``image_embedder/``, in ``dtype``.
      text_length: tokens of the empty text before Redux's.
      mesh: of the devices.
      dtype: float32 or bfloat16.
      vae: the base's autoencoder on the mesh.

    Raises UserError for a folder that is not FLUX.1-Redux or does not fit the base.
    """
    folder = assets.resolve(redux)
    config = pipeline.transformer_config(base)
    transformers_folder.check_redux(folder, config.joint_attention_dim)
    loaded = transformers_folder.load_redux(folder, dtype=jnp.dtype(dtype), sharding=meshes.replicated(mesh))
    described = folder / "feature_extractor" / "preprocessor_config.json"
    side = loaded.config.image_encoder.image_size
    processor = ImageProcessor.from_json(described) if described.is_file() else ImageProcessor.siglip(side)
    run = make_run(vae, loaded, config, text_length)
    return DiptychEncoder(vae, loaded, processor, mesh, run, folder, weights_hash(folder))


@functools.cache
def weights_hash(folder: Path) -> str:
    """SHA-256 (hex) of the weights of a FLUX.1-Redux folder, tower and embedder joined by a plus sign; read once."""
    return "+".join(pipeline.folder_hash(folder / name) for name in transformers_folder.REDUX)


def make_run(
    vae: pipeline.Component, redux: pipeline.Component, config: flux.FluxConfig, text_length: int
) -> Callable[..., DeviceBatch]:
    """Compiled: (vae parameters, redux parameters, batch) -> batch, see ``DiptychEncoder``.

    The incoming batch has, beside what ``DiptychEncoder`` takes, ``seen`` [B, 3, H, W] float32: the subjects as Redux
    sees them.
    """
    settings: AutoencoderKLConfig = vae.config

    @jax.jit
    def run(vae_params: layers.Params, redux_params: layers.Params, batch: Mapping[str, jax.Array]) -> DeviceBatch:
        encode = layers.bind(vae.graphdef, vae_params).encode
        reference, target = (batch[name].astype(jnp.float32) / 127.5 - 1 for name in ("subject", "target"))
        whole, masked, mask = diptych.pictures(reference, target, batch["repaint"])
        tokens = layers.bind(redux.graphdef, redux_params)(batch["seen"]).astype(jnp.float32)
        embeds, pooled = diptych.prompt(tokens, text_length, config.pooled_projection_dim)
        found = {
            "masked": encode(masked).astype(jnp.float32),
            "repaint": diptych.fold_mask(mask, settings.factor),
            "prompt_embeds": embeds,
            "pooled": pooled,
            "sample": batch["sample"],
        }
        if "mask" in batch:
            found["target"] = encode(whole).astype(jnp.float32)
            found["mask"] = diptych.side_by_side(jnp.zeros_like(batch["mask"]), batch["mask"])
        return found

    return run
