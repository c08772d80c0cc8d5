"""The CLIP text encoder (Radford et al. 2021).

Letters in shapes: B prompts, T tokens, D width, N heads, H head width. Attribute names follow the published
checkpoints, so a parameter's path in the tree is its checkpoint name split at the dots.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_types, read_config
from nabla_jax.models.layers import Embedding, LayerNorm, Linear

# Older files carry the positions 0..T-1 as a buffer; newer libraries leave the prefix out.
TABLE = (
    (r"(text_model\.)?embeddings\.position_ids", None),
    (r"(embeddings|encoder|final_layer_norm)\.(.+)", r"text_model.\1.\2"),
)
# Published FLUX and CLIP configs carry this wrong id for the end-of-text token.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text encoder under their keys in ``config.json``; defaults are ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    @classmethod
    def large(cls) -> "CLIPTextConfig":
        """The encoder of FLUX.1 (``text_encoder``), with the legacy end-of-text id of its config."""
        return cls(bos_token_id=0, eos_token_id=LEGACY_EOS)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "CLIPTextConfig":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "CLIP text config")
        if raw.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise UserError(f"{where}: hidden_act: found {raw['hidden_act']!r}, expected 'quick_gelu'")
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = sorted(key for key in fields if key not in raw and key not in _OPTIONAL)
        if missing:
            raise UserError(f"{where}: missing keys: {', '.join(missing)}")
        check_types(where, cls, raw)
        config = cls(**{key: raw[key] for key in fields if key in raw})
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{where}: hidden_size: found {config.hidden_size}, "
                f"expected a multiple of num_attention_heads ({config.num_attention_heads})"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """The published config.json's content, as transformers reads it."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **dataclasses.asdict(self),
            "hidden_act": "quick_gelu",
            "projection_dim": self.hidden_size,
            "pad_token_id": 1,
            "attention_dropout": 0.0,
        }


# Keys that some published files leave to transformers' defaults, which are this class's.
_OPTIONAL = {"layer_norm_eps", "bos_token_id", "eos_token_id"}


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x sigmoid(1.702 x)``, the sigmoid approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.hidden_size
        self.q_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.k_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.v_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.out_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; a token attends to itself and to those before it."""
        length = x.shape[1]
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        # float32: softmax in bfloat16 loses most of its bits.
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return self.out_proj(jnp.einsum("bnqk,bknh->bqnh", weights, v).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with quick-GELU between them."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.fc2(quick_gelu(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-normalised attention and feed-forward layer with residual connections."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    """Token plus learned position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, width, rngs=rngs, dtype=dtype)
        self.position_embedding = Embedding(config.max_position_embeddings, width, rngs=rngs, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Ids [B, T] -> [B, T, D]."""
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class Encoder(nnx.Module):
    """All layers in a row."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nnx.Module):
    """Embeddings, encoder and the closing norm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Ids [B, T] -> [B, T, D]."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class CLIPText(nnx.Module):
    """Token ids to contextual embeddings and one vector per prompt."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.text_model = TextTransformer(config, rngs=rngs, dtype=dtype)
        self.config = config

    def end_of_text(self, ids: jax.Array) -> jax.Array:
        """Position of the end-of-text token in each prompt, [B, T] -> [B].

        With the legacy id in the config it is the largest id's (the end-of-text token closes the vocabulary);
        else the first occurrence of the configured id. Padding with the same token comes later.
        """
        legacy = self.config.eos_token_id == LEGACY_EOS
        return jnp.argmax(ids if legacy else ids == self.config.eos_token_id, axis=-1)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids [B, T], T <= max_position_embeddings -> hidden [B, T, D] and pooled [B, D].

        Raises ValueError if T is larger: positions beyond the table have no embedding.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"CLIP: found {ids.shape[1]} tokens, expected at most {limit}")
        hidden = self.text_model(ids)
        pooled = jnp.take_along_axis(hidden, self.end_of_text(ids)[:, None, None], axis=1)[:, 0]
        return hidden, pooled
