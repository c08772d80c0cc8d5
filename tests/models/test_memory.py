"""Branches that see only themselves, remembered; tokens that are padding; positions that differ between samples."""

import dataclasses

import jax
import numpy as np
import pytest

from nabla_jax.conditioning import omini
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.attention import attend
from nabla_jax.models.flux import Flux, FluxConfig
from tests import fixtures

CONFIG = FluxConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=7,
    axes_dims_rope=(2, 2, 4),
    in_channels=12,
    guidance_embeds=True,
)
GRID = (3, 4)
ATOL = 1e-5


@pytest.fixture(scope="module")
def model():
    """(graphdef, parameters, two adapters with random matrices)."""
    graphdef, _ = layers.abstract(lambda rngs: Flux(CONFIG, rngs=rngs))
    params = fixtures.random_params(lambda rngs: Flux(CONFIG, rngs=rngs), np.random.default_rng(0))
    adapters = {}
    for seed, name in enumerate(("subject", "control")):
        fresh = lora.initialize(jax.random.key(seed), params, rank=2, alpha=2, stacked=flux.STACKED)
        rng = np.random.default_rng(seed)
        trained = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape).astype(np.float32) / 4, fresh.params)
        adapters[name] = lora.Adapter(trained, fresh.scale)
    return graphdef, params, adapters


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(batch: int, **changes):
    """Arguments of ``omini.branches``: two conditions of other sizes than the noise, an adapter each."""
    conditions = [
        omini.Condition(draw(batch, 12, 12, seed=1), omini.grid_ids(*GRID, index=1), "subject"),
        omini.Condition(draw(batch, 6, 12, seed=2), omini.grid_ids(2, 3, scale=1.5), "control"),
    ]
    return {
        "prompt": draw(batch, 5, 10, seed=3),
        "pooled": draw(batch, 7, seed=4),
        "noisy": draw(batch, 12, 12, seed=5),
        "noisy_ids": omini.grid_ids(*GRID),
        "time": np.linspace(0.3, 0.9, batch, dtype=np.float32),
        "guidance": 2.0,
        "conditions": conditions,
    } | changes


def velocity(model, arguments, memory=None, **options) -> np.ndarray:
    graphdef, params, adapters = model
    streams = omini.branches(**arguments)
    run = jax.jit(lambda p: layers.bind(graphdef, p)(streams, adapters=adapters, memory=memory, **options))
    return np.asarray(run(params))


def remember(model, conditions, pooled, **options) -> flux.Memory:
    graphdef, params, adapters = model
    alone = omini.alone(conditions, pooled, guidance_embeds=True)
    return jax.jit(lambda p: layers.bind(graphdef, p).remember(alone, adapters=adapters, **options))(params)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("batch", [1, 2])
