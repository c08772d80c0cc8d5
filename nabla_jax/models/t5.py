"""The T5 1.1 encoder (Raffel et al. 2020; Shazeer 2020 for the gated feed-forward layer).

Letters in shapes: B prompts, T tokens, D model width, N heads, H head width. Attribute names follow the
published checkpoints, so a parameter's path in the tree is its checkpoint name split at the dots.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_types, read_config
from nabla_jax.models.layers import Embedding, Linear, RMSNorm

# The embedding is stored under either name or both.
TABLE = ((r"encoder\.embed_tokens\.weight", "shared.weight"),)
# Keys of config.json with the one value this implementation has.
_FIXED = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder, with the keys of the published ``config.json``; defaults are T5 1.1 XXL's."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def xxl(cls) -> "T5Config":
        """The encoder of FLUX.1 (``text_encoder_2``)."""
        return cls()

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "T5Config":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "T5 config")
        for key, value in _FIXED.items():
            if raw.get(key, value) != value:
                raise UserError(f"{where}: {key}: found {raw[key]!r}, expected {value!r}")
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [key for key in (*fields, "feed_forward_proj") if key not in raw and key not in _OPTIONAL]
        if missing:
            raise UserError(f"{where}: missing keys: {', '.join(missing)}")
        check_types(where, cls, raw)
        return cls(**{key: raw[key] for key in fields if key in raw})

    def to_json(self) -> dict[str, Any]:
        """The published config.json's content, as transformers reads it."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            **dataclasses.asdict(self),
            **_FIXED,
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }


# Keys that some published files leave to transformers' defaults, which are this class's.
_OPTIONAL = {"relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"}


def relative_buckets(distance: np.ndarray, count: int, max_distance: int) -> np.ndarray:
    """Buckets of relative positions (key - query), both directions (Raffel et al. 2020, section 2.1).

    Half of the ``count`` buckets serve each direction; of these, half hold one distance each and the others
    grow logarithmically up to ``max_distance``; all larger distances share the last. int64, any shape.
    """
    half = count // 2
    exact = half // 2
    magnitude = np.abs(distance)
    # float32 as in training: exact arithmetic would put some distances into the neighbouring bucket.
    ratio = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + np.trunc(steps).astype(np.int64), half - 1)
    return np.where(magnitude < exact, magnitude, far) + half * (distance > 0)


class SelfAttention(nnx.Module):
    """Attention over all tokens without 1/sqrt(H) scaling, plus a learned bias of the relative position."""

    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, width, bias=False, rngs=rngs, dtype=dtype)
        self.k = Linear(config.d_model, width, bias=False, rngs=rngs, dtype=dtype)
        self.v = Linear(config.d_model, width, bias=False, rngs=rngs, dtype=dtype)
        self.o = Linear(width, config.d_model, bias=False, rngs=rngs, dtype=dtype)
        # Only the first block holds the table; all blocks share its bias.
        self.relative_attention_bias = (
            Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs, dtype=dtype)
            if has_bias
            else None
        )
        self.heads = config.num_heads

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D], bias [B or 1, N, T, T] -> [B, T, D]."""
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))  # [B, T, N, H]
        # float32: unscaled scores are large, and softmax in bfloat16 would round their differences away.
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bnqk,bknh->bqnh", weights, v).reshape(*x.shape[:2], -1))


class AttentionLayer(nnx.Module):
    """Pre-normalised self-attention with a residual connection."""

    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.SelfAttention = SelfAttention(config, has_bias=has_bias, rngs=rngs, dtype=dtype)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedGelu(nnx.Module):
    """``W_o (gelu(W_0 x) * W_1 x)`` with GELU in its tanh form (Shazeer 2020)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False, rngs=rngs, dtype=dtype)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False, rngs=rngs, dtype=dtype)
        self.wo = Linear(config.d_ff, config.d_model, bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class FeedForwardLayer(nnx.Module):
    """Pre-normalised feed-forward layer with a residual connection."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.DenseReluDense = GatedGelu(config, rngs=rngs, dtype=dtype)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nnx.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        attention = AttentionLayer(config, has_bias=has_bias, rngs=rngs, dtype=dtype)
        self.layer = nnx.List([attention, FeedForwardLayer(config, rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class Stack(nnx.Module):
    """All blocks and the closing norm."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.block = nnx.List(
            [Block(config, has_bias=i == 0, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        )
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nnx.Module):
    """Token ids to contextual embeddings; ``num_layers`` must be at least 1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.shared = Embedding(config.vocab_size, config.d_model, rngs=rngs, dtype=dtype)
        self.encoder = Stack(config, rngs=rngs, dtype=dtype)
        self.config = config

    def position_bias(self, length: int) -> jax.Array:
        """The bias of the relative position that all blocks add to their scores, float32 [1, N, T, T]."""
        first = self.encoder.block[0].layer[0]
        assert isinstance(first, AttentionLayer)
        table = first.SelfAttention.relative_attention_bias
        assert table is not None
        position = np.arange(length)
        buckets = relative_buckets(
            position[None, :] - position[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return table(jnp.asarray(buckets, jnp.int32)).astype(jnp.float32).transpose(2, 0, 1)[None]

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Integer ids [B, T] -> embeddings [B, T, D] in the parameters' dtype.

        ``mask`` [B, T] is True at tokens that may be attended to. FLUX gives none: its padding takes part.
        """
        bias = self.position_bias(ids.shape[1])
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        return self.encoder(self.shared(ids), bias)
