"""The CLIP text encoder against transformers', on tiny random weights written by transformers."""

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
from nabla_jax.models.clip import LEGACY_EOS, TABLE, CLIPText, CLIPTextConfig

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
}
EOS = 39


def save(folder, eos):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**SIZES, bos_token_id=38, eos_token_id=eos, pad_token_id=1)
    model = transformers.CLIPTextModel(config).eval()
    with torch.no_grad():
        # Freshly drawn CLIP weights are near the identity and its norms trivial; widen both.
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.1 if "norm" in name or "bias" in name else 0.3))
    model.save_pretrained(folder)
    return model


def load(folder, dtype=jnp.float32):
    config = CLIPTextConfig.from_json(folder / "config.json")
    graphdef, abstract = layers.abstract(lambda rngs: CLIPText(config, rngs=rngs, dtype=dtype))
    return graphdef, load_tree(folder, abstract, TABLE)


def prompts(length):
    """Ids with one end-of-text token inside, padded by the same token, and one row padded by another."""
    ids = np.random.default_rng(length).integers(2, 38, (3, length))
    ids[:, 0] = 38
    ids[0, -1] = EOS
    ids[1, length // 2 :] = EOS
    ids[2, length // 2] = EOS
    ids[2, length // 2 + 1 :] = 1
    return ids


@pytest.mark.parametrize("eos", [LEGACY_EOS, EOS])
@pytest.mark.parametrize("length", [3, 12])
def test_hidden_and_pooled_equal_transformers(tmp_path, eos, length):
    model = save(tmp_path, eos)
    ids = prompts(length)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids))
    graphdef, params = load(tmp_path)
    hidden, pooled = jax.jit(lambda p, x: layers.bind(graphdef, p)(x))(params, ids.astype(np.int32))
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), rtol=0, atol=2e-5)


def test_gradients_equal_transformers(tmp_path):
    model = save(tmp_path, EOS)
    ids = prompts(8)
    weight = np.random.default_rng(5).normal(size=(3, SIZES["hidden_size"])).astype(np.float32)
    (model(torch.from_numpy(ids)).pooler_output * torch.from_numpy(weight)).sum().backward()
    graphdef, params = load(tmp_path)

    @jax.jit
    def grads(p):
        return jax.grad(lambda q: (layers.bind(graphdef, q)(ids.astype(np.int32))[1] * weight).sum())(p)

    actual = {name.removeprefix("text_model."): grad for name, grad in flatten(grads(params)).items()}
    expected = {name.removeprefix("text_model."): p.grad for name, p in model.named_parameters()}
    assert set(actual) == set(expected)
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        np.testing.assert_allclose(actual[name], grad.numpy(), rtol=0, atol=1e-5 * largest, err_msg=name)


def test_a_later_token_changes_nothing_before_it(tmp_path):
    save(tmp_path, EOS)
    graphdef, params = load(tmp_path)
    model = jax.jit(lambda x: layers.bind(graphdef, params)(x))
    ids = prompts(10).astype(np.int32)
    changed = ids.copy()
    changed[:, 7:] = 5
    before, after = model(ids)[0], model(changed)[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_files_with_and_without_the_prefix_and_with_position_buffers_load(tmp_path, prefix):
    save(tmp_path, EOS)
    flat = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("text_model."): value for name, value in flat.items()}
    named = {prefix + name: value for name, value in bare.items()}
    named[f"{prefix}embeddings.position_ids"] = np.arange(12)[None]
    save_file(named, tmp_path / "model.safetensors")
    _, params = load(tmp_path)
    loaded = flatten(params)
    assert set(loaded) == {f"text_model.{name}" for name in bare}
    for name, value in bare.items():
        np.testing.assert_array_equal(loaded[f"text_model.{name}"], value)


def test_the_published_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        config = transformers.CLIPTextConfig(**CLIPTextConfig.large().to_json())
        state = transformers.CLIPTextModel(config).state_dict()
    expected = {
        "text_model." + name.removeprefix("text_model."): tuple(value.shape)
        for name, value in state.items()
        if not name.endswith("position_ids")
    }
    _, abstract = layers.abstract(lambda rngs: CLIPText(CLIPTextConfig.large(), rngs=rngs))
    assert {name: leaf.shape for name, leaf in flatten(abstract).items()} == expected
    assert sum(np.prod(shape) for shape in expected.values()) == 123_060_480


def test_configs_of_other_architectures_are_refused():
    good = CLIPTextConfig(**SIZES, bos_token_id=38, eos_token_id=39)
    assert CLIPTextConfig.from_json(good.to_json()) == good
    with pytest.raises(UserError, match="hidden_act: found 'gelu', expected 'quick_gelu'"):
        CLIPTextConfig.from_json(good.to_json() | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match=r"missing keys: hidden_size"):
        CLIPTextConfig.from_json({k: v for k, v in good.to_json().items() if k != "hidden_size"})
    with pytest.raises(UserError, match=r"hidden_size: found 25, expected a multiple"):
        CLIPTextConfig.from_json(good.to_json() | {"hidden_size": 25})


def test_too_many_tokens_are_refused(tmp_path):
    save(tmp_path, EOS)
    with pytest.raises(ValueError, match="found 13 tokens, expected at most 12"):
        layers.bind(*load(tmp_path))(np.zeros((1, 13), np.int32))
