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
_QUERY_BLOCK = 256


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
    blocks = -(-s // _QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * _QUERY_BLOCK - s), (0, 0), (0, 0)))
    padded = padded.reshape(b, blocks, _QUERY_BLOCK, h, d).transpose(1, 0, 2, 3, 4)
    # The scores of a block are recomputed in the backward pass instead of being kept for all blocks.
    block = jax.checkpoint(lambda x: _softmax_attention(x, k, v, scale, valid))
    out = jax.lax.map(block, padded)
    return out.transpose(1, 0, 2, 3, 4).reshape(b, blocks * _QUERY_BLOCK, h, d)[:, :s]
