"""The noise schedule against the published scheduler, the Euler loop against flows with a known answer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_jax.errors import UserError
from nabla_jax.flow import path, sampler

DYNAMIC = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _published(config: dict[str, Any], steps: int, tokens: int) -> np.ndarray:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    shift = slope * (tokens - config["base_image_seq_len"]) + config["base_shift"]
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    return scheduler.sigmas.numpy()


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 60), tokens=st.integers(1, 10_000), dynamic=st.booleans(), shift=st.floats(0.5, 5.0))
def test_sigmas_equal_the_published_scheduler(steps: int, tokens: int, dynamic: bool, shift: float) -> None:
    config = DYNAMIC | {"use_dynamic_shifting": dynamic, "shift": shift}
    np.testing.assert_allclose(sampler.sigmas(config, steps, tokens), _published(config, steps, tokens), rtol=5e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 100), st.integers(1, 10_000), st.booleans())
def test_sigmas_fall_from_one_to_zero(steps: int, tokens: int, dynamic: bool) -> None:
    levels = sampler.sigmas(DYNAMIC | {"use_dynamic_shifting": dynamic}, steps, tokens)
    assert levels.shape == (steps + 1,) and levels[0] == 1 and levels[-1] == 0
    assert np.all(np.diff(levels) < 0)


def test_a_left_out_key_means_what_the_published_scheduler_takes_it_to_mean() -> None:
    expected = FlowMatchEulerDiscreteScheduler.from_config({})
    expected.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7))
    np.testing.assert_allclose(sampler.sigmas({}, 7, 64), expected.sigmas.numpy(), rtol=1.2e-7)
    signature = FlowMatchEulerDiscreteScheduler().config
    assert {key: signature[key] for key in sampler._DEFAULTS} == sampler._DEFAULTS
    fixed = {key: value for key, value in sampler._FIXED.items() if key != "_class_name"}
    assert {key: signature[key] or fixed[key] for key in fixed} == fixed


@pytest.mark.parametrize(
    ("config", "steps", "tokens", "message"),
    [
        ({"use_karras_sigmas": True}, 4, 16, "use_karras_sigmas is True"),
        ({"_class_name": "DDIMScheduler"}, 4, 16, "DDIMScheduler"),
        ({}, 0, 16, "0 steps"),
        ({}, 4, 0, "0 tokens"),
    ],
)
def test_other_schedules_are_refused(config: dict[str, Any], steps: int, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler.sigmas(config, steps, tokens)


def test_euler_is_exact_on_a_straight_path() -> None:
    x0, x1 = (jax.random.normal(jax.random.key(seed), (2, 6, 8)) for seed in range(2))
    levels = sampler.sigmas(DYNAMIC, 9, 1024)
    ours = sampler.euler(lambda x, sigma: path.velocity(x0, x1), x1, levels)
    np.testing.assert_allclose(ours, x0, atol=2e-6)


def test_euler_equals_the_written_out_loop() -> None:
    levels = sampler.sigmas(DYNAMIC, 5, 1024)
    start = np.asarray(jax.random.normal(jax.random.key(0), (3, 4)), np.float64)
    expected = start.copy()
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        expected += (float(following) - float(now)) * (np.sin(expected) + float(now))
    ours = sampler.euler(lambda x, sigma: jnp.sin(x) + sigma, jnp.asarray(start, jnp.float32), levels)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_euler_keeps_float32_while_the_model_computes_in_bfloat16() -> None:
    levels = np.linspace(1, 0, 1001, dtype=np.float32)
    ours = sampler.euler(lambda x, sigma: jnp.ones(x.shape, jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), levels)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, np.zeros((2, 3)), atol=1e-4)


def test_euler_traces_the_velocity_once() -> None:
    calls = []

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        calls.append(x.shape)
        return -x

    jax.jit(lambda x: sampler.euler(velocity, x, sampler.sigmas(DYNAMIC, 28, 64)))(jnp.ones((2, 3)))
    assert len(calls) == 1
