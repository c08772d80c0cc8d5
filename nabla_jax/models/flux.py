"""The FLUX.1 diffusion transformer as one function of an ordered list of token streams ("branches").

Plain FLUX, FLUX.1-Kontext's reference picture, OminiControl's conditions and Insert Anything's diptych differ only
in the list they hand in. Every branch has its own tokens, position ids, time, guidance, pooled text vector and
adapter; attention alone mixes branches, and each branch says which branches its queries see.

B batch, N tokens of a branch, C input channels, D model width, H heads, E head width, L blocks of a kind.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nabla_jax.errors import UserError
from nabla_jax.models import attention, layers, partitioning
from nabla_jax.models.attention import Implementation, attend
from nabla_jax.models.config_file import check_types, read_config
from nabla_jax.models.layers import Linear, RMSNorm, layer_norm
from nabla_jax.models.lora import Adapter, Adapters
from nabla_jax.models.partitioning import BATCH

STACKED = ("transformer_blocks", "single_transformer_blocks")
Remat = Literal["none", "full", "save_attention", "offload"]
# A scan copies what the backward pass needs into stacked buffers: a training step of 2 + 4 blocks took 1.4 times as
# long on two CPU cores. Deep models need it to compile in reasonable time.
_UNROLLED_DEPTH = 8
# Unrolled, XLA copies every block's weights out of their stack and keeps all copies while it samples: a second base.
_UNROLLED_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Architecture of a FLUX.1 transformer, with the keys of its published ``config.json``."""

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    patch_size: int = 1

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise UserError(
                f"transformer config: axes_dims_rope {self.axes_dims_rope} must add up to attention_head_dim "
                f"{self.attention_head_dim}"
            )
        if self.patch_size != 1:
            raise UserError(f"transformer config: patch_size is {self.patch_size}, expected 1")

    @property
    def width(self) -> int:
        """D, the width of the token stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def velocity_channels(self) -> int:
        """Channels of the predicted velocity."""
        return self.out_channels or self.in_channels

    @classmethod
    def schnell(cls) -> "FluxConfig":
        """FLUX.1-schnell."""
        return cls()

    @classmethod
    def dev(cls) -> "FluxConfig":
        """FLUX.1-dev."""
        return cls(guidance_embeds=True)

    @classmethod
    def kontext(cls) -> "FluxConfig":
        """FLUX.1-Kontext-dev."""
        return cls(guidance_embeds=True)

    @classmethod
    def fill(cls) -> "FluxConfig":
        """FLUX.1-Fill-dev: noisy latents, latents of the masked picture and the mask enter as 384 channels."""
        return cls(in_channels=384, out_channels=64, guidance_embeds=True)

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "FluxConfig":
        """Reads a published config.json (path or its dict). Raises UserError for another architecture."""
        where, raw = read_config(source, "transformer config")
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(k for k in raw if not k.startswith("_") and k not in fields)
        if unknown:
            raise UserError(f"{where}: unknown keys {', '.join(unknown)}; expected {', '.join(sorted(fields))}")
        check_types(where, cls, raw)
        known = {k: v for k, v in raw.items() if k in fields}
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        try:
            return cls(**known)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('transformer config: ')}") from error

    def to_json(self) -> dict[str, Any]:
        """The object that ``from_json`` and diffusers read."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"_class_name": "FluxTransformer2DModel", **fields}


