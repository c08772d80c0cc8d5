"""Is it the subject? Measures against the right answers of a world that can render them (an oracle).

For a pair the oracle renders the subject's identity in the target's pose, light, camera and background: the right
answer. All errors are masked RMSE (0..255) against it, all masks the target's. Every measure of a set is a mean or a
ratio of sums over pairs, so one bootstrap of (numerators, denominators) clustered by class covers them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax.metrics.pixels import rmse_of_pixels

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class RightAnswer:
    """The oracle's pixels of one pair inside the target's mask, each [pixels, 3] uint8.

    `right`: the subject's identity; `sibling`: another species of its family, same kind of plumage;
    `sibling_plumage`: another plumage of its own species, None where the species has one only; `lineup`: species
    name -> its render, `subject` among the keys.
    """

    right: Array
    sibling: Array
    sibling_plumage: Array | None
    lineup: Mapping[str, Array]
    subject: str


@dataclasses.dataclass(frozen=True)
class IdentityErrors:
    """One picture against the oracle; errors are masked RMSE 0..255.

    `right`: the picture against the right answer. `sibling`, `sibling_plumage`: what the wrong birds would score,
    the same for every model; `sibling_plumage` is None where the species has one plumage. `rank`: place of the right
    species among the lineup, 1 is nearest.
    """

    right: float
    sibling: float
    sibling_plumage: float | None
    rank: int


def identity_errors(generated: Array, answer: RightAnswer) -> IdentityErrors | None:
    """Errors of the generated picture's pixels inside the mask, [pixels, 3] uint8; None if there are no pixels."""
    right = rmse_of_pixels(generated, answer.right)
    sibling = rmse_of_pixels(answer.sibling, answer.right)
    if right is None or sibling is None:
        return None
    plumage = None if answer.sibling_plumage is None else rmse_of_pixels(answer.sibling_plumage, answer.right)
    return IdentityErrors(right, sibling, plumage, rank_in_lineup(generated, answer.lineup, answer.subject))


def rank_in_lineup(generated: Array, lineup: Mapping[str, Array], subject: str) -> int:
    """1 + the number of other species whose render is at least as near to `generated` as the subject's species'.

    A tie counts against the picture: a flat grey that is equally far from all has identified nothing.
    """
    own = rmse_of_pixels(generated, lineup[subject])
    others = [rmse_of_pixels(generated, render) for name, render in lineup.items() if name != subject]
    if own is None:
        raise ValueError("rank_in_lineup: no pixels, expected a mask that is not empty")
    return 1 + sum(other is not None and other <= own for other in others)


def normalised_identity(errors: Sequence[float] | Array, sibling_errors: Sequence[float] | Array) -> float:
    """1 - sum(errors) / sum(sibling_errors): 1 is the right answer, 0 is as wrong as a sibling species."""
    return 1.0 - float(np.sum(errors)) / float(np.sum(sibling_errors))


def normalised_identity_terms(errors: Array, sibling_errors: Array) -> tuple[Array, Array]:
    """(numerators, denominators), each [pairs]: the normalised identity is the ratio of their sums."""
    return sibling_errors - errors, sibling_errors


def subject_effect_terms(errors: Array, shuffled_errors: Array, sibling_errors: Array) -> tuple[Array, Array]:
    """(numerators, denominators), each [pairs], of the subject effect.

    The effect is the normalised identity with the right subject minus that with a shuffled one, both against the
    right answer of the true subject: above 0 the model reads its subject, at 0 it does not.
    """
    return shuffled_errors - errors, sibling_errors
