"""Clipping, and what happens when a step is not finite."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def total(tree: Any) -> jax.Array:
    """The sum of a tree of scalars, float32.

    In a loop: a plain sum of scalars XLA writes out and computes again in every kernel that reads it, which is each
    leaf's update; that took half the time of compiling a small model's step.
    """
    scalars = jnp.stack(jax.tree.leaves(tree)).astype(jnp.float32)
    return jax.lax.fori_loop(0, len(scalars), lambda i, before: before + scalars[i], jnp.zeros(()))


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers of a tree, float32."""
    return jnp.sqrt(total(jax.tree.map(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), tree)))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by `min(1, limit / (norm + 1e-6))`, norm being that of the whole tree.

    The 1e-6 is the published training's (PyTorch's `clip_grad_norm_`); optax's own clipping has none and
    differs by one part in a million.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        factor = jnp.minimum(1.0, limit / (norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class GuardState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: jax.Array  # int32, steps that were skipped since the start
    inner: Any


def skip_nonfinite(inner: optax.GradientTransformation, *, hold: bool) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and the state of `inner` as they are in a step that is not finite.

    That is one in which the loss (`value`, a keyword of `update`), a gradient or their norm, a parameter after it or a
    number of `inner`'s state is NaN or infinite. It does not pass unseen: it is counted, see `skipped_steps`.

    Args:
      inner: the optimizer.
      hold: nothing changes after such a step either, so that what it began with is still there when the host, one step
        later, hears of it; `released` lets the steps go on.
    """

    def init(params: Any) -> GuardState:
        return GuardState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: GuardState, params: Any = None, *, value: jax.Array | None = None, **_: Any
    ) -> tuple[Any, GuardState]:
        # Selecting leaf by leaf, not lax.cond: the selects fuse into the update and keep donated buffers in
        # place.
        stepped, following = inner.update(updates, state.inner, params)
        moved = None if params is None else optax.apply_updates(params, stepped)
        reached = (value, updates, norm(updates), moved, following)
        finite = total([jnp.any(~jnp.isfinite(x)) for x in jax.tree.leaves(reached)]) == 0
        if hold:
            finite &= state.skipped == 0
        stepped = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), stepped)
        following = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state.inner)
        return stepped, GuardState(state.skipped + jnp.where(finite, 0, 1), following)

    return optax.GradientTransformationExtraArgs(init, update)


def skipped_steps(state: GuardState) -> jax.Array:
    """How many steps of the run changed nothing because they were not finite; int32 scalar."""
    return state.skipped


def released(state: GuardState) -> GuardState:
    """The state before a step that was not finite, from one that was held since."""
    return state._replace(skipped=state.skipped * 0)


def nonfinite(metrics: Mapping[str, float]) -> str:
    """Which metrics, name to value on the host, are NaN or infinite, in words; empty when all are finite."""
    bad = {name: float(value) for name, value in metrics.items() if not math.isfinite(value)}
    return ", ".join(f"{name} is {value}" for name, value in bad.items())
