"""LPIPS against the numbers of the published package: a narrow network, and VGG16 at its full width."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_jax.checkpoints.transformers_folder import load_lpips, write_lpips
from nabla_jax.metrics.preprocessing import lpips_pixels
from nabla_jax.models import layers
from nabla_jax.models.lpips import DEPTHS, SCALE, SHIFT
from tests.golden import golden

ATOL = 1e-5
VARIANTS = {"plain": ("a", "b"), "masked": ("a_masked", "b_masked"), "same": ("a", "a")}


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.case("lpips")


def seeded_vgg(case):
    """The full-width convolutions, drawn as the manifest says."""
    seed, tensors = case.config["full_seed"], {}
    index, before = 0, 3
    for level, (channels, depth) in enumerate(zip(case.config["full_channels"], DEPTHS, strict=True)):
        index += level > 0
        for _ in range(depth):
            weight = np.random.RandomState(seed + index).standard_normal((channels, before, 3, 3))
            bias = np.random.RandomState(seed + 500 + index).standard_normal(channels)
            tensors[f"features.{index}.weight"] = (weight * np.sqrt(2 / (9 * before))).astype(np.float32)
            tensors[f"features.{index}.bias"] = (bias * 0.05).astype(np.float32)
            index, before = index + 2, channels
    return tensors


@pytest.fixture(scope="module")
def networks(case, tmp_path_factory):
    """The networks by name, through the folder that a user makes of the two published files."""
    return {name: network(case, name, tmp_path_factory.mktemp(name)) for name in ("tiny", "full")}


def network(case, name, folder):
    if name == "tiny":
        stored = load_file(case.path("weights_tiny"))
        vgg = {k: v for k, v in stored.items() if k.startswith("features.")}
        lin = {k: v for k, v in stored.items() if k not in vgg}
    else:
        vgg, lin = seeded_vgg(case), load_file(case.path("weights_full_lin"))
        for layer, expected in case.scalar("full.weight_sums").items():
            assert vgg[f"{layer}.weight"].astype(np.float64).sum() == pytest.approx(expected, abs=1e-6)
    write_lpips(folder, vgg, lin)
    component = load_lpips(folder)
    assert list(component.config.channels) == case.config[f"{name}_channels"]
    return component


def pairs(case):
    return [file for file in case.files if file.startswith("pair")]


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_distances_and_the_levels_shares(case, networks, name):
    component = networks[name]
    shares = jax.jit(lambda p, a, b: layers.bind(component.graphdef, p).contributions(a, b))
    distance = jax.jit(lambda p, a, b: layers.bind(component.graphdef, p)(a, b))
    assert pairs(case)
    for file in pairs(case):
        for variant, names in VARIANTS.items():
            a, b = (lpips_pixels([case.tensor(file, key)]) for key in names)
            expected = case.tensor(file, f"{name}.{variant}.layers")
            np.testing.assert_allclose(shares(component.params, a, b)[0], expected, rtol=0, atol=ATOL)
            total = distance(component.params, a, b)
            np.testing.assert_allclose(total, case.tensor(file, f"{name}.{variant}"), rtol=0, atol=ATOL)


def test_intermediates_of_the_narrow_network(case, networks):
    component = networks["tiny"]
    model = layers.bind(component.graphdef, component.params)
    for file in pairs(case):
        a = lpips_pixels([case.tensor(file, "a")])
        for key, expected in case.tensors(file, "mid.tiny.").items():
            if key == "scaled_a":
                shift, scale = (np.float32(x)[:, None, None] for x in (SHIFT, SCALE))
                found = (a - shift) / scale
            else:
                assert key.startswith("feat")
                assert key.endswith("_a")
                found = np.moveaxis(np.asarray(model.levels(a)[int(key[4])]), -1, 1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=key)
