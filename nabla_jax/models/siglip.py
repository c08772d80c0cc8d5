"""The vision tower of SigLIP (Zhai et al. 2023) and of SigLIP 2 at fixed resolution (Tschannen et al. 2025).

Letters in shapes: B pictures, N patches in row-major order, D width. Attribute names follow the published
checkpoints, so a parameter's path in the tree is its checkpoint name split at the dots, with the layers stacked.
Pixels come from ``nabla_jax.metrics.preprocessing.ImageProcessor``. Computations are in the parameters' dtype,
norms and softmax in float32.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.config_file import check_sizes, check_types, known_fields, read_config
from nabla_jax.models.layers import Conv2d, Embedding, LayerNorm, Linear
from nabla_jax.models.vision import MLP, ImageFeatures, attend_heads, embed_patches, gelu_tanh, resize_positions

STACKED = ("vision_model.encoder.layers",)
# Tensors of a published file that the vision tower does not use: the text tower with its projection, the two
# scalars of the loss, and position numbers that old files carry as buffers. Anything else is an error.
UNUSED = (
    r"text_model\.embeddings\.(token|position)_embedding\.weight",
    r"text_model\.encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.([qkv]|out)_proj|mlp\.fc[12])\.(weight|bias)",
    r"text_model\.(final_layer_norm|head)\.(weight|bias)",
    r"logit_(scale|bias)",
    r"((text|vision)_model\.)?embeddings\.position_ids",
)
# Newer libraries leave the prefix out of a file that holds the vision tower alone.
TABLE = (
    *((pattern, None) for pattern in UNUSED),
    (r"(embeddings|encoder|post_layernorm|head)\.(.+)", r"vision_model.\1.\2"),
)
_MODEL_TYPES = ("siglip", "siglip_vision_model")
# Keys of the config with the one value that is built here.
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "vision_use_head": True}


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """Sizes of a SigLIP vision tower under their keys in ``config.json``; defaults are base-patch16-224's.

    ``image_size`` is the side in pixels of the square pictures that the position embeddings are for.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along a side of the square pictures that the position embeddings are for."""
        return self.image_size // self.patch_size

    @classmethod
    def base(cls, image_size: int = 224) -> "SiglipVisionConfig":
        """``google/siglip-base-patch16-*`` and ``google/siglip2-base-patch16-*`` (224, 256, 384 or 512 pixels)."""
        return cls(image_size=image_size)

    @classmethod
    def so400m(cls, image_size: int = 384, patch_size: int = 14) -> "SiglipVisionConfig":
        """``google/siglip-so400m-patch14-384``, which FLUX.1-Redux uses, and its siblings of another size."""
        return cls(1152, 4304, 27, 16, image_size, patch_size)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "SiglipVisionConfig":
        """Reads a published config.json (path or its dict), of the tower alone or of both towers.

        Published files name only what differs from the library's defaults, which are this class's. Raises
        UserError for another architecture; SigLIP 2 with pictures of any shape (NaFlex) is one.
        """
        where, raw = read_config(source, "SigLIP config")
        kind = raw.get("model_type")
        if kind not in _MODEL_TYPES:
            hint = " (NaFlex checkpoints are not read, fixed-resolution ones are)" if kind == "siglip2" else ""
            raise UserError(f"{where}: model_type: found {kind!r}, expected {' or '.join(_MODEL_TYPES)}{hint}")
        if kind == "siglip":
            where, vision = f"{where}: vision_config", raw.get("vision_config")
            if not isinstance(vision, dict):
                raise UserError(f"{where}: found {vision!r}, expected a JSON object")
            raw = vision
        fields = [field.name for field in dataclasses.fields(cls)]
        check_types(where, cls, raw)
        config = cls(**known_fields(where, raw, fields, fixed=_FIXED))
        config.check(where)
        return config

    def check(self, where: str = "SigLIP config") -> None:
        """Raises UserError unless the sizes are positive and fit each other."""
        check_sizes(where, **{k: v for k, v in dataclasses.asdict(self).items() if k != "layer_norm_eps"})

    def to_json(self) -> dict[str, Any]:
        """The config.json of the tower alone, as transformers reads it."""
        return {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            **dataclasses.asdict(self),
            **_FIXED,
        }


class Attention(nnx.Module):
    """Self-attention of all patches."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.hidden_size
        self.q_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.k_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.v_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.out_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        return self.out_proj(attend_heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class EncoderLayer(nnx.Module):
    """Pre-normalised attention and feed-forward layer with residual connections."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.layer_norm2 = LayerNorm(width, eps=eps, dtype=dtype)
        self.mlp = MLP(width, config.intermediate_size, gelu_tanh, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    """Projected patches plus learned position embeddings."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = Conv2d(config.num_channels, width, patch, stride=patch, rngs=rngs, dtype=dtype)
        self.position_embedding = Embedding(config.grid**2, width, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(self, pixels: jax.Array, interpolate: bool) -> jax.Array:
        """[B, C, H, W] -> [B, N, D]."""
        x, grid = embed_patches(self.patch_embedding, pixels)
        side = self.config.grid
        if grid != (side, side) and not interpolate:
            raise ValueError(
                f"SigLIP: found {grid[0]}x{grid[1]} patches (pixels {tuple(pixels.shape)}), expected {side}x{side} "
                f"as of {self.config.image_size}x{self.config.image_size} pixels, or interpolate=True"
            )
        return x + resize_positions(self.position_embedding.weight[...], grid)


class Encoder(nnx.Module):
    """All layers in a row, their parameters stacked."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.layers = layers.stack(lambda r: EncoderLayer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)

    def __call__(self, x: jax.Array, scan: bool | None) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        return layers.run_stacked(self.layers, x, scan=scan)


class PoolingAttention(nnx.Module):
    """Attention of few queries over all tokens, with one packed matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        packed = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.in_proj_weight = nnx.Param(packed.weight[...])
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * width,), jnp.dtype(dtype)))
        self.out_proj = Linear(width, width, rngs=rngs, dtype=dtype)
        self.heads = heads

    def __call__(self, queries: jax.Array, tokens: jax.Array) -> jax.Array:
        """Queries [B, S, D], tokens [B, N, D] -> [B, S, D]."""
        width = tokens.shape[-1]
        weight, bias = (p[...].astype(tokens.dtype) for p in (self.in_proj_weight, self.in_proj_bias))
        q = jnp.einsum("bsi,oi->bso", queries, weight[:width]) + bias[:width]
        k, v = jnp.split(jnp.einsum("bni,oi->bno", tokens, weight[width:]) + bias[width:], 2, axis=-1)
        # A flash kernel gains nothing for one query, and cuDNN's has limits on short sequences.
        return self.out_proj(attend_heads(q, k, v, self.heads, "xla"))


