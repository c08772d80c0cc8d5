"""The optimizers: published implementations as oracles, guards, donation, resuming."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import prodigyopt
import pytest
import torch

from nabla_jax.config import Optim
from nabla_jax.errors import UserError
from nabla_jax.optim import (
    STUCK_AFTER,
    clip_by_global_norm,
    make,
    nonfinite,
    prodigy,
    prodigy_estimate,
    released,
    skipped_steps,
    stuck,
)

CONFIGS = [Optim(), Optim(name="adamw", lr=1e-2)]


def _params(seed: int = 0) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    return {"a": {"w": jax.random.normal(first, (4, 3))}, "b": jax.random.normal(second, (5,))}


def _gradients(steps: int, size: float = 1.0) -> list[dict[str, Any]]:
    """Noise around one direction: without a direction Prodigy's estimate would rightly never grow."""
    direction = _params(999)
    return [jax.tree.map(lambda g, m: size * (m + g), _params(1000 + step), direction) for step in range(steps)]


def _run(optimizer: optax.GradientTransformation, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def _torch_run(optimizer: Any, params: Any, gradients: list[Any], clip: float, **settings: Any) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    stepper = optimizer(tensors, **settings)
    for gradient in gradients:
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(np.asarray(leaf))
        torch.nn.utils.clip_grad_norm_(tensors, clip)
        stepper.step()
    return jax.tree.unflatten(structure, [tensor.detach().numpy() for tensor in tensors]), stepper


def _assert_same_movement(ours: Any, theirs: Any, start: Any, tolerance: float) -> None:
    largest = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (theirs, start)), strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), ours, theirs)


@pytest.mark.parametrize("size", [0.03, 30.0])
@pytest.mark.parametrize("d0", [1e-6, 1e-3])
def test_prodigy_equals_the_published_one_with_clipping(size: float, d0: float) -> None:
    params, gradients = _params(), _gradients(60, size=size)
    ours, state = _run(make(Optim(d0=d0)), params, gradients)
    theirs, optimizer = _torch_run(
        prodigyopt.Prodigy,
        params,
        gradients,
        1.0,
        lr=1.0,
        use_bias_correction=True,
        safeguard_warmup=True,
        weight_decay=0.01,
        d0=d0,
    )
    assert optimizer.param_groups[0]["d"] > d0
    np.testing.assert_allclose(prodigy_estimate(state), optimizer.param_groups[0]["d"], rtol=1e-4)
    _assert_same_movement(ours, theirs, params, 1e-4)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.99), (0.5, 0.9)])
def test_prodigy_betas(betas: tuple[float, float]) -> None:
    params, gradients = _params(), _gradients(30)
    ours, state = _run(make(Optim(betas=betas, clip=1e6)), params, gradients)
    theirs, optimizer = _torch_run(
        prodigyopt.Prodigy,
        params,
        gradients,
        1e6,
        use_bias_correction=True,
        safeguard_warmup=True,
        weight_decay=0.01,
        betas=betas,
    )
    np.testing.assert_allclose(prodigy_estimate(state), optimizer.param_groups[0]["d"], rtol=1e-4)
    _assert_same_movement(ours, theirs, params, 1e-4)


def test_adamw_equals_torch() -> None:
    params, gradients = _params(), _gradients(30)
    ours, state = _run(make(Optim(name="adamw", lr=3e-3, weight_decay=0.1)), params, gradients)
    theirs, _ = _torch_run(torch.optim.AdamW, params, gradients, 1.0, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.1)
    _assert_same_movement(ours, theirs, params, 1e-4)
    assert prodigy_estimate(state) is None


