"""Tokens beside tokens: text, noise and conditions as branches of one forward pass.

OminiControl (Tan et al. 2024) puts the tokens of each condition after the noisy tokens, as branches of their own at
time 0 that carry the adapter; FLUX.1-Kontext's own use of a reference picture puts its tokens into the noisy stream.
Both are lists of branches for ``models.flux``.

Conditions can be compact (OminiControl2, Tan et al. 2025): a picture at reduced resolution whose positions are scaled
up to the noise's grid, tokens left out where they say nothing, and pictures of which only a region is generated while
the condition's tokens complete it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax.models.flux import Branch


@dataclasses.dataclass(frozen=True)
class Condition:
    """A picture that guides the generation.

    Attributes:
      tokens: [B, N, C] packed latents.
      ids: [N, 3] positions, or [B, N, 3] where they differ between samples.
      adapter: name of the adapter that reads it, or None for the bare base.
      valid: [B, N] bool, False for padding (see ``take``); None when there is none.
    """

    tokens: jax.Array
    ids: jax.Array | np.ndarray
    adapter: str | None
    valid: jax.Array | None = None


def grid_ids(
    height: int, width: int, *, index: int = 0, offset: tuple[int, int] = (0, 0), scale: float = 1.0
) -> np.ndarray:
    """Positions (index, row, column) of a grid of tokens in row-major order, float32 [height * width, 3].

    A spatial control shares the noise's own positions; for the subject's see ``subject_ids``. A picture at
    1 / ``scale`` of the noise's resolution gets the rows and columns ``scale p + (scale - 1) / 2``, the centres of the
    squares of the noise's tokens that its tokens cover; the ``offset`` (rows, columns) is added before.
    """
    grid = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    rows, columns = (scale * (x + delta) + (scale - 1) / 2 for x, delta in zip(grid, offset, strict=True))
    ids = np.stack([np.full_like(rows, index), rows, columns], axis=-1)
    return ids.reshape(-1, 3).astype(np.float32)


def subject_ids(height: int, width: int, *, kontext: bool, scale: float = 1.0) -> np.ndarray:
    """Positions of the subject's picture, [height * width, 3], by the kind of base; ``scale`` as in ``grid_ids``.

    On FLUX.1-Kontext it is picture 1 at the noise's positions, as Kontext's own references are. FLUX.1-schnell and dev
    know no second picture: there it lies to the left of the noise.
    """
    if kontext:
        return grid_ids(height, width, index=1, scale=scale)
    return grid_ids(height, width, offset=(0, -width), scale=scale)


def _scale(value: float | None, batch: int) -> jax.Array | None:
    return None if value is None else jnp.full((batch,), value, jnp.float32)


def branches(
    prompt: jax.Array,
    pooled: jax.Array,
    noisy: jax.Array,
    noisy_ids: jax.Array | np.ndarray,
    time: jax.Array,
    *,
    guidance: float | jax.Array | None,
    conditions: Sequence[Condition] = (),
    independent: bool = False,
    adapter: str | None = None,
    noisy_valid: jax.Array | None = None,
) -> list[Branch]:
    """The branches text, noise, condition 0, condition 1, …

    Conditions enter at time 0 with guidance 1 and do not see each other. By default they see text and noise; with
    ``independent`` they see only themselves, so that their keys and values do not depend on time.

    Args:
      prompt: [B, T, E] text embeddings.
      pooled: [B, P] pooled text vector.
      noisy: [B, N, C] noisy tokens.
      noisy_ids: [N, 3], or [B, N, 3] where a region is generated that differs between samples.
      time: [B] in [0, 1].
      guidance: scale for text and noise ([B] or a number); None for models without guidance embedding.
      conditions: the pictures, in order.
      independent: whether conditions are cut off from text and noise.
      adapter: adapter on text and noise (None, as OminiControl does, leaves the base untouched there).
      noisy_valid: [B, N] bool, False for padding of the noisy tokens.
    """
    scale = _scale(guidance, noisy.shape[0]) if isinstance(guidance, int | float) else guidance
    out = [
        Branch(prompt, np.zeros((prompt.shape[1], 3), np.float32), time, scale, pooled, adapter, kind="text"),
        Branch(noisy, noisy_ids, time, scale, pooled, adapter, valid=noisy_valid),
    ]
    for i, stream in enumerate(alone(conditions, pooled, guidance_embeds=guidance is not None), start=2):
        out.append(dataclasses.replace(stream, sees=(i,) if independent else (0, 1, i)))
    return out


def alone(conditions: Sequence[Condition], pooled: jax.Array, *, guidance_embeds: bool) -> list[Branch]:
    """The branches of independent conditions without text and noise, for ``Flux.remember``.

    ``branches`` without conditions, called with what is remembered of these, gives what ``branches`` with these
    conditions and ``independent`` gives.
    """
    batch = pooled.shape[0]
    ones = jnp.ones((batch,), jnp.float32) if guidance_embeds else None
    zeros = jnp.zeros((batch,), jnp.float32)
    return [
        Branch(c.tokens, c.ids, zeros, ones, pooled, c.adapter, sees=(i,), valid=c.valid)
        for i, c in enumerate(conditions)
    ]


def image_guided(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """``unconditional + scale (conditional - unconditional)``: how strongly the conditions' pictures are followed.

    Both velocities [B, N, C] come from the same branches with the same visibility; in the unconditional one, other
    pictures take the conditions' places: black ones, or a sibling's the subject's.
    """
    return unconditional + scale * (conditional - unconditional)


# ------------------------------------------------------------------------------------------ compact conditions


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which tokens of a grid stay, per sample, as many places for each.

    Attributes:
      index: [B, M] int32, places in the grid in ascending order, then padding.
      valid: [B, M] bool, False for padding.
    """

    index: jax.Array
    valid: jax.Array