@dataclasses.dataclass(frozen=True)
class Branch:
    """One token stream of a forward pass.

    Attributes:
      tokens: [B, N, C] picture tokens (packed latents), or [B, N, joint_attention_dim] text embeddings.
      ids: positions (index, row, column), [N, 3] or [B, N, 3]. A numpy array makes the rotary angles exact constants.
      time: [B] flow time in [0, 1].
      guidance: [B] guidance scale (not multiplied by 1000), or None for models without guidance embedding.
      pooled: [B, P] pooled text vector.
      adapter: name of the adapter applied to this branch's linears, or None.
      sees: indices of the branches whose keys this branch's queries attend to; None means all.
      kind: which of the two parameter sets of the double blocks serves the branch.
      valid: [B, N] bool, False for tokens that only pad a sample to the length of the batch: nobody attends to them and
        what comes out for them means nothing. None when there are none.
    """

    tokens: jax.Array
    ids: jax.Array | np.ndarray
    time: jax.Array
    guidance: jax.Array | None
    pooled: jax.Array
    adapter: str | None = None
    sees: tuple[int, ...] | None = None
    kind: Literal["text", "image"] = "image"
    valid: jax.Array | None = None

    @property
    def length(self) -> int:
        """N, the number of tokens."""
        return self.tokens.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Keys and values of branches that see only themselves: they depend on nothing else, so one run serves many calls.

    Attributes:
      double, single: per branch a pair (keys, values) of arrays [L, B, N, H, E], for the two kinds of blocks; keys
        are taken after norm and rotation.
      valid: per branch [B, N] bool or None, as in ``Branch``.
    """

    double: tuple[tuple[jax.Array, jax.Array], ...]
    single: tuple[tuple[jax.Array, jax.Array], ...]
    valid: tuple[jax.Array | None, ...]


KeysAndValues = tuple[tuple[jax.Array, jax.Array], ...]


class Others(NamedTuple):
    """What a block needs beyond its own streams: padding, and remembered branches that all its queries see.

    Attributes:
      valid: per branch [B, N] bool or None.
      keys, values: per remembered branch [B, N, H, E].
      remembered: per remembered branch [B, N] bool or None.
    """

    valid: tuple[jax.Array | None, ...]
    keys: tuple[jax.Array, ...] = ()
    values: tuple[jax.Array, ...] = ()
    remembered: tuple[jax.Array | None, ...] = ()


# ----------------------------------------------------------------------------------------------- embeddings


@functools.cache
def sinusoid_frequencies() -> np.ndarray:
    """``exp(-ln(10000) i / 128)`` for i = 0..127, float32 [128]."""
    # The exponent is rounded to float32 as where the weights were trained: arguments reach 30,000, so that one unit
    # in the last place of a frequency is seen in the output.
    exponent = np.float32(-np.log(10000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
    return np.exp(exponent.astype(np.float64)).astype(np.float32)


def sinusoid(value: jax.Array) -> jax.Array:
    """[B] times or guidance scales -> [B, 256] = [cos, sin] of 1000 * value * frequencies (cosines first)."""
    # float32: at guidance 30 the argument is 30,000 and bfloat16 would step by 128 radians.
    angles = value.astype(jnp.float32)[:, None] * 1000.0 * sinusoid_frequencies()
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope(ids: jax.Array | np.ndarray, axes: Sequence[int], theta: float = 10000.0) -> tuple[Any, Any]:
    """Rotary tables (cos, sin), float32 [N, E/2] or [B, N, E/2], axes concatenated in the order index, row, column.

    Static ids (numpy) are turned into angles in float64; traced ids in float32.
    """
    static = isinstance(ids, np.ndarray)
    xp: Any = np if static else jnp
    positions = ids.astype(np.float64) if static else ids.astype(jnp.float32)
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        frequencies = frequencies if static else frequencies.astype(np.float32)
        angles.append(positions[..., axis, None] * frequencies)
    angle = xp.concatenate(angles, axis=-1)
    return xp.cos(angle).astype(np.float32), xp.sin(angle).astype(np.float32)


def rotate(x: jax.Array, tables: tuple[jax.Array, ...]) -> jax.Array:
    """Rotates interleaved pairs of [B, N, H, E] by the angles of ``rope``; computed in float32."""
    cos, sin = (t[..., :, None, :] for t in tables)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class EmbeddingMLP(nnx.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_features: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.linear_1 = Linear(in_features, width, rngs=rngs, dtype=dtype)
        self.linear_2 = Linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        """[..., in] -> [..., width]."""
        hidden = jax.nn.silu(self.linear_1(x, _linear(adapter, "linear_1")))
        return self.linear_2(hidden, _linear(adapter, "linear_2"))


class TimeTextEmbed(nnx.Module):
    """Modulation vector: the sum of embedded time, guidance (when the model has it) and pooled text."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.timestep_embedder = EmbeddingMLP(256, config.width, rngs=rngs, dtype=dtype)
        self.guidance_embedder = (
            EmbeddingMLP(256, config.width, rngs=rngs, dtype=dtype) if config.guidance_embeds else None
        )
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, config.width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        time: jax.Array,
        guidance: jax.Array | None,
        pooled: jax.Array,
        adapter: Adapter | None,
        dtype: DTypeLike,
    ) -> jax.Array:
        """([B], [B] or None, [B, P]) -> [B, D] in ``dtype``."""
        # float32: neighbouring times differ in the low bits of these cosines, and there is one row per picture.
        temb = self.timestep_embedder(sinusoid(time), _at(adapter, "timestep_embedder"))
        temb = temb + self.text_embedder(pooled.astype(jnp.float32), _at(adapter, "text_embedder"))
        if (self.guidance_embedder is None) != (guidance is None):
            expected = "no guidance" if self.guidance_embedder is None else "a guidance scale"
            raise ValueError(f"this transformer expects {expected} on every branch")
        if self.guidance_embedder is not None and guidance is not None:
            temb = temb + self.guidance_embedder(sinusoid(guidance), _at(adapter, "guidance_embedder"))
        return partitioning.constrain(temb.astype(dtype), BATCH, None)


