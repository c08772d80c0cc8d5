"""LPIPS against the lpips package: VGG16 at its full width with random weights, the published weights per level."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints.transformers_folder import check_network, load_lpips, write_lpips
from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import lpips_pixels
from nabla_jax.models import layers
from nabla_jax.models.lpips import LpipsConfig
from tests.models.vision_reference import Vgg16, lpips_package


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The package's metric, and our folder made of its parts as a user makes it."""
    package = lpips_package()
    torch.manual_seed(0)
    reference = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    vgg = {}
    for part in (reference.net.slice1, reference.net.slice2, reference.net.slice3, reference.net.slice4):
        vgg |= {f"features.{name}": value for name, value in part.state_dict().items()}
    vgg |= {f"features.{name}": value for name, value in reference.net.slice5.state_dict().items()}
    with torch.device("meta"):
        names = [name for name in Vgg16().state_dict() if name.startswith("classifier.")]
    assert len(names) == 6
    # What the classifier holds is of no importance.
    vgg |= {name: torch.zeros(1) for name in names}
    lin = torch.load(Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth", map_location="cpu")
    folder = tmp_path_factory.mktemp("lpips")
    write_lpips(folder, vgg, lin)
    return reference, folder, (vgg, lin)


def pictures(batch, height, width):
    a, b = np.random.default_rng(height).integers(0, 256, (2, batch, height, width, 3), np.uint8)
    # Half of the second picture equals the first, as outside a mask.
    b[:, :, : width // 2] = a[:, :, : width // 2]
    a[:, : height // 3] = b[:, : height // 3] = 0
    return a, b


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 49, 35), (1, 16, 70)])
def test_distances_equal_the_package(published, batch, height, width):
    reference, folder, _ = published
    component = load_lpips(folder)
    a, b = map(lpips_pixels, pictures(batch, height, width))
    with torch.no_grad():
        expected, shares = reference(torch.from_numpy(a), torch.from_numpy(b), retPerLayer=True)
    actual = jax.jit(lambda p, *x: layers.bind(component.graphdef, p).contributions(*x))
    levels = actual(component.params, a, b)
    np.testing.assert_allclose(levels, torch.cat(shares, 1).numpy().reshape(batch, 5), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(levels.sum(1), expected.numpy().reshape(-1), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(actual(component.params, a, a), np.zeros((batch, 5)), rtol=0, atol=1e-12)


def test_bfloat16_is_near(published):
    _, folder, _ = published
    a, b = map(lpips_pixels, pictures(1, 32, 32))
    exact, near = (
        jax.jit(lambda p, *x, c=c: layers.bind(c.graphdef, p)(*x))(c.params, a, b)
        for c in (load_lpips(folder), load_lpips(folder, dtype="bfloat16"))
    )
    assert near.dtype == np.float32
    assert 0 < abs(float(near[0] / exact[0]) - 1) < 2e-2


def test_the_folder_holds_the_published_names(published):
    _, folder, (vgg, lin) = published
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == {name for name in vgg if name.startswith("features.")} | lin.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, (vgg | dict(lin))[name])
    check_network(folder, "lpips")


def test_torchvisions_file_may_keep_its_classifier(published, tmp_path):
    _, folder, _ = published
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors | {"classifier.6.bias": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    check_network(tmp_path, "lpips")
    for name in ("classifier.7.bias", "features.30.weight", "lin5.model.1.weight"):
        save_file(tensors | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"1 not expected .*{name}"):
            check_network(tmp_path, "lpips")


def test_weights_that_do_not_fit_are_refused_before_writing(published, tmp_path):
    _, _, (vgg, lin) = published
    for changed_vgg, changed_lin, message in [
        ({k: v for k, v in vgg.items() if k != "features.28.bias"}, lin, "features.28.bias is missing"),
        (vgg | {"features.1.running_mean": vgg["features.0.bias"]}, lin, "features.1.running_mean is not expected"),
        (
            vgg | {"features.0.bias": vgg["features.0.bias"][1:]},
            lin,
            r"features.0.bias: found \(63,\), expected \(64,\)",
        ),
        (vgg, {k: v for k, v in lin.items() if "lin2" not in k}, "missing: lin2.model.1.weight"),
    ]:
        with pytest.raises(UserError, match=message):
            write_lpips(tmp_path / "lpips", changed_vgg, changed_lin)
        assert not (tmp_path / "lpips").exists()


def test_pictures_that_cannot_be_compared_are_refused(published):
    component = load_lpips(published[1])
    model = layers.bind(component.graphdef, component.params)
    for a, b in [((1, 3, 32, 32), (1, 3, 32, 33)), ((1, 3, 15, 32),) * 2, ((1, 1, 32, 32),) * 2]:
        with pytest.raises(ValueError, match="expected two equal shapes"):
            model(np.zeros(a, np.float32), np.zeros(b, np.float32))


def test_configs_of_other_networks_are_refused():
    good = LpipsConfig().to_json()
    assert LpipsConfig.from_json(good) == LpipsConfig()
    for change, message in [
        ({"net": "alex"}, "net: found 'alex', expected 'vgg16'"),
        ({"version": "0.0"}, "version: found '0.0', expected '0.1'"),
        ({"channels": [64, 128]}, "channels: found .*expected a list of 5"),
        ({"channels": [64, 128, 256, 512, 0]}, "channels: found 0, expected a positive whole number"),
    ]:
        with pytest.raises(UserError, match=message):
            LpipsConfig.from_json(good | change)
    with pytest.raises(UserError, match="missing keys: channels"):
        LpipsConfig.from_json({k: v for k, v in good.items() if k != "channels"})
