"""Sampling from moments: remembered conditions, an adapter per condition, image guidance, the kinds of bases."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import api, flow, reposing
from nabla_jax.checkpoints.adapters import AdapterMetadata
from nabla_jax.conditioning import omini
from nabla_jax.config import Conditioning
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.models.flux import Flux, FluxConfig
from tests import fixtures

CONFIG = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=7,
    axes_dims_rope=(2, 2, 4),
    in_channels=16,
    guidance_embeds=True,
)
VAE = AutoencoderKLConfig(latent_channels=4)
GRID = (2, 3)
LEVELS = np.array([1.0, 0.6, 0.0], np.float32)


@pytest.fixture(scope="module")
def setup():
    """(method, base, two adapters)."""
    graphdef, _ = layers.abstract(lambda rngs: Flux(CONFIG, rngs=rngs))
    base = fixtures.random_params(lambda rngs: Flux(CONFIG, rngs=rngs), np.random.default_rng(0))
    fresh = lora.initialize(jax.random.key(0), base, rank=2, alpha=2, stacked=flux.STACKED)
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        drawn = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32) / 3, fresh.params)
        adapters[name] = lora.Adapter(drawn, fresh.scale)
    return reposing.Method(graphdef, VAE, "a", False, True), base, adapters


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shape = (2, 8, 2 * GRID[0], 2 * GRID[1])
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name in ("subject", "control", "empty")}
    return drawn | {
        "prompt_embeds": rng.normal(size=(2, 4, 10)).astype(np.float32),
        "pooled": rng.normal(size=(2, 7)).astype(np.float32),
        "sample": np.array([3, 4], np.uint32),
    }


def sample(setup, *image_guidance: float, levels: np.ndarray = LEVELS, **changes) -> np.ndarray:
    method, base, adapters = setup
    sampler = reposing.make_sampler(dataclasses.replace(method, **changes))
    image = [jnp.float32(x) for x in image_guidance]
    return np.asarray(sampler(base, adapters, batch(), levels, jnp.float32(2.5), jnp.uint32(0), *image))


def by_hand(
    setup,
    image_guidance: float | None = None,
    *,
    control: str = "a",
    independent=False,
    subject_ids=None,
    levels=LEVELS,
):
    """Euler steps over the branches themselves, every condition anew at every step."""
    method, base, adapters = setup
    data = batch()

    def tokens(first: str, second: str):
        return reposing.condition_tokens(method, data[first], data[second], jnp.uint32(0), data["sample"])

    def velocity(latents, sigma, pictures):
        conditions = [
            omini.Condition(pictures[0], omini.grid_ids(*GRID, index=1) if subject_ids is None else subject_ids, "a"),
            omini.Condition(pictures[1], omini.grid_ids(*GRID), control),
        ]
        streams = omini.branches(
            data["prompt_embeds"], data["pooled"], latents, omini.grid_ids(*GRID), jnp.full(2, sigma), guidance=2.5,
            conditions=conditions, independent=independent,
        )  # fmt: skip
        return layers.bind(method.transformer, base)(streams, adapters=adapters)

    state = flow.pack(jnp.zeros((2, 4, 4, 6)))
    state = reposing.draws.normal(
        reposing.draws.keys(jnp.uint32(0), data["sample"], reposing.draws.NOISE), state.shape[1:]
    )
    step = jax.jit(velocity)
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        v = step(state, now, tokens("subject", "control"))
        if image_guidance is not None:
            without = step(state, now, tokens("empty", "empty"))
            v = without + image_guidance * (v - without)
        state = state + (following - now) * v
    return np.asarray(flow.unpack(state, 4, 6))


def check(found: np.ndarray, expected: np.ndarray, plain: np.ndarray | None = None) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    if plain is not None:
        assert np.abs(found - plain).max() > 1e-2


def test_conditions_and_their_variants(setup) -> None:
    plain = sample(setup)
    check(plain, by_hand(setup))
    check(sample(setup, independent=True), by_hand(setup, independent=True), plain)
    check(sample(setup, control_adapter="b"), by_hand(setup, control="b"), plain)
    left = omini.grid_ids(*GRID, offset=(0, -GRID[1]))
    check(sample(setup, kontext=False), by_hand(setup, subject_ids=left), plain)


def test_remembered_conditions_change_nothing(setup) -> None:
    """One run of the conditions, or one at every step: the same latents after 28 steps."""
    levels = flow.sigmas({"use_dynamic_shifting": True}, 28, GRID[0] * GRID[1])
    remembered = sample(setup, independent=True, levels=levels)
    np.testing.assert_allclose(remembered, by_hand(setup, independent=True, levels=levels), rtol=0, atol=1e-5)


def test_image_guidance(setup) -> None:
    plain = sample(setup)
    check(sample(setup, 2.0), by_hand(setup, 2.0), plain)
    check(sample(setup, 1.0), plain)
    remembered = sample(setup, 2.0, independent=True, control_adapter="b")
    check(remembered, by_hand(setup, 2.0, independent=True, control="b"))


def test_an_adapter_for_one_condition_is_given_for_that_one() -> None:
    metadata = AdapterMetadata(rank=2, alpha=2, reads="control")
    with pytest.raises(UserError, match=r"c\.safetensors: reads control, expected both or subject for adapter"):
        api.check_reads(Path("c.safetensors"), metadata, ("both", "subject"), "adapter")
    api.check_reads(Path("c.safetensors"), metadata, ("both", "control"), "control_adapter")


def test_the_cache_needs_independent_conditions(setup) -> None:
    method, base, adapters = setup
    tokens = jnp.zeros((1, 6, 16))
    conditions = method.conditions(tokens, tokens, GRID)
    with pytest.raises(UserError, match="found independent_conditions false, expected true"):
        reposing.remember(method, base, adapters, conditions, jnp.zeros((1, 7)))
    with pytest.raises(
        UserError, match=r"fill\.safetensors: condition cache: found independent_conditions false"
    ) as error:
        api.check_cache(True, Conditioning(size=32), Path("fill.safetensors"))
    assert "\n" not in str(error.value)
    api.check_cache(None, Conditioning(size=32), None)
    api.check_cache(True, Conditioning(size=32, independent_conditions=True), None)