class PoolingHead(nnx.Module):
    """A learned query attends to all patches; a feed-forward layer with residual follows."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.hidden_size
        self.probe = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width), jnp.dtype(dtype)))
        self.attention = PoolingAttention(width, config.num_attention_heads, rngs=rngs, dtype=dtype)
        self.layernorm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(width, config.intermediate_size, gelu_tanh, rngs=rngs, dtype=dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, D]."""
        probe = self.probe[...].astype(tokens.dtype)
        pooled = self.attention(jnp.broadcast_to(probe, (tokens.shape[0], *probe.shape[1:])), tokens)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class VisionTransformer(nnx.Module):
    """Embeddings, encoder, the closing norm and the pooling head."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.head = PoolingHead(config, rngs=rngs, dtype=dtype)

    def __call__(self, pixels: jax.Array, interpolate: bool, scan: bool | None) -> ImageFeatures:
        """Pixels [B, C, H, W] -> pooled [B, D], patches [B, N, D]."""
        patches = self.post_layernorm(self.encoder(self.embeddings(pixels, interpolate), scan))
        return ImageFeatures(self.head(patches), patches)


class SiglipVision(nnx.Module):
    """Pictures to one vector each (SigLIP's image feature, not normalised) and one per patch."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        config.check()
        self.vision_model = VisionTransformer(config, rngs=rngs, dtype=dtype)

    def __call__(self, pixels: jax.Array, *, interpolate: bool = False, scan: bool | None = None) -> ImageFeatures:
        """Features of a batch.

        Args:
          pixels: [B, 3, H, W], normalised by the checkpoint's processor.
          interpolate: accept pictures of another size or shape than ``config.image_size`` and interpolate the
            position embeddings.
          scan: run the layers under ``lax.scan``; None scans deep towers.

        Returns:
          ``pooled`` [B, D] (transformers' ``pooler_output``) and ``patches`` [B, N, D] (``last_hidden_state``).

        Raises:
          ValueError: the pictures' size is another one than the position embeddings are for.
        """
        return self.vision_model(pixels, interpolate, scan)
