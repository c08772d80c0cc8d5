"""The published checkpoints at full size: names, shapes and dtypes of diffusers and transformers on the meta device.

A checkpoint is written as its header in front of a hole (a sparse file takes no room), so that the production reader,
strict both ways, decides whether it fits.
"""

import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from nabla_jax.checkpoints import bfl, pipeline
from nabla_jax.checkpoints import safetensors_io as io
from nabla_jax.errors import UserError
from nabla_jax.models import layers

# The published config.json files (black-forest-labs/FLUX.1-*), less the keys that only name classes and versions.
_FLUX = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
TRANSFORMERS = {
    "schnell": _FLUX | {"guidance_embeds": False},
    "dev": _FLUX,
    "kontext": _FLUX | {"axes_dims_rope": [16, 56, 56], "out_channels": None},
    "fill": _FLUX | {"axes_dims_rope": [16, 56, 56], "in_channels": 384, "out_channels": 64},
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
T5 = {
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
CLIP = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SIZES = {"F32": 4, "BF16": 2}
Tensors = dict[str, tuple[tuple[int, ...], str]]


def on_meta(make, dtype=torch.bfloat16) -> Tensors:
    """Name -> (shape, safetensors dtype) of a torch module's parameters; nothing is allocated."""
    with torch.device("meta"):
        state = make().to(dtype).state_dict()
    codes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    return {name: (tuple(value.shape), codes[value.dtype]) for name, value in state.items()}


def transformer(name) -> Tensors:
    return on_meta(lambda: diffusers.FluxTransformer2DModel.from_config(TRANSFORMERS[name]))


def t5() -> Tensors:
    config = transformers.T5Config(**T5)
    tensors = on_meta(lambda: transformers.T5EncoderModel(config))
    # Both names are one tensor, which is saved once.
    return {name: value for name, value in tensors.items() if name != "encoder.embed_tokens.weight"}


def clip() -> Tensors:
    config = transformers.CLIPTextConfig(**CLIP)
    tensors = on_meta(lambda: transformers.CLIPTextModel(config))
    # The published file has the prefix and the buffer-free names of transformers 4; version 5 leaves the prefix out.
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}


def vae() -> Tensors:
    return on_meta(lambda: diffusers.AutoencoderKL.from_config(VAE))


PUBLISHED = {
    **{f"FLUX.1-{name}": ("transformer", TRANSFORMERS[name], lambda n=name: transformer(n)) for name in TRANSFORMERS},
    "autoencoder": ("vae", VAE, vae),
    "T5-XXL": ("text_encoder_2", T5, t5),
    "CLIP-L": ("text_encoder", CLIP, clip),
}
COUNTS = {
    "FLUX.1-schnell": (1156, 11_891_178_560),
    "FLUX.1-dev": (1160, 11_901_408_320),
    "FLUX.1-kontext": (1160, 11_901_408_320),
    "FLUX.1-fill": (1160, 11_902_391_360),
    "autoencoder": (244, 83_819_683),
    "T5-XXL": (219, 4_762_310_656),
    "CLIP-L": (196, 123_060_480),
}


def write(path: Path, tensors: Tensors) -> None:
    """A safetensors file of these tensors whose data are a hole."""
    header, offset = {}, 0
    for name, (shape, code) in tensors.items():
        end = offset + SIZES[code] * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def abstract(name: str, config: dict, dtype: str):
    """The part, its configuration and its abstract parameters."""
    part = pipeline.PARTS[name]
    parsed = part.config.from_json(config)
    return part, parsed, layers.abstract(lambda rngs: part.model(parsed, rngs=rngs, dtype=dtype))[1]


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_every_tensor_has_its_leaf_and_back(tmp_path, checkpoint):
    name, config, make = PUBLISHED[checkpoint]
    tensors = make()
    assert (len(tensors), sum(torch.Size(s).numel() for s, _ in tensors.values())) == COUNTS[checkpoint]
    write(tmp_path / name / pipeline.PARTS[name].file, tensors)
    part, _, tree = abstract(name, config, "bfloat16")
    io.check_tree(tmp_path / name, tree, part.table, stacked=part.stacked)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == COUNTS[checkpoint][1]
    exported = io.file_tensors(tree, stacked=part.stacked)
    assert {t.name: (t.shape, "BF16" if kind.itemsize == 2 else "F32") for t, kind in exported} == tensors


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bfl_transformer_files(tmp_path, name):
    """Names by our table, judged by diffusers' converter: it must use all of them and yield the published tree."""
    expected = transformer(name)
    part, config, tree = abstract("transformer", TRANSFORMERS[name], "bfloat16")
    exported = io.file_tensors(tree, stacked=part.stacked, layout=bfl.flux_layout)
    assert {kind for _, kind in exported} == {np.dtype("bfloat16")}
    stored = {t.name: (t.shape, "BF16") for t, _ in exported}
    checkpoint = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, (s, _) in stored.items()}
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint
    assert {n: (tuple(v.shape), "BF16") for n, v in converted.items()} == expected
    path = tmp_path / f"flux1-{name}.safetensors"
    write(path, stored)
    assert pipeline.transformer_config(path) == config
    io.check_tree(path, tree, stacked=part.stacked, layout=bfl.flux_layout)
    del stored["double_blocks.18.txt_attn.qkv.bias"]
    write(path, stored)
    with pytest.raises(UserError, match=r"1 missing: double_blocks\.18\.txt_attn\.qkv\.bias"):
        io.check_tree(path, tree, stacked=part.stacked, layout=bfl.flux_layout)


def test_bfl_autoencoder_file(tmp_path):
    _, config, tree = abstract("vae", VAE, "float32")
    stored = {t.name: (t.shape, "F32") for t, _ in io.file_tensors(tree, layout=bfl.vae_layout)}
    checkpoint = {n: torch.empty(s, device="meta") for n, (s, _) in stored.items()}
    converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, VAE)
    expected = on_meta(lambda: diffusers.AutoencoderKL.from_config(VAE), torch.float32)
    assert {n: (tuple(v.shape), "F32") for n, v in converted.items()} == expected
    assert len(stored) == len(expected)
    write(tmp_path / "ae.safetensors", stored)
    assert pipeline.vae_config(tmp_path / "ae.safetensors") == config
    io.check_tree(tmp_path / "ae.safetensors", tree, layout=bfl.vae_layout)
