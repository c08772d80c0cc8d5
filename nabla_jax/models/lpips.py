"""LPIPS (Zhang et al. 2018) version 0.1 with VGG16 (Simonyan & Zisserman 2015): a learned perceptual distance.

Letters in shapes: B pairs, H x W pixels, C channels. Attribute names follow torchvision's ``vgg16`` (``features``)
and the lpips package (``lin0`` .. ``lin4``), so a parameter's path in the tree is its name there split at the dots.
Between the ends all is NHWC, as in the autoencoder.

A checkpoint folder holds ``config.json`` and ``model.safetensors`` with both sets of names;
``nabla_jax.checkpoints.transformers_folder.write_lpips`` makes it from the two published files.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_counts, known_fields, read_config
from nabla_jax.models.layers import Conv2d, convolve_nhwc

# Channel means and deviations of ImageNet pictures in [-1, 1], as the published metric uses them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Convolutions per level; each level but the first begins with max pooling.
DEPTHS = (2, 2, 3, 3, 3)
NORM_EPS = 1e-10
# Below this side the last level is empty.
MIN_SIDE = 16
# torchvision's file also holds the classifier, which the metric does not use.
UNUSED = (r"classifier\.[036]\.(weight|bias)",)
TABLE = tuple((pattern, None) for pattern in UNUSED)
_FIXED = {"model_type": "lpips", "net": "vgg16", "version": "0.1"}


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """Channels of VGG16's five levels."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "LpipsConfig":
        """Reads the folder's config.json (path or its dict). Raises UserError for another network."""
        where, raw = read_config(source, "LPIPS config")
        values = known_fields(where, raw, ["channels"], required=[*_FIXED, "channels"], fixed=_FIXED)
        channels = values["channels"]
        if not isinstance(channels, list) or len(channels) != len(DEPTHS):
            raise UserError(f"{where}: channels: found {channels!r}, expected a list of {len(DEPTHS)}")
        for count in channels:
            check_counts(where, channels=count)
        return cls(tuple(channels))

    def to_json(self) -> dict[str, Any]:
        """The folder's config.json."""
        return {**_FIXED, "channels": list(self.channels)}


class Relu(nnx.Module):
    """``max(x, 0)``; a module because it counts in the published numbering."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape."""
        return jax.nn.relu(x)


class MaxPool(nnx.Module):
    """Maximum over squares of 2 x 2; an odd last row or column is left out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H // 2, W // 2, C]."""
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


class Identity(nnx.Module):
    """Nothing; holds the place of a dropout in the published numbering."""


class Head(nnx.Module):
    """A level's non-negative weight per channel, published as a 1x1 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.model = nnx.List([Identity(), Conv2d(channels, 1, 1, bias=False, rngs=rngs, dtype=dtype)])

    @property
    def weight(self) -> jax.Array:
        """[C] float32."""
        return cast(Conv2d, self.model[1]).weight[...].astype(jnp.float32).reshape(-1)


class Lpips(nnx.Module):
    """Distance of two pictures: 0 for equal ones (to rounding), about 1 for unrelated ones."""

    def __init__(self, config: LpipsConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        modules: list[nnx.Module] = []
        before = 3
        self.taps: tuple[int, ...] = ()
        for level, (channels, depth) in enumerate(zip(config.channels, DEPTHS, strict=True)):
            if level:
                modules.append(MaxPool())
            for _ in range(depth):
                modules += [Conv2d(before, channels, 3, padding=1, rngs=rngs, dtype=dtype), Relu()]
                before = channels
            self.taps += (len(modules) - 1,)
        self.features = nnx.List(modules)
        for level, channels in enumerate(config.channels):
            setattr(self, f"lin{level}", Head(channels, rngs=rngs, dtype=dtype))

    def levels(self, images: jax.Array, sizes: jax.Array | None = None) -> list[jax.Array]:
        """The five levels' last activations of pictures [B, 3, H, W] in [-1, 1], each [B, H', W', C].

        With ``sizes`` [B, 2] they are those of the pictures' top left (height, width) alone, and 0 elsewhere.
        """
        dtype = cast(Conv2d, self.features[0]).weight[...].dtype
        x = (images.transpose(0, 2, 3, 1) - np.array(SHIFT, np.float32)) / np.array(SCALE, np.float32)
        x = _keep(x.astype(dtype), sizes)
        found = []
        for index, module in enumerate(self.features):
            x = convolve_nhwc(module, x) if isinstance(module, Conv2d) else module(x)
            if isinstance(module, MaxPool):
                sizes = None if sizes is None else sizes // 2
            if not isinstance(module, Conv2d):
                # What a convolution, or pooling of an odd side, leaves outside would come back with the next one.
                x = _keep(x, sizes)
            if index in self.taps:
                found.append(x)
        return found

    def channels(self, a: jax.Array, b: jax.Array, sizes: jax.Array | None = None) -> list[jax.Array]:
        """What the weights weigh: per level the mean squared difference of every channel, [B, C] float32.

        Arguments and errors as in ``__call__``.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"LPIPS: found {tuple(a.shape)} and {tuple(b.shape)}, expected two equal shapes [B, 3, H, W] "
                f"with sides of at least {MIN_SIDE}"
            )
        # One batch: each side on its own took 1.5 times the CPU time, and a loop over the sides seven times.
        twice = None if sizes is None else jnp.concatenate([sizes, sizes])
        halves = (jnp.split(_unit(both), 2) for both in self.levels(jnp.concatenate([a, b]), twice))
        if sizes is None:
            return [jnp.mean((f - g) ** 2, axis=(1, 2)) for f, g in halves]
        counts = [jnp.prod(sizes // 2**level, axis=1, keepdims=True) for level in range(len(DEPTHS))]
        return [jnp.sum((f - g) ** 2, axis=(1, 2)) / n for (f, g), n in zip(halves, counts, strict=True)]

    def contributions(self, a: jax.Array, b: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """The five levels' shares of the distance, [B, 5] float32; arguments as in ``__call__``."""
        shares = [
            jnp.sum(means * getattr(self, f"lin{level}").weight, axis=-1)
            for level, means in enumerate(self.channels(a, b, sizes))
        ]
        return jnp.stack(shares, axis=-1)

    def __call__(self, a: jax.Array, b: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """Distances of pairs of pictures.

        Args:
          a: [B, 3, H, W] in [-1, 1], sides of at least 16.
          b: same shape.
          sizes: [B, 2] int, (height, width) of each pair, at least 16, at the top left of its canvas; the rest of the
            canvas does not count. One program then serves pictures of many sizes. None: the canvases are the pictures.

        Returns:
          [B] float32, the mean over all positions summed over the levels (eq. 1).

        Raises:
          ValueError: the shapes differ or the pictures are too small.
        """
        return self.contributions(a, b, sizes).sum(-1)


def _keep(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """[B, H, W, C] with zeros outside the top left (height, width) of ``sizes`` [B, 2], as padding would give."""
    if sizes is None:
        return x
    rows = jnp.arange(x.shape[1]) < sizes[:, :1]
    columns = jnp.arange(x.shape[2]) < sizes[:, 1:]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0)


def _unit(x: jax.Array) -> jax.Array:
    """Every position's channels scaled to length 1, [B, H, W, C] -> same shape, float32."""
    # float32: differences of nearly equal unit vectors are the metric.
    y = x.astype(jnp.float32)
    return y / (jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True)) + NORM_EPS)
