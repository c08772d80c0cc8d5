"""Side by side: the reference and the target as one picture of which FLUX.1-Fill repaints the right half's bird.

Insert Anything (Song et al. 2025) puts the reference to the LEFT of the target; positions cover the whole picture as
one grid, the mask is zero on the reference. FLUX.1-Fill takes the noisy latents, the latents of the masked picture and
the mask as channels of one token; the prompt is zeros followed by the reference's Redux tokens.

Letters in shapes: B batch, C latent channels, H W height and width of the diptych in pixels, h w of its latents,
N tokens (h/2 * w/2).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import flow
from nabla_jax.conditioning import omini
from nabla_jax.errors import UserError
from nabla_jax.models.flux import Branch

GREY = 0.0
"""What FLUX.1-Fill sees where the mask hides the picture, in training and sampling alike."""


@dataclasses.dataclass(frozen=True)
class Masked:
    """What FLUX.1-Fill is shown beside the noise.

    Attributes:
      tokens: [B, N, 4C] packed latents of the diptych with its hole.
      mask: [B, N, 4 * factor**2], see ``fold_mask``.
      adapter: name of the adapter on the whole sequence, or None for the bare base.
    """

    tokens: jax.Array
    mask: jax.Array
    adapter: str | None


def side_by_side(reference: jax.Array, target: jax.Array) -> jax.Array:
    """[B, C, H, W'] and [B, C, H, W''] -> [B, C, H, W' + W'']: reference left, target right.

    Raises UserError for pictures of different height.
    """
    if reference.shape[-2] != target.shape[-2]:
        raise UserError(f"diptych: the reference is {reference.shape[-2]} high, the target {target.shape[-2]}")
    return jnp.concatenate([reference, target], axis=-1)


def pictures(
    reference: jax.Array, target: jax.Array, mask: jax.Array, hole: float = GREY
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The diptych, the diptych with its hole, and the mask over both halves, which is 0 on the reference.

    Args:
      reference: [B, 3, H, W'] in [-1, 1].
      target: [B, 3, H, W''] in [-1, 1].
      mask: [B, H, W''], repainted where it is at least 0.5.
      hole: value of the hole.

    Returns:
      [B, 3, H, W], [B, 3, H, W] and [B, H, W] float32 of 0 and 1, W = W' + W''.
    """
    whole = side_by_side(reference, target)
    mask = (mask >= 0.5).astype(jnp.float32)
    mask = side_by_side(jnp.zeros(reference[:, 0].shape, jnp.float32), mask)
    return whole, hide(whole, mask, hole), mask


def hide(picture: jax.Array, mask: jax.Array, hole: float = GREY) -> jax.Array:
    """The picture [B, 3, H, W] in [-1, 1] with ``hole`` where the mask [B, H, W] is 1."""
    return jnp.where(mask[:, None] >= 0.5, jnp.float32(hole), picture)


def fold_mask(mask: jax.Array, factor: int = 8) -> jax.Array:
    """A mask in pixels as channels of the tokens.

    Args:
      mask: [B, H, W], repainted where it is at least 0.5.
      factor: pixels per latent pixel.

    Returns:
      [B, N, 4 * factor**2] float32 of 0 and 1; channel ``((y mod f) f + x mod f) 4 + 2 dy + dx`` with (dy, dx) the
      latent pixel inside the token's 2x2 square.

    Raises:
      UserError: H or W is not a multiple of 2 * factor.
    """
    batch, height, width = mask.shape
    if height % (2 * factor) or width % (2 * factor):
        raise UserError(f"mask: found {height}x{width}, expected multiples of {2 * factor}")
    squares = (mask >= 0.5).astype(jnp.float32).reshape(batch, height // factor, factor, width // factor, factor)
    planes = squares.transpose(0, 2, 4, 1, 3).reshape(batch, factor**2, height // factor, width // factor)
    return flow.pack(planes)


def fill_tokens(noisy: jax.Array, masked: jax.Array, mask: jax.Array) -> jax.Array:
    """Noisy latents [B, N, 64], those of the masked picture [B, N, 64] and the mask [B, N, 256] -> [B, N, 384]."""
    return jnp.concatenate([noisy, masked.astype(noisy.dtype), mask.astype(noisy.dtype)], axis=-1)


def prompt(redux: jax.Array, text_length: int, pooled_width: int) -> tuple[jax.Array, jax.Array]:
    """The prompt without a text: (zeros followed by Redux tokens [B, R, E], zeros [B, pooled_width]).

    Returns:
      [B, text_length + R, E] and [B, pooled_width].
    """
    batch, _, width = redux.shape
    zeros = jnp.zeros((batch, text_length, width), redux.dtype)
    return jnp.concatenate([zeros, redux], axis=1), jnp.zeros((batch, pooled_width), redux.dtype)


def branches(
    prompt: jax.Array,
    pooled: jax.Array,
    noisy: jax.Array,
    masked: jax.Array,
    mask: jax.Array,
    grid: tuple[int, int],
    time: jax.Array,
    *,
    guidance: float | jax.Array | None,
    adapter: str | None = None,
) -> list[Branch]:
    """Text and picture as FLUX.1-Fill takes them; the adapter, where there is one, acts on the whole sequence.

    Args:
      prompt: [B, T, E].
      pooled: [B, P].
      noisy, masked, mask: tokens, as in ``fill_tokens``.
      grid: (height, width) of the whole diptych in tokens, N = height * width.
      time: [B] in [0, 1].
      guidance: scale ([B] or a number).
      adapter: name of the adapter, or None for the bare base.
    """
    ids: np.ndarray = omini.grid_ids(*grid)
    tokens = fill_tokens(noisy, masked, mask)
    return omini.branches(prompt, pooled, tokens, ids, time, guidance=guidance, adapter=adapter)
