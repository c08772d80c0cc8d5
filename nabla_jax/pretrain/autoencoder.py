"""Trains a small autoencoder from scratch on pictures of birds and their masks.

The objective is reconstruction (squared and absolute error, the bird weighted more) plus a small KL term
towards the unit normal, as in Rombach et al. 2022 without the adversarial part. Every sample depends on
(seed, step) alone, so a run continued from a checkpoint equals one that was never stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from nabla_jax.pretrain.state import State, Update, fit, make_update

Params = layers.Params


def small_config() -> AutoencoderKLConfig:
    """The autoencoder of the embedded checkpoints: pictures of 48 pixels, factor 4, 16 channels."""
    return AutoencoderKLConfig(
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=48,
        # Placeholders until the training has measured its latents.
        scaling_factor=1.0,
        shift_factor=0.0,
    )


@dataclass(frozen=True)
class Settings:
    """How to train.

    ``flat`` is the share of pictures whose bird, or whose background, is replaced by one colour: conditions
    are encoded like that. ``bird_weight`` multiplies the error inside the mask; ``l1`` and ``kl`` weigh the
    absolute error and the KL term against the squared error.
    """

    steps: int = 6000
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 1e-4
    ema: float = 0.995
    flat: float = 0.1
    bird_weight: float = 3.0
    l1: float = 0.1
    kl: float = 1e-5
    seed: int = 0


def initialize(config: AutoencoderKLConfig, seed: int) -> tuple["nnx.GraphDef[AutoencoderKL]", Params]:
    """Fresh parameters with residual branches and latent noise silenced: training starts almost linear."""
    graphdef, params = layers.initialize(lambda r: AutoencoderKL(config, rngs=r), jax.random.key(seed))

    def silence(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if "conv2" in names or "to_out" in names:
            return jnp.zeros_like(leaf)
        if names[:2] == ["encoder", "conv_out"]:
            # Small noise at first: the decoder learns nothing from drowned latents.
            return leaf.at[config.latent_channels :].set(-6.0 if names[2] == "bias" else 0.0)
        return leaf

    return graphdef, jax.tree_util.tree_map_with_path(silence, params)


def loss(
    graphdef: "nnx.GraphDef[AutoencoderKL]",
    params: Params,
    images: jax.Array,
    masks: jax.Array,
    key: jax.Array,
    settings: Settings,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted reconstruction error plus KL term.

    Args:
      graphdef: the autoencoder's graph.
      params: its parameters.
      images: [B, 3, H, W] in [-1, 1].
      masks: [B, H, W] in [0, 1], 1 = bird.
      key: for the sampled latents.
      settings: the weights.

    Returns:
      The loss and {mse (inside the mask), kl (per latent value)}.
    """
    model = layers.bind(graphdef, params)
    mean, logvar = jnp.split(model.encode(images), 2, axis=1)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = model.decode(z) - images
    weight = 1 + (settings.bird_weight - 1) * masks[:, None]
    weight = weight / weight.mean()
    pixel = jnp.mean(weight * (error**2 + settings.l1 * jnp.abs(error)))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    inside = jnp.sum(masks[:, None] * error**2) / jnp.maximum(3 * masks.sum(), 1)
    return pixel + settings.kl * kl, {"mse": inside, "kl": kl}


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to zero and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, settings.warmup, settings.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay)
    )


