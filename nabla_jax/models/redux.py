"""FLUX.1-Redux: a picture as prompt tokens (a SigLIP vision tower and two linear layers).

Letters in shapes: B pictures, N patches in row-major order (729 in the published model), T width of prompt tokens
(4096). Attribute names follow the published folders, so a parameter's path in the tree is the component's folder
and the checkpoint name split at the dots.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_counts, check_types, known_fields, read_config
from nabla_jax.models.layers import Linear
from nabla_jax.models.siglip import SiglipVision, SiglipVisionConfig


@dataclasses.dataclass(frozen=True)
class ReduxEmbedderConfig:
    """Sizes of ``image_embedder`` under their keys in ``config.json``; defaults are FLUX.1-Redux-dev's."""

    redux_dim: int = 1152
    txt_in_features: int = 4096

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "ReduxEmbedderConfig":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "Redux embedder config")
        fields = [field.name for field in dataclasses.fields(cls)]
        check_types(where, cls, raw)
        config = cls(**known_fields(where, raw, fields, fixed={"_class_name": "ReduxImageEncoder"}))
        check_counts(where, **dataclasses.asdict(config))
        return config

    def to_json(self) -> dict[str, Any]:
        """The published config.json's content, as diffusers reads it."""
        return {"_class_name": "ReduxImageEncoder", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ReduxConfig:
    """The two components of FLUX.1-Redux."""

    image_encoder: SiglipVisionConfig = dataclasses.field(default_factory=SiglipVisionConfig.so400m)
    image_embedder: ReduxEmbedderConfig = dataclasses.field(default_factory=ReduxEmbedderConfig)

    def check(self, where: str = "Redux config") -> None:
        """Raises UserError unless the embedder takes what the tower gives."""
        found, expected = self.image_embedder.redux_dim, self.image_encoder.hidden_size
        if found != expected:
            raise UserError(
                f"{where}: image_embedder/config.json: redux_dim: found {found}, "
                f"expected {expected}, the hidden_size of image_encoder/config.json"
            )


class ReduxEmbedder(nnx.Module):
    """``down(silu(up(x)))``: patch features to prompt tokens."""

    def __init__(self, config: ReduxEmbedderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        hidden = 3 * config.txt_in_features
        self.redux_up = Linear(config.redux_dim, hidden, rngs=rngs, dtype=dtype)
        self.redux_down = Linear(hidden, config.txt_in_features, rngs=rngs, dtype=dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, N, redux_dim] -> [B, N, T]."""
        return self.redux_down(jax.nn.silu(self.redux_up(features)))


class Redux(nnx.Module):
    """Pictures to prompt tokens."""

    def __init__(self, config: ReduxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        config.check()
        self.image_encoder = SiglipVision(config.image_encoder, rngs=rngs, dtype=dtype)
        self.image_embedder = ReduxEmbedder(config.image_embedder, rngs=rngs, dtype=dtype)

    def __call__(self, pixels: jax.Array, *, scan: bool | None = None) -> jax.Array:
        """Pixels [B, 3, H, W] of the tower's picture size, normalised by its processor -> tokens [B, N, T]."""
        return self.image_embedder(self.image_encoder(pixels, scan=scan).patches)
