"""The layout of Black Forest Labs' own single files: ``flux1-*.safetensors`` and ``ae.safetensors``.

The same numbers as in the diffusers folders under other names. Queries, keys, values (and the single blocks' first MLP
layer) lie in one tensor, one after another; the last modulation's shift and scale are the other way round; the
autoencoder's decoder counts its levels from the picture and its attention linears are 1x1 convolutions.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from nabla_jax.checkpoints.safetensors_io import Header, Rows, Shape, Stored, whole
from nabla_jax.errors import UserError
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.models.flux import FluxConfig
from nabla_jax.untrusted import parse_json

# Entry of the file's header under which ``metadata`` puts the configuration: it cannot all be told from the tensors.
_KEY = "nabla_jax_config"
# The rotary axes of every published FLUX.1, whose heads are 128 wide.
_AXES = {128: (16, 56, 56)}

C = TypeVar("C", FluxConfig, AutoencoderKLConfig)
# Stored module -> the published modules it holds, one after another.
Modules = Mapping[str, tuple[str, ...]]

OUTER: Modules = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE: Modules = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE: Modules = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# The autoencoder's attention, published -> stored.
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def flux_layout(shapes: Mapping[str, Shape]) -> list[Stored]:
    """The tensors of a ``flux1-*.safetensors`` file that holds the published tensors of these names and shapes."""
    stored = []
    for prefix, stored_prefix, modules in _flux_modules(shapes):
        for module, parts in modules.items():
            for leaf in ("weight", "bias"):
                names = [f"{prefix}{part}.{leaf}" for part in parts]
                if names[0] not in shapes:
                    continue
                rows = sum(shapes[name][0] for name in names)
                ending = "scale" if module.endswith("_norm") else leaf
                pieces = tuple(whole(name, shapes[name]) for name in names)
                if module == "final_layer.adaLN_modulation.1":
                    # Here the chunks are shift, scale; in the published tree scale, shift.
                    pieces = (Rows(names[0], rows // 2, rows), Rows(names[0], 0, rows // 2))
                stored.append(Stored(f"{stored_prefix}{module}.{ending}", (rows, *shapes[names[0]][1:]), pieces))
    return _complete(stored, shapes)


def vae_layout(shapes: Mapping[str, Shape]) -> list[Stored]:
    """The tensors of an ``ae.safetensors`` file that holds the published tensors of these names and shapes."""
    levels = _count(shapes, "decoder.up_blocks")
    stored = []
    for name, shape in shapes.items():
        kept = (*shape, 1, 1) if re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name) else shape
        stored.append(Stored(_vae_name(name, levels), kept, (whole(name, shape),)))
    return _complete(stored, shapes)


def flux_config(path: str | os.PathLike[str], header: Header) -> FluxConfig:
    """The configuration of a ``flux1-*.safetensors`` file, from the names and shapes of its tensors.

    Schnell, dev and Fill differ in the guidance embedding and the input channels; dev and Kontext are one
    configuration. Raises UserError saying what was found if it cannot be told.
    """
    if _KEY in header.metadata:
        return _from_metadata(path, header, FluxConfig.from_json)
    size = _sizes(path, header, "a FLUX.1 transformer in BFL's layout")
    head = size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    width = size("img_in.weight", 0)
    channels = size("img_in.weight", 1)
    out = size("final_layer.linear.weight", 0)
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _count(header.tensors, "double_blocks"),
        "num_single_layers": _count(header.tensors, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": size("txt_in.weight", 1),
        "pooled_projection_dim": size("vector_in.in_layer.weight", 1),
        "guidance_embeds": "guidance_in.in_layer.weight" in header.tensors,
    }
    if head not in _AXES:
        raise UserError(
            f"{path}: the rotary axes cannot be told from the tensors: found heads of {head} channels, expected "
            f"{' or '.join(map(str, _AXES))}, or a file with the configuration in its metadata ({_KEY}); "
            f"found {', '.join(f'{k} {v}' for k, v in config.items())}"
        )
    return FluxConfig(**config, axes_dims_rope=_AXES[head])


def vae_config(path: str | os.PathLike[str], header: Header) -> AutoencoderKLConfig:
    """The configuration of an ``ae.safetensors`` file, FLUX's if the names and shapes of its tensors are.

    Scale and shift of the latents lie in no tensor: another autoencoder needs the configuration in the metadata.
    """
    if _KEY in header.metadata:
        return _from_metadata(path, header, AutoencoderKLConfig.from_json)
    size = _sizes(path, header, "FLUX's autoencoder in BFL's layout")
    expected = AutoencoderKLConfig.flux()
    levels = _count(header.tensors, "encoder.down")
    found = {
        "block_out_channels": tuple(size(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)),
        "layers_per_block": _count(header.tensors, "encoder.down.0.block"),
        "latent_channels": size("decoder.conv_in.weight", 1),
        "use_quant_conv": "quant_conv.weight" in header.tensors,
    }
    others = [f"{k} {v} (expected {getattr(expected, k)})" for k, v in found.items() if v != getattr(expected, k)]
    if others:
        raise UserError(
            f"{path}: not FLUX's autoencoder, so that scale and shift of its latents cannot be told: found "
            f"{', '.join(others)}; another one needs its configuration in the file's metadata ({_KEY})"
        )
    return expected


def metadata(config: FluxConfig | AutoencoderKLConfig) -> dict[str, str]:
    """What an exported file carries beside its tensors, so that every configuration can be read back."""
    return {_KEY: json.dumps(config.to_json(), sort_keys=True)}


def _flux_modules(shapes: Mapping[str, Shape]) -> list[tuple[str, str, Modules]]:
    """(published prefix, stored prefix, modules) of the outer layers and of every block."""
    found: list[tuple[str, str, Modules]] = [("", "", OUTER)]
    for prefix, stored, modules in (
        ("transformer_blocks", "double_blocks", DOUBLE),
        ("single_transformer_blocks", "single_blocks", SINGLE),
    ):
        found += [(f"{prefix}.{i}.", f"{stored}.{i}.", modules) for i in range(_count(shapes, prefix))]
    return found


def _vae_name(name: str, levels: int) -> str:
    def up(match: re.Match[str]) -> str:
        return f"decoder.up.{levels - 1 - int(match.group(1))}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", up, name)
    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m.group(1)) + 1}.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    match = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name)
    if match:
        name = f"{match.group(1)}.mid.attn_1.{_ATTENTION[match.group(2)]}.{match.group(3)}"
    return name


def _complete(stored: list[Stored], shapes: Mapping[str, Shape]) -> list[Stored]:
    held = {part.name for tensor in stored for part in tensor.parts}
    absent = sorted(set(shapes) - held)
    if absent:
        raise ValueError(f"no place in BFL's layout for {', '.join(absent)}")
    return stored


def _count(names: Mapping[str, Any], prefix: str) -> int:
    """Number of blocks below a prefix: one more than the largest block number."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return max((int(match.group(1)) + 1 for match in numbers if match), default=0)


def _sizes(path: str | os.PathLike[str], header: Header, kind: str) -> Callable[[str, int], int]:
    """A function from a tensor's name and an axis to the size; a tensor that is not there is a UserError."""

    def size(name: str, axis: int) -> int:
        entry = header.tensors.get(name)
        if entry is not None and len(entry.shape) > axis:
            return entry.shape[axis]
        found = "missing" if entry is None else f"of shape {entry.shape}"
        first = ", ".join(sorted(header.tensors)[:3]) or "none"
        hint = ""
        if {"x_embedder.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"} & set(header.tensors):
            hint = "; these are the names of a diffusers folder: give the folder with its config.json"
        raise UserError(
            f"{path}: not {kind}: {name} is {found}; found {len(header.tensors)} tensors ({first}, ...){hint}"
        )

    return size


def _from_metadata(path: str | os.PathLike[str], header: Header, parse: Callable[[dict[str, Any]], C]) -> C:
    try:
        raw = parse_json(header.metadata[_KEY])
        if not isinstance(raw, dict):
            raise UserError(f"found {type(raw).__name__}, expected a JSON object")
        return parse(raw)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: metadata {_KEY}: {error}") from error
