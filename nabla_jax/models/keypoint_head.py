"""A keypoint head on the patch features of a frozen DINOv2: one heatmap and one visibility for each part of a bird.

Letters in shapes: B pictures, P parts, g patches along a side, G = g * ``upsample`` cells along a side, D width of
features.

Patches are too coarse for an eye: their features are mixed by convolutions, unfolded into ``upsample`` x ``upsample``
cells each and joined with a look at the pixels of every cell. A position is the heatmap's mean (soft-argmax; Sun et al.
2018, eq. 2), so that it lies between cells. Whether a part can be seen is told from the features at its place and from
the picture as a whole.

The features come from one DINOv2 and mean nothing to another: the config holds the hash of its weights.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_counts, check_types, known_fields, read_config
from nabla_jax.models.layers import Conv2d, LayerNorm, Linear
from nabla_jax.models.vision import MLP, embed_patches, gelu

_FIXED = {"model_type": "keypoint_head"}


@dataclasses.dataclass(frozen=True)
class KeypointHeadConfig:
    """Sizes of a head, and what it was trained on, under their keys in ``config.json``.

    Attributes:
      parts: names, in the order of the heatmaps.
      feature_size: width of the DINOv2's patch features.
      patch_size: side of its patches, in pixels.
      dinov2_sha256: of its weights.
      image_size: side in pixels of the square crop that both networks see.
      margin: side of the crop over the longer side of the bird's box.
      hidden_size: width at the patches.
      fine_size: width at the cells.
      num_blocks: convolution blocks at the patches.
      upsample: cells along a patch's side; divides ``patch_size``.
    """

    parts: tuple[str, ...]
    feature_size: int
    patch_size: int
    dinov2_sha256: str
    image_size: int
    margin: float = 1.25
    hidden_size: int = 256
    fine_size: int = 64
    num_blocks: int = 3
    upsample: int = 2

    @property
    def grid(self) -> int:
        """Patches along a side of the crop."""
        return self.image_size // self.patch_size

    @property
    def cells(self) -> int:
        """Cells of a heatmap along a side."""
        return self.grid * self.upsample

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "KeypointHeadConfig":
        """Reads the folder's config.json (path or its dict). Raises UserError for another network."""
        where, raw = read_config(source, "keypoint head config")
        names = [field.name for field in dataclasses.fields(cls)]
        values = known_fields(where, raw, names, required=[*_FIXED, *names], fixed=_FIXED)
        if not isinstance(values["parts"], list) or not all(isinstance(part, str) for part in values["parts"]):
            raise UserError(f"{where}: parts: found {values['parts']!r}, expected a list of names")
        check_types(where, cls, raw)
        config = cls(**{**values, "parts": tuple(values["parts"])})
        config.check(where)
        return config

    def check(self, where: str = "keypoint head config") -> None:
        """Raises UserError unless the sizes are positive and fit each other."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        other = ("parts", "dinov2_sha256", "margin")
        check_counts(where, parts=len(self.parts), **{k: v for k, v in named.items() if k not in other})
        if not isinstance(self.margin, float | int) or self.margin < 1:
            raise UserError(f"{where}: margin: found {self.margin!r}, expected a number of at least 1")
        for key, value, whole in (
            ("image_size", self.image_size, self.patch_size),
            ("patch_size", self.patch_size, self.upsample),
        ):
            if value % whole:
                raise UserError(f"{where}: {key}: found {value}, expected a multiple of {whole}")

    def to_json(self) -> dict[str, Any]:
        """The folder's config.json."""
        return {**_FIXED, **dataclasses.asdict(self), "parts": list(self.parts)}


class Keypoints(NamedTuple):
    """``heatmaps`` [B, P, G, G], logits; ``positions`` [B, P, 2] (row, column), 0 to 1 from edge to edge of the crop;
    ``visible`` [B, P], logits. All float32.
    """

    heatmaps: jax.Array
    positions: jax.Array
    visible: jax.Array