class Modulation(nnx.Module):
    """``linear(silu(temb))`` cut into ``chunks`` vectors of the model's width."""

    def __init__(self, width: int, chunks: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.linear = Linear(width, width * chunks, rngs=rngs, dtype=dtype)
        self.chunks = chunks

    def __call__(self, temb: jax.Array, adapter: Adapter | None) -> list[jax.Array]:
        """[B, D] -> ``chunks`` arrays [B, 1, D] float32."""
        # float32 results: a factor that every token shares is rounded once, where it is used.
        out = self.linear(jax.nn.silu(temb), _linear(adapter, "linear"), dtype=jnp.float32)
        out = partitioning.constrain(out, BATCH, None)
        return jnp.split(out[:, None, :], self.chunks, axis=-1)


def _linear(adapter: Adapter | None, *path: str) -> layers.LowRank | None:
    return adapter.linear(*path) if adapter is not None else None


def _at(adapter: Adapter | None, *path: str) -> Adapter | None:
    return adapter.at(*path) if adapter is not None else None


def _of(branch: Branch, adapters: Adapters) -> Adapter | None:
    return adapters[branch.adapter] if branch.adapter else None


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    # float32 and one rounding: 1 + scale keeps seven bits of the scale in bfloat16. Fused, it costs nothing.
    return (layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(x.dtype)


def _add(x: jax.Array, gate: jax.Array, update: jax.Array) -> jax.Array:
    """The stream x [B, N, D] plus a gated update, in the stream's dtype."""
    # float32 and one rounding, as in _modulate.
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)


# --------------------------------------------------------------------------------------- grouping of branches


@dataclasses.dataclass(frozen=True)
class Group:
    """Branches that pass through the same linears with the same modulation, computed as one array."""

    members: tuple[int, ...]
    kind: str
    adapter: str | None
    modulation: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static bookkeeping of one forward pass: lengths, visibility and the two groupings."""

    lengths: tuple[int, ...]
    sees: tuple[tuple[int, ...], ...]
    double: tuple[Group, ...]
    single: tuple[Group, ...]

    def split(self, groups: Sequence[Group], arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Arrays [B, n, ...] per group -> arrays per branch, in branch order."""
        out: dict[int, jax.Array] = {}
        for group, array in zip(groups, arrays, strict=True):
            bounds = np.cumsum([self.lengths[m] for m in group.members])[:-1]
            out.update(zip(group.members, jnp.split(array, bounds, axis=1), strict=True))
        return [out[i] for i in range(len(self.lengths))]

    def join(self, groups: Sequence[Group], arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Arrays per branch -> arrays per group."""
        return [_concat([arrays[m] for m in group.members]) for group in groups]


def _concat(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _group(branches: Sequence[Branch], modulation: Sequence[int], *, by_kind: bool) -> tuple[Group, ...]:
    members: dict[tuple[str, str | None, int], list[int]] = {}
    for i, branch in enumerate(branches):
        kind = branch.kind if by_kind else "any"
        members.setdefault((kind, branch.adapter, modulation[i]), []).append(i)
    return tuple(Group(tuple(m), kind, adapter, mod) for (kind, adapter, mod), m in members.items())


def _joint_attention(
    layout: Layout,
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    others: Others,
    implementation: Implementation,
) -> list[jax.Array]:
    """Per-branch [B, N, H, E] queries, keys, values -> per-branch outputs [B, N, H * E].

    Branches with equal visibility share one call; the mask between groups of tokens is never built.
    """
    out: list[jax.Array | None] = [None] * len(q)
    for seen in dict.fromkeys(layout.sees):
        queries = [i for i, s in enumerate(layout.sees) if s == seen]
        keys = _concat([*(k[j] for j in seen), *others.keys])
        values = _concat([*(v[j] for j in seen), *others.values])
        lengths = [layout.lengths[j] for j in seen] + [key.shape[1] for key in others.keys]
        valid = _join_valid([*(others.valid[j] for j in seen), *others.remembered], lengths, keys.shape[0])
        mixed = partitioning.attend_locally(
            lambda q, k, v, valid: attend(q, k, v, valid=valid, implementation=implementation),
            _concat([q[i] for i in queries]), keys, values, valid,
        )  # fmt: skip
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        bounds = np.cumsum([layout.lengths[i] for i in queries])[:-1]
        for i, part in zip(queries, jnp.split(mixed, bounds, axis=1), strict=True):
            out[i] = part
    return [x for x in out if x is not None]


def _join_valid(valid: Sequence[jax.Array | None], lengths: Sequence[int], batch: int) -> jax.Array | None:
    if all(part is None for part in valid):
        return None
    parts = [
        jnp.ones((batch, n), bool) if part is None else jnp.broadcast_to(part, (batch, n))
        for part, n in zip(valid, lengths, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


# ---------------------------------------------------------------------------------------------------- blocks


class Attention(nnx.Module):
    """Projections and query/key norms of a block; ``joint`` adds the text stream's own set."""

    def __init__(self, config: FluxConfig, *, joint: bool, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width, head = config.width, config.attention_head_dim
        make = functools.partial(Linear, width, width, rngs=rngs, dtype=dtype)
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = make(), make(), make()
        self.norm_q, self.norm_k = RMSNorm(head, dtype=dtype), RMSNorm(head, dtype=dtype)
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = make(), make(), make()
            self.norm_added_q, self.norm_added_k = RMSNorm(head, dtype=dtype), RMSNorm(head, dtype=dtype)
            self.to_out = nnx.List([make()])
            self.to_add_out = make()

    def project(
        self, x: jax.Array, tables: tuple[jax.Array, ...], kind: str, adapter: Adapter | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, N, D] -> rotated queries, rotated keys and values, each [B, N, H, E]."""
        if kind == "text":
            q = self.add_q_proj(x, _linear(adapter, "add_q_proj"))
            k = self.add_k_proj(x, _linear(adapter, "add_k_proj"))
            v = self.add_v_proj(x, _linear(adapter, "add_v_proj"))
            norm_q, norm_k = self.norm_added_q, self.norm_added_k
        else:
            q = self.to_q(x, _linear(adapter, "to_q"))
            k = self.to_k(x, _linear(adapter, "to_k"))
            v = self.to_v(x, _linear(adapter, "to_v"))
            norm_q, norm_k = self.norm_q, self.norm_k
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return rotate(norm_q(q), tables), rotate(norm_k(k), tables), v


class GELUProjection(nnx.Module):
    """Linear followed by the tanh approximation of GELU."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.proj = Linear(in_features, out_features, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        """[..., in] -> [..., out]."""
        return partitioning.hidden(jax.nn.gelu(self.proj(x, _linear(adapter, "proj")), approximate=True))


class FeedForward(nnx.Module):
    """Linear to four times the width, GELU, Linear back. ``net.1`` is the published layout's dropout: no weights."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.net = nnx.Dict(
            {
                "0": GELUProjection(width, 4 * width, rngs=rngs, dtype=dtype),
                "2": Linear(4 * width, width, rngs=rngs, dtype=dtype),
            }
        )

    def __call__(self, x: jax.Array, adapter: Adapter | None) -> jax.Array:
        """[..., width] -> same shape."""
        return self.net["2"](self.net["0"](x, _at(adapter, "net", "0")), _linear(adapter, "net", "2"))


class DoubleBlock(nnx.Module):
    """Text and picture streams with their own parameters, joined in attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.width
        self.norm1 = Modulation(width, 6, rngs=rngs, dtype=dtype)
        self.norm1_context = Modulation(width, 6, rngs=rngs, dtype=dtype)
        self.attn = Attention(config, joint=True, rngs=rngs, dtype=dtype)
        self.ff = FeedForward(width, rngs=rngs, dtype=dtype)
        self.ff_context = FeedForward(width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: list[jax.Array],
        tembs: list[jax.Array],
        tables: list[tuple[jax.Array, ...]],
        layout: Layout,
        adapters: dict[str, Adapter],
        others: Others,
        implementation: Implementation,
    ) -> tuple[list[jax.Array], KeysAndValues]:
        """One array [B, n, D] per group of ``layout.double`` -> the same, and keys and values per branch."""
        mods, projected = [], []
        for group, h, temb, table in zip(layout.double, x, tembs, tables, strict=True):
            adapter = adapters.get(group.adapter) if group.adapter else None
            if group.kind == "text":
                mod = self.norm1_context(temb, _at(adapter, "norm1_context"))
            else:
                mod = self.norm1(temb, _at(adapter, "norm1"))
            mods.append(mod)
            projected.append(self.attn.project(_modulate(h, mod[0], mod[1]), table, group.kind, _at(adapter, "attn")))
        q, k, v = (layout.split(layout.double, [p[i] for p in projected]) for i in range(3))
        mixed = layout.join(layout.double, _joint_attention(layout, q, k, v, others, implementation))
        out = []
        for group, h, mod, attended in zip(layout.double, x, mods, mixed, strict=True):
            adapter = adapters.get(group.adapter) if group.adapter else None
            _, _, gate_attn, shift, scale, gate_mlp = mod
            if group.kind == "text":
                h = _add(h, gate_attn, self.attn.to_add_out(attended, _linear(adapter, "attn", "to_add_out")))
                h = _add(h, gate_mlp, self.ff_context(_modulate(h, shift, scale), _at(adapter, "ff_context")))
            else:
                h = _add(h, gate_attn, self.attn.to_out[0](attended, _linear(adapter, "attn", "to_out", "0")))
                h = _add(h, gate_mlp, self.ff(_modulate(h, shift, scale), _at(adapter, "ff")))
            out.append(h)
        return out, tuple(zip(k, v, strict=True))


class SingleBlock(nnx.Module):
    """All streams through the same parameters; attention and MLP in parallel."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.width
        self.norm = Modulation(width, 3, rngs=rngs, dtype=dtype)
        self.attn = Attention(config, joint=False, rngs=rngs, dtype=dtype)
        self.proj_mlp = Linear(width, 4 * width, rngs=rngs, dtype=dtype)
        self.proj_out = Linear(5 * width, width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: list[jax.Array],
        tembs: list[jax.Array],
        tables: list[tuple[jax.Array, ...]],
        layout: Layout,
        adapters: dict[str, Adapter],
        others: Others,
        implementation: Implementation,
    ) -> tuple[list[jax.Array], KeysAndValues]:
        """One array [B, n, D] per group of ``layout.single`` -> the same, and keys and values per branch."""
        gates, hidden, projected = [], [], []
        for group, h, temb, table in zip(layout.single, x, tembs, tables, strict=True):
            adapter = adapters.get(group.adapter) if group.adapter else None
            shift, scale, gate = self.norm(temb, _at(adapter, "norm"))
            h = _modulate(h, shift, scale)
            gates.append(gate)
            inner = jax.nn.gelu(self.proj_mlp(h, _linear(adapter, "proj_mlp")), approximate=True)
            hidden.append(partitioning.hidden(inner))
            projected.append(self.attn.project(h, table, "image", _at(adapter, "attn")))
        q, k, v = (layout.split(layout.single, [p[i] for p in projected]) for i in range(3))
        mixed = layout.join(layout.single, _joint_attention(layout, q, k, v, others, implementation))
        out = []
        for group, h, gate, mlp, attended in zip(layout.single, x, gates, hidden, mixed, strict=True):
            adapter = adapters.get(group.adapter) if group.adapter else None
            joined = jnp.concatenate([attended, mlp], axis=-1)
            out.append(_add(h, gate, self.proj_out(joined, _linear(adapter, "proj_out"))))
        return out, tuple(zip(k, v, strict=True))


# ----------------------------------------------------------------------------------------------------- model


def _remat(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "full":
        return jax.checkpoint(body)
    if remat == "save_attention":
        named = policies.save_only_these_names(attention.KEPT)
        return jax.checkpoint(body, policy=policies.save_from_both_policies(named, attention.is_kernel))
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[attention.KEPT, attention.CUDNN],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(body, policy=policy)
    raise UserError(f"train.remat: {remat!r} is not one of none, full, save_attention, offload")


class Flux(nnx.Module):
    """FLUX.1; parameter paths are the published names with the blocks of each kind stacked."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        width = config.width
        make = functools.partial(Linear, rngs=rngs, dtype=dtype)
        self.time_text_embed = TimeTextEmbed(config, rngs=rngs, dtype=dtype)
        self.context_embedder = make(config.joint_attention_dim, width)
        self.x_embedder = make(config.in_channels, width)
        self.transformer_blocks = layers.stack(
            lambda r: DoubleBlock(config, rngs=r, dtype=dtype), config.num_layers, rngs
        )
        self.single_transformer_blocks = layers.stack(
            lambda r: SingleBlock(config, rngs=r, dtype=dtype), config.num_single_layers, rngs
        )
        self.norm_out = Modulation(width, 2, rngs=rngs, dtype=dtype)
        self.proj_out = make(width, config.velocity_channels)

    def __call__(
        self,
        branches: Sequence[Branch],
        *,
        adapters: Adapters | None = None,
        memory: Memory | None = None,
        output: int = 1,
        dtype: DTypeLike = jnp.float32,
        implementation: Implementation = "auto",
        remat: Remat = "none",
        scan: bool | None = None,
    ) -> jax.Array:
        """Predicts the velocity ``x1 - x0`` (noise minus data) of one branch.

        Branches that share adapter and the very same time, guidance and pooled arrays (the same Python objects) are
        computed together.

        Args:
          branches: the token streams; keys are laid out in this order.
          adapters: adapters by name; every name that a branch uses must be here.
          memory: further branches that every branch of the call sees, after its own keys; see ``remember``.
          output: index of the branch whose velocity is returned.
          dtype: compute dtype of matrix products.
          implementation: attention kernel.
          remat: what the backward pass keeps of each block.
          scan: run the blocks of a kind with ``lax.scan`` (compile time independent of depth) or unrolled; None
            scans deep and large models and those with a ``remat``, and unrolls small ones.

        Returns:
          [B, N, velocity_channels] float32.
        """
        options = Options(dtype, implementation, remat, scan)
        adapters = dict(adapters or {})
        modulation, tembs = self._modulations(branches, adapters, dtype)
        streams, _ = self._run_blocks(branches, modulation, tembs, adapters, memory, options, keep=False)
        adapter = _of(branches[output], adapters)
        # The published output layer orders its chunks scale, shift, unlike every other modulation.
        scale, shift = self.norm_out(tembs[modulation[output]], _at(adapter, "norm_out"))
        hidden = _modulate(streams[output], shift, scale)
        return self.proj_out(hidden, _linear(adapter, "proj_out"), dtype=jnp.float32)

    def remember(
        self,
        branches: Sequence[Branch],
        *,
        adapters: Adapters | None = None,
        dtype: DTypeLike = jnp.float32,
        implementation: Implementation = "auto",
        scan: bool | None = None,
    ) -> Memory:
        """Keys and values in every block of branches that see only themselves.

        Calls with this memory and without these branches give what calls with both give, at the price of the
        other branches alone: in sampling, the conditions run once instead of at every step.

        Raises:
          UserError: a branch sees another one, so that its keys would change from step to step.
        """
        for i, branch in enumerate(branches):
            if branch.sees != (i,):
                raise UserError(
                    f"condition cache: branch {i} sees branches {branch.sees or 'all'}, expected itself alone: only "
                    "independent conditions have keys and values that stay the same"
                )
        adapters = dict(adapters or {})
        modulation, tembs = self._modulations(branches, adapters, dtype)
        options = Options(dtype, implementation, "none", scan)
        # Large ones one after another: together they need the room of all at once. Small ones together: each by itself
        # is compiled by itself.
        count = len(branches)
        parts = [[i] for i in range(count)] if _large(self.single_transformer_blocks) else [list(range(count))]
        kept: list[KeysAndValues] = [(), ()]
        for part in parts:
            members = [dataclasses.replace(branches[i], sees=(own,)) for own, i in enumerate(part)]
            indices = [modulation[i] for i in part]
            _, found = self._run_blocks(members, indices, tembs, adapters, None, options, keep=True)
            kept = [(*before, *more) for before, more in zip(kept, found, strict=True)]
        return Memory(kept[0], kept[1], tuple(b.valid for b in branches))

    def _run_blocks(
        self,
        branches: Sequence[Branch],
        modulation: list[int],
        tembs: list[jax.Array],
        adapters: dict[str, Adapter],
        memory: Memory | None,
        options: "Options",
        *,
        keep: bool,
    ) -> tuple[list[jax.Array], list[KeysAndValues]]:
        """The streams after the last block, per branch, and, if kept, keys and values per kind of block and branch."""
        layout = Layout(
            lengths=tuple(b.length for b in branches),
            sees=tuple(tuple(range(len(branches))) if b.sees is None else b.sees for b in branches),
            double=_group(branches, modulation, by_kind=True),
            single=_group(branches, modulation, by_kind=False),
        )
        tables = [rope(b.ids, self.config.axes_dims_rope) for b in branches]
        streams = [self._embed(b, adapters, options.dtype) for b in branches]
        valid = tuple(b.valid for b in branches)
        kept: list[KeysAndValues] = []
        for name, groups in (("transformer_blocks", layout.double), ("single_transformer_blocks", layout.single)):
            remembered: KeysAndValues = ()
            if memory is not None:
                remembered = memory.double if name == "transformer_blocks" else memory.single
            x, keys_and_values = _run(
                getattr(self, name),
                layout.join(groups, streams),
                [tembs[g.modulation] for g in groups],
                [tuple(_join_axis([tables[m][i] for m in g.members]) for i in range(2)) for g in groups],
                layout,
                {n: a.at(name) for n, a in adapters.items()},
                remembered,
                Others(valid, remembered=() if memory is None else memory.valid),
                options,
                keep=keep,
            )
            streams = layout.split(groups, x)
            kept.append(keys_and_values)
        return streams, kept

    def _modulations(
        self, branches: Sequence[Branch], adapters: Adapters, dtype: DTypeLike
    ) -> tuple[list[int], list[jax.Array]]:
        """Index of each branch's modulation vector, and the distinct vectors [B, D]."""
        seen: dict[tuple[int, int, int, str | None], int] = {}
        tembs: list[jax.Array] = []
        index = []
        for b in branches:
            adapter = _at(_of(b, adapters), "time_text_embed")
            key = (id(b.time), id(b.guidance), id(b.pooled), b.adapter if adapter and adapter.params else None)
            if key not in seen:
                seen[key] = len(tembs)
                tembs.append(self.time_text_embed(b.time, b.guidance, b.pooled, adapter, dtype))
            index.append(seen[key])
        return index, tembs

    def _embed(self, branch: Branch, adapters: dict[str, Adapter], dtype: DTypeLike) -> jax.Array:
        adapter = _of(branch, adapters)
        if branch.kind == "text":
            tokens = branch.tokens.astype(dtype)
            return partitioning.stream(self.context_embedder(tokens, _linear(adapter, "context_embedder")))
        # float32: near time 0 the velocity is a small difference in the noisy tokens, divided by the time.
        tokens = branch.tokens.astype(jnp.float32)
        return partitioning.stream(self.x_embedder(tokens, _linear(adapter, "x_embedder")).astype(dtype))


def _join_axis(tables: Sequence[Any]) -> jax.Array:
    arrays = [jnp.asarray(t) for t in tables]
    lead = max((a.shape[:-2] for a in arrays), key=len)  # positions of some branches may differ per sample
    return jnp.concatenate([jnp.broadcast_to(a, (*lead, *a.shape[-2:])) for a in arrays], axis=-2)


def _large(blocks: DoubleBlock | SingleBlock) -> bool:
    """Whether a second copy of a stack's weights, or of what it computes with, would matter."""
    return layers.tree_bytes(layers.split(blocks)[1]) > _UNROLLED_BYTES


class Options(NamedTuple):
    """How blocks are computed; see ``Flux.__call__``."""

    dtype: DTypeLike
    implementation: Implementation
    remat: Remat
    scan: bool | None


def _run(
    blocks: DoubleBlock | SingleBlock,
    x: list[jax.Array],
    tembs: list[jax.Array],
    tables: list[tuple[jax.Array, ...]],
    layout: Layout,
    adapters: dict[str, Adapter],
    remembered: KeysAndValues,
    others: Others,
    options: Options,
    *,
    keep: bool,
) -> tuple[list[jax.Array], KeysAndValues]:
    """All blocks of a kind: the streams after the last one and, if kept, keys and values [L, B, N, H, E] per branch."""
    graphdef, params = layers.split(blocks)
    depth = jax.tree.leaves(params)[0].shape[0]

    def body(
        x: list[jax.Array], block: tuple[layers.Params, dict[str, Adapter], KeysAndValues]
    ) -> tuple[list[jax.Array], KeysAndValues]:
        params, adapters, remembered = block
        seen = others._replace(keys=tuple(k for k, _ in remembered), values=tuple(v for _, v in remembered))
        module = layers.bind(graphdef, params)
        x, keys_and_values = module(x, tembs, tables, layout, adapters, seen, options.implementation)
        # What is kept between blocks: without a constraint XLA lays it out anew in each of them.
        return [partitioning.stream(y) for y in x], keys_and_values if keep else ()

    body = _remat(body, options.remat)
    stacked = (params, adapters, remembered)
    # Unrolled, XLA's CPU compiler merges what the backward pass should compute again with the forward pass, and keeps
    # it: a middle-sized step took 4.8 GiB of temporaries with every policy, scanned 0.7 with `full`.
    deep = depth > _UNROLLED_DEPTH or _large(blocks)
    if deep or options.remat != "none" if options.scan is None else options.scan:
        x, kept = jax.lax.scan(body, x, stacked)
        return x, kept
    every = []
    for i in range(depth):
        x, keys_and_values = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        every.append(keys_and_values)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
