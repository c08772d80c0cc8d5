"""Prodigy: Adam that estimates its own step size (Mishchenko and Defazio 2023, arXiv:2306.06101).

Written out instead of taken from optax because the published runs need three things which optax 0.2.8 lacks.
All-zero gradients must not turn the estimate into NaN. The starting point must be a float32 copy, so that
parameters and state can both be donated. And decay and step must be rounded one after the other: while the
estimate is near 1e-6 an update is a few units in the last place of a parameter, and the estimate grows from
`p0 - p`, which is made of nothing but those roundings.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from nabla_jax.optim.guards import total


class ProdigyState(NamedTuple):
    """State of `prodigy`; scalars are float32 but `steps`. Trees have the structure of the parameters."""

    steps: jax.Array  # int32, k: steps taken
    estimate: jax.Array  # d: the distance estimate, which scales the step
    largest: jax.Array  # the largest estimate seen before growth was limited
    numerator: jax.Array  # r: average of <g, p0 - p>
    start: Any  # p0: the parameters at the start
    first: Any  # m: average of d g
    second: Any  # v: average of d^2 g^2
    denominator: Any  # s: average of g, whose 1-norm divides r


def prodigy(
    learning_rate: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    *,
    beta3: float | None = None,
    eps: float = 1e-8,
    initial_estimate: float = 1e-6,
    estimate_factor: float = 1.0,
    growth: float = math.inf,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    safeguard_warmup: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Algorithm 4 of the paper, with the options of its published implementation.

    Args:
        learning_rate: multiplies the estimated step; 1 is the method's own choice.
        betas: decay of the first and second moment.
        beta3: decay of the sums behind the estimate; None is `sqrt(betas[1])`.
        eps: added to the denominator, times the estimate.
        initial_estimate: d0.
        estimate_factor: multiplies the estimate (`d_coef`).
        growth: largest factor by which the estimate grows in one step.
        weight_decay: strength of the decay towards zero.
        decoupled: decay the parameters themselves (AdamW) instead of adding to the gradient.
        bias_correction: Adam's correction of the first steps.
        safeguard_warmup: leave the learning rate out of the sum that divides the estimate.
        dtype: that the state's trees are kept in. All arithmetic is float32; what is kept is rounded once a step.

    Returns:
        A transformation whose `update` needs `params`. When every gradient is zero, parameters and state stay
        as they are: such a step says nothing about the distance.
    """
    beta1, beta2 = betas
    beta3 = math.sqrt(beta2) if beta3 is None else beta3
    d0 = initial_estimate

    def init(params: Any) -> ProdigyState:
        def scalar(value: float) -> jax.Array:
            return jnp.full((), value, jnp.float32)

        return ProdigyState(
            steps=jnp.zeros((), jnp.int32),
            estimate=scalar(d0),
            largest=scalar(d0),
            numerator=scalar(0.0),
            start=jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params),
            first=_zeros(params, dtype),
            second=_zeros(params, dtype),
            denominator=_zeros(params, dtype),
        )

    def update(updates: Any, state: ProdigyState, params: Any = None) -> tuple[Any, ProdigyState]:
        if params is None:
            raise ValueError("prodigy: update needs params")
        exact, gradient, origin = _exact(params), _exact(updates), _exact(state.start)
        given = total(jax.tree.map(lambda g: jnp.any(g != 0), gradient)) > 0
        if not decoupled:
            gradient = jax.tree.map(lambda g, p: g + weight_decay * p, gradient, exact)

        d = state.estimate
        rate = d * learning_rate  # the paper's dlr
        if bias_correction:
            rate *= jnp.sqrt(_one_minus_power(beta2, state.steps + 1)) / _one_minus_power(beta1, state.steps + 1)
        # d / d0 instead of d keeps the sums behind the estimate in float32's range while d is tiny.
        scale = d / d0
        moved = jax.tree.map(lambda g, start, p: jnp.vdot(g, start - p), gradient, origin, exact)
        numerator = beta3 * state.numerator + scale * rate * total(moved)
        pull = scale * (d if safeguard_warmup else rate)

        first = _kept(lambda m, g: beta1 * m + (1 - beta1) * d * g, state.first, gradient)
        second = _kept(lambda v, g: beta2 * v + (1 - beta2) * d * d * g * g, state.second, gradient)
        denominator = _kept(lambda s, g: beta3 * s + pull * g, state.denominator, gradient)
        norm = total(jax.tree.map(lambda s: jnp.sum(jnp.abs(s)), _exact(denominator)))

        usable = given & (norm > 0)
        candidate = estimate_factor * numerator / jnp.where(usable, norm, 1.0)
        # Until the first growth the estimate may jump; afterwards `growth` limits it.
        grown = jnp.where(d == jnp.float32(d0), jnp.maximum(d, candidate), d)
        largest = jnp.maximum(state.largest, candidate)
        estimate = jnp.minimum(largest, grown * growth)

        def move(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            decayed = p - weight_decay * rate * p if decoupled else p
            stepped = decayed - rate * m / (jnp.sqrt(v) + estimate * eps)
            # The difference of neighbouring floats is exact, so adding it to p gives `stepped` to the bit.
            return jnp.where(usable, stepped - p, jnp.zeros_like(p))

        following = ProdigyState(state.steps + 1, estimate, largest, numerator, state.start, first, second, denominator)
        kept = jax.tree.map(lambda new, old: jnp.where(usable, new, old), following, state)
        return jax.tree.map(move, exact, _exact(first), _exact(second)), kept._replace(start=state.start)

    return optax.GradientTransformation(init, update)


def prodigy_estimate(state: Any) -> jax.Array | None:
    """The distance estimate d inside any optimizer state, float32 scalar; None where there is no Prodigy.

    Times the learning rate it is the step size that Adam would be given.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ProdigyState))
    return next((leaf.estimate for leaf in leaves if isinstance(leaf, ProdigyState)), None)


def _zeros(params: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)


def _exact(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _kept(follow: Callable[[jax.Array, jax.Array], jax.Array], average: Any, gradient: Any) -> Any:
    """An average that follows the gradient, computed in float32 and rounded to the dtype that it is kept in."""
    return jax.tree.map(lambda x, g: follow(x.astype(jnp.float32), g).astype(x.dtype), average, gradient)


def _one_minus_power(beta: float, count: jax.Array) -> jax.Array:
    """`1 - beta**count` without the cancellation that costs float32 four digits at beta 0.999 and count 1."""
    if beta == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(count.astype(jnp.float32) * math.log(beta))
