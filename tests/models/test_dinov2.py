"""DINOv2 against transformers', on small random weights written by transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints.safetensors_io import flatten
from nabla_jax.checkpoints.transformers_folder import check_network, load_dinov2, save_network
from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.dinov2 import Dinov2, Dinov2Config
from nabla_jax.models.vision import bicubic_weights, resize_positions
from tests.models.vision_reference import randomise

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 4,
    "image_size": 35,
    "patch_size": 7,
}


def save_backbone(folder, **changes):
    model = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES | changes)))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return save_backbone(folder), folder


def features(component, pixels, **options):
    return jax.jit(lambda p, x: layers.bind(component.graphdef, p)(x, **options))(component.params, pixels)


def pictures(batch, height, width):
    return np.random.default_rng(batch + height).normal(size=(batch, 3, height, width)).astype(np.float32)


def check_equal(actual, model, pixels):
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    np.testing.assert_allclose(actual.pooled, expected[:, 0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(actual.patches, expected[:, 1:], rtol=0, atol=2e-5)


# Its own size; smaller, as the metric uses it; larger; not square with a rest; as many patches in another shape.
@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 35, 35), (2, 21, 21), (1, 49, 49), (2, 29, 45), (2, 7, 175)]
)
def test_features_equal_transformers(backbone, batch, height, width):
    model, folder = backbone
    pixels = pictures(batch, height, width)
    check_equal(features(load_dinov2(folder), pixels), model, pixels)


def test_scanned_layers_equal_unrolled_ones_and_deep_backbones_are_scanned(backbone):
    model, folder = backbone
    component = load_dinov2(folder)
    pixels = pictures(2, 21, 21)
    check_equal(features(component, pixels, scan=True), model, pixels)
    for depth, scans in ((3, 0), (12, 1)):
        config = dataclasses.replace(component.config, num_hidden_layers=depth)
        graphdef, abstract = layers.abstract(lambda rngs, c=config: Dinov2(c, rngs=rngs))
        program = jax.make_jaxpr(lambda p, g=graphdef: layers.bind(g, p)(pixels))(abstract)
        assert str(program).count("scan[") == scans


@pytest.mark.parametrize(("size", "n"), [(37, 16), (16, 37), (5, 5), (3, 1), (1, 4), (2, 7)])
def test_positions_are_resampled_as_torch_does(size, n):
    values = np.random.default_rng(size).normal(size=(size * size, 3)).astype(np.float32)
    grid = torch.from_numpy(values.reshape(1, size, size, 3)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(n, n + 1), mode="bicubic", align_corners=False)
    actual = resize_positions(jnp.asarray(values), (n, n + 1))
    # torch rounds the places to float32: at 37 that is 4e-6 of a step between neighbours.
    np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1).reshape(-1, 3), rtol=0, atol=1e-5)
    np.testing.assert_allclose(bicubic_weights(size, n).sum(1), 1, rtol=0, atol=1e-6)


def test_positions_of_their_own_grid_are_taken_as_they_are():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.bfloat16)
    np.testing.assert_array_equal(resize_positions(values, (3, 3)), values)
    assert resize_positions(values, (2, 5)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="found 8, expected the square"):
        resize_positions(values[1:], (3, 3))


def test_the_files_tensors_are_the_trees(backbone, tmp_path):
    _, folder = backbone
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for name in ("embeddings.mask_token", "encoder.layer.2.layer_scale1.lambda1"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"1 missing: {name}"):
            check_network(tmp_path, "dinov2")
    for name in ("embeddings.register_tokens", "classifier.weight"):
        save_file(tensors | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"1 not expected .*{name}"):
            check_network(tmp_path, "dinov2")


def test_a_saved_backbone_loads_in_transformers(backbone, tmp_path):
    model, folder = backbone
    component = load_dinov2(folder)
    save_network(tmp_path, "dinov2", component.config, component.params)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    loaded, report = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_bfloat16_parameters_compute_in_bfloat16(backbone):
    model, folder = backbone
    pixels = pictures(2, 21, 28)
    component = load_dinov2(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in flatten(component.params).values()} == {jnp.dtype("bfloat16")}
    actual = features(component, pixels)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state[:, 0].numpy()
    assert actual.pooled.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(actual.pooled, np.float32) - expected) / np.linalg.norm(expected)
    assert 0 < error < 3e-2


def test_configs_of_other_architectures_are_refused():
    good = Dinov2Config(**SIZES).to_json()
    assert Dinov2Config.from_json(good) == Dinov2Config(**SIZES)
    for change, message in [
        ({"model_type": "dinov2_with_registers"}, "model_type: found 'dinov2_with_registers', expected 'dinov2'"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn: found True, expected False"),
        ({"hidden_act": "gelu_new"}, "hidden_act: found 'gelu_new', expected 'gelu'"),
        ({"num_attention_heads": 5}, "hidden_size: found 24, expected a multiple of num_attention_heads"),
        ({"mlp_ratio": 2.5}, "mlp_ratio: found 2.5, expected a positive whole number"),
        ({"patch_size": 36}, "patch_size: found 36, expected at most 35"),
    ]:
        with pytest.raises(UserError, match=message):
            Dinov2Config.from_json(good | change)
    with pytest.raises(UserError, match="missing keys: image_size"):
        Dinov2Config.from_json({k: v for k, v in good.items() if k != "image_size"})
