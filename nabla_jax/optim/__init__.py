"""Optimizers by name, gradient clipping, and guards against steps that are not finite."""

import numpy as np
import optax

from nabla_jax.config import Optim
from nabla_jax.errors import UserError
from nabla_jax.optim.guards import clip_by_global_norm, nonfinite, norm, released, skip_nonfinite, skipped_steps
from nabla_jax.optim.prodigy import ProdigyState, prodigy, prodigy_estimate

__all__ = [
    "ProdigyState",
    "clip_by_global_norm",
    "make",
    "nonfinite",
    "norm",
    "prodigy",
    "prodigy_estimate",
    "released",
    "skip_nonfinite",
    "skipped_steps",
    "stuck",
]


# By then Prodigy's estimate has grown in every run that learns anything.
STUCK_AFTER = 200


def stuck(config: Optim, step: int, estimate: float | None) -> str:
    """What to tell of a Prodigy whose estimate, after STUCK_AFTER steps, is where it began; otherwise empty."""
    if step != STUCK_AFTER or estimate is None or estimate > np.float32(config.d0):
        return ""
    return (
        f"step {step}: Prodigy's estimate of the distance is still optim.d0 = {config.d0:g}: the adapter hardly moves; "
        f"try a larger optim.d0, such as {config.d0 * 10:g}"
    )


def make(config: Optim, dtype: str = "float32", nonfinite: str = "stop") -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run: skip steps that are not finite, clip by global norm, then `config.name`.

    `prodigy` is the paper's: bias correction, safeguarded warm-up, decoupled weight decay. `update` needs
    `params`, which are of `dtype`, as is the state, and takes the loss as `value`. `nonfinite`, stop or skip, is what a
    run does after a step that is not finite: to stop, all later ones change nothing either (see `skip_nonfinite`).

    Raises:
        UserError: an unknown name, or a number out of its range.
    """
    for field, value, valid in (
        ("lr", config.lr, config.lr > 0),
        ("d0", config.d0, config.d0 > 0),
        ("clip", config.clip, config.clip > 0),
        ("weight_decay", config.weight_decay, config.weight_decay >= 0),
        ("betas", config.betas, len(config.betas) == 2 and all(0 <= beta < 1 for beta in config.betas)),
    ):
        if not valid:
            raise UserError(f"optim.{field}: {value!r} is out of range")
    first, second = config.betas
    if config.name == "prodigy":
        inner = prodigy(
            config.lr, (first, second), initial_estimate=config.d0, weight_decay=config.weight_decay, dtype=dtype
        )
    elif config.name == "adamw":
        inner = optax.adamw(config.lr, first, second, weight_decay=config.weight_decay)
    else:
        raise UserError(f"optim.name: found {config.name!r}, expected prodigy or adamw")
    return skip_nonfinite(optax.chain(clip_by_global_norm(config.clip), inner), hold=nonfinite == "stop")
