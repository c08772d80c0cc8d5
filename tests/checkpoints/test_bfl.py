"""Black Forest Labs' single files: against diffusers' own converters and against diffusers folders."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from nabla_jax.checkpoints import bfl, pipeline
from nabla_jax.checkpoints import safetensors_io as io
from nabla_jax.errors import UserError
from nabla_jax.models import autoencoder, flux, layers
from nabla_jax.models.flux import FluxConfig
from tests.checkpoints.pipeline_folder import write_pipeline
from tests.fixtures import fake_devices


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    write_pipeline(path)
    return path


def config_of(folder, name):
    return json.loads((folder / name / "config.json").read_text())


def fused(flat: dict[str, np.ndarray], doubles: int, singles: int) -> dict[str, np.ndarray]:
    """The tensors of a published tree under BFL's names, written out by hand."""
    out = {}

    def put(stored: str, *names: str) -> None:
        for leaf in ("weight", "bias"):
            out[f"{stored}.{leaf}"] = np.concatenate([flat[f"{name}.{leaf}"] for name in names])

    def norm(stored: str, name: str) -> None:
        out[f"{stored}.scale"] = flat[f"{name}.weight"]

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for stored, name in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for side, number in (("in", 1), ("out", 2)):
            put(f"{stored}_in.{side}_layer", f"time_text_embed.{name}_embedder.linear_{number}")
    for i in range(doubles):
        there, here = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        put(f"{there}img_mod.lin", f"{here}norm1.linear")
        put(f"{there}txt_mod.lin", f"{here}norm1_context.linear")
        put(f"{there}img_attn.qkv", *(f"{here}attn.to_{x}" for x in "qkv"))
        put(f"{there}txt_attn.qkv", *(f"{here}attn.add_{x}_proj" for x in "qkv"))
        for stored, x in (("query", "q"), ("key", "k")):
            norm(f"{there}img_attn.norm.{stored}_norm", f"{here}attn.norm_{x}")
            norm(f"{there}txt_attn.norm.{stored}_norm", f"{here}attn.norm_added_{x}")
        put(f"{there}img_attn.proj", f"{here}attn.to_out.0")
        put(f"{there}txt_attn.proj", f"{here}attn.to_add_out")
        for stream, name in (("img", "ff"), ("txt", "ff_context")):
            put(f"{there}{stream}_mlp.0", f"{here}{name}.net.0.proj")
            put(f"{there}{stream}_mlp.2", f"{here}{name}.net.2")
    for i in range(singles):
        there, here = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        put(f"{there}modulation.lin", f"{here}norm.linear")
        put(f"{there}linear1", *(f"{here}attn.to_{x}" for x in "qkv"), f"{here}proj_mlp")
        put(f"{there}linear2", f"{here}proj_out")
        norm(f"{there}norm.query_norm", f"{here}attn.norm_q")
        norm(f"{there}norm.key_norm", f"{here}attn.norm_k")
    put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = np.split(flat[f"norm_out.linear.{leaf}"], 2)
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = np.concatenate([shift, scale])
    return out


@pytest.fixture
def single(folder, tmp_path):
    """The folder's transformer as a BFL file."""
    flat = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "flux1-dev.safetensors"
    save_file(fused(flat, 2, 3), path, {"nabla_jax_config": json.dumps(config_of(folder, "transformer"))})
    return path


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_layouts_give_the_same_tree(folder, single, dtype):
    there = pipeline.load_transformer(folder, dtype=dtype)
    here = pipeline.load_transformer(single, dtype=dtype)
    assert here.config == there.config == pipeline.transformer_config(single)
    equal(here.params, there.params)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_exported_file_reads_back_bitwise(folder, single, tmp_path, dtype):
    loaded = pipeline.load_transformer(single)
    pipeline.save_single_file(tmp_path / "out.safetensors", "transformer", loaded.config, loaded.params, dtype=dtype)
    written, original = load_file(tmp_path / "out.safetensors"), load_file(single)
    assert written.keys() == original.keys()
    for name, value in original.items():
        expected = value.astype(ml_dtypes.bfloat16) if dtype else value
        assert written[name].dtype == expected.dtype
        np.testing.assert_array_equal(written[name].view(np.uint8), expected.view(np.uint8), err_msg=name)
    again = pipeline.load_transformer(tmp_path / "out.safetensors", dtype=dtype or "float32")
    assert again.config == loaded.config
    equal(again.params, jax.tree.map(lambda x: x.astype(dtype or "float32"), loaded.params))
    pipeline.save_part(tmp_path, "transformer", again.config, again.params)
    equal(pipeline.load_transformer(tmp_path, dtype=dtype or "float32").params, again.params)


@pytest.mark.parametrize("config", [FluxConfig.schnell(), FluxConfig.fill()])
def test_diffusers_converter_reads_what_is_written(tmp_path, config):
    """The converter knows rows of full size only: rows of that size, two columns, two blocks of each kind."""
    config = dataclasses.replace(config, num_layers=2, num_single_layers=2)
    _, abstract = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        matrix = leaf.ndim - (path[0].key in flux.STACKED) == 2
        return rng.standard_normal((*leaf.shape[:-1], 2) if matrix else leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract)
    io.save_tree(params, tmp_path / "diffusers.safetensors", stacked=flux.STACKED)
    io.save_tree(params, tmp_path / "bfl.safetensors", stacked=flux.STACKED, layout=bfl.flux_layout)
    checkpoint = load_torch(tmp_path / "bfl.safetensors")
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint
    expected = load_torch(tmp_path / "diffusers.safetensors")
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(converted[name], value), name
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    again = io.load_tree(tmp_path / "bfl.safetensors", shapes, stacked=flux.STACKED, layout=bfl.flux_layout)
    equal(again, params)


