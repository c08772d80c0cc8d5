"""The rectified flow: the straight path and its loss (`path`), schedule and Euler loop (`sampler`)."""

from nabla_jax.flow.path import (
    foreground_weight,
    interpolate,
    logit_normal_time,
    pack,
    unpack,
    velocity,
    velocity_loss,
)
from nabla_jax.flow.sampler import euler, sigmas

__all__ = [
    "euler",
    "foreground_weight",
    "interpolate",
    "logit_normal_time",
    "pack",
    "sigmas",
    "unpack",
    "velocity",
    "velocity_loss",
]