@pytest.mark.parametrize("size", [1e-3, 0.2, 50.0])
def test_clipping_equals_torch(size: float) -> None:
    (gradient,) = _gradients(1, size=size)
    tensors = [torch.nn.Parameter(torch.zeros(leaf.shape)) for leaf in jax.tree.leaves(gradient)]
    for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
        tensor.grad = torch.tensor(np.asarray(leaf))
    torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    ours, _ = clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    for tensor, leaf in zip(tensors, jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(leaf, tensor.grad.numpy(), rtol=1e-6)


@pytest.mark.parametrize("before", [0, 5])
def test_zero_gradients_change_nothing(before: int) -> None:
    params, state = _run(prodigy(weight_decay=0.01), _params(), _gradients(before))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, following = jax.jit(prodigy(weight_decay=0.01).update)(zeros, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, zeros)
    jax.tree.map(np.testing.assert_array_equal, following, state)


def test_one_leaf_without_gradient_is_ordinary() -> None:
    params = _params()
    gradients = [gradient | {"b": jnp.zeros(5)} for gradient in _gradients(30)]
    ours, state = _run(prodigy(safeguard_warmup=True), params, gradients)
    np.testing.assert_array_equal(ours["b"], params["b"])
    assert np.all(np.asarray(ours["a"]["w"] != params["a"]["w"])) and np.isfinite(state.estimate)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(config: Optim, bad: float) -> None:
    optimizer = make(config)
    params, state = _run(optimizer, _params(), _gradients(3))
    spoilt = jax.tree.map(lambda p: p.at[0].set(bad) if p.ndim == 1 else p, params)
    updates, following = jax.jit(optimizer.update)(spoilt, state, params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, np.zeros_like(u)), updates)
    jax.tree.map(np.testing.assert_array_equal, following.inner, state.inner)
    assert (skipped_steps(state), skipped_steps(following)) == (0, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_parameters_and_state_can_both_be_donated(config: Optim) -> None:
    optimizer = make(config)
    gradients = _gradients(4)
    expected, _ = _run(optimizer, _params(), gradients)

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    together = jax.jit(lambda params: (jax.tree.map(lambda p: 1 * p, params), optimizer.init(params)))
    apart = (_params(), optimizer.init(_params()))
    compiled = (_params(), jax.jit(optimizer.init)(_params()))
    same = _params()
    for params, state in (together(_params()), apart, compiled, (same, optimizer.init(same))):
        for gradient in gradients:
            params, state = donating(params, state, gradient)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_two_halves_through_the_host_equal_the_whole(config: Optim) -> None:
    optimizer, gradients = make(config), _gradients(8)
    whole, state = _run(optimizer, _params(), gradients)
    half, stopped = _run(optimizer, _params(), gradients[:4])
    resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), stopped)
    for gradient in gradients[4:]:
        updates, resumed = jax.jit(optimizer.update)(gradient, resumed, half)
        half = optax.apply_updates(half, updates)
    jax.tree.map(np.testing.assert_array_equal, (half, resumed), (whole, state))


def test_state_is_float32_whatever_the_parameters_are() -> None:
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _params())
    state = prodigy().init(low)
    updates, following = prodigy().update(low, state, low)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state, following, updates))}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_a_bfloat16_state_follows_the_published_optimizer_in_bfloat16() -> None:
    """Parameters, gradients and state of eight bits, as the reference system trains."""
    low, gradients = _low(_params()), [_low(gradient) for gradient in _gradients(20)]
    ours, state = _run(prodigy(initial_estimate=1e-2, weight_decay=0.01, dtype=jnp.bfloat16), low, gradients)
    assert {
        leaf.dtype for leaf in jax.tree.leaves((ours, state.start, state.first, state.second, state.denominator))
    } == {jnp.dtype("bfloat16")}
    tensors = [torch.nn.Parameter(_tensor(leaf)) for leaf in jax.tree.leaves(low)]
    settings = {"use_bias_correction": True, "safeguard_warmup": True, "weight_decay": 0.01, "d0": 1e-2}
    stepper = prodigyopt.Prodigy(tensors, **settings)
    for gradient in gradients:
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = _tensor(leaf)
        stepper.step()
    np.testing.assert_allclose(state.estimate, stepper.param_groups[0]["d"], rtol=0.05)
    for found, tensor, before in zip(jax.tree.leaves(ours), tensors, jax.tree.leaves(low), strict=True):
        moved = np.abs(np.asarray(found, np.float32) - np.asarray(before, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(found, np.float32), tensor.detach().float().numpy(), rtol=0, atol=0.1 * moved
        )


def test_bfloat16_parameters_that_do_not_begin_at_zero_never_move_at_first() -> None:
    """Why float32 is the default: a step of d0 is lost in them, and the estimate grows from movement alone."""
    for dtype, moves in ((jnp.bfloat16, False), (jnp.float32, True)):
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), _params())
        after, state = _run(prodigy(dtype=dtype), params, _gradients(50))
        assert (state.estimate > 2e-6) == moves
        assert (
            any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after, params)), strict=True)) == moves
        )


