"""Optimizers by name, gradient clipping, and guards against gradients that carry no information."""

import optax

from nabla_jax.config import Optim
from nabla_jax.errors import UserError
from nabla_jax.optim.guards import check_finite, clip_by_global_norm, skip_nonfinite, skipped_steps
from nabla_jax.optim.prodigy import ProdigyState, prodigy, prodigy_estimate

__all__ = [
    "ProdigyState",
    "check_finite",
    "clip_by_global_norm",
    "make",
    "prodigy",
    "prodigy_estimate",
    "skip_nonfinite",
    "skipped_steps",
]


def make(config: Optim, dtype: str = "float32") -> optax.GradientTransformation:
    """The optimizer of a run: skip non-finite gradients, clip by global norm, then `config.name`.

    `prodigy` is the paper's: bias correction, safeguarded warm-up, decoupled weight decay. `update` needs
    `params`, which are of `dtype`, as is the state.

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
    return skip_nonfinite(optax.chain(clip_by_global_norm(config.clip), inner))
