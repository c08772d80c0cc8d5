"""Scaled dot-product attention, one entry point for every model and platform.

B batch, S query tokens, T key tokens, H heads, D head width.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nabla_jax.errors import UserError

KEPT = "attention"
"""The name by which remat policies know what attention made; of the TPU's kernel with its log-sum-exps."""
CUDNN = "cudnn_attention"
"""The same of what cuDNN's kernel gave, of which only the result can be named."""

_LANES = 128  # of a TPU's vector unit


@dataclasses.dataclass(frozen=True)
class Splash:
    """Pallas' splash attention, a flash kernel for TPUs.

    Attributes:
      queries, keys: the most tokens of a block, each a multiple of 128. Blocks are the largest up to these for which
        the fewest tokens are filled up: 9,433 are 37 blocks of 256, 12,800 are 25 of 512.
      interpret: computes the same, slowly, on any platform.
      ahead: compiled for TPUs that are not here.
    """

    queries: int = 512
    keys: int = 512
    interpret: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        for name, size in (("queries", self.queries), ("keys", self.keys)):
            if size <= 0 or size % _LANES:
                raise UserError(f"attention: splash: {name}: found {size}, expected a multiple of {_LANES}")


Implementation = Literal["auto", "xla", "chunked", "cudnn"] | Splash

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
      implementation: ``auto`` takes cuDNN's flash kernel on GPUs for half-precision inputs, Pallas' splash attention
        on TPUs for heads of 128, else XLA with queries in blocks when the score matrix would be large.

    Returns:
      [B, S, H, D] in q's dtype. The softmax is float32. Remat policies can keep it, see ``KEPT`` and ``is_kernel``.

    Raises:
      UserError: a kernel was asked for where it cannot run.
    """
    backend = jax.default_backend()
    if implementation == "auto":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        if backend == "gpu" and half:
            implementation = "cudnn"
        elif backend == "tpu" and fits_splash(q.shape[-1]):
            implementation = Splash()
        else:
            implementation = "chunked" if q.shape[1] * k.shape[1] > _QUADRATIC_LIMIT else "xla"
    if implementation == "cudnn":
        _check_backend("cudnn", "gpu")
        mask = None if valid is None else valid[:, None, None, :]
        found = jax.nn.dot_product_attention(q, k, v, scale=scale, mask=mask, implementation="cudnn")
        return checkpoint_name(found, CUDNN)
    if isinstance(implementation, Splash):
        return _splash(q, k, v, scale, valid, implementation)
    compute = _chunked if implementation == "chunked" else _softmax_attention
    return checkpoint_name(compute(q, k, v, scale, valid), KEPT)


def parse(text: str) -> Implementation:
    """``base.attention`` of a configuration: a name, or ``splash:QUERIESxKEYS``.

    Raises UserError for another text and for blocks that are no multiples of 128.
    """
    name, _, blocks = text.partition(":")
    queries, _, keys = blocks.partition("x")
    names: dict[str, Implementation] = {"auto": "auto", "xla": "xla", "chunked": "chunked", "cudnn": "cudnn"}
    if name == "splash" and (not blocks or (queries.isdecimal() and keys.isdecimal())):
        return Splash(int(queries), int(keys)) if blocks else Splash()
    if text not in names:
        raise UserError(f"base.attention: found {text!r}, expected {', '.join(names)}, splash or splash:QUERIESxKEYS")
    return names[text]


def choose(text: str, head_width: int) -> Implementation:
    """``parse`` for a transformer with heads of this width. Raises UserError also for what cannot run here."""
    implementation = parse(text)
    if implementation == "cudnn":
        _check_backend("cudnn", "gpu")
    if isinstance(implementation, Splash):
        _check_splash(implementation, head_width)
    return implementation


def ahead(text: str, head_width: int) -> Implementation:
    """What ``choose`` gives on TPUs, for a program that is compiled where there are none."""
    implementation = parse(text)
    if implementation == "auto" and fits_splash(head_width):
        implementation = Splash()
    return dataclasses.replace(implementation, ahead=True) if isinstance(implementation, Splash) else implementation


def _check_splash(how: Splash, head_width: int) -> None:
    if not (how.interpret or how.ahead):
        _check_backend("splash", "tpu")
    if not fits_splash(head_width):
        raise UserError(f"attention: implementation 'splash' needs heads of {_LANES}, found {head_width}")


def _check_backend(name: str, expected: str) -> None:
    found = jax.default_backend()
    if found != expected:
        raise UserError(f"attention: implementation {name!r} needs a {expected.upper()}, found {found}")


def fits_splash(head_width: int) -> bool:
    """Whether the TPU's kernel takes heads of this width."""
    return head_width == _LANES


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: keeps all that cuDNN's forward kernel gives, so that a backward pass does not run it again.

    What it hands to its backward kernel beside its result, the log-sum-exps, has no name.
    """
    return str(primitive.name).startswith("dot_product_attention_fwd")


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None, valid: jax.Array | None, how: Splash
) -> jax.Array:
    # Not needed elsewhere, and not light.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    b, s, h, d = q.shape
    _check_splash(how, d)
    (block_q, length), (block_kv, keys) = _blocks(s, how.queries), _blocks(k.shape[1], how.keys)
    segments = None
    if valid is not None or keys > k.shape[1]:
        valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
        # Queries see keys of their own segment, 1; padding is 0.
        valid = jnp.pad(valid, ((0, 0), (0, keys - valid.shape[1])))
        segments = kernels.SegmentIds(jnp.ones((b, length), jnp.int32), valid.astype(jnp.int32))
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.FullMask((length, keys))] * h),
        block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1, q_seq_shards=1, residual_checkpoint_name=KEPT, interpret=how.interpret,
    )  # fmt: skip

    def heads_first(x: jax.Array, tokens: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    # The kernel does not scale.
    q = (q.astype(jnp.float32) * (d**-0.5 if scale is None else scale)).astype(q.dtype)
    found = jax.vmap(kernel)(heads_first(q, length), heads_first(k, keys), heads_first(v, keys), segments)
    return found.transpose(0, 2, 1, 3)[:, :s]


def _blocks(tokens: int, most: int) -> tuple[int, int]:
    """(tokens of a block, of all blocks): the least in all, and then the largest blocks."""
    size = min(range(_LANES, most + 1, _LANES), key=lambda size: (-(-tokens // size) * size, -size))
    return size, -(-tokens // size) * size


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