# Lengths are rounded up to a multiple of this, so that few programs are compiled.
BUCKET = 64


def bucket(mask: np.ndarray, step: int = BUCKET) -> int:
    """A length that holds the kept tokens of every sample of ``mask`` [B, N] bool, at most N."""
    most = int(mask.sum(axis=-1).max(initial=0))
    return min(max(-(-most // step), 1) * step, mask.shape[-1])


def keep(mask: jax.Array | np.ndarray, length: int) -> Kept:
    """The True places of ``mask`` [B, N], at most ``length`` (see ``bucket``) per sample.

    A place beyond ``length`` would be lost: the length must hold the fullest sample.
    """
    mask = jnp.asarray(mask, bool)
    index = jnp.argsort(~mask, axis=-1, stable=True)[:, :length].astype(jnp.int32)
    return Kept(index, jnp.arange(length) < mask.sum(axis=-1, keepdims=True))


def take(tokens: jax.Array, ids: np.ndarray, kept: Kept) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, N, C] and positions [N, 3] of a grid -> those of the kept places, [B, M, C] and [B, M, 3]."""
    return jnp.take_along_axis(tokens, kept.index[..., None], axis=1), jnp.asarray(ids)[kept.index]


def compact(condition: Condition, mask: jax.Array | np.ndarray, length: int) -> Condition:
    """The condition, of a whole grid, without the tokens that are False in ``mask`` [B, N]."""
    if not isinstance(condition.ids, np.ndarray) or condition.valid is not None:
        raise ValueError("the condition is compact already")
    kept = keep(mask, length)
    return Condition(*take(condition.tokens, condition.ids, kept), condition.adapter, kept.valid)


def complete(generated: jax.Array, kept: Kept, condition: jax.Array) -> jax.Array:
    """The picture of which a region was generated and the rest is a condition's (its complement).

    Args:
      generated: [B, M, C] tokens at the places of ``kept``.
      kept: the region.
      condition: [B, N, C] tokens of the whole grid.

    Returns:
      [B, N, C].
    """
    count = condition.shape[1]
    # Padding is written beyond the end, where it is dropped.
    places = jnp.where(kept.valid, kept.index, count)
    return jax.vmap(lambda grid, at, tokens: grid.at[at].set(tokens, mode="drop"))(
        condition, places, generated.astype(condition.dtype)
    )


def native(
    prompt: jax.Array,
    pooled: jax.Array,
    noisy: jax.Array,
    noisy_ids: np.ndarray,
    time: jax.Array,
    *,
    guidance: float | jax.Array | None,
    references: Sequence[tuple[jax.Array, np.ndarray]] = (),
    adapter: str | None = None,
) -> list[Branch]:
    """FLUX.1-Kontext's own formulation: reference tokens in the noisy stream, at the same time.

    Args: as in ``branches``; references: (tokens [B, N', C], ids [N', 3]) with index 1, 2, … per picture.

    Only the first N tokens of the noise branch's velocity belong to the picture being made.
    """
    tokens = jnp.concatenate([noisy, *(t for t, _ in references)], axis=1)
    ids = np.concatenate([noisy_ids, *(i for _, i in references)], axis=0)
    return branches(prompt, pooled, tokens, ids, time, guidance=guidance, adapter=adapter)
