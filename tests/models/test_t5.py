"""The T5 encoder against transformers', on tiny random weights written by transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints.safetensors_io import flatten, load_tree
from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.t5 import TABLE, T5Config, T5Encoder, relative_buckets

SIZES = {"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.T5Config(
        **SIZES, feed_forward_proj="gated-gelu", relative_attention_max_distance=20, layer_norm_epsilon=1e-5
    )
    model = transformers.T5EncoderModel(config).eval()
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return model, folder


def load(folder, dtype=jnp.float32):
    config = T5Config.from_json(folder / "config.json")
    graphdef, abstract = layers.abstract(lambda rngs: T5Encoder(config, rngs=rngs, dtype=dtype))
    return graphdef, load_tree(folder, abstract, TABLE)


def apply(graphdef, params, *inputs):
    return jax.jit(lambda p, *x: layers.bind(graphdef, p)(*x))(params, *inputs)


@pytest.mark.parametrize("length", [1, 7, 60])
def test_embeddings_equal_transformers(reference, length):
    model, folder = reference
    ids = np.random.default_rng(length).integers(0, SIZES["vocab_size"], (2, length))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    graphdef, params = load(folder)
    actual = apply(graphdef, params, ids.astype(np.int32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_masked_padding_equals_transformers(reference):
    model, folder = reference
    ids = np.random.default_rng(3).integers(1, SIZES["vocab_size"], (2, 9))
    ids[0, 5:] = 0
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(ids != 0).long()).last_hidden_state.numpy()
    graphdef, params = load(folder)
    actual = apply(graphdef, params, ids.astype(np.int32), ids != 0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_gradients_equal_transformers(reference):
    model, folder = reference
    ids = np.random.default_rng(4).integers(0, SIZES["vocab_size"], (2, 6))
    weight = np.random.default_rng(5).normal(size=(2, 6, SIZES["d_model"])).astype(np.float32)
    model.zero_grad()
    (model(torch.from_numpy(ids)).last_hidden_state * torch.from_numpy(weight)).sum().backward()
    graphdef, params = load(folder)

    @jax.jit
    def grads(p):
        return jax.grad(lambda q: (layers.bind(graphdef, q)(ids.astype(np.int32)) * weight).sum())(p)

    actual = flatten(grads(params))
    for name, parameter in model.named_parameters():
        if name in actual:
            scale = parameter.grad.abs().max().item()
            np.testing.assert_allclose(actual[name], parameter.grad.numpy(), rtol=0, atol=2e-5 * scale)
    assert set(actual) <= {name for name, _ in model.named_parameters()}


def test_bfloat16_stays_near_float32(reference):
    _, folder = reference
    ids = np.arange(10, dtype=np.int32)[None]
    full = apply(*load(folder), ids)
    half = apply(*load(folder, jnp.bfloat16), ids)
    assert half.dtype == jnp.bfloat16
    relative = np.linalg.norm(half.astype(np.float32) - full) / np.linalg.norm(full)
    assert 0 < relative < 0.03


@pytest.mark.parametrize(
    "names",
    [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")],
)
def test_the_embedding_may_carry_either_published_name(reference, tmp_path, names):
    _, folder = reference
    flat = load_file(folder / "model.safetensors")
    table = flat.pop("shared.weight")
    save_file(flat | {name: table.copy() for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    np.testing.assert_array_equal(load(tmp_path)[1]["shared"]["weight"], table)


def test_a_foreign_tensor_is_refused(reference, tmp_path):
    _, folder = reference
    flat = load_file(folder / "model.safetensors")
    stray = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(flat | {stray: np.zeros((32, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=stray.replace(".", r"\.")):
        load(tmp_path)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 20), (16, 64), (64, 300)])
def test_buckets_equal_transformers(buckets, distance):
    offsets = np.arange(-600, 601)
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(torch.from_numpy(offsets), True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(offsets, buckets, distance), expected.numpy())


def test_the_published_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        config = transformers.T5Config(**T5Config.xxl().to_json())
        expected = {k: tuple(v.shape) for k, v in transformers.T5EncoderModel(config).state_dict().items()}
    expected.pop("encoder.embed_tokens.weight", None)
    _, abstract = layers.abstract(lambda rngs: T5Encoder(T5Config.xxl(), rngs=rngs))
    assert {name: leaf.shape for name, leaf in flatten(abstract).items()} == expected
    assert sum(np.prod(shape) for shape in expected.values()) == pytest.approx(4.76e9, rel=0.01)


def test_configs_of_other_architectures_are_refused(tmp_path):
    good = T5Config(**SIZES).to_json()
    assert T5Config.from_json(json.loads(json.dumps(good))) == T5Config(**SIZES)
    with pytest.raises(UserError, match="feed_forward_proj: found 'relu', expected 'gated-gelu'"):
        T5Config.from_json(good | {"feed_forward_proj": "relu"})
    del good["d_kv"], good["feed_forward_proj"]
    (tmp_path / "config.json").write_text(json.dumps(good))
    with pytest.raises(UserError, match=r"config\.json: missing keys: d_kv, feed_forward_proj"):
        T5Config.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        T5Config.from_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="file not found"):
        T5Config.from_json(tmp_path / "absent.json")