def test_remembered_conditions_equal_computed_ones_at_every_step(
    model, batch: int, scan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs(batch)
    if scan:
        # As of large models, whose conditions are computed one after another.
        monkeypatch.setattr(flux, "_UNROLLED_BYTES", 0)
    memory = remember(model, arguments["conditions"], arguments["pooled"], scan=scan)
    assert [k.shape for k, _ in memory.double] == [(2, batch, 12, 2, 8), (2, batch, 6, 2, 8)]
    for seed in range(2):
        step = {"noisy": draw(batch, 12, 12, seed=seed), "time": np.full(batch, 0.8 - seed / 2, np.float32)}
        full = velocity(model, arguments | step | {"independent": True}, scan=scan)
        short = velocity(model, arguments | step | {"conditions": ()}, memory, scan=scan)
        np.testing.assert_allclose(short, full, rtol=0, atol=ATOL)
        without = velocity(model, arguments | step | {"conditions": ()}, scan=scan)
        assert np.abs(full - without).max() > 100 * ATOL


def test_conditions_that_see_the_noise_cannot_be_remembered(model) -> None:
    graphdef, params, adapters = model
    streams = omini.branches(**inputs(1))
    with pytest.raises(UserError, match=r"condition cache: branch 0 sees branches all, expected itself alone"):
        layers.bind(graphdef, params).remember(streams, adapters=adapters)


def kept_mask() -> np.ndarray:
    """Two samples that keep 5 and 9 of 12 tokens."""
    mask = np.zeros((2, 12), bool)
    mask[0, [0, 3, 4, 8, 11]] = True
    mask[1, :9] = True
    return mask


def row(arguments, i: int):
    """One sample of the arguments."""
    conditions = [dataclasses.replace(c, tokens=c.tokens[i : i + 1]) for c in arguments["conditions"]]
    one = {k: v[i : i + 1] for k, v in arguments.items() if k in ("prompt", "pooled", "noisy", "time")}
    return arguments | one | {"conditions": conditions}


@pytest.mark.parametrize("independent", [False, True])
def test_dropped_tokens_equal_shorter_conditions(model, independent: bool) -> None:
    """Samples of a batch that keep different tokens, against each sample alone with its tokens cut out."""
    arguments = inputs(2, independent=independent)
    first, second = arguments["conditions"]
    mask = kept_mask()
    length = omini.bucket(mask, step=5)
    assert length == 10
    compact = omini.compact(first, mask, length)
    found = velocity(model, arguments | {"conditions": [compact, second]})
    for i in range(2):
        alone = row(arguments, i)
        cut = omini.Condition(first.tokens[i : i + 1, mask[i]], first.ids[mask[i]], first.adapter)
        expected = velocity(model, alone | {"conditions": [cut, alone["conditions"][1]]})
        np.testing.assert_allclose(found[i : i + 1], expected, rtol=0, atol=ATOL)
    if independent:
        memory = remember(model, [compact, second], arguments["pooled"])
        short = velocity(model, arguments | {"conditions": (), "independent": False}, memory)
        np.testing.assert_allclose(short, found, rtol=0, atol=ATOL)


def test_a_region_is_generated_and_its_complement_completes_it(model) -> None:
    """Noise tokens inside the region only, the condition's outside it; each sample as if it were alone."""
    arguments, mask = inputs(2), kept_mask()
    whole = arguments["conditions"][0]
    region = omini.keep(mask, omini.bucket(mask, step=5))
    noisy, ids = omini.take(arguments["noisy"], arguments["noisy_ids"], region)
    rest = omini.compact(whole, ~mask, omini.bucket(~mask, step=1))
    changes = {"noisy": noisy, "noisy_ids": ids, "noisy_valid": region.valid, "conditions": [rest]}
    found = velocity(model, arguments | changes)
    picture = np.asarray(omini.complete(found, region, whole.tokens))
    for i in range(2):
        alone = row(arguments, i)
        complement = omini.Condition(whole.tokens[i : i + 1, ~mask[i]], whole.ids[~mask[i]], whole.adapter)
        expected = velocity(
            model,
            alone
            | {
                "noisy": alone["noisy"][:, mask[i]],
                "noisy_ids": arguments["noisy_ids"][mask[i]],
                "conditions": [complement],
            },
        )
        np.testing.assert_allclose(picture[i, mask[i]], expected[0], rtol=0, atol=ATOL)
        np.testing.assert_array_equal(picture[i, ~mask[i]], whole.tokens[i, ~mask[i]])


def test_a_sample_without_any_kept_token_is_the_same_without_the_condition(model) -> None:
    arguments = inputs(1)
    empty = omini.compact(arguments["conditions"][0], np.zeros((1, 12), bool), 4)
    found = velocity(model, arguments | {"conditions": [empty]})
    np.testing.assert_allclose(found, velocity(model, arguments | {"conditions": ()}), rtol=0, atol=ATOL)


def test_buckets() -> None:
    mask = np.zeros((2, 200), bool)
    assert omini.bucket(mask) == 64
    mask[1, :65] = True
    assert omini.bucket(mask) == 128
    assert omini.bucket(np.ones((1, 200), bool)) == 200


def test_scaled_positions_are_the_centres_of_the_covered_squares() -> None:
    """Every token of the half-sized picture lies at the mean of the four tokens it stands for."""
    fine = omini.grid_ids(6, 8).reshape(3, 2, 4, 2, 3).mean(axis=(1, 3)).reshape(-1, 3)
    np.testing.assert_array_equal(omini.grid_ids(3, 4, scale=2.0), fine)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_keys_that_are_padding_do_not_count(implementation: str) -> None:
    q, k, v = (draw(2, n, 3, 4, seed=n) for n in (5, 7, 7))
    v = draw(2, 7, 3, 4, seed=8)
    valid = np.array([[True] * 4 + [False] * 3, [True] * 7])
    found = attend(q, k, v, valid=valid, implementation=implementation)
    np.testing.assert_allclose(found[0], attend(q, k[:, :4], v[:, :4])[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], attend(q, k, v)[1], rtol=0, atol=1e-6)
