"""FLUX's variational autoencoder (the architecture published as ``AutoencoderKL``).

Pictures are NCHW in [-1, 1]; latents have ``latent_channels`` channels and 1/factor of the height and width
(one halving per level but the last: 8 for FLUX). Attribute names follow the published checkpoints, so a
parameter's path in the tree is its checkpoint name split at the dots. Between the ends of ``encode`` and
``decode`` all is NHWC: CPU convolutions are compiled to that layout anyway, and with a transposition around each
a picture took a third longer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models.config_file import check_types, read_config
from nabla_jax.models.layers import Conv2d, GroupNorm, Linear, convolve_nhwc
from nabla_jax.untrusted import check

LOGVAR_RANGE = (-30.0, 20.0)
NORM_EPS = 1e-6
# Share of a tile that overlaps its neighbour.
TILE_OVERLAP = 0.25
# Queries per chunk of the mid-block attention: scores of a 1024 x 2048 picture would take 4 GiB in one piece.
QUERY_CHUNK = 4096

# Keys of config.json with the one value this implementation has.
_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of an autoencoder, with the keys of the published ``vae/config.json``; defaults are FLUX's.

    ``shift_factor`` and ``scaling_factor`` bring latents to unit scale:
    ``(z - shift_factor) * scaling_factor``.
    ``sample_size`` is the picture side (pixels) up to which no tiling is needed.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent position along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def flux(cls) -> "AutoencoderKLConfig":
        """The autoencoder of FLUX.1 (schnell, dev, Kontext and Fill share it)."""
        return cls()

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "AutoencoderKLConfig":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "autoencoder config")
        for key, value in _FIXED.items():
            if raw.get(key, value) != value:
                raise UserError(f"{where}: field {key}: found {raw[key]!r}, expected {value!r}")
        for key, name in _BLOCK_TYPES.items():
            check(raw.get(key, []), list[str], where, key)
            others = [x for x in raw.get(key, ()) if x != name]
            if others:
                raise UserError(f"{where}: field {key}: found {others[0]!r}, expected {name!r}")
        values = {k: raw[k] for k in cls.__dataclass_fields__ if k in raw}
        # The published class's own defaults differ from FLUX's: a missing key must not mean FLUX's value.
        missing = [k for k in ("block_out_channels", "scaling_factor", "shift_factor") if values.get(k) is None]
        if missing:
            raise UserError(f"{where}: field {missing[0]}: missing, expected a value")
        check_types(where, cls, raw)
        defaults = {
            "layers_per_block": 1,
            "latent_channels": 4,
            "sample_size": 32,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        }
        values = {**defaults, **values, "block_out_channels": tuple(values["block_out_channels"])}
        config = cls(**values)
        config.check(where)
        for key in _BLOCK_TYPES:
            count, levels = len(raw.get(key, ())), len(config.block_out_channels)
            if key in raw and count != levels:
                raise UserError(
                    f"{where}: field {key}: found {count} blocks, expected {levels} as in block_out_channels"
                )
        return config

    def check(self, where: str = "autoencoder config") -> None:
        """Raises UserError unless the group norm divides every level's channels."""
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"{where}: field block_out_channels: found {channels}, "
                    f"expected a multiple of norm_num_groups = {self.norm_num_groups}"
                )

    def to_json(self) -> dict[str, Any]:
        """The published config.json's content, as a dict."""
        levels = len(self.block_out_channels)
        values = {**asdict(self), "block_out_channels": list(self.block_out_channels)}
        blocks = {key: [name] * levels for key, name in _BLOCK_TYPES.items()}
        return {"_class_name": "AutoencoderKL", **values, **blocks, **_FIXED, "force_upcast": True}


