"""A base that starts from another computes at first what the other computes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax.checkpoints import pipeline
from nabla_jax.conditioning import omini
from nabla_jax.errors import UserError
from nabla_jax.models import clip, flux, layers
from nabla_jax.pretrain import start

KONTEXT = flux.FluxConfig(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
FILL = dataclasses.replace(KONTEXT, in_channels=28, out_channels=16)
SCHNELL = dataclasses.replace(KONTEXT, guidance_embeds=False)
SCALE = 2.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _, params = layers.initialize(lambda rngs: flux.Flux(KONTEXT, rngs=rngs), jax.random.key(0))
    pipeline.save_part(tmp_path, "transformer", KONTEXT, params)
    return tmp_path


def velocity(config: flux.FluxConfig, params: layers.Params, tokens: jax.Array, guidance: float | None) -> np.ndarray:
    graphdef, _ = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs))
    keys = jax.random.split(jax.random.key(1), 3)
    prompt, pooled = jax.random.normal(keys[0], (2, 3, 8)), jax.random.normal(keys[1], (2, 8))
    time = jnp.array([0.2, 0.9])
    branches = omini.branches(prompt, pooled, tokens, omini.grid_ids(2, 2), time, guidance=guidance)
    return np.asarray(layers.bind(graphdef, params)(branches))


def test_the_guidance_that_is_built_in_gives_the_same_velocity(folder: Path) -> None:
    tokens = jax.random.normal(jax.random.key(2), (2, 4, 16))
    expected = velocity(KONTEXT, pipeline.load_transformer(folder).params, tokens, SCALE)
    params = start.transformer(folder, SCHNELL, SCALE)
    np.testing.assert_allclose(velocity(SCHNELL, params, tokens, None), expected, rtol=0, atol=1e-5)
    other = start.transformer(folder, SCHNELL, 1.0)
    assert np.abs(velocity(SCHNELL, other, tokens, None) - expected).max() > 1e-3


def test_flat_guidance_is_one_scale_at_every_scale(folder: Path) -> None:
    tokens = jax.random.normal(jax.random.key(2), (2, 4, 16))
    params = pipeline.load_transformer(folder).params
    expected, flat = velocity(KONTEXT, params, tokens, SCALE), start.flatten_guidance(params, SCALE)
    np.testing.assert_allclose(velocity(KONTEXT, flat, tokens, 30.0), expected, rtol=0, atol=1e-5)
    assert np.abs(velocity(KONTEXT, params, tokens, 30.0) - expected).max() > 1e-3


def test_new_input_channels_are_not_looked_at(folder: Path) -> None:
    tokens = jax.random.normal(jax.random.key(2), (2, 4, 28))
    expected = velocity(KONTEXT, pipeline.load_transformer(folder).params, tokens[..., :16], SCALE)
    params = start.transformer(folder, FILL, SCALE)
    np.testing.assert_allclose(velocity(FILL, params, tokens, SCALE), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"num_single_layers": 2}, {"in_channels": 8}, {"out_channels": 32}])
def test_another_architecture_is_refused(folder: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="transformer_model"):
        start.transformer(folder, dataclasses.replace(KONTEXT, **changes), SCALE)


def test_units_without_effect_are_the_ones_dropped() -> None:
    config = clip.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4, bos_token_id=18, eos_token_id=19,
    )  # fmt: skip
    graphdef, params = layers.initialize(lambda rngs: clip.CLIPText(config, rngs=rngs), jax.random.key(0))
    for name, dead in (("0", [1, 4]), ("1", [0, 5])):
        second = params["text_model"]["encoder"]["layers"][name]["mlp"]["fc2"]
        second["weight"] = second["weight"].at[:, jnp.array(dead)].set(0.0)
    narrow = start.narrow_clip(pipeline.Component(config, graphdef, params), 4)
    assert narrow.config == dataclasses.replace(config, intermediate_size=4)
    ids = jnp.array([[18, 3, 5, 19], [18, 7, 19, 19]])
    found, expected = (layers.bind(g, p)(ids) for g, p in ((narrow.graphdef, narrow.params), (graphdef, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)
    assert narrow.params["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["weight"].shape == (4, 8)


def test_parts_are_shared_with_a_sibling_and_copied_elsewhere(tmp_path: Path) -> None:
    origin, sibling, stranger = tmp_path / "bases" / "a", tmp_path / "bases" / "b", tmp_path / "c"
    for name in start.SHARED:
        (origin / name).mkdir(parents=True)
        (origin / name / "config.json").write_text(name)
        (origin / name / "weights.safetensors").write_text(f"weights of {name}")
    for output in (sibling, stranger):
        for _ in range(2):  # over what is there
            start.copy_shared(origin, output)
        for name in start.SHARED:
            weights = output / name / "weights.safetensors"
            assert weights.is_symlink() == (output == sibling)
            assert weights.read_text() == f"weights of {name}"
            assert not (output / name / "config.json").is_symlink()
    (tmp_path / "bases").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "b" / "vae" / "weights.safetensors").read_text() == "weights of vae", "relative"