class Block(nnx.Module):
    """A 3x3 convolution of each channel, then two linear layers at every place, as a residual (Liu et al. 2022)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), (3, 3, width), jnp.dtype(dtype), -1 / 3, 1 / 3))
        self.norm = LayerNorm(width, dtype=dtype)
        self.mlp = MLP(width, 2 * width, gelu, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, width] -> same shape."""
        h, w = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = self.conv[...].astype(x.dtype)
        # Nine shifted products: XLA's convolutions, and above all their gradients, took several times as long on a CPU.
        y = jnp.zeros_like(x)
        for i, j in np.ndindex(3, 3):
            y = y + padded[:, i : i + h, j : j + w] * kernel[i, j]
        return x + self.mlp(self.norm(y))


class KeypointHead(nnx.Module):
    """Patch features and pixels of a crop to keypoints."""

    def __init__(self, config: KeypointHeadConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        config.check()
        width, fine, parts = config.hidden_size, config.fine_size, len(config.parts)
        self.project = Linear(config.feature_size, width, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List([Block(width, rngs=rngs, dtype=dtype) for _ in range(config.num_blocks)])
        self.unfold = Linear(width, fine * config.upsample**2, rngs=rngs, dtype=dtype)
        cell = config.patch_size // config.upsample
        self.pixels = Conv2d(3, fine, cell, stride=cell, rngs=rngs, dtype=dtype)
        self.join = Linear(2 * fine, fine, rngs=rngs, dtype=dtype)
        self.refine = Block(fine, rngs=rngs, dtype=dtype)
        self.norm = LayerNorm(fine, dtype=dtype)
        self.heat = Linear(fine, parts, rngs=rngs, dtype=dtype)
        self.visible_there = Linear(fine, parts, bias=False, rngs=rngs, dtype=dtype)
        self.visible_overall = Linear(width, parts, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(self, patches: jax.Array, pixels: jax.Array) -> Keypoints:
        """Keypoints in square crops.

        Args:
          patches: [B, g * g, D], the DINOv2's patch features of the crops.
          pixels: [B, 3, g * patch_size, g * patch_size], what it saw.
        """
        size, up = self.config.grid, self.config.upsample
        x = self.project(patches).reshape(len(patches), size, size, -1)
        for block in self.blocks:
            x = block(x)
        y = unfold(self.unfold(x), up)
        look, (rows, columns) = embed_patches(self.pixels, pixels)
        look = look.reshape(len(pixels), rows, columns, -1)
        y = self.norm(self.refine(self.join(gelu(jnp.concatenate([y, look], axis=-1)))))
        # float32: a mean over thousands of cells, to a fraction of one.
        heatmaps = self.heat(y).astype(jnp.float32).transpose(0, 3, 1, 2)
        shares = jax.nn.softmax(heatmaps.reshape(*heatmaps.shape[:2], -1)).reshape(heatmaps.shape)
        there = jnp.einsum("bphw,bhwd,pd->bp", shares, y.astype(jnp.float32), self.visible_there.weight[...])
        overall = self.visible_overall(x.mean(axis=(1, 2))).astype(jnp.float32)
        return Keypoints(heatmaps, centres(shares), there + overall)


def unfold(x: jax.Array, factor: int) -> jax.Array:
    """Channels to finer cells: [B, h, w, C * factor^2] -> [B, h * factor, w * factor, C] (Shi et al. 2016, eq. 4)."""
    batch, h, w, _ = x.shape
    y = x.reshape(batch, h, w, factor, factor, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, h * factor, w * factor, -1)


def soft_argmax(heatmaps: jax.Array) -> jax.Array:
    """Logits [..., h, w] -> the mean position [..., 2] (row, column) under their softmax; see ``centres``."""
    shares = jax.nn.softmax(heatmaps.reshape(*heatmaps.shape[:-2], -1).astype(jnp.float32))
    return centres(shares.reshape(heatmaps.shape))


def centres(shares: jax.Array) -> jax.Array:
    """Shares [..., h, w] that sum to 1 -> mean (row, column) [..., 2], 0 to 1 from edge to edge; cell i of n lies at
    (i + 0.5) / n.
    """
    rows, columns = ((jnp.arange(n) + 0.5) / n for n in shares.shape[-2:])
    # Sums, not matrix products, which accelerators would round to fewer bits.
    return jnp.stack([(shares.sum(-1) * rows).sum(-1), (shares.sum(-2) * columns).sum(-1)], axis=-1)