def test_the_autoencoder_is_read_by_diffusers_and_back(folder, tmp_path):
    loaded = pipeline.load_vae(folder)
    path = tmp_path / "ae.safetensors"
    pipeline.save_single_file(path, "vae", loaded.config, loaded.params)
    model = AutoencoderKL.from_single_file(str(path), config=str(folder / "vae"), local_files_only=True)
    original = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]), name
    assert load_file(path)["encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    again = pipeline.load_vae(path)
    assert again.config == loaded.config == pipeline.vae_config(path)
    equal(again.params, loaded.params)


def described(tensors: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> io.Header:
    entries = {n: io.Entry(Path("flux1.safetensors"), s, "BF16", 0) for n, s in tensors.items()}
    return io.Header((), entries, metadata or {})


def bfl_shapes(config):
    _, abstract = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs))
    return {t.name: t.shape for t, _ in io.file_tensors(abstract, stacked=flux.STACKED, layout=bfl.flux_layout)}


def published(name):
    """The settings of the published config.json files."""
    return {
        "schnell": {},
        "dev": {"guidance_embeds": True},
        "kontext": {"guidance_embeds": True},
        "fill": {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
    }[name]


@pytest.mark.parametrize("name", ["schnell", "dev", "kontext", "fill"])
def test_the_configuration_is_told_from_names_and_shapes(name):
    config = FluxConfig.from_json(published(name))
    shapes = bfl_shapes(config)
    assert bfl.flux_config("file", described(shapes)) == config == getattr(FluxConfig, name)()


def test_a_configuration_that_cannot_be_told_says_what_was_found(folder, tmp_path, single):
    tensors = load_file(single)
    save_file(tensors, single)
    with pytest.raises(UserError, match=r"flux1-dev.*rotary axes.*heads of 8 channels.*num_layers 2"):
        pipeline.load_transformer(single)
    with pytest.raises(UserError, match=r"img_attn.norm.query_norm.scale is missing.*diffusers folder"):
        pipeline.load_transformer(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"not FLUX's autoencoder.*block_out_channels \(8, 8\) \(expected \(128"):
        loaded = pipeline.load_vae(folder)
        io.save_tree(loaded.params, tmp_path / "ae.safetensors", layout=bfl.vae_layout)
        pipeline.load_vae(tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=r"flux1-dev.*not FLUX's autoencoder.*decoder.conv_in.weight is missing"):
        pipeline.load_vae(single)
    with pytest.raises(UserError, match="text_encoder is read from a pipeline folder"):
        pipeline.load_part(single, "text_encoder")
    save_file(tensors, single, {"nabla_jax_config": json.dumps({"num_blocks": 3})})
    with pytest.raises(UserError, match=r"flux1-dev.*metadata nabla_jax_config.*unknown keys num_blocks"):
        pipeline.load_transformer(single)


def test_the_published_autoencoder_is_told_from_its_shapes():
    config = autoencoder.AutoencoderKLConfig.flux()
    _, abstract = layers.abstract(lambda rngs: autoencoder.AutoencoderKL(config, rngs=rngs))
    shapes = {t.name: t.shape for t, _ in io.file_tensors(abstract, layout=bfl.vae_layout)}
    assert bfl.vae_config("ae.safetensors", described(shapes)) == config
    with pytest.raises(UserError, match=r"latent_channels 4 \(expected 16\).*use_quant_conv True"):
        bfl.vae_config("x", described(shapes | {"decoder.conv_in.weight": (512, 4, 3, 3), "quant_conv.weight": (8, 8)}))


def test_missing_extra_and_misshapen_tensors_are_all_listed(single):
    tensors, metadata = load_file(single), io.read_header(single).metadata
    del tensors["single_blocks.1.linear1.bias"]
    tensors["single_blocks.3.linear1.bias"] = np.zeros(1, np.float32)
    tensors["stray"] = np.zeros(1, np.float32)
    tensors["double_blocks.0.img_attn.qkv.weight"] = np.zeros((32, 16), np.float32)
    save_file(tensors, single, metadata)
    with pytest.raises(UserError) as caught:
        pipeline.load_transformer(single)
    for expected in (
        "1 missing: single_blocks.1.linear1.bias",
        "2 not expected (in flux1-dev.safetensors): ",
        "stray",
        "single_blocks.3.linear1.bias",
        "double_blocks.0.img_attn.qkv.weight in flux1-dev.safetensors: found (32, 16), expected (48, 16)",
    ):
        assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fused_tensors_are_cut_over_eight_devices(folder, single):
    program = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nabla_jax.checkpoints.pipeline import load_transformer
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
def spread(axis, names):
    def one(leaf):
        fits = len(leaf.shape) > axis and leaf.shape[axis] % 8 == 0
        return NamedSharding(mesh, P(*[None] * axis, names) if fits else P())
    return lambda abstract: jax.tree.map(one, abstract)
whole = load_transformer(sys.argv[1]).params
for sharding in (spread(1, ("a", "b")), spread(2, ("b", "a"))):
    parts = load_transformer(sys.argv[2], sharding=sharding).params
    assert jax.tree.map(lambda x: x.sharding, parts) == sharding(whole)
    assert sum(len(x.sharding.spec) > 0 for x in jax.tree.leaves(parts)) > 10
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
print(len(jax.devices()), "devices")
"""
    environment = os.environ | {"XLA_FLAGS": fake_devices(8), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(folder), str(single)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8 devices"


def test_a_single_file_of_another_dtype_converts_like_numpy(single):
    tensors, metadata = load_file(single), io.read_header(single).metadata
    full = pipeline.load_transformer(single).params
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, single, metadata)
    half = pipeline.load_transformer(single).params
    equal(half, jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float16).astype(np.float32)), full))
