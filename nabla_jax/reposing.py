"""The method as pure functions: from VAE moments of subject and control to a loss or to a new picture.

Training, the samples drawn during training and generation all run these functions. Letters in shapes: B
batch, C latent channels, h w latent height and width, N tokens (h/2 * w/2), T text tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nabla_jax import draws, flow
from nabla_jax.conditioning import omini
from nabla_jax.models import flux, layers
from nabla_jax.models.autoencoder import AutoencoderKLConfig, sample_latents
from nabla_jax.models.lora import Adapter

Adapters = dict[str, Adapter]
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything static about a forward pass.

    Attributes:
      transformer: graph of the FLUX transformer.
      vae: the autoencoder's configuration.
      adapter: name of the adapter on both conditions, or None for the bare base.
      independent: conditions see themselves only.
      guidance_embeds: whether the transformer takes a guidance scale.
      dtype: of matrix products.
      remat: what the backward pass keeps.
    """

    transformer: "nnx.GraphDef[flux.Flux]"
    vae: AutoencoderKLConfig
    adapter: str | None
    independent: bool
    guidance_embeds: bool
    dtype: str = "float32"
    remat: flux.Remat = "none"


def predict(
    method: Method,
    base: layers.Params,
    adapters: Adapters,
    noisy: jax.Array,
    time: jax.Array,
    subject: jax.Array,
    control: jax.Array,
    text: tuple[jax.Array, jax.Array],
    guidance: float | jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """The velocity at ``noisy``.

    Args:
      noisy, subject, control: [B, N, 4C] packed latents.
      time: [B].
      text: prompt embeddings [B, T, E] and pooled vector [B, P].
      guidance: scale on text and noise; ignored by transformers without guidance embedding.
      grid: (height, width) in tokens, N = height * width.

    Returns:
      [B, N, 4C] float32.
    """
    conditions = [
        omini.Condition(subject, omini.grid_ids(*grid, index=1), method.adapter),
        omini.Condition(control, omini.grid_ids(*grid), method.adapter),
    ]
    branches = omini.branches(
        *text,
        noisy,
        omini.grid_ids(*grid),
        time,
        guidance=guidance if method.guidance_embeds else None,
        conditions=conditions,
        independent=method.independent,
    )
    model = layers.bind(method.transformer, base)
    return model(branches, adapters=adapters, dtype=jnp.dtype(method.dtype), remat=method.remat)


def condition_tokens(
    method: Method, subject: jax.Array, control: jax.Array, seed: int | jax.Array, numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws the latents of both conditions from their moments [B, 2C, h, w], packed: [B, N, 4C] each."""
    return (
        _tokens(method, subject, seed, numbers, draws.SUBJECT_LATENT),
        _tokens(method, control, seed, numbers, draws.CONTROL_LATENT),
    )


def _tokens(method: Method, moments: jax.Array, seed: int | jax.Array, numbers: jax.Array, purpose: int) -> jax.Array:
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    eps = draws.normal(draws.keys(seed, numbers, purpose), shape)
    return flow.pack(sample_latents(moments.astype(jnp.float32), eps, method.vae))


def loss(
    method: Method, adapters: Adapters, base: layers.Params, batch: Batch, *, seed: int, guidance: float,
    time_mean: float = 0.0, foreground_weight: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Mean squared error of the velocity at a random point of each sample's path; float32 scalar.

    Args:
      batch: ``target``, ``subject``, ``control`` VAE moments [B, 2C, h, w]; ``prompt_embeds`` [B, T, E];
        ``pooled`` [B, P]; ``mask`` [B, h, w], the target's foreground coverage in [0, 1]; ``sample`` [B], the numbers
        that every draw is folded with.
      seed: of the run.
      guidance: scale on text and noise.
      time_mean: mean of the logit of the times; the reference system has 0.
      foreground_weight: weight of tokens that show the bird; the reference system has 1.
    """
    numbers = batch["sample"]
    height, width = batch["target"].shape[-2:]
    x0 = _tokens(method, batch["target"], seed, numbers, draws.TARGET_LATENT)
    x1 = draws.normal(draws.keys(seed, numbers, draws.NOISE), x0.shape[1:])
    time = jax.vmap(lambda key: flow.logit_normal_time(key, mean=time_mean))(draws.keys(seed, numbers, draws.TIME))
    subject, control = condition_tokens(method, batch["subject"], batch["control"], seed, numbers)
    noisy = flow.interpolate(x0, x1, time)
    text = (batch["prompt_embeds"], batch["pooled"])
    grid = (height // flow.path.PATCH, width // flow.path.PATCH)
    prediction = predict(method, base, adapters, noisy, time, subject, control, text, guidance, grid)
    weight = None if foreground_weight == 1 else flow.foreground_weight(batch["mask"], foreground_weight)
    return flow.velocity_loss(prediction, x0, x1, weight)


def sample(
    method: Method,
    base: layers.Params,
    adapters: Adapters,
    batch: Batch,
    sigmas: np.ndarray | jax.Array,
    guidance: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    """Draws the latents of a batch of pictures by Euler's method, as one scan.

    Args:
      batch: ``subject``, ``control`` moments [B, 2C, h, w]; ``prompt_embeds``; ``pooled``; ``sample`` [B]
        numbers.
      sigmas: [steps + 1] noise levels from 1 down to 0.
      guidance: float32 scalar or [B].
      seed: integer scalar; with the number of a picture it fixes the picture.

    Returns:
      Scaled latents [B, C, h, w] float32.
    """
    numbers = batch["sample"]
    height, width = batch["subject"].shape[-2:]
    grid = (height // flow.path.PATCH, width // flow.path.PATCH)
    subject, control = condition_tokens(method, batch["subject"], batch["control"], seed, numbers)
    scale = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), numbers.shape)
    text = (batch["prompt_embeds"], batch["pooled"])

    def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        time = jnp.full(numbers.shape, sigma)
        return predict(method, base, adapters, noisy, time, subject, control, text, scale, grid)

    start = draws.normal(draws.keys(seed, numbers, draws.NOISE), subject.shape[1:])
    return flow.unpack(flow.euler(velocity, start, jnp.asarray(sigmas)), height, width)


def make_sampler(method: Method) -> Callable[..., jax.Array]:
    """``sample`` compiled for one method: (base, adapters, batch, sigmas, guidance, seed) -> latents."""
    return jax.jit(lambda *arguments: sample(method, *arguments))
