"""Clipping, and what happens when a gradient is not finite."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nabla_jax.errors import UserError


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by `min(1, limit / (norm + 1e-6))`, norm being that of the whole tree.

    The 1e-6 is the published training's (PyTorch's `clip_grad_norm_`); optax's own clipping has none and
    differs by one part in a million.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class GuardState(NamedTuple):
    """State of `skip_nonfinite`."""

    skipped: jax.Array  # int32, steps that were skipped since the start
    inner: Any


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leaves parameters and the state of `inner` as they are when any gradient is NaN or infinite.

    A step that overflows then cannot spoil the state that is about to be saved. It does not pass unseen: it
    is counted (`skipped_steps`), and the loss or gradient norm of such a step makes `check_finite` stop the
    run.
    """

    def init(params: Any) -> GuardState:
        return GuardState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: GuardState, params: Any = None) -> tuple[Any, GuardState]:
        finite = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]).all()
        # Selecting leaf by leaf, not lax.cond: the selects fuse into the update and keep donated buffers in
        # place.
        stepped, following = inner.update(updates, state.inner, params)
        stepped = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), stepped)
        following = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state.inner)
        return stepped, GuardState(state.skipped + jnp.where(finite, 0, 1), following)

    return optax.GradientTransformation(init, update)


def skipped_steps(state: GuardState) -> jax.Array:
    """How many steps of the run were skipped because a gradient was not finite; int32 scalar."""
    return state.skipped


def check_finite(metrics: Mapping[str, float], step: int) -> None:
    """Stops a run that has lost its numbers.

    Args:
        metrics: name to value, on the host.
        step: where they were measured.

    Raises:
        UserError: naming the step and every metric that is NaN or infinite.
    """
    bad = {name: float(value) for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        found = ", ".join(f"{name} is {value}" for name, value in bad.items())
        raise UserError(f"step {step}: {found}; expected finite numbers (try a lower optim.lr or optim.clip)")
