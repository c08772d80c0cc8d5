"""Trains a small FLUX.1-Fill together with a small FLUX.1-Redux, starting from another small base.

Every step has one task for its whole batch, drawn from (seed, step):

- ``caption``: caption and masked picture -> picture.
- ``variation``: the picture's own Redux tokens, after zeros, and masked picture -> picture.
- ``diptych``: reference left, masked target right, and the target's caption or the plain one. The reference is another
  view of the same individual, every pair a fresh one; at first it is often the target's own view.

So everything that Insert Anything puts together is known, and never put together: Redux tokens of another view, beside
a diptych, with the bird's own silhouette as the hole. That is for an adapter to learn.

SigLIP stays as it is. Pictures are encoded once, diptychs side by side, since the autoencoder's norms and attention
span both halves; hence the masks are drawn once, too. Every sample depends on (seed, step) alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from nabla_jax import flow
from nabla_jax.checkpoints.pipeline import Component
from nabla_jax.conditioning import diptych
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.masks import repaint_mask
from nabla_jax.flow.path import interpolate, logit_normal_time, velocity
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.layers import Params
from nabla_jax.models.lora import Adapter
from nabla_jax.pretrain import transformer
from nabla_jax.pretrain.pictures import Pictures
from nabla_jax.pretrain.state import State, draw_task, fit, make_update, muon
from nabla_jax.pretrain.transformer import EncodeText, Latents
from nabla_jax.runs import progress, write_atomic

_BATCH = 32
_CHUNK = 500
_WHOLE = "whole"
_SINGLES = 4
"""Of so many individuals one also gives a masked picture."""

TASKS = ("caption", "variation", "diptych")


@dataclasses.dataclass(frozen=True)
class DiptychConfig:
    """What the diptychs show.

    Attributes:
      copies: share of individuals that also get a diptych whose reference is the target's own view, whole or cropped.
      whole: share of references that are not cropped.
      alone: share of crops without their background.
      expansion: range of the white border round a crop, times its height and width.
      masks: share of each mask policy, as (policy, share) pairs; the shares add up to 1.
      seed: of every random draw.
    """

    copies: float = 0.15
    whole: float = 0.5
    alone: float = 0.3
    expansion: tuple[float, float] = (1.0, 1.4)
    masks: tuple[tuple[str, float], ...] = (("box", 0.5), ("bezier", 0.5))
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; what is not said here is as in ``transformer.Settings``.

    Attributes:
      tasks: shares of ``TASKS``; they add up to 1.
      plain: share of diptychs with the plain caption instead of the target's.
      curriculum: share of the steps during which references are copies with falling probability.
      hole_weight: weight of repainted tokens against the others, which can be copied.
      guidance: range of the guidance scales drawn.
    """

    steps: int = 2000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.4
    ema: float = 0.995
    tasks: tuple[float, float, float] = (0.1, 0.15, 0.75)
    plain: float = 0.5
    curriculum: float = 0.2
    hole_weight: float = 8.0
    guidance: tuple[float, float] = (1.0, 30.0)
    time_mean: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Diptychs:
    """Encoded diptychs and masked pictures; scaled latents are float16.

    Attributes:
      picture, masked: [P, C, h, 2w], reference left and target right, without and with the hole.
      hole: bool [P, H, W], what is repainted of the target.
      copy: bool [P], whether the reference is the target's own view.
      individual, view: int [P], which view the target is.
      single: [S, C, h, w], masked views.
      single_hole: bool [S, H, W].
      single_features: float16 [S, R, D], SigLIP's patches of the views without their holes.
      single_individual, single_view: int [S], which view it is.
    """

    picture: np.ndarray
    masked: np.ndarray
    hole: np.ndarray
    copy: np.ndarray
    individual: np.ndarray
    view: np.ndarray
    single: np.ndarray
    single_hole: np.ndarray
    single_features: np.ndarray
    single_individual: np.ndarray
    single_view: np.ndarray


