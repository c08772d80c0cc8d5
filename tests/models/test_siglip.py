"""The SigLIP vision tower against transformers', on small random weights written by transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints.safetensors_io import flatten
from nabla_jax.checkpoints.transformers_folder import check_network, load_siglip, save_network
from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.siglip import SiglipVision, SiglipVisionConfig
from tests.models.vision_reference import randomise

# 23 pixels hold three patches of 7: two rows and columns are left out.
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 23,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
}


def save_tower(folder, **changes):
    model = randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES | changes)))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return save_tower(folder), folder


def features(component, pixels, **options):
    return jax.jit(lambda p, x: layers.bind(component.graphdef, p)(x, **options))(component.params, pixels)


def pictures(batch, height, width):
    return np.random.default_rng(batch + height).normal(size=(batch, 3, height, width)).astype(np.float32)


def check_equal(actual, model, pixels, **options):
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels), **options)
    np.testing.assert_allclose(actual.patches, expected.last_hidden_state.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(actual.pooled, expected.pooler_output.numpy(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_features_equal_transformers(tower, batch):
    model, folder = tower
    pixels = pictures(batch, 23, 23)
    check_equal(features(load_siglip(folder), pixels), model, pixels)


@pytest.mark.parametrize(("height", "width"), [(14, 37), (30, 23), (21, 21)])
def test_other_sizes_interpolate_the_positions_as_transformers_does(tower, height, width):
    model, folder = tower
    pixels = pictures(2, height, width)
    actual = features(load_siglip(folder), pixels, interpolate=True)
    check_equal(actual, model, pixels, interpolate_pos_encoding=True)


def test_other_sizes_are_refused_unless_asked_for(tower):
    component = load_siglip(tower[1])
    with pytest.raises(ValueError, match="found 3x4 patches.*expected 3x3"):
        features(component, pictures(1, 23, 28))
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\] with H and W of at least 7"):
        features(component, pictures(1, 6, 23), interpolate=True)


def test_scanned_layers_equal_unrolled_ones_and_deep_towers_are_scanned(tower):
    model, folder = tower
    component = load_siglip(folder)
    pixels = pictures(2, 23, 23)
    check_equal(features(component, pixels, scan=True), model, pixels)
    for depth, scans in ((3, 0), (12, 1)):
        config = dataclasses.replace(component.config, num_hidden_layers=depth)
        graphdef, abstract = layers.abstract(lambda rngs, c=config: SiglipVision(c, rngs=rngs))
        program = jax.make_jaxpr(lambda p, g=graphdef: layers.bind(g, p)(pixels))(abstract)
        assert str(program).count("scan[") == scans


@pytest.fixture(scope="module")
def both_towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    config = transformers.SiglipConfig(vision_config=SIZES, text_config=TEXT)
    model = randomise(transformers.SiglipModel(config))
    model.save_pretrained(folder)
    return model, folder


def test_a_checkpoint_of_both_towers_gives_the_vision_tower(both_towers):
    model, folder = both_towers
    pixels = pictures(2, 23, 23)
    check_equal(features(load_siglip(folder), pixels), model.vision_model, pixels)


def test_only_listed_tensors_may_go_unused(both_towers, tmp_path):
    _, folder = both_towers
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    def save(changed):
        save_file(changed, tmp_path / "model.safetensors")
        check_network(tmp_path, "siglip")

    save(tensors | {"vision_model.embeddings.position_ids": np.arange(9)[None]})
    for name in ("text_model.projection.weight", "vision_model.proj.weight", "logit_temperature"):
        with pytest.raises(UserError, match=f"1 not expected .*{name}"):
            save(tensors | {name: np.zeros(3, np.float32)})
    for name in ("vision_model.head.probe", "vision_model.encoder.layers.1.mlp.fc1.bias"):
        with pytest.raises(UserError, match=f"1 missing: {name}"):
            save({k: v for k, v in tensors.items() if k != name})
    name = "vision_model.embeddings.position_embedding.weight"
    with pytest.raises(UserError, match=r"1 of another shape or type: .*position_embedding.*\(9, 24\)"):
        save(tensors | {name: tensors[name][1:]})


def test_a_saved_tower_loads_in_transformers(tower, tmp_path):
    model, folder = tower
    component = load_siglip(folder)
    save_network(tmp_path, "siglip", component.config, component.params)
    loaded, report = transformers.SiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    again = load_siglip(tmp_path)
    assert again.config == component.config
    jax.tree.map(np.testing.assert_array_equal, again.params, component.params)


def test_bfloat16_parameters_compute_in_bfloat16(tower):
    model, folder = tower
    pixels = pictures(2, 23, 23)
    component = load_siglip(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in flatten(component.params).values()} == {jnp.dtype("bfloat16")}
    actual = features(component, pixels)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).pooler_output.numpy()
    assert actual.pooled.dtype == actual.patches.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(actual.pooled, np.float32) - expected) / np.linalg.norm(expected)
    assert 0 < error < 3e-2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # As published: the base files name nothing that equals the library's defaults.
        ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, SiglipVisionConfig.base()),
        (
            {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", "image_size": 384}},
            SiglipVisionConfig.base(384),
        ),
        (
            {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
            SiglipVisionConfig.so400m(),
        ),
    ],
)
def test_published_configs(config, expected):
    assert SiglipVisionConfig.from_json(config) == expected
    assert SiglipVisionConfig.from_json(expected.to_json()) == expected


def test_configs_of_other_architectures_are_refused(tmp_path):
    good = SiglipVisionConfig(**SIZES).to_json()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(good | {"model_type": "siglip2"}))
    with pytest.raises(UserError, match=r"config.json: model_type: found 'siglip2', expected siglip .*NaFlex"):
        SiglipVisionConfig.from_json(path)
    with pytest.raises(UserError, match="hidden_act: found 'gelu', expected 'gelu_pytorch_tanh'"):
        SiglipVisionConfig.from_json(good | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="vision_use_head: found False, expected True"):
        SiglipVisionConfig.from_json(good | {"vision_use_head": False})
    with pytest.raises(UserError, match="hidden_size: found 25, expected a multiple of num_attention_heads"):
        SiglipVisionConfig.from_json(good | {"hidden_size": 25})
    with pytest.raises(UserError, match=r"image_size: found \[24, 24\], expected a positive whole number"):
        SiglipVisionConfig.from_json(good | {"image_size": [24, 24]})
    with pytest.raises(UserError, match="patch_size: found 24, expected at most 23"):
        SiglipVisionConfig.from_json(good | {"patch_size": 24})
    with pytest.raises(UserError, match="vision_config: found None, expected a JSON object"):
        SiglipVisionConfig.from_json({"model_type": "siglip"})