def make_step(graphdef: "nnx.GraphDef[AutoencoderKL]", settings: Settings) -> Update:
    """The compiled update: (params, ema, optimizer state, step, images, masks) -> the first three, metrics."""

    def objective(
        params: Params, number: jax.Array, images: jax.Array, masks: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        images = images.astype(jnp.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        return loss(graphdef, params, images, masks.astype(jnp.float32), key, settings)

    return make_update(objective, optimizer(settings), settings.ema)


def draw_batch(pictures: np.ndarray, masks: np.ndarray, step: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step: drawn with replacement, mirrored half of the time, some partly flattened.

    Args:
      pictures: uint8 [N, H, W, 3].
      masks: bool [N, H, W].
      step: the number of the step.
      settings: batch, flat and seed.

    Returns:
      uint8 [B, H, W, 3] and bool [B, H, W].
    """
    rng = np.random.default_rng((settings.seed, step))
    index = rng.integers(len(pictures), size=settings.batch)
    images, birds = pictures[index], masks[index]
    for i in range(settings.batch):
        if rng.random() < 0.5:
            images[i], birds[i] = images[i, :, ::-1].copy(), birds[i, :, ::-1].copy()
        if rng.random() < settings.flat:
            grey = rng.choice(np.array([0, 127, 128, 255]))
            colour = rng.integers(256, size=3) if rng.random() < 0.5 else np.full(3, grey)
            images[i][birds[i] if rng.random() < 0.5 else ~birds[i]] = colour
    return images, birds


def reconstruct(
    graphdef: "nnx.GraphDef[AutoencoderKL]",
    params: Params,
    pictures: np.ndarray,
    seed: int = 0,
    batch: int = 25,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes (sampling) and decodes uint8 pictures [N, H, W, 3].

    Returns:
      uint8 reconstructions [N, H, W, 3] and the unscaled latents float32 [N, C, h, w].
    """

    @jax.jit
    def run(params: Params, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = layers.bind(graphdef, params)
        mean, logvar = jnp.split(model.encode(images), 2, axis=1)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return model.decode(z), z

    out, latents = [], []
    for start in range(0, len(pictures), batch):
        images = pictures[start : start + batch].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        decoded, z = run(params, images, jax.random.fold_in(jax.random.key(seed), start))
        decoded = np.clip(np.round((np.asarray(decoded).transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255)
        out.append(decoded.astype(np.uint8))
        latents.append(np.asarray(z))
    return np.concatenate(out), np.concatenate(latents)


def psnr(pictures: np.ndarray, reconstructions: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures [N, H, W, 3], inside weights [N, H, W] if given.

    The squared error is averaged over all pictures before the logarithm.
    """
    error = (pictures.astype(np.float64) - reconstructions.astype(np.float64)) ** 2
    error = error.mean(-1)
    mse = error.mean() if weights is None else (error * weights).sum() / weights.sum()
    return float(10 * np.log10(255**2 / mse))


def with_measured_scale(config: AutoencoderKLConfig, latents: np.ndarray) -> AutoencoderKLConfig:
    """The config whose shift and scale bring unscaled latents [N, C, h, w] to mean 0 and deviation 1."""
    return replace(
        config,
        shift_factor=round(float(latents.mean()), 4),
        scaling_factor=round(float(1 / latents.std()), 4),
    )


def train(
    config: AutoencoderKLConfig,
    settings: Settings,
    pictures: np.ndarray,
    masks: np.ndarray,
    *,
    held_out: tuple[np.ndarray, np.ndarray],
    checkpoint: Path,
    report: Callable[[dict[str, float]], None],
    every: int = 250,
) -> tuple["nnx.GraphDef[AutoencoderKL]", State]:
    """Trains to ``settings.steps``, continuing from ``checkpoint`` if it exists.

    Args:
      config: sizes of the autoencoder; shift and scale are not used.
      settings: how to train.
      pictures: uint8 [N, H, W, 3].
      masks: bool [N, H, W].
      held_out: pictures and masks to measure on.
      checkpoint: file to continue from and to write every ``every`` steps.
      report: receives {step, samples_per_second, loss, mse, kl, psnr_bird, psnr} every ``every`` steps.

    Returns:
      The graph and the final state; ``state.ema`` are the parameters to keep.
    """
    graphdef, params = initialize(config, settings.seed)

    def tell(state: State, row: dict[str, float]) -> None:
        decoded, _ = reconstruct(graphdef, state.ema, held_out[0])
        report(
            {
                "step": state.step,
                "samples_per_second": settings.batch * row.pop("steps_per_second"),
                **row,
                "psnr_bird": psnr(held_out[0], decoded, held_out[1]),
                "psnr": psnr(held_out[0], decoded),
            }
        )

    state = fit(
        params, optimizer(settings), make_step(graphdef, settings),
        lambda number: draw_batch(pictures, masks, number, settings),
        steps=settings.steps, name="autoencoder", checkpoint=checkpoint, report=tell, every=every,
    )  # fmt: skip
    return graphdef, state