def draw_reference(
    rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, size: int, config: DiptychConfig
) -> np.ndarray:
    """The picture, or the bird's crop on a white square: uint8 [H, W, 3], bool [H, W] -> uint8 [size, size, 3]."""
    if rng.random() < config.whole:
        return picture
    if rng.random() < config.alone:
        picture = np.where(mask[..., None], picture, np.uint8(255))
    return Placement.subject(mask, size, rng.uniform(*config.expansion)).apply(picture, 255, "area")


def _policy(rng: np.random.Generator, config: DiptychConfig) -> str:
    names, shares = zip(*config.masks, strict=True)
    return str(rng.choice(names, p=np.array(shares) / sum(shares)))


def draw_diptychs(drawn: Pictures, index: int, config: DiptychConfig, size: int) -> list[dict[str, Any]]:
    """One individual's diptychs {reference, target, hole, copy, individual, view}: one of two views, sometimes also one
    whose reference is the target's own view."""
    rng = np.random.default_rng((config.seed, index))
    pictures, masks = drawn.pictures[index], drawn.masks[index]
    view = int(rng.integers(2))
    rows = []
    for copy in (False, True)[: 1 + (rng.random() < config.copies)]:
        shown = view if copy else 1 - view
        reference = draw_reference(rng, pictures[shown], masks[shown], size, config)
        hole = repaint_mask(np.asarray(masks[view]), _policy(rng, config), rng)
        row = {"reference": reference, "target": pictures[view], "hole": hole, "copy": copy}
        rows.append({**row, "individual": index, "view": view})
    return rows


ToLatents = Callable[[np.ndarray], np.ndarray]


def make_encoders(vae: Component, vision: Component) -> tuple[ToLatents, ToLatents]:
    """Two functions: pictures [B, 3, H, W] in [-1, 1] -> scaled latents; SigLIP's input -> patches. Both float16."""

    @jax.jit
    def latents(params: Params, images: jax.Array) -> jax.Array:
        mean, _ = jnp.split(layers.bind(vae.graphdef, params).encode(images), 2, axis=1)
        return ((mean - vae.config.shift_factor) * vae.config.scaling_factor).astype(jnp.float16)

    @jax.jit
    def patches(params: Params, pixels: jax.Array) -> jax.Array:
        return layers.bind(vision.graphdef, params)(pixels).patches.astype(jnp.float16)

    return functools.partial(_batched, latents, vae.params), functools.partial(_batched, patches, vision.params)


