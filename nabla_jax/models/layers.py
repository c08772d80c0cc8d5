"""Layers in the published (torch) parameter layout, and how modules become plain parameter trees.

Linear weights are ``[out, in]`` and convolutions ``[out, in, kh, kw]``, as in the checkpoints, so that loading
never transposes. Images are NCHW. Modules are Flax NNX classes whose attribute names equal the published names;
``abstract``/``initialize`` split them into a static graph and a plain nested dict of arrays, ``bind`` puts the two
together again inside a pure function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.models.quantised import Quantised, dequantise

Params = dict[str, Any]
M = TypeVar("M", bound=nnx.Module)


def _to_plain(state: nnx.State) -> Params:
    return jax.tree.map(lambda x: x, nnx.to_pure_dict(state))


def _keys_to_str(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _keys_to_str(v) for k, v in tree.items()}
    return tree


def _keys_to_graph(tree: Any) -> Any:
    # NNX numbers the children of a list with integers, checkpoints with decimal strings.
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: _keys_to_graph(v) for k, v in tree.items()}
    return tree


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its static graph and its parameters as a plain nested dict with string keys."""
    graphdef, state = nnx.split(module)
    return graphdef, _keys_to_str(_to_plain(state))


def bind(graphdef: "nnx.GraphDef[M]", params: Params) -> M:
    """Puts parameters into the module described by ``graphdef``; the inverse of ``split``."""
    return nnx.merge(graphdef, _keys_to_graph(params))


def abstract(make: Callable[[nnx.Rngs], M]) -> tuple["nnx.GraphDef[M]", Params]:
    """The module's graph and its parameters as ``jax.ShapeDtypeStruct`` leaves; nothing is allocated."""
    shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return split(shapes)


def initialize(make: Callable[[nnx.Rngs], M], key: jax.Array) -> tuple["nnx.GraphDef[M]", Params]:
    """The module's graph and freshly drawn parameters, initialised in one compiled program."""
    graphdef, _ = abstract(make)
    params = jax.jit(lambda k: split(make(nnx.Rngs(k)))[1])(key)
    return graphdef, params


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """``count`` modules of one shape as a single module whose parameters carry a leading axis of ``count``."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(r: nnx.Rngs) -> M:
        return make(r)

    return build(rngs)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Shallow stacks are those that train here, and a scan copies what a backward pass needs. Forward alone, 12 layers of
# a base vision tower took less CPU time scanned (0.7 against 0.8 s) and a tenth of the temporary memory.
UNROLLED_DEPTH = 8


def run_stacked(blocks: nnx.Module, x: jax.Array, *, scan: bool | None = None) -> jax.Array:
    """Applies modules stacked by ``stack`` one after another, each from arrays like x to arrays like x.

    ``scan`` runs them under ``lax.scan``, so that compile time does not depend on their number; None scans deep
    stacks and unrolls those of up to ``UNROLLED_DEPTH``.
    """
    graphdef, params = split(blocks)
    depth = jax.tree.leaves(params)[0].shape[0]

    def body(y: jax.Array, block: Params) -> tuple[jax.Array, None]:
        return bind(graphdef, block)(y), None

    if depth > UNROLLED_DEPTH if scan is None else scan:
        return jax.lax.scan(body, x, params)[0]
    for i in range(depth):
        x, _ = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], params))
    return x


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.dtype(dtype), -bound, bound))


class Linear(nnx.Module):
    """``y = x W^T + b`` with W of shape [out, in], contracting the last axis of x; multiplies in x's dtype.

    Parameters may hold a ``Quantised`` weight.
    """

    def __init__(
        self, in_features: int, out_features: int, *, rngs: nnx.Rngs, bias: bool = True, dtype: DTypeLike = jnp.float32
    ) -> None:
        bound = in_features**-0.5
        self.weight = _uniform(rngs, (out_features, in_features), bound, dtype)
        self.bias = _uniform(rngs, (out_features,), bound, dtype) if bias else None

    def __call__(self, x: jax.Array, lora: "LowRank | None" = None, *, dtype: DTypeLike | None = None) -> jax.Array:
        """[..., in] -> [..., out].

        Args:
          x: the input; products are of its dtype.
          lora: one adapter's pair of matrices for this linear, or None.
          dtype: of the result, in which products are also added up; x's when None.
        """
        dtype = x.dtype if dtype is None else dtype
        y = _product(x, self.weight.get_value(), dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype)
        if lora is not None:
            y = y + low_rank(x, lora).astype(dtype)
        return y


def _product(x: jax.Array, weight: jax.Array | Quantised, dtype: DTypeLike) -> jax.Array:
    """``x W^T`` in ``dtype``: x [..., in], W [out, in]."""

    def multiply(x: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
        w = dequantise(weight, x.dtype) if isinstance(weight, Quantised) else weight.astype(x.dtype)
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)

    if not isinstance(weight, Quantised):
        return multiply(x, weight)
    # The backward pass multiplies by W again: without this it would keep every block's whole weights until then.
    return jax.checkpoint(multiply)(x, weight)


class LowRank(NamedTuple):
    """One adapter's matrices for one linear: ``lora_A`` [r, in], ``lora_B`` [out, r] and the factor alpha / r."""

    lora_A: jax.Array
    lora_B: jax.Array
    scale: float