def _normalise(norm: GroupNorm, x: jax.Array) -> jax.Array:
    """GroupNorm (Wu & He 2018) of NHWC pictures: [B, H, W, C] -> same shape and dtype."""
    b, h, w, c = x.shape
    size = h * w * c // norm.groups

    def group_mean(y: jax.Array) -> jax.Array:
        # Over the pixels first, then over a group's channels: the wide axis stays innermost in memory.
        total = y.sum((1, 2)).reshape(b, norm.groups, -1).sum(-1)
        return jnp.repeat(total / size, c // norm.groups, axis=-1)[:, None, None]

    # float32: statistics over up to a million pixels.
    y = x.astype(jnp.float32)
    y = y - group_mean(y)
    scale = jax.lax.rsqrt(group_mean(y * y) + norm.eps) * norm.weight[...].astype(jnp.float32)
    return (y * scale + norm.bias[...].astype(jnp.float32)).astype(x.dtype)


def _norm_conv(norm: GroupNorm, conv: Conv2d, x: jax.Array) -> jax.Array:
    return convolve_nhwc(conv, nnx.silu(_normalise(norm, x)))


class ResnetBlock(nnx.Module):
    """Two (GroupNorm, SiLU, 3x3 convolution) and a residual (by a 1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.norm1 = GroupNorm(groups, in_channels, eps=NORM_EPS, dtype=dtype)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(groups, out_channels, eps=NORM_EPS, dtype=dtype)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, rngs=rngs, dtype=dtype)
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1, rngs=rngs, dtype=dtype) if in_channels != out_channels else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H, W, out]."""
        h = _norm_conv(self.norm1, self.conv1, x)
        h = _norm_conv(self.norm2, self.conv2, h)
        return h + (x if self.conv_shortcut is None else convolve_nhwc(self.conv_shortcut, x))


class Attention(nnx.Module):
    """Self-attention over all positions with one head as wide as the picture's channels, and a residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS, dtype=dtype)
        self.to_q = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.to_k = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.to_v = Linear(channels, channels, rngs=rngs, dtype=dtype)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> same shape and dtype."""
        b, h, w, c = x.shape
        tokens = _normalise(self.group_norm, x).reshape(b, h * w, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = jax.vmap(_attend)(q, k, v)
        return x + self.to_out[0](out).reshape(b, h, w, c)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of one picture, q, k, v [N, C] -> [N, C], at most QUERY_CHUNK queries at a time."""

    def one(query: jax.Array) -> jax.Array:
        # Softmax in float32: it sums over thousands of positions.
        scores = jnp.einsum("c,kc->k", query, k, preferred_element_type=jnp.float32)
        scores = scores * q.shape[-1] ** -0.5
        return jax.nn.softmax(scores).astype(v.dtype) @ v

    if q.shape[0] <= QUERY_CHUNK:
        return jax.vmap(one)(q)
    return jax.lax.map(one, q, batch_size=QUERY_CHUNK)


class MidBlock(nnx.Module):
    """Resnet block, attention, resnet block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs=rngs, dtype=dtype) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nnx.Module):
    """Halves height and width by a strided 3x3 convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=((0, 1), (0, 1)), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        return convolve_nhwc(self.conv, x)


class Upsample(nnx.Module):
    """Doubles height and width by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.conv = Conv2d(channels, channels, 3, padding=1, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return convolve_nhwc(self.conv, x)


class DownBlock(nnx.Module):
    """One level of the encoder: resnet blocks, then a downsampler unless it is the last level."""

    def __init__(
        self,
        channels: tuple[int, int],
        layers: int,
        groups: int,
        last: bool,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ) -> None:
        widths = [channels[0]] + [channels[1]] * layers
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.resnets = nnx.List([ResnetBlock(i, o, groups, rngs=rngs, dtype=dtype) for i, o in pairs])
        self.downsamplers = None if last else nnx.List([Downsample(channels[1], rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H/2, W/2, out] (the last level keeps H and W)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nnx.Module):
    """One level of the decoder: resnet blocks, then an upsampler unless it is the last level."""

    def __init__(
        self,
        channels: tuple[int, int],
        layers: int,
        groups: int,
        last: bool,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ) -> None:
        widths = [channels[0]] + [channels[1]] * layers
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.resnets = nnx.List([ResnetBlock(i, o, groups, rngs=rngs, dtype=dtype) for i, o in pairs])
        self.upsamplers = None if last else nnx.List([Upsample(channels[1], rngs=rngs, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, 2H, 2W, out] (the last level keeps H and W)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def _levels(widths: tuple[int, ...]) -> list[tuple[tuple[int, int], bool]]:
    """((channels in, channels out), is last) of every level."""
    pairs = zip(widths[:1] + widths[:-1], widths, strict=True)
    return [(pair, index == len(widths) - 1) for index, pair in enumerate(pairs)]


class Encoder(nnx.Module):
    """Pictures -> mean and log-variance (before clipping)."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1, rngs=rngs, dtype=dtype)
        self.down_blocks = nnx.List(
            [DownBlock(pair, layers, groups, last, rngs=rngs, dtype=dtype) for pair, last in _levels(widths)]
        )
        self.mid_block = MidBlock(widths[-1], groups, rngs=rngs, dtype=dtype)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, dtype=dtype)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H/factor, W/factor, 2C]."""
        x = convolve_nhwc(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return _norm_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nnx.Module):
    """Latents -> pictures."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        widths, groups, layers = (
            config.block_out_channels[::-1],
            config.norm_num_groups,
            config.layers_per_block + 1,
        )
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1, rngs=rngs, dtype=dtype)
        self.mid_block = MidBlock(widths[0], groups, rngs=rngs, dtype=dtype)
        self.up_blocks = nnx.List(
            [UpBlock(pair, layers, groups, last, rngs=rngs, dtype=dtype) for pair, last in _levels(widths)]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS, dtype=dtype)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1, rngs=rngs, dtype=dtype)

    def __call__(self, z: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, factor*h, factor*w, 3]."""
        x = self.mid_block(convolve_nhwc(self.conv_in, z))
        for block in self.up_blocks:
            x = block(x)
        return _norm_conv(self.conv_norm_out, self.conv_out, x)


class AutoencoderKL(nnx.Module):
    """Convolutional variational autoencoder, attention at the lowest resolution (Rombach et al. 2022)."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        config.check()
        c = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)
        self.quant_conv = Conv2d(2 * c, 2 * c, 1, rngs=rngs, dtype=dtype) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(c, c, 1, rngs=rngs, dtype=dtype) if config.use_post_quant_conv else None
        self.factor = config.factor
        self.tile = config.sample_size

    def encode(self, images: jax.Array, *, tiled: bool = False) -> jax.Array:
        """Moments of the latent distribution, not scaled.

        Args:
          images: [B, 3, H, W] in [-1, 1]; H and W multiples of ``config.factor``.
          tiled: encode a picture larger than ``config.sample_size`` in overlapping tiles of that side, one after
            another, and blend their moments. Memory no longer grows with the picture; the result differs, because
            the normalisations and the attention see one tile only.

        Returns:
          [B, 2C, H/factor, W/factor]: mean (first C channels) and log-variance (last C, in [-30, 20]).

        Raises:
          ValueError: H or W is no multiple of the factor.
        """
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"picture is {images.shape[2:]} pixels, expected multiples of {self.factor}")
        large = max(images.shape[2:]) > self.tile
        x = images.transpose(0, 2, 3, 1)
        moments = (
            _in_tiles(self._encode, x, self.tile, self.tile // self.factor) if tiled and large else self._encode(x)
        )
        mean, logvar = jnp.split(moments.transpose(0, 3, 1, 2), 2, axis=1)
        return jnp.concatenate([mean, jnp.clip(logvar, *LOGVAR_RANGE)], axis=1)

    def decode(self, latents: jax.Array, *, tiled: bool = False) -> jax.Array:
        """Unscaled latents [B, C, h, w] -> pictures [B, 3, factor*h, factor*w], not clipped to [-1, 1].

        ``tiled`` decodes latents larger than ``config.sample_size / factor`` in overlapping tiles, as in ``encode``.
        """
        tile = self.tile // self.factor
        large = max(latents.shape[2:]) > tile
        x = latents.transpose(0, 2, 3, 1)
        pictures = _in_tiles(self._decode, x, tile, self.tile) if tiled and large else self._decode(x)
        return pictures.transpose(0, 3, 1, 2)

    def _encode(self, x: jax.Array) -> jax.Array:
        moments = self.encoder(x)
        return moments if self.quant_conv is None else convolve_nhwc(self.quant_conv, moments)

    def _decode(self, z: jax.Array) -> jax.Array:
        return self.decoder(z if self.post_quant_conv is None else convolve_nhwc(self.post_quant_conv, z))


def _in_tiles(run: Callable[[jax.Array], jax.Array], x: jax.Array, side: int, result_side: int) -> jax.Array:
    """``run`` on overlapping square tiles of a picture [B, H, W, C], blended into one result.

    Args:
      run: from a tile of at most ``side`` x ``side`` pixels to its result, of at most ``result_side``.
      side, result_side: of a whole tile.
    """
    step = int(side * (1 - TILE_OVERLAP))
    overlap = int(result_side * TILE_OVERLAP)
    kept = result_side - overlap
    rows, columns = range(0, x.shape[1], step), range(0, x.shape[2], step)
    tiles = {(i, j): x[:, i : i + side, j : j + side] for i in rows for j in columns}
    done: dict[tuple[int, int], jax.Array] = {}
    for shape in dict.fromkeys(tile.shape for tile in tiles.values()):
        alike = [where for where, tile in tiles.items() if tile.shape == shape]
        # One program per shape of a tile, run on one tile after another: side by side they would need the memory that
        # tiling saves.
        results = jax.lax.map(run, jnp.stack([tiles[where] for where in alike]))
        done.update(zip(alike, results, strict=True))
    for i in rows:
        for j in columns:
            # In this order, so that a tile is blended with neighbours that have been blended before.
            if i:
                done[i, j] = _blend(done[i - step, j], done[i, j], overlap, axis=1)
            if j:
                done[i, j] = _blend(done[i, j - step], done[i, j], overlap, axis=2)
    return jnp.concatenate(
        [jnp.concatenate([done[i, j][:, :kept, :kept] for j in columns], axis=2) for i in rows], axis=1
    )


def _blend(before: jax.Array, tile: jax.Array, overlap: int, axis: int) -> jax.Array:
    """``tile`` whose first ``overlap`` positions along ``axis`` fade in from the last ones of its neighbour."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    weight = jnp.arange(overlap, dtype=tile.dtype) / overlap
    weight = weight.reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    last = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, before.shape[axis], axis=axis)
    first = jax.lax.slice_in_dim(tile, 0, overlap, axis=axis)
    rest = jax.lax.slice_in_dim(tile, overlap, tile.shape[axis], axis=axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)


def sample_latents(moments: jax.Array, eps: jax.Array, config: AutoencoderKLConfig) -> jax.Array:
    """Draws latents and brings them to unit scale: ``(mean + exp(logvar / 2) eps - shift) * scale``.

    Args:
      moments: [B, 2C, h, w] as ``encode`` returns them.
      eps: standard normal noise [B, C, h, w].
      config: holds shift_factor and scaling_factor.

    Returns:
      [B, C, h, w].
    """
    mean, logvar = jnp.split(moments, 2, axis=1)
    return (mean + jnp.exp(0.5 * logvar) * eps - config.shift_factor) * config.scaling_factor


def unscale(latents: jax.Array, config: AutoencoderKLConfig) -> jax.Array:
    """The inverse of the scaling in ``sample_latents``: [B, C, h, w] as ``decode`` takes them."""
    return latents / config.scaling_factor + config.shift_factor