def _low(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def _tensor(leaf: jax.Array) -> torch.Tensor:
    return torch.tensor(np.asarray(leaf, np.float32)).to(torch.bfloat16)


def test_adding_the_update_gives_two_roundings() -> None:
    """Decay, then step, each rounded to float32: what the published in-place code does."""
    params = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    gradient = {"w": jax.random.normal(jax.random.key(1), (1000,))}
    optimizer = prodigy(weight_decay=0.5, initial_estimate=1e-3, bias_correction=False, safeguard_warmup=True)
    ours, state = _run(optimizer, params, [gradient])
    p, g, d = np.asarray(params["w"]), np.asarray(gradient["w"], np.float64), float(np.float32(1e-3))
    decayed = (p - 0.5 * d * p.astype(np.float64)).astype(np.float32)
    step = d * (0.1 * d * g) / (np.sqrt(0.001 * d * d * g * g) + float(state.estimate) * 1e-8)
    expected = (decayed - step).astype(np.float32)
    assert np.mean(np.asarray(ours["w"]) == expected) > 0.97


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "sgd"}, "optim.name: found 'sgd', expected prodigy or adamw"),
    ({"lr": 0.0}, "optim.lr"),
    ({"d0": -1e-6}, "optim.d0"),
    ({"clip": 0.0}, "optim.clip"),
    ({"betas": (0.9, 1.0)}, "optim.betas"),
    ({"weight_decay": -0.1}, "optim.weight_decay"),
])  # fmt: skip
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(dataclasses.replace(Optim(), **change))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_loss_that_is_not_finite_holds_every_later_step_until_it_is_released(config: Optim) -> None:
    params, gradients = _params(), _gradients(3)
    for what, later in (("stop", 2), ("skip", 1)):
        optimizer = make(config, nonfinite=what)
        moved, state = _run(optimizer, params, gradients)
        _, held = optimizer.update(gradients[0], state, moved, value=jnp.float32(math.nan))
        jax.tree.map(np.testing.assert_array_equal, held.inner, state.inner)
        _, following = optimizer.update(gradients[0], held, moved, value=jnp.float32(1))
        assert skipped_steps(following) == later
        jax.tree.map(np.testing.assert_array_equal, released(held), state)


def test_parameters_that_would_overflow_change_nothing() -> None:
    optimizer = make(Optim(name="adamw", lr=3e38, weight_decay=1e30))
    params = {"w": jnp.ones(3)}
    updates, state = optimizer.update({"w": jnp.ones(3)}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], np.zeros(3))
    assert skipped_steps(state) == 1


def test_nonfinite_metrics_in_words() -> None:
    assert nonfinite({"loss": 1.0, "grad_norm": 0.0, "skipped": 3}) == ""
    assert nonfinite({"loss": math.nan, "rate": 1.0, "grad_norm": math.inf}) == "loss is nan, grad_norm is inf"


def test_an_estimate_at_its_start_is_told_of_at_one_step_alone() -> None:
    config = Optim(d0=1e-6)
    start = float(np.float32(1e-6))
    assert "still optim.d0 = 1e-06" in stuck(config, STUCK_AFTER, start)
    for step, estimate in (
        (STUCK_AFTER, 2e-6),
        (STUCK_AFTER, None),
        (STUCK_AFTER - 1, start),
        (STUCK_AFTER + 1, start),
    ):
        assert stuck(config, step, estimate) == ""
