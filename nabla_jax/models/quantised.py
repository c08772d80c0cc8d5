"""Weights of frozen linears in 8 or 4 bits, made by qwix's quantiser.

Three formats, each symmetric and with one scale for every group of numbers along a row of a weight [out, in]:

- ``int8``: a row's largest magnitude is 127.5, numbers are rounded to whole ones;
- ``fp8``: a row's largest magnitude is 448, numbers are rounded to float8 e4m3;
- ``nf4``: of every 64 numbers of a row the largest magnitude is 1, and each becomes the nearest of the 16 levels of
  NormalFloat (QLoRA, Dettmers et al. 2023, appendix E).

A quantised weight stands in a parameter tree where the weight stood. It is made whole again just before its product,
so that under ``lax.scan`` no more than one block's weights exist in full.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nabla_jax.errors import UserError

Format = Literal["int8", "fp8", "nf4"]
FORMATS: tuple[Format, ...] = ("int8", "fp8", "nf4")
TILE = 64
"""Numbers of nf4 that share a scale."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight [..., out, in] as codes and scales; both are leaves of the tree it stands in.

    Attributes:
      codes: of int8 int8 [..., out, in]; of fp8 uint8 [..., out, in], the bits of the numbers; of nf4 uint8
        [..., out, in / 2], two codes a byte, the first one in the low bits. Bytes because devices differ in what they
        make of smaller types: some give every uint4 a byte, XLA's CPU compiler keeps a float16 copy of a whole stack
        of float8.
      scale: float32 [..., out, 1]; of nf4 bfloat16 [..., out, in / 64].
      format: static.
    """

    codes: Any
    scale: Any
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        *lead, width = self.codes.shape
        return (*lead, 2 * width if self.format == "nf4" else width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers that it is made from."""
        return np.dtype(np.float32)


def find_format(name: str) -> Format:
    """The format of this name. Raises UserError for an unknown one."""
    for known in FORMATS:
        if name == known:
            return known
    raise UserError(f"base.quantise: found {name!r}, expected one of none, {', '.join(FORMATS)}")


def abstract(params: dict[str, Any], kind: Format, stacked: tuple[str, ...]) -> dict[str, Any]:
    """A tree of ``jax.ShapeDtypeStruct`` with the weights of stacked linears quantised.

    Those [L, out, in] below a ``stacked`` name are nearly all of a deep model. Biases and norms stay: they are few,
    and are added or multiplied where every bit counts. So do the linears outside the stacks: an error in what they make
    of noisy tokens and times, or of the velocity, is made up for by nothing, and all of them together are less than one
    part in a hundred of FLUX.1.

    Raises UserError for nf4 where rows cannot be cut into tiles.
    """

    def replaced(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        if path[0].key not in stacked or path[-1].key != "weight" or len(leaf.shape) != 3:
            return leaf
        *lead, width = leaf.shape
        if kind == "nf4" and width % TILE:
            name = ".".join(key.key for key in path[:-1])
            raise UserError(
                f"base.quantise: found nf4 for {name} with {width} inputs, expected a multiple of {TILE}; int8 and fp8 "
                "take any"
            )
        return jax.eval_shape(functools.partial(quantise, kind=kind), leaf)

    return jax.tree_util.tree_map_with_path(replaced, params)


@functools.partial(jax.jit, static_argnames="kind")
def quantise(weight: jax.Array, kind: Format) -> Quantised:
    """A weight [..., out, in] of any floating dtype in one of the formats, compiled."""
    # Imported here: only a quantised base needs it.
    import qwix

    last = weight.ndim - 1
    tiled = {last: TILE} if kind == "nf4" else {}
    made = qwix.quantize(
        weight.astype(jnp.float32), _TYPES[kind], channelwise_axes=tuple(range(last)), tiled_axes=tiled
    )
    if kind == "int8":
        return Quantised(made.qvalue, made.scale, kind)
    if kind == "fp8":
        return Quantised(jax.lax.bitcast_convert_type(made.qvalue, jnp.uint8), made.scale, kind)
    codes = made.qvalue.astype(jnp.uint8)
    return Quantised(codes[..., 0::2] | codes[..., 1::2] << 4, made.scale.astype(jnp.bfloat16), kind)


def dequantise(weight: Quantised, dtype: DTypeLike) -> jax.Array:
    """The weight [..., out, in] that this stands for, computed in float32 and rounded once to ``dtype``."""
    import qwix

    codes = weight.codes
    if weight.format == "fp8":
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    if weight.format == "nf4":
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(weight.shape)
    array = qwix.QArray(codes, weight.scale.astype(jnp.float32), None, _TYPES[weight.format])
    return qwix.dequantize(array).astype(dtype)


_TYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": "nf4"}
