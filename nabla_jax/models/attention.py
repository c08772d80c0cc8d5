"""Scaled dot-product attention, one entry point for every model and platform.

B batch, S query tokens, T key tokens, H heads, D head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from nabla_jax.errors import UserError

Implementation = Literal["auto", "xla", "chunked", "cudnn"]

# Above this many scores per head the quadratic XLA path is replaced by query blocks: on two CPU cores blocks of a
# few hundred queries ran 3.5 times faster at 3,200 tokens, and memory grows linearly.
_QUADRATIC_LIMIT = 1024 * 1024
_QUERY_BLOCK = 384


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Softmax attention; every query sees every key that is no padding.

    Args:
      q: [B, S, H, D].
      k: [B, T, H, D].
      v: [B, T, H, D].
      scale: factor on the scores; ``D ** -0.5`` when None.
      valid: [B, T] bool, False for keys that only pad a sample to the length of the batch; None when none do.
      implementation: ``auto`` takes cuDNN's flash kernel on GPUs for half-precision inputs, else XLA with queries in
        blocks when the score matrix would be large.

    Returns:
      [B, S, H, D] in q's dtype. The softmax is float32.

    Raises:
      UserError: cuDNN was asked for where it cannot run.
    """
    if implementation == "auto":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if jax.default_backend() == "gpu" and half:
            implementation = "cudnn"
        else:
            implementation = "chunked" if q.shape[1] * k.shape[1] > _QUADRATIC_LIMIT else "xla"
    if implementation == "cudnn":
        if jax.default_backend() != "gpu":
            raise UserError(f"attention: implementation 'cudnn' needs a GPU, found {jax.default_backend()}")
        mask = None if valid is None else valid[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=mask, implementation="cudnn")
    if implementation == "chunked":
        return _chunked(q, k, v, scale, valid)
    return _softmax_attention(q, k, v, scale, valid)


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None, valid: jax.Array | None
) -> jax.Array:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Heads before tokens: on two CPU cores both products and their gradients took two thirds of the time.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    # float32 scores: differences of large bfloat16 scores decide the softmax.
    scores = jnp.einsum("bhsd,bhtd->bhst", q, k, preferred_element_type=jnp.float32) * scale
    if valid is not None:
        # Finite: a sample of which every key is padding gets a mean that nobody reads, not a NaN that spreads.
        scores = jnp.where(valid[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bhtd->bhsd", weights, v).transpose(0, 2, 1, 3)


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None, valid: jax.Array | None) -> jax.Array:
    b, s, h, d = q.shape
    scale = d**-0.5 if scale is None else scale
    blocks = -(-s // _QUERY_BLOCK)
    size = -(-s // blocks)

    def heads_first(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1, 3).reshape(b * h, -1, d)

    def head(parts: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, valid = parts
        # The scores of a block are recomputed in the backward pass instead of being kept for all blocks.
        block = jax.checkpoint(lambda x: _attend_rows(x, k, v, scale, valid))
        return jax.lax.map(block, q.reshape(blocks, size, d)).reshape(-1, d)

    padded = jnp.pad(q, ((0, 0), (0, blocks * size - s), (0, 0), (0, 0)))
    of_heads = None if valid is None else jnp.repeat(valid, h, axis=0)
    parts = (heads_first(padded), heads_first(k), heads_first(v), of_heads)
    # One head after another on CPUs, whose cores share one product: forward and backward took a quarter less time.
    out = jax.lax.map(head, parts) if jax.default_backend() == "cpu" else jax.vmap(head)(parts)
    return out.reshape(b, h, -1, d).transpose(0, 2, 1, 3)[:, :s]


def _attend_rows(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, valid: jax.Array | None) -> jax.Array:
    """Queries [S, D] of one head over keys and values [T, D], of which ``valid`` [T] are no padding -> [S, D]."""
    scores = jnp.einsum("sd,td->st", q, k, preferred_element_type=jnp.float32) * scale
    if valid is not None:
        scores = jnp.where(valid, scores, jnp.finfo(jnp.float32).min)
    # The largest score cancels. Dividing the result instead of the weights saves a pass over the scores.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("st,td->sd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(q.dtype)
