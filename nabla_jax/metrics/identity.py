"""Is it the subject? Measures against the right answers of a world that can render them (an oracle).

For a pair the oracle renders the subject's identity in the target's pose, light, camera and background: the
right answer. All errors are masked RMSE (0..255) against it, all masks the target's. Every measure of a set
is a mean or a ratio of sums over pairs, so one bootstrap of (numerators, denominators) clustered by class
covers them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nabla_jax.metrics.pixels import rmse_of_pixels

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class RightAnswer:
    """The oracle's pixels of one pair inside the target's mask, each [pixels, 3] uint8.

    `right`: the subject's identity; `sibling`: another species of its family, same kind of plumage;
    `sibling_plumage`: another plumage of its own species, None where the species has one only; `lineup`
    [species, pixels, 3]: the right answer first, then other species.
    """

    right: Array
    sibling: Array
    sibling_plumage: Array | None
    lineup: Array


@dataclasses.dataclass(frozen=True)
class IdentityErrors:
    """One picture against the oracle; errors are masked RMSE 0..255.

    `right`: the picture against the right answer. `sibling`, `sibling_plumage`: what the wrong birds would
    score, the same for every model; `sibling_plumage` is None where the species has one plumage. `rank`:
    place of the right species among the lineup, 1 is nearest.
    """

    right: float
    sibling: float
    sibling_plumage: float | None
    rank: int


def identity_errors(generated: Array, answer: RightAnswer) -> IdentityErrors | None:
    """Errors of the generated picture's pixels inside the mask, [pixels, 3] uint8; None if there are no
    pixels.
    """
    right = rmse_of_pixels(generated, answer.right)
    sibling = rmse_of_pixels(answer.sibling, answer.right)
    if right is None or sibling is None:
        return None
    plumage = None if answer.sibling_plumage is None else rmse_of_pixels(answer.sibling_plumage, answer.right)
    return IdentityErrors(right, sibling, plumage, rank_in_lineup(generated, answer.lineup))


def rank_in_lineup(generated: Array, lineup: Array) -> int:
    """1 + how many renders of `lineup` [species, pixels, 3] are at least as near to `generated` as the first.

    A tie counts against the picture: what is equally far from all has identified nothing. Raises ValueError
    if there are no pixels.
    """
    errors = [rmse_of_pixels(generated, render) for render in lineup]
    known = [error for error in errors if error is not None]
    if not known:
        raise ValueError("rank_in_lineup: found no pixels, expected a mask that is not empty")
    return 1 + sum(other <= known[0] for other in known[1:])


def normalised_identity(errors: Sequence[float] | Array, sibling_errors: Sequence[float] | Array) -> float:
    """1 - sum(errors) / sum(sibling_errors): 1 is the right answer, 0 is as wrong as a sibling species."""
    return 1.0 - float(np.sum(errors)) / float(np.sum(sibling_errors))


def normalised_identity_terms(errors: Array, sibling_errors: Array) -> tuple[Array, Array]:
    """(numerators, denominators), each [pairs]: the normalised identity is the ratio of their sums."""
    return sibling_errors - errors, sibling_errors


def subject_effect_terms(errors: Array, shuffled_errors: Array, sibling_errors: Array) -> tuple[Array, Array]:
    """(numerators, denominators), each [pairs], of the subject effect.

    The effect is the normalised identity with the right subject minus that with a shuffled one, both against
    the right answer of the true subject: above 0 the model reads its subject, at 0 it does not.
    """
    return shuffled_errors - errors, sibling_errors
