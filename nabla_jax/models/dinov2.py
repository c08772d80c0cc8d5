"""DINOv2 (Oquab et al. 2023) without registers: the small, base and large backbones.

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

from nabla_jax.models import layers
from nabla_jax.models.config_file import check_sizes, check_types, known_fields, read_config
from nabla_jax.models.layers import Conv2d, LayerNorm, Linear
from nabla_jax.models.vision import MLP, ImageFeatures, attend_heads, embed_patches, gelu, resize_positions

STACKED = ("encoder.layer",)
# Published files use every name of the tree as it is; none is left out.
TABLE = ()
# Keys of the config with the one value that is built here: the giant model's gated feed-forward layer is not.
_FIXED = {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of a DINOv2 backbone under their keys in ``config.json``; defaults are ``facebook/dinov2-base``'s.

    ``image_size`` is the side in pixels of the square pictures that the position embeddings are for. Pictures of
    any other size get interpolated ones (published: 518 pixels, used at 224).
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along a side of the square pictures that the position embeddings are for."""
        return self.image_size // self.patch_size

    @classmethod
    def small(cls) -> "Dinov2Config":
        """``facebook/dinov2-small``."""
        return cls(384, 12, 6)

    @classmethod
    def base(cls) -> "Dinov2Config":
        """``facebook/dinov2-base``."""
        return cls()

    @classmethod
    def large(cls) -> "Dinov2Config":
        """``facebook/dinov2-large``."""
        return cls(1024, 24, 16)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "Dinov2Config":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "DINOv2 config")
        fields = [field.name for field in dataclasses.fields(cls)]
        # The library's own default picture size is 224, not the published models' 518.
        required = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        check_types(where, cls, raw)
        config = cls(**known_fields(where, raw, fields, required=required, fixed=_FIXED))
        config.check(where)
        return config

    def check(self, where: str = "DINOv2 config") -> None:
        """Raises UserError unless the sizes are positive and fit each other."""
        check_sizes(where, **{k: v for k, v in dataclasses.asdict(self).items() if k != "layer_norm_eps"})

    def to_json(self) -> dict[str, Any]:
        """The published config.json's content, as transformers reads it."""
        return {
            "architectures": ["Dinov2Model"],
            **dataclasses.asdict(self),
            **_FIXED,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "layerscale_value": 1.0,
        }


class QueryKeyValue(nnx.Module):
    """The three projections of the published ``attention.attention``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.query = Linear(width, width, rngs=rngs, dtype=dtype)
        self.key = Linear(width, width, rngs=rngs, dtype=dtype)
        self.value = Linear(width, width, rngs=rngs, dtype=dtype)


class Output(nnx.Module):
    """The projection of the published ``attention.output``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.dense = Linear(width, width, rngs=rngs, dtype=dtype)


class Attention(nnx.Module):
    """Self-attention of all tokens."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attention = QueryKeyValue(config.hidden_size, rngs=rngs, dtype=dtype)
        self.output = Output(config.hidden_size, rngs=rngs, dtype=dtype)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 1 + N, D] -> [B, 1 + N, D]."""
        projections = self.attention
        q, k, v = projections.query(x), projections.key(x), projections.value(x)
        return self.output.dense(attend_heads(q, k, v, self.heads))


class LayerScale(nnx.Module):
    """A learned factor per channel (Touvron et al. 2021, eq. 2)."""

    def __init__(self, width: int, *, dtype: DTypeLike) -> None:
        self.lambda1 = nnx.Param(jnp.ones((width,), jnp.dtype(dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return x * self.lambda1[...].astype(x.dtype)


class Layer(nnx.Module):
    """Pre-normalised attention and feed-forward layer, each scaled per channel before its residual sum."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = LayerNorm(width, eps=eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.layer_scale1 = LayerScale(width, dtype=dtype)
        self.norm2 = LayerNorm(width, eps=eps, dtype=dtype)
        self.mlp = MLP(width, width * config.mlp_ratio, gelu, rngs=rngs, dtype=dtype)
        self.layer_scale2 = LayerScale(width, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, 1 + N, D] -> [B, 1 + N, D]."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class PatchEmbeddings(nnx.Module):
    """The published module around the patches' projection."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        patch = config.patch_size
        self.projection = Conv2d(config.num_channels, config.hidden_size, patch, stride=patch, rngs=rngs, dtype=dtype)


class Embeddings(nnx.Module):
    """A class token and projected patches, plus position embeddings for any grid."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.hidden_size

        def draw(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.dtype(dtype)))

        self.cls_token = draw(1, 1, width)
        # Stands for hidden patches in pre-training; kept so that the tree holds the whole checkpoint.
        self.mask_token = nnx.Param(jnp.zeros((1, width), jnp.dtype(dtype)))
        self.patch_embeddings = PatchEmbeddings(config, rngs=rngs, dtype=dtype)
        self.position_embeddings = draw(1, 1 + config.grid**2, width)

    def positions(self, grid: tuple[int, int]) -> jax.Array:
        """Position embeddings [1, 1 + h * w, D] of a grid (h, w): the class token's own, the patches' resampled."""
        table = self.position_embeddings[...]
        return jnp.concatenate([table[:, :1], resize_positions(table[0, 1:], grid)[None]], axis=1)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, C, H, W] -> [B, 1 + N, D]."""
        patches, grid = embed_patches(self.patch_embeddings.projection, pixels)
        first = jnp.broadcast_to(self.cls_token[...], (patches.shape[0], 1, patches.shape[2]))
        return jnp.concatenate([first, patches], axis=1) + self.positions(grid)


class Encoder(nnx.Module):
    """All layers in a row, their parameters stacked."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.layer = layers.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)

    def __call__(self, x: jax.Array, scan: bool | None) -> jax.Array:
        """[B, 1 + N, D] -> [B, 1 + N, D]."""
        return layers.run_stacked(self.layer, x, scan=scan)


class Dinov2(nnx.Module):
    """Pictures to one vector each (the class token) and one per patch."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        config.check()
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, pixels: jax.Array, *, scan: bool | None = None) -> ImageFeatures:
        """Features of a batch of pictures of any size of at least one patch.

        Args:
          pixels: [B, 3, H, W], normalised by the checkpoint's processor; a rest that fills no patch is left out.
          scan: run the layers under ``lax.scan``; None scans deep backbones.

        Returns:
          ``pooled`` [B, D], the class token after the closing norm (transformers' ``last_hidden_state[:, 0]``), and
          ``patches`` [B, N, D] (``last_hidden_state[:, 1:]``).
        """
        tokens = self.layernorm(self.encoder(self.embeddings(pixels), scan))
        return ImageFeatures(tokens[:, 0], tokens[:, 1:])
