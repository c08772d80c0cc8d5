"""Trains a small FLUX.1-Kontext or FLUX.1-schnell: captions and in-context pictures of fresh individuals.

Every step has one task for its whole batch, drawn from (seed, step):

- ``caption``: caption → picture.
- ``reference``: another view of the same individual is in the noisy stream (index 1), as FLUX.1-Kontext reads it.
- ``edit``: the same picture with rectangles blanked out is in the stream.
- ``compose``: two pictures are in the stream: another view (index 1) and, with index 2, the picture itself with either
  a stranger's coat on the bird or rectangles blanked out.
- ``pair``: two views of one individual side by side, both made from noise.

FLUX.1-schnell knows no second picture and takes no guidance: there pictures lie side by side, picture 1 to the left of
the one being made and picture 2 to its right (``beside``).

The text encoders train along. Every sample depends on (seed, step) alone, so a continued run equals an unbroken one.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax import runs
from nabla_jax.conditioning import omini
from nabla_jax.flow.path import interpolate, logit_normal_time, pack, velocity
from nabla_jax.models import layers
from nabla_jax.models.flux import Flux, FluxConfig
from nabla_jax.models.layers import Params
from nabla_jax.pretrain.state import draw_task, load_arrays, muon, save_arrays

TASKS = ("caption", "reference", "edit", "compose", "pair")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      steps: number of updates.
      batch: samples per update.
      learning_rate: of Muon for the matrices inside blocks and of AdamW for the rest.
      warmup: steps of linear warm-up.
      decay: share of the steps, at the end, over which the learning rate falls linearly to zero.
      ema: decay of the averaged weights, which are the ones kept.
      tasks: share of steps per task, in the order of ``TASKS``.
      beside: whether pictures lie side by side instead of having indices.
      curriculum: share of the steps during which references are aligned copies with falling probability.
      fixed_caption: share of samples whose caption is the plain one that tells nothing of the plumage.
      bird_weight: weight of tokens that show the bird against background tokens.
      disguised: share of the second pictures of ``compose`` that show the bird in a stranger's coat.
      guidance: range of the guidance scales drawn; unused by transformers without guidance embedding.
      time_mean: mean of the logit of the times; above 0 there is more noise than in FLUX's own training. A reference
        is of use while the noise hides the bird: small pictures show it sooner than large ones.
      seed: of every random draw.
    """

    steps: int = 20_000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    tasks: tuple[float, float, float, float, float] = (0.1, 0.25, 0.15, 0.5, 0.0)
    beside: bool = False
    curriculum: float = 0.15
    fixed_caption: float = 0.5
    bird_weight: float = 3.0
    disguised: float = 0.7
    guidance: tuple[float, float] = (1.0, 5.0)
    time_mean: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Latents:
    """Encoded pictures: scaled latents float16 [N, 2, C, h, w] of whole views and of the birds' crops.

    Attributes:
      whole: the views as they are.
      crop: the bird's box, padded to a square with white.
      disguise: [N, C, h, w], the second whole view with a stranger's coat on the bird.
      blank: [C, h, w], a black picture.
      cover: uint8 [N, 2, h/2, w/2], share of the token that shows the bird, 0..255.
      t5: int32 [N, 2, T] T5 token ids of each view's caption.
      clip: int32 [N, 2, T'] CLIP token ids.
      plain_t5: [T] and plain_clip: [T'] ids of the plain caption.
    """

    whole: np.ndarray
    crop: np.ndarray
    disguise: np.ndarray
    blank: np.ndarray
    cover: np.ndarray
    t5: np.ndarray
    clip: np.ndarray
    plain_t5: np.ndarray
    plain_clip: np.ndarray


@dataclasses.dataclass
class State:
    """Everything a training continues from."""

    step: int
    params: Params
    ema: Params
    optimizer: Any


