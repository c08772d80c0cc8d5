"""The noise schedule of FLUX.1 and the Euler loop that follows it from noise to data."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import untrusted
from nabla_jax.errors import UserError

# What a scheduler_config.json means where it leaves a key out (the published scheduler's constructor).
_DEFAULTS: dict[str, Any] = {
    "use_dynamic_shifting": False,
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_LARGEST = 80.0  # exponent that a float32 holds
# Keys that would change the schedule, with the only value that FLUX.1 uses.
_FIXED: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def sigmas(config: Mapping[str, Any], steps: int, tokens: int) -> np.ndarray:
    """Noise levels of a run of `steps` Euler steps.

    `linspace(1, 1/steps, steps)`, shifted towards noise: with dynamic shifting `e^mu / (e^mu + 1/s - 1)`, mu
    linear in the number of tokens (and extrapolated beyond the configured range); without it
    `shift s / (1 + (shift - 1) s)`. Esser et al. 2024, section 5.3.2.

    Args:
        config: the keys of a published `scheduler_config.json`.
        steps: number of Euler steps, at least 1.
        tokens: number of tokens of the noisy picture alone, without text or conditions; a diptych counts both
            halves.

    Returns:
        [steps + 1] float32, from 1 down to 0. A level is also the model's time.

    Raises:
        UserError: fewer than one step or token, or a schedule which FLUX.1 does not use.
    """
    for key, expected in _FIXED.items():
        if config.get(key, expected) != expected:
            raise UserError(f"scheduler_config.json: {key} is {config[key]!r}, expected {expected!r}")
    if steps < 1 or tokens < 1:
        raise UserError(f"a schedule needs a step and a token at least, found {steps} steps and {tokens} tokens")
    settings = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    for key, default in _DEFAULTS.items():
        untrusted.check(settings[key], bool if isinstance(default, bool) else float, "scheduler_config.json", key)
    if not 0 < settings["shift"] < math.inf:
        raise UserError(f"scheduler_config.json: shift: found {settings['shift']}, expected a positive number")
    # Rounded to float32 before the shift, as published: shifting in float64 moves the levels by an ulp.
    base = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if settings["use_dynamic_shifting"]:
        factor = np.float32(math.exp(min(_resolution_shift(settings, tokens), _LARGEST)))
        levels = factor / (factor + (1 / base - 1))
    else:
        shift = settings["shift"]
        levels = np.float32(shift) * base / (1 + np.float32(shift - 1) * base)
    levels = np.append(levels, np.float32(0.0)).astype(np.float32)
    if not (np.diff(levels) <= 0).all() or (steps > 1 and levels[-2] == 1):
        raise UserError(f"scheduler_config.json: {settings} gives levels that do not fall, such as {levels[:3]}")
    return levels


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], latents: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Follows the velocity down the noise levels, `x += (s[k+1] - s[k]) v(x, s[k])`, as one `lax.scan`.

    Args:
        velocity: `(latents, sigma) -> v`, the shape of `latents`; sigma is a float32 scalar. Traced once.
        latents: the start, usually standard normal noise; any shape.
        sigmas: [steps + 1], from `sigmas`.

    Returns:
        The shape of `latents`, float32. The sum is kept in float32 whatever the model computes in: 28 small
        steps in bfloat16 would lose most of their bits.
    """
    levels = jnp.asarray(sigmas, jnp.float32)

    def step(state: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        now, following = pair
        return state + (following - now) * velocity(state, now).astype(jnp.float32), None

    final, _ = jax.lax.scan(step, latents.astype(jnp.float32), (levels[:-1], levels[1:]))
    return final


def _resolution_shift(settings: Mapping[str, Any], tokens: int) -> float:
    """mu: the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    if settings["max_image_seq_len"] == settings["base_image_seq_len"]:
        raise UserError("scheduler_config.json: max_image_seq_len: found base_image_seq_len, expected another number")
    slope = (settings["max_shift"] - settings["base_shift"]) / (
        settings["max_image_seq_len"] - settings["base_image_seq_len"]
    )
    return tokens * slope + (settings["base_shift"] - slope * settings["base_image_seq_len"])
