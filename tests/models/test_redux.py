"""FLUX.1-Redux against diffusers' pipeline, on small random weights written by diffusers and transformers."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nabla_jax.checkpoints.transformers_folder import load_redux, save_redux
from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.redux import ReduxConfig, ReduxEmbedderConfig
from nabla_jax.models.siglip import SiglipVisionConfig
from tests.models.vision_reference import randomise

SIDE = 29


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The pipeline of diffusers and a folder with its two models."""
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=7,
        )
    )
    embedder = diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(redux_dim=24, txt_in_features=20)
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pipeline = diffusers.FluxPriorReduxPipeline(randomise(tower), processor, randomise(embedder))
    folder = tmp_path_factory.mktemp("redux")
    tower.save_pretrained(folder / "image_encoder")
    embedder.save_pretrained(folder / "image_embedder")
    processor.save_pretrained(folder / "feature_extractor")
    return pipeline, folder


def tokens(component, pixels):
    return jax.jit(lambda p, x: layers.bind(component.graphdef, p)(x))(component.params, pixels)


@pytest.mark.parametrize("sizes", [[(40, 57)], [(29, 29), (64, 31)]])
def test_a_picture_becomes_the_tokens_of_diffusers(published, sizes):
    pipeline, folder = published
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(sizes)]
    with torch.no_grad():
        hidden = pipeline.encode_image([Image.fromarray(x) for x in images], torch.device("cpu"), 1)
        expected = pipeline.image_embedder(hidden).image_embeds.numpy()
    processor = ImageProcessor.from_json(folder / "feature_extractor" / "preprocessor_config.json")
    assert processor == ImageProcessor.siglip(SIDE)
    actual = tokens(load_redux(folder), processor(images))
    assert actual.shape == (len(sizes), 16, 20)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_saved_folders_are_equal(published, tmp_path):
    _, folder = published
    component = load_redux(folder)
    save_redux(tmp_path, component.config, component.params)
    again = load_redux(tmp_path)
    assert again.config == component.config
    jax.tree.map(np.testing.assert_array_equal, again.params, component.params)
    expected = load_file(folder / "image_embedder" / "diffusion_pytorch_model.safetensors")
    assert load_file(tmp_path / "image_embedder" / "diffusion_pytorch_model.safetensors").keys() == expected.keys()
    loaded = diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder.from_pretrained(tmp_path / "image_embedder")
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(value, expected[name])


def test_each_device_receives_its_part(published):
    _, folder = published
    mesh = jax.make_mesh((1,), ("data",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    plain = load_redux(folder).params
    for sharding in (replicated, lambda abstract: jax.tree.map(lambda _: replicated, abstract)):
        placed = load_redux(folder, sharding=sharding).params
        assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {replicated}
        jax.tree.map(np.testing.assert_array_equal, placed, plain)


def test_components_that_do_not_fit_are_refused(published, tmp_path):
    _, folder = published
    component = load_redux(folder)
    save_redux(tmp_path, component.config, component.params)
    path = tmp_path / "image_embedder" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"redux_dim": 25}))
    with pytest.raises(UserError, match=r"image_embedder/config.json: redux_dim: found 25, expected 24"):
        load_redux(tmp_path)
    path.write_text(json.dumps(content | {"_class_name": "IPAdapter"}))
    with pytest.raises(UserError, match="_class_name: found 'IPAdapter', expected 'ReduxImageEncoder'"):
        load_redux(tmp_path)
    path.write_text(json.dumps(content))
    weights = tmp_path / "image_embedder" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"redux_mid.weight": np.zeros(2, np.float32)}, weights)
    with pytest.raises(UserError, match="1 not expected .*redux_mid.weight"):
        load_redux(tmp_path)


def test_the_published_sizes_are_the_defaults():
    assert ReduxConfig() == ReduxConfig(SiglipVisionConfig.so400m(384), ReduxEmbedderConfig(1152, 4096))
    ReduxConfig().check()