EncodeText = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def silence(params: Params) -> Params:
    """Initial values under which every block starts as a small, gated residual branch (Peebles & Xie 2023)."""

    def start(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[0] == "proj_out":
            return jnp.zeros_like(leaf)
        if {"norm1", "norm1_context", "norm", "norm_out"} & set(names) and "linear" in names:
            if names[-1] == "weight":
                return jnp.zeros_like(leaf)
            chunks = {"norm1": 6, "norm1_context": 6, "norm": 3}.get(names[-3], 2)
            gates = {6: (2, 5), 3: (2,), 2: ()}[chunks]
            return jnp.concatenate(
                [jnp.full_like(c, 0.5 if i in gates else 0.0) for i, c in enumerate(jnp.split(leaf, chunks, -1))], -1
            )
        # Queries and keys that start alike make a token look first at its own place and at tokens like itself.
        return leaf

    params = jax.tree_util.tree_map_with_path(start, params)
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        params[blocks]["attn"]["to_k"] = jax.tree.map(jnp.copy, params[blocks]["attn"]["to_q"])
    return params


def block_matrices(params: Params) -> Any:
    """Which leaves are matrices of blocks, except modulations: for ``state.muon``."""

    def spec(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        # Modulations are looked up by time, not multiplied by features of a token: AdamW suits them better.
        if leaf.ndim != 3 or "linear" in names or not names[1].endswith("transformer_blocks"):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)

    return jax.tree_util.tree_map_with_path(spec, params)


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """See ``state.muon``, which here updates the matrices of blocks, except modulations."""
    return muon(settings.learning_rate, settings.steps, settings.warmup, settings.decay, 0.01, block_matrices)


def positions(grid: tuple[int, int], picture: int, beside: bool) -> np.ndarray:
    """Positions [N, 3] of a picture on a grid of tokens: 0 is the one being made, 1 and 2 are shown."""
    if not beside:
        return omini.grid_ids(*grid, index=picture)
    return omini.grid_ids(*grid, offset=(0, (0, -1, 1)[picture] * grid[1]))


def blank_rectangles(key: jax.Array, latents: jax.Array, blank: jax.Array) -> jax.Array:
    """Replaces one or two rectangles of each picture's latents by those of a black picture.

    Args:
      key: PRNG key.
      latents: [B, C, h, w].
      blank: [C, h, w].
    """
    b, _, h, w = latents.shape
    rows, columns = jnp.arange(h)[None, None, :], jnp.arange(w)[None, None, :]
    draw = jax.random.uniform(key, (4, b, 2, 1))
    top, left = draw[0] * h * 0.6, draw[1] * w * 0.6
    height, width = (0.3 + 0.5 * draw[2]) * h, (0.3 + 0.5 * draw[3]) * w
    inside_rows = (rows >= top) & (rows < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    hole = (inside_rows[:, :, :, None] & inside_columns[:, :, None, :]).any(1)
    return jnp.where(hole[:, None], blank, latents)


def loss(
    graphdef: Any, params: Params, encode_text: EncodeText, batch: Mapping[str, jax.Array], key: jax.Array,
    task: str, settings: Settings,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Weighted velocity error of one batch.

    Args:
      graphdef: the transformer's graph.
      params: {"transformer", "text"}.
      encode_text: (text parameters, T5 ids, CLIP ids) -> (prompt [B, T, E], pooled [B, P]).
      batch: target, reference, disguise [B, C, h, w]; blank [C, h, w]; cover [B, N] of the N tokens that are made; t5,
        clip ids.
      key: PRNG key of the step.
      task: one of ``TASKS``.
      settings: weights and ranges.

    Returns:
      The loss and {"bird": unweighted error on tokens that show the bird}.
    """
    noise_key, time_key, guidance_key, hole_key, disguise_key = jax.random.split(key, 5)
    target = batch["target"].astype(jnp.float32)
    b, _, h, w = target.shape
    grid = (h // 2, w // 2)
    x0, ids = pack(target), positions(grid, 0, settings.beside)
    if task == "pair":
        x0 = jnp.concatenate([x0, pack(batch["reference"].astype(jnp.float32))], axis=1)
        ids = np.concatenate([ids, positions(grid, 1, settings.beside)])
    x1 = jax.random.normal(noise_key, x0.shape)
    t = logit_normal_time(time_key, (b,), mean=settings.time_mean)
    xt = interpolate(x0, x1, t)
    guidance = jax.random.uniform(guidance_key, (b,), minval=settings.guidance[0], maxval=settings.guidance[1])
    prompt, pooled = encode_text(params["text"], batch["t5"], batch["clip"])
    pictures = []
    if task in ("reference", "compose"):
        pictures.append(batch["reference"].astype(jnp.float32))
    if task in ("edit", "compose"):
        blanked = blank_rectangles(hole_key, target, batch["blank"])
        if task == "compose":
            disguised = jax.random.bernoulli(disguise_key, settings.disguised, (b, 1, 1, 1))
            blanked = jnp.where(disguised, batch["disguise"].astype(jnp.float32), blanked)
        pictures.append(blanked)
    references = [(pack(p), positions(grid, i, settings.beside)) for i, p in enumerate(pictures, start=1)]
    guided = "guidance_embedder" in params["transformer"]["time_text_embed"]
    branches = omini.native(prompt, pooled, xt, ids, t, guidance=guidance if guided else None, references=references)
    predicted = layers.bind(graphdef, params["transformer"])(branches)[:, : x0.shape[1]]
    error = jnp.mean((predicted - velocity(x0, x1)) ** 2, axis=-1)
    weight = 1 + (settings.bird_weight - 1) * batch["cover"]
    weighted = jnp.sum(error * weight) / jnp.sum(weight)
    return weighted, {"bird": jnp.sum(error * batch["cover"]) / jnp.sum(batch["cover"])}


def draw_batch(latents: Latents, step: int, settings: Settings) -> tuple[str, dict[str, np.ndarray]]:
    """The task and the arrays of one step."""
    rng = np.random.default_rng((settings.seed, step))
    task = draw_task(rng, TASKS, settings.tasks)
    index = rng.integers(len(latents.whole), size=settings.batch)
    view = rng.integers(2, size=settings.batch)
    if task == "compose":
        view[:] = 1  # the view that has a disguise
    # Aligned copies first, then shifted and scaled ones (the crop of the same view), then the other view.
    ramp = step / max(settings.curriculum * settings.steps, 1)
    same = rng.random(settings.batch) < max(0.0, 1.0 - ramp) * 0.8
    other = np.where(same, view, 1 - view)
    cropped = rng.random(settings.batch) < np.where(same, 0.5, 0.75)
    cover = latents.cover[index, view].reshape(settings.batch, -1)
    if task == "pair":
        other, cropped = 1 - view, np.zeros_like(cropped)
        cover = np.concatenate([cover, latents.cover[index, other].reshape(settings.batch, -1)], axis=1)
    reference = np.where(cropped[:, None, None, None], latents.crop[index, other], latents.whole[index, other])
    plain = rng.random(settings.batch) < (0.05 if task == "caption" else settings.fixed_caption)
    return task, {
        "target": latents.whole[index, view],
        "reference": reference,
        "disguise": latents.disguise[index],
        "cover": cover.astype(np.float32) / 255,
        "t5": np.where(plain[:, None], latents.plain_t5, latents.t5[index, view]),
        "clip": np.where(plain[:, None], latents.plain_clip, latents.clip[index, view]),
    }


def make_step(
    graphdef: Any, encode_text: EncodeText, blank: np.ndarray, settings: Settings
) -> Callable[..., tuple[Params, Params, Any, dict[str, jax.Array]]]:
    """The compiled update, one program per task."""
    tx = optimizer(settings)

    @functools.partial(jax.jit, static_argnames="task", donate_argnums=(0, 1, 2))
    def step(
        params: Params, ema: Params, state: Any, number: jax.Array, batch: dict[str, jax.Array], task: str
    ) -> tuple[Params, Params, Any, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        (value, metrics), grads = jax.value_and_grad(
            lambda p: loss(graphdef, p, encode_text, {**batch, "blank": jnp.asarray(blank)}, key, task, settings),
            has_aux=True,
        )(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # The average follows closely at first, else early parameters linger in it.
        decay = jnp.minimum(settings.ema, (1 + number) / (10 + number))
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)
        return params, ema, state, {"loss": value, "gradient_norm": optax.global_norm(grads), **metrics}

    return step


def initialize(config: FluxConfig, text: Params, seed: int) -> tuple[Any, Params]:
    """The transformer's graph and {"transformer", "text"} parameters to start from."""
    graphdef, params = layers.initialize(lambda r: Flux(config, rngs=r), jax.random.key(seed))
    return graphdef, {"transformer": silence(params), "text": text}


def train(
    config: FluxConfig, text: Params, encode_text: EncodeText, latents: Latents, settings: Settings, *,
    checkpoint: Path, report: Callable[[dict[str, float]], None], every: int = 100, save_every: int = 500,
    start: Params | None = None, seconds: float | None = None,
) -> State:  # fmt: skip
    """Trains to ``settings.steps`` (or for ``seconds``), continuing from ``checkpoint`` if it exists.

    Args:
      config: sizes of the transformer.
      text: initial parameters of the text encoders.
      encode_text: see ``loss``.
      latents: encoded pictures.
      settings: how to train.
      checkpoint: file to continue from and to write every ``save_every`` steps.
      report: receives {step, samples_per_second, and per task loss and bird error} every ``every`` steps.
      every: steps between reports.
      save_every: steps between checkpoints.
      start: parameters to start from instead of fresh ones, when there is no checkpoint.
      seconds: wall-clock limit; the state is saved when it is reached.

    Returns:
      The last state; ``state.ema`` are the parameters to keep.
    """
    graphdef, fresh = initialize(config, text, settings.seed)
    params = fresh if start is None else jax.tree.map(jnp.array, start)
    state = State(0, params, jax.tree.map(jnp.copy, params), optimizer(settings).init(params))
    if checkpoint.exists():
        step, (p, e, o) = load_arrays(checkpoint, (state.params, state.ema, state.optimizer))
        state = State(step, p, e, o)
    update = make_step(graphdef, encode_text, latents.blank, settings)
    begun = clock = time.monotonic()
    gathered: dict[str, list[jax.Array]] = {}
    done = 0
    with (
        runs.StopSignals() as stop,
        runs.progress(settings.steps, "transformer", done=state.step, unit="step") as bar,
    ):
        while state.step < settings.steps:
            task, batch = draw_batch(latents, state.step, settings)
            state.params, state.ema, state.optimizer, metrics = update(
                state.params, state.ema, state.optimizer, state.step, batch, task=task
            )
            state.step += 1
            done += 1
            bar.update(1)
            gathered.setdefault(f"{task}_loss", []).append(metrics["loss"])
            gathered.setdefault(f"{task}_bird", []).append(metrics["bird"])
            over = stop.signum is not None or (seconds is not None and time.monotonic() - begun > seconds)
            last = over or state.step == settings.steps
            if last or state.step % every == 0:
                means = {name: float(np.mean([float(v) for v in values])) for name, values in gathered.items()}
                rate = done * settings.batch / (time.monotonic() - clock)
                report({"step": state.step, "samples_per_second": rate, **means})
                gathered, done, clock = {}, 0, time.monotonic()
            if last or state.step % save_every == 0:
                save_arrays(checkpoint, state.step, (state.params, state.ema, state.optimizer))
            if stop.signum is not None:
                raise runs.Interrupted(stop.signum, f"{checkpoint}: saved after step {state.step}")
            if over:
                break
    return state
