"""The autoencoder, whole and in tiles: weights through the production loader, every stored intermediate."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import flow
from nabla_jax.checkpoints.safetensors_io import load_tree
from nabla_jax.models import autoencoder, layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from tests.golden import golden

ATOL = 2e-5


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.case("vae")


@pytest.fixture(scope="module")
def config(case) -> AutoencoderKLConfig:
    return AutoencoderKLConfig.from_json(case.config["vae"])


@pytest.fixture(scope="module")
def model(case, config) -> AutoencoderKL:
    graphdef, abstract = layers.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return layers.bind(graphdef, load_tree(case.path("weights"), abstract, dtype=jnp.float32))


def test_from_picture_to_tokens(case, config, model) -> None:
    data = case.tensors("plain")
    moments = jax.jit(model.encode)(data["x"])
    mean, logvar = np.split(np.asarray(moments), 2, axis=1)
    latents = autoencoder.sample_latents(moments, data["eps"], config)
    found = {
        "mean": mean,
        "logvar": logvar,
        "std": np.exp(0.5 * logvar),
        "sample": autoencoder.unscale(latents, config),
        "scaled": latents,
        "packed": flow.pack(latents),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, data[name], rtol=0, atol=ATOL, err_msg=name)


def test_from_latents_to_picture(case, model) -> None:
    data = case.tensors("plain")
    found = jax.jit(model.decode)(data["z"])
    np.testing.assert_allclose(found, data["decoded"], rtol=0, atol=ATOL)
    height, width = data["scaled"].shape[-2:]
    np.testing.assert_array_equal(flow.unpack(data["packed"], height, width), data["scaled"])


@pytest.mark.parametrize(("tiled", "suffix"), [(True, ""), (False, "_untiled")])
def test_pictures_larger_than_a_tile(case, model, tiled, suffix) -> None:
    data = case.tensors("tiled")
    assert max(data["x"].shape[2:]) > model.tile
    mean, logvar = np.split(np.asarray(jax.jit(model.encode, static_argnames="tiled")(data["x"], tiled=tiled)), 2, 1)
    np.testing.assert_allclose(mean, data[f"mean{suffix}"], rtol=0, atol=ATOL)
    if tiled:
        np.testing.assert_allclose(logvar, data["logvar"], rtol=0, atol=ATOL)
        difference = np.abs(data["mean"] - data["mean_untiled"]).max()
        np.testing.assert_allclose(difference, case.scalar("tiled_vs_plain.mean"), rtol=1e-6)
    decoded = jax.jit(model.decode, static_argnames="tiled")(data["z"], tiled=tiled)
    np.testing.assert_allclose(decoded, data[f"decoded{suffix}"], rtol=0, atol=ATOL)


def test_intermediates(case, model) -> None:
    data = case.tensors("plain")
    expected = case.tensors("plain", "mid.")
    if not expected:
        return  # sets made for acceptance hold inputs and outputs only
    passed: list[tuple[str, jax.Array]] = []

    def recording(kind: str, call):
        def wrapped(self, x):
            passed.append((kind, call(self, x)))
            return passed[-1][1]

        return wrapped

    kinds = {"down": autoencoder.DownBlock, "mid": autoencoder.MidBlock, "up": autoencoder.UpBlock}
    for name, cls in kinds.items():
        patch = mock.patch.object(cls, "__call__", recording(name, cls.__call__))
        patch.start()
    try:
        model.encode(data["x"])
        encoded = list(passed)
        passed.clear()
        model.decode(data["z"])
    finally:
        mock.patch.stopall()
    # The model works on pictures with channels last; the stored ones have them second.
    found = {"enc.conv_in": np.moveaxis(np.asarray(model.encoder.conv_in(data["x"])), 1, -1)}
    for part, calls in (("enc", encoded), ("dec", passed)):
        for kind in kinds:
            outputs = [value for name, value in calls if name == kind]
            for i, value in enumerate(outputs):
                found[f"{part}.{kind}" if kind == "mid" else f"{part}.{kind}{i}"] = value
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        ours = np.moveaxis(np.asarray(found[name]), -1, 1)
        np.testing.assert_allclose(ours, value, rtol=0, atol=ATOL * scale, err_msg=name)
