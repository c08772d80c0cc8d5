"""What the vision transformers share: patches, positions for another grid, attention over heads, outputs.

Letters in shapes: B pictures, H x W pixels, h x w patches, N = h * w tokens in row-major order, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.models.attention import Implementation, attend
from nabla_jax.models.layers import Conv2d, Linear

# torch's bicubic kernel; Keys (1981) recommends -0.5.
BICUBIC_A = -0.75


class ImageFeatures(NamedTuple):
    """``pooled`` [B, D], one vector per picture, and ``patches`` [B, N, D], both after the closing norm."""

    pooled: jax.Array
    patches: jax.Array


def embed_patches(projection: Conv2d, pixels: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
    """Projects non-overlapping square patches with a convolution's weights, in their dtype.

    Rows and columns that fill no whole patch are left out, as a convolution without padding does (SigLIP's 384
    pixels hold 27 patches of 14). One matrix product: on CPU the convolution took 1.7 times as long.

    Args:
      projection: weights [D, C, p, p].
      pixels: [B, C, H, W].

    Returns:
      [B, N, D], and the grid (h, w).

    Raises:
      ValueError: the picture has other channels, or is smaller than one patch.
    """
    weight = projection.weight[...]
    width, channels, p, _ = weight.shape
    batch, found, *size = pixels.shape
    h, w = size[0] // p, size[1] // p
    if found != channels or not h * w:
        raise ValueError(
            f"pixels: found {tuple(pixels.shape)}, expected [B, {channels}, H, W] with H and W of at least {p}"
        )
    x = pixels[:, :, : h * p, : w * p].astype(weight.dtype).reshape(batch, channels, h, p, w, p)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, h * w, channels * p * p)
    y = jnp.einsum("bnk,dk->bnd", x, weight.reshape(width, -1))
    return (y if projection.bias is None else y + projection.bias[...].astype(y.dtype)), (h, w)


def resize_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Position embeddings of a square grid for another one, by torch's bicubic interpolation without smoothing.

    Args:
      table: [G * G, D], row-major.
      grid: (h, w).

    Returns:
      [h * w, D] in the table's dtype; the table itself where the grid is its own.

    Raises:
      ValueError: the table is of no square grid.
    """
    side = int(round(table.shape[0] ** 0.5))
    if side * side != table.shape[0]:
        raise ValueError(f"positions: found {table.shape[0]}, expected the square of a whole number")
    if grid == (side, side):
        return table
    rows, columns = bicubic_weights(side, grid[0]), bicubic_weights(side, grid[1])
    # float32 in full precision: positions are added to every token, and a grid is interpolated once per program.
    source = table.astype(jnp.float32).reshape(side, side, -1)
    y = jnp.einsum("hi,wj,ijd->hwd", rows, columns, source, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(-1, table.shape[1]).astype(table.dtype)


def bicubic_weights(size: int, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The matrix [n, size] float32 that resamples ``size`` values at ``n`` places by cubic convolution.

    As torch's ``interpolate(mode="bicubic", align_corners=False)``: half-pixel centres, no smoothing when
    shrinking, the border value repeated outside (Keys 1981 with a = -0.75).
    """
    places = (np.arange(n) + 0.5) * (size / n) - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((n, size))
    for tap in range(-1, 3):
        x = np.abs(places - (first + tap))
        near = ((BICUBIC_A + 2) * x - (BICUBIC_A + 3)) * x * x + 1
        far = ((BICUBIC_A * x - 5 * BICUBIC_A) * x + 8 * BICUBIC_A) * x - 4 * BICUBIC_A
        np.add.at(weights, (np.arange(n), np.clip(first + tap, 0, size - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def attend_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, implementation: Implementation = "auto"
) -> jax.Array:
    """Multi-head softmax attention without a mask: q [B, S, D], k and v [B, T, D] -> [B, S, D]."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    mixed = attend(q, k, v, implementation=implementation)
    return mixed.reshape(*mixed.shape[:2], -1)


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ) -> None:
        self.fc1 = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.fc2 = Linear(hidden, width, rngs=rngs, dtype=dtype)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return self.fc2(self.activation(self.fc1(x)))


def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)`` with the exact normal distribution (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of ``gelu``."""
    return jax.nn.gelu(x, approximate=True)
