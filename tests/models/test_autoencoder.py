"""The autoencoder against stored reference numbers and against the torch implementation."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoderKL
from safetensors.numpy import load_file

from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, _attend, sample_latents, unscale

GOLDEN = Path(os.environ.get("NABLA_GOLDEN_DIR", Path(__file__).parents[1] / "golden" / "data"))
CASE = GOLDEN / "vae" / os.environ.get("NABLA_GOLDEN_SET", "dev")

TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.7,
    "shift_factor": 0.2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def nest(flat: dict[str, np.ndarray]) -> layers.Params:
    tree: layers.Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value)
    return tree


def flatten(tree: layers.Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def load(config: AutoencoderKLConfig, weights: dict[str, np.ndarray]) -> AutoencoderKL:
    graphdef, shapes = layers.abstract(lambda r: AutoencoderKL(config, rngs=r))
    assert flatten(shapes) == {name: w.shape for name, w in weights.items()}
    return layers.bind(graphdef, nest(weights))


def torch_pair(config: dict, seed: int) -> tuple[TorchAutoencoderKL, AutoencoderKL]:
    torch.manual_seed(seed)
    reference = TorchAutoencoderKL(**config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    weights = {name: w.numpy() for name, w in reference.state_dict().items()}
    return reference, load(AutoencoderKLConfig.from_json(config), weights)


def test_golden() -> None:
    config = AutoencoderKLConfig.from_json(json.loads((CASE / "manifest.json").read_text())["config"]["vae"])
    model = load(config, load_file(CASE / "weights.safetensors"))
    x = load_file(CASE / "plain.safetensors")
    moments = jax.jit(model.encode)(x["x"])
    np.testing.assert_allclose(moments, np.concatenate([x["mean"], x["logvar"]], 1), atol=2e-5)
    np.testing.assert_allclose(sample_latents(moments, x["eps"], config), x["scaled"], atol=2e-5)
    np.testing.assert_allclose(unscale(x["scaled"], config), x["sample"], atol=2e-5)
    np.testing.assert_allclose(jax.jit(model.decode)(x["z"]), x["decoded"], atol=5e-5)


@pytest.mark.parametrize(
    ("batch", "height", "width", "change"),
    [
        (1, 16, 16, {}),
        (2, 8, 20, {"layers_per_block": 2}),
        (2, 24, 16, {"use_quant_conv": True, "use_post_quant_conv": True}),
        (1, 32, 24, {"block_out_channels": [8, 8, 12, 16], "norm_num_groups": 2, "latent_channels": 16}),
    ],
)
def test_equals_torch(batch: int, height: int, width: int, change: dict) -> None:
    config = {**TINY, **change}
    levels = len(config["block_out_channels"])
    config["down_block_types"] = ["DownEncoderBlock2D"] * levels
    config["up_block_types"] = ["UpDecoderBlock2D"] * levels
    reference, model = torch_pair(config, seed=levels)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
    factor = 2 ** (levels - 1)
    z = rng.normal(size=(batch, config["latent_channels"], height // factor, width // factor)).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(torch.from_numpy(images)).latent_dist
        decoded = reference.decode(torch.from_numpy(z)).sample.numpy()
    expected = np.concatenate([posterior.mean.numpy(), posterior.logvar.numpy()], 1)
    np.testing.assert_allclose(jax.jit(model.encode)(images), expected, atol=3e-5)
    np.testing.assert_allclose(jax.jit(model.decode)(z), decoded, atol=3e-5)


@pytest.mark.parametrize(
    ("batch", "height", "width", "change"),
    [
        (1, 48, 80, {}),
        (2, 24, 56, {"use_quant_conv": True, "use_post_quant_conv": True}),
        (1, 66, 32, {}),
        (1, 40, 40, {"sample_size": 22}),
        (2, 32, 16, {}),
    ],
)
def test_tiles_equal_torch(batch: int, height: int, width: int, change: dict) -> None:
    reference, model = torch_pair({**TINY, **change}, seed=1)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
    z = rng.normal(size=(batch, 4, height // 2, width // 2)).astype(np.float32)
    reference.enable_tiling()
    with torch.no_grad():
        posterior = reference.encode(torch.from_numpy(images)).latent_dist
        decoded = reference.decode(torch.from_numpy(z)).sample.numpy()
    expected = np.concatenate([posterior.mean.numpy(), posterior.logvar.numpy()], 1)
    encode, decode = (jax.jit(f, static_argnames="tiled") for f in (model.encode, model.decode))
    np.testing.assert_allclose(encode(images, tiled=True), expected, atol=3e-5)
    np.testing.assert_allclose(decode(z, tiled=True), decoded, atol=3e-5)
    large = max(height, width) > reference.config.sample_size
    assert np.array_equal(encode(images, tiled=True), encode(images)) != large
    assert np.array_equal(decode(z, tiled=True), decode(z)) != large


def test_logvar_is_clipped() -> None:
    _, model = torch_pair(TINY, seed=3)
    bias = np.zeros(8, np.float32)
    bias[4:] = [1e3, -1e3, 1e3, -1e3]
    model.encoder.conv_out.bias.set_value(jnp.asarray(bias))
    logvar = model.encode(jnp.zeros((1, 3, 16, 16)))[:, 4:]
    np.testing.assert_array_equal(logvar[0, :, 0, 0], [20, -30, 20, -30])


def test_chunked_attention_equals_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 30, 8))
    expected = torch.nn.functional.scaled_dot_product_attention(*(torch.tensor(np.asarray(x)) for x in (q, k, v)))
    monkeypatch.setattr("nabla_jax.models.autoencoder.QUERY_CHUNK", 7)
    np.testing.assert_allclose(_attend(q, k, v), expected.numpy(), atol=1e-6)


def test_flux_names_and_sizes() -> None:
    config = AutoencoderKLConfig.flux()
    with torch.device("meta"):
        reference = TorchAutoencoderKL.from_config(config.to_json())
    _, shapes = layers.abstract(lambda r: AutoencoderKL(config, rngs=r))
    assert flatten(shapes) == {name: tuple(w.shape) for name, w in reference.state_dict().items()}
    assert sum(int(np.prod(s)) for s in flatten(shapes).values()) == 83_819_683


def test_config_round_trip(tmp_path: Path) -> None:
    config = AutoencoderKLConfig.from_json(TINY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert AutoencoderKLConfig.from_json(path) == config
    assert config.factor == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "field act_fn: found 'gelu', expected 'silu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types: found 1 blocks, expected 2"),
        ({"norm_num_groups": 3}, "expected a multiple of norm_num_groups = 3"),
        ({"shift_factor": None}, "field shift_factor: missing"),
    ],
)
def test_other_architectures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoencoderKLConfig.from_json({**TINY, **change})


def test_sides_must_be_multiples_of_the_factor() -> None:
    _, model = torch_pair(TINY, seed=0)
    with pytest.raises(ValueError, match="expected multiples of 2"):
        model.encode(jnp.zeros((1, 3, 15, 16)))
