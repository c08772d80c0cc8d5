"""Noise levels and Euler steps against the published scheduler's own numbers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax.flow import euler, sampler, sigmas
from tests.golden.golden import case

MODELS = ("schnell", "dev")


def _runs() -> list[tuple[str, int, int]]:
    return [(model, steps, tokens) for model in MODELS for steps, tokens in case("schedules").config["pairs"]]


@pytest.mark.parametrize(("model", "steps", "tokens"), _runs())
def test_sigmas_equal_the_published_ones(model: str, steps: int, tokens: int) -> None:
    golden = case("schedules")
    ours = sigmas(golden.config[model], steps, tokens)
    expected = golden.tensor("schedules", f"{model}.steps{steps}.n{tokens}.sigmas")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(("model", "steps", "tokens"), _runs())
def test_time_is_sigma(model: str, steps: int, tokens: int) -> None:
    golden = case("schedules")
    times = golden.tensor("schedules", f"{model}.steps{steps}.n{tokens}.timesteps")
    np.testing.assert_allclose(1000 * sigmas(golden.config[model], steps, tokens)[:-1], times, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("tokens", sorted({tokens for _, tokens in case("schedules").config["pairs"]}))
def test_resolution_shift(tokens: int) -> None:
    golden = case("schedules")
    shift = sampler._resolution_shift(golden.config["dev"], tokens)
    assert shift == pytest.approx(golden.scalar(f"mu.n{tokens}"), rel=1e-12)


@pytest.mark.parametrize(("model", "steps", "tokens"), _runs())
def test_euler_follows_the_published_steps(model: str, steps: int, tokens: int) -> None:
    golden = case("schedules")
    prefix = f"{model}.steps{steps}.n{tokens}.euler"
    count = sum(name.startswith(prefix) for name in golden.names("schedules"))
    track = [golden.tensor("schedules", f"{prefix}{index}") for index in range(count)]
    positions, velocities = track[0::2], track[1::2]
    assert len(positions) == len(velocities) + 1 >= 2
    levels = sigmas(golden.config[model], steps, tokens)
    for first, last in itertools.combinations(range(len(positions)), 2):
        recorded, here = jnp.asarray(np.stack(velocities[first:last])), jnp.asarray(levels[first:last])
        ours = euler(
            lambda x, sigma, v=recorded, s=here: v[jnp.argmax(s == sigma)],
            jnp.asarray(positions[first]),
            levels[first : last + 1],
        )
        np.testing.assert_allclose(ours, positions[last], atol=5e-7 * np.abs(positions[last]).max())