def low_rank(x: jax.Array, lora: LowRank) -> jax.Array:
    """``scale * B A x`` (LoRA, Hu et al. 2021, eq. 3), computed in x's dtype from float32 masters."""
    down = jnp.einsum("...i,ri->...r", x, lora.lora_A.astype(x.dtype))
    return jnp.einsum("...r,or->...o", down, lora.lora_B.astype(x.dtype)) * lora.scale


class Conv2d(nnx.Module):
    """2-D convolution of NCHW images with [out, in, kh, kw] weights and torch's symmetric zero padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        bound = (in_channels * kernel_size**2) ** -0.5
        self.weight = _uniform(rngs, (out_channels, in_channels, kernel_size, kernel_size), bound, dtype)
        self.bias = _uniform(rngs, (out_channels,), bound, dtype) if bias else None
        self.stride = stride
        self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, in, H, W] -> [B, out, H', W']."""
        y = jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[:, None, None]
        return y


def convolve_nhwc(conv: Conv2d, x: jax.Array) -> jax.Array:
    """A convolution with [out, in, kh, kw] weights of NHWC pictures: [B, H, W, in] -> [B, H', W', out]."""
    weight = conv.weight[...].astype(x.dtype)
    strides = (conv.stride, conv.stride)
    y = jax.lax.conv_general_dilated(x, weight, strides, conv.padding, dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return y if conv.bias is None else y + conv.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Look-up table [count, features]."""

    def __init__(self, count: int, features: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (count, features), jnp.dtype(dtype)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integer ids [...] -> vectors [..., features]."""
        return jnp.take(self.weight[...], ids, axis=0)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without affine parameters."""
    # Mean and variance in float32: in bfloat16 the variance of wide features loses most of its bits.
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with weight and bias."""

    def __init__(self, features: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((features,), jnp.dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.dtype(dtype)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> same shape and dtype."""
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang & Sennrich 2019), no mean, no bias."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((features,), jnp.dtype(dtype)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> same shape and dtype."""
        # float32: the mean of squares overflows half precision and loses bits in bfloat16.
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm of NCHW images (Wu & He 2018)."""

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-6, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((channels,), jnp.dtype(dtype)))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.dtype(dtype)))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, C, H, W] -> same shape and dtype."""
        b, c, h, w = x.shape
        # float32: statistics over up to a million pixels.
        y = x.astype(jnp.float32).reshape(b, self.groups, -1)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        y = y.reshape(b, c, h, w)
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (y * weight[:, None, None] + bias[:, None, None]).astype(x.dtype)