def encode_rows(rows: Sequence[Mapping[str, Any]], latents: ToLatents) -> dict[str, np.ndarray]:
    """Diptychs as ``draw_diptychs`` gives them -> picture, masked, hole, copy, individual and view of ``Diptychs``."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    reference, target = (_signed(stacked.pop(name)) for name in ("reference", "target"))
    hidden = _hide(target, stacked["hole"])
    return {
        "picture": latents(np.concatenate([reference, target], axis=-1)),
        "masked": latents(np.concatenate([reference, hidden], axis=-1)),
        **stacked,
    }


def encode_singles(
    drawn: Pictures, indices: Sequence[int], config: DiptychConfig, latents: ToLatents, patches: ToLatents,
    processor: ImageProcessor,
) -> dict[str, np.ndarray]:  # fmt: skip
    """One masked view of each individual: what ``Diptychs`` has of singles."""
    holes, views = [], []
    for index in indices:
        rng = np.random.default_rng((config.seed, index, 1))
        views.append(int(rng.integers(2)))
        holes.append(repaint_mask(np.asarray(drawn.masks[index, views[-1]]), _policy(rng, config), rng))
    hole, pictures = np.stack(holes), drawn.pictures[list(indices), views]
    return {
        "single": latents(_hide(_signed(pictures), hole)),
        "single_hole": hole,
        "single_features": patches(processor(list(pictures))),
        "single_individual": np.array(indices, np.int32),
        "single_view": np.array(views, np.int32),
    }


def encode(
    drawn: Pictures, vae: Component, vision: Component, processor: ImageProcessor, config: DiptychConfig, folder: Path,
    *, size: int,
) -> Diptychs:  # fmt: skip
    """Draws and encodes the diptychs of all individuals; finished chunks in ``folder`` are kept.

    Args:
      drawn: rendered views.
      vae: the autoencoder with its measured shift and scale.
      vision: SigLIP's vision tower.
      processor: from pictures to the tower's input.
      config: what to draw.
      folder: where the encoded chunks are kept.
      size: side of the model's pictures, pixels.
    """
    latents, patches = make_encoders(vae, vision)
    chunks = []
    with progress(len(drawn.pictures), "diptychs", unit="bird") as bar:
        for start in range(0, len(drawn.pictures), _CHUNK):
            path = folder / f"chunk-{start:07d}.safetensors"
            indices = range(start, min(start + _CHUNK, len(drawn.pictures)))
            if not path.exists():
                rows = [row for index in indices for row in draw_diptychs(drawn, index, config, size)]
                arrays = encode_rows(rows, latents)
                arrays |= encode_singles(drawn, indices[::_SINGLES], config, latents, patches, processor)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
            chunks.append(load_file(path))
            bar.update(len(indices))
    return Diptychs(**{name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})


def _signed(images: np.ndarray) -> np.ndarray:
    return np.asarray(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _hide(pictures: np.ndarray, hole: np.ndarray) -> np.ndarray:
    return np.where(hole[:, None], np.float32(diptych.GREY), pictures)


def _batched(run: Callable[..., jax.Array], params: Params, images: np.ndarray) -> np.ndarray:
    """One program for all batches: the last one is filled up with its last picture."""
    index = np.minimum(np.arange(-(-len(images) // _BATCH) * _BATCH), len(images) - 1).reshape(-1, _BATCH)
    return np.concatenate([np.asarray(run(params, images[i])) for i in index])[: len(images)]


def draw_batch(diptychs: Diptychs, latents: Latents, step: int, settings: Settings) -> dict[str, np.ndarray]:
    """The arrays of one step: picture, masked, hole (over the whole picture), features, t5 and clip ids.

    What the step's task does not read is empty: features [B, 0, D] without Redux tokens, ids [B, 0] with them.
    """
    rng = np.random.default_rng((settings.seed, step))
    task = draw_task(rng, TASKS, settings.tasks)
    no_ids = np.zeros((settings.batch, 0), np.int32)
    no_features = np.zeros((settings.batch, 0, diptychs.single_features.shape[-1]), np.float16)
    if task != "diptych":
        chosen = rng.integers(len(diptychs.single), size=settings.batch)
        place = diptychs.single_individual[chosen], diptychs.single_view[chosen]
        told = task == "caption"
        return {
            "picture": latents.whole[place],
            "masked": diptychs.single[chosen],
            "hole": diptychs.single_hole[chosen],
            "features": no_features if told else diptychs.single_features[chosen],
            "t5": latents.t5[place] if told else no_ids,
            "clip": latents.clip[place] if told else no_ids,
        }
    copies, others = np.flatnonzero(diptychs.copy), np.flatnonzero(~diptychs.copy)
    chosen = rng.choice(others, settings.batch)
    if len(copies):
        ramp = step / max(settings.curriculum * settings.steps, 1)
        copied = rng.random(settings.batch) < max(0.0, 1.0 - ramp) * 0.8
        chosen = np.where(copied, rng.choice(copies, settings.batch), chosen)
    hole, place = diptychs.hole[chosen], (diptychs.individual[chosen], diptychs.view[chosen])
    plain = (rng.random(settings.batch) < settings.plain)[:, None]
    return {
        "picture": diptychs.picture[chosen],
        "masked": diptychs.masked[chosen],
        "hole": np.concatenate([np.zeros_like(hole), hole], axis=2),
        "features": no_features,
        "t5": np.where(plain, latents.plain_t5, latents.t5[place]),
        "clip": np.where(plain, latents.plain_clip, latents.clip[place]),
    }


@dataclasses.dataclass(frozen=True)
class Networks:
    """What is static of a forward pass: graphs, the text encoders' function, a prompt's length and pooled width."""

    transformer: Any
    embedder: Any
    encode_text: EncodeText
    text_length: int
    pooled_width: int


def loss(
    networks: Networks,
    params: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    settings: Settings,
    adapter: Adapter | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted velocity error of one batch.

    Args:
      networks: the static part.
      params: {"transformer", "text", "redux"}.
      batch: see ``draw_batch``; picture and masked [B, C, h, w'], hole [B, H, W'].
      key: PRNG key of the step.
      settings: weights and ranges.
      adapter: acts on the whole sequence; None for the bare base.

    Returns:
      The loss and {"hole": unweighted error on repainted tokens}.
    """
    noise_key, time_key, guidance_key = jax.random.split(key, 3)
    picture = batch["picture"].astype(jnp.float32)
    b, _, h, w = picture.shape
    x0 = flow.pack(picture)
    x1 = jax.random.normal(noise_key, x0.shape)
    t = logit_normal_time(time_key, (b,), mean=settings.time_mean)
    guidance = jax.random.uniform(guidance_key, (b,), minval=settings.guidance[0], maxval=settings.guidance[1])
    if batch["features"].shape[1]:
        redux = layers.bind(networks.embedder, params["redux"])(batch["features"].astype(jnp.float32))
        prompt, pooled = diptych.prompt(redux, networks.text_length, networks.pooled_width)
    else:
        prompt, pooled = networks.encode_text(params["text"], batch["t5"], batch["clip"])
    mask = diptych.fold_mask(batch["hole"].astype(jnp.float32), batch["hole"].shape[1] // h)
    branches = diptych.branches(
        prompt, pooled, interpolate(x0, x1, t), flow.pack(batch["masked"].astype(jnp.float32)), mask,
        (h // flow.path.PATCH, w // flow.path.PATCH), t, guidance=guidance, adapter=_WHOLE if adapter else None,
    )  # fmt: skip
    model = layers.bind(networks.transformer, params["transformer"])
    predicted = model(branches, adapters={_WHOLE: adapter} if adapter else {})
    error = jnp.mean((predicted - velocity(x0, x1)) ** 2, axis=-1)
    share = mask.mean(-1)
    weight = 1 + (settings.hole_weight - 1) * share
    return jnp.sum(error * weight) / jnp.sum(weight), {"hole": jnp.sum(error * share) / jnp.sum(share)}


def train(
    networks: Networks, params: Params, diptychs: Diptychs, latents: Latents, settings: Settings, *,
    checkpoint: Path, report: Callable[[dict[str, float]], None], every: int = 50, seconds: float | None = None,
) -> State:  # fmt: skip
    """Trains to ``settings.steps`` (or for ``seconds``), continuing from ``checkpoint`` if it exists.

    Args:
      networks: the static part.
      params: {"transformer", "text", "redux"} to start from.
      diptychs, latents: encoded pictures of the same individuals.
      settings: how to train.
      checkpoint: file to continue from and to write every ``every`` steps.
      report: receives {step, steps_per_second, loss, hole} every ``every`` steps.
      every: steps between reports.
      seconds: wall-clock limit; the state is saved when it is reached.

    Returns:
      The last state; ``state.ema`` are the parameters to keep.
    """
    tx = muon(settings.learning_rate, settings.steps, settings.warmup, settings.decay, 0.01, transformer.block_matrices)

    def objective(values: Params, number: jax.Array, batch: Mapping[str, jax.Array]) -> Any:
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        return loss(networks, values, batch, key, settings)

    return fit(
        params, tx, make_update(objective, tx, settings.ema),
        lambda step: (draw_batch(diptychs, latents, step, settings),), steps=settings.steps, name="fill",
        checkpoint=checkpoint, report=lambda state, row: report({"step": state.step, **row}), every=every,
        seconds=seconds,
    )  # fmt: skip
