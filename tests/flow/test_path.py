"""The path, its loss and the token layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_jax.errors import UserError
from nabla_jax.flow import path


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_interpolate_ends_and_derivative() -> None:
    x0, x1 = _normal(0, 3, 4, 5), _normal(1, 3, 4, 5)
    np.testing.assert_array_equal(path.interpolate(x0, x1, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(path.interpolate(x0, x1, jnp.ones(3)), x1)
    _, slope = jax.jvp(lambda t: path.interpolate(x0, x1, t), (jnp.full(3, 0.3),), (jnp.ones(3),))
    np.testing.assert_allclose(slope, path.velocity(x0, x1), rtol=1e-6)


def test_interpolate_takes_one_time_per_sample() -> None:
    x0, x1, time = _normal(0, 3, 4, 5), _normal(1, 3, 4, 5), jnp.array([0.1, 0.5, 0.9])
    whole = path.interpolate(x0, x1, time)
    for row in range(3):
        np.testing.assert_array_equal(whole[row], path.interpolate(x0[row], x1[row], time[row]))


def test_interpolate_is_float32_for_low_precision_input() -> None:
    x0, x1 = _normal(0, 1, 64).astype(jnp.bfloat16), _normal(1, 1, 64).astype(jnp.bfloat16)
    near, next_to_it = (path.interpolate(x0, x1, jnp.array([t])) for t in (0.5, 0.5005))
    assert near.dtype == jnp.float32
    assert np.all(np.asarray(near != next_to_it))


def test_time_is_logit_normal() -> None:
    time = np.asarray(path.logit_normal_time(jax.random.key(3), (20_000,)))
    assert time.dtype == np.float32 and time.min() > 0 and time.max() < 1
    assert scipy.stats.kstest(scipy.special.logit(time.astype(np.float64)), "norm").pvalue > 1e-3
    later = np.asarray(path.logit_normal_time(jax.random.key(3), (20_000,), mean=1.5))
    assert scipy.stats.kstest(scipy.special.logit(later.astype(np.float64)), "norm", (1.5, 1.0)).pvalue > 1e-3


def test_time_of_a_sample_does_not_depend_on_the_batch() -> None:
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(6))
    draw = jax.vmap(path.logit_normal_time)
    np.testing.assert_array_equal(draw(keys)[4], draw(keys[4:5])[0])


def test_loss_equals_torch() -> None:
    prediction, x0, x1 = (np.asarray(_normal(seed, 2, 6, 8)) for seed in range(3))
    expected = torch.nn.functional.mse_loss(torch.tensor(prediction), torch.tensor(x1 - x0))
    np.testing.assert_allclose(path.velocity_loss(prediction, x0, x1), expected, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1e3))
def test_equal_weights_give_the_plain_mean(weight: float) -> None:
    prediction, x0, x1 = (_normal(seed, 2, 6, 8) for seed in range(3))
    weighted = path.velocity_loss(prediction, x0, x1, jnp.full((2, 6), weight))
    np.testing.assert_allclose(weighted, path.velocity_loss(prediction, x0, x1), rtol=1e-6)


def test_weight_chooses_tokens_and_every_picture_counts_alike() -> None:
    prediction, x0, x1 = (_normal(seed, 2, 6, 8) for seed in range(3))
    weight = jnp.zeros((2, 6)).at[0, 2].set(1.0).at[1, :4].set(3.0)
    error = np.square(np.asarray(prediction - (x1 - x0)))
    expected = (error[0, 2].mean() + error[1, :4].mean()) / 2
    np.testing.assert_allclose(path.velocity_loss(prediction, x0, x1, weight), expected, rtol=1e-6)


def test_foreground_weight_follows_coverage() -> None:
    mask = np.zeros((1, 4, 6), np.float32)
    mask[0, 0:2, 2:4] = 1  # token (0, 1) wholly
    mask[0, 2, 4] = 1  # a quarter of token (1, 2)
    weight = path.foreground_weight(jnp.asarray(mask), 5.0)
    np.testing.assert_allclose(weight, [[1, 5, 1, 1, 1, 2]])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (2, 2), (8, 2)])
def test_pack_equals_diffusers(height: int, width: int) -> None:
    latents = np.asarray(_normal(0, 2, 16, height, width))
    expected = FluxPipeline._pack_latents(torch.tensor(latents), 2, 16, height, width)
    np.testing.assert_array_equal(path.pack(jnp.asarray(latents)), expected)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpack_inverts_pack(batch: int, channels: int, rows: int, columns: int) -> None:
    latents = np.arange(batch * channels * rows * columns * 4, dtype=np.float32)
    latents = latents.reshape(batch, channels, 2 * rows, 2 * columns)
    tokens = path.pack(jnp.asarray(latents))
    assert tokens.shape == (batch, rows * columns, 4 * channels)
    np.testing.assert_array_equal(path.unpack(tokens, 2 * rows, 2 * columns), latents)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="found 3x4"):
        path.pack(jnp.zeros((1, 16, 3, 4)))
    with pytest.raises(UserError, match="found 6 tokens"):
        path.unpack(jnp.zeros((1, 6, 64)), 4, 4)
