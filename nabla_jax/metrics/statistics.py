"""Means, ratios and differences with intervals from a bootstrap clustered by class.

Pictures of one class share its difficulty, so whole classes are drawn with replacement, never single
pictures. All pictures of a drawn class are kept. The quantiles are Hesterberg's expanded percentiles (2015,
arXiv:1411.5279, section 5.3): plain percentiles are too narrow for few clusters, exactly as a normal interval
is beside Student's.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy import special

from nabla_jax.errors import UserError

RESAMPLES = 5000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate over all pairs and the interval around it.

    With a single cluster nothing is known about the spread between clusters, and low = mean = high.
    """

    mean: float
    low: float
    high: float
    n: int  # pairs
    clusters: int


def mean_interval(
    values: Any, clusters: Any, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of `values` over pairs.

    Args:
        values: [n] finite numbers, one per pair.
        clusters: [n] the class of each pair: integers or strings.
        level: coverage of the interval, in (0, 1).
        resamples: draws of the bootstrap.
        seed: of the draws. The result depends on the set of (value, cluster) rows and on the seed, on nothing
        else.

    Raises:
        UserError: no pairs, a value that is not finite, or lists of different lengths.
    """
    values = np.asarray(values, np.float64)
    return ratio_interval(values, np.ones_like(values), clusters, level, resamples=resamples, seed=seed)


def ratio_interval(
    numerator: Any,
    denominator: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The ratio of sums `sum(numerator) / sum(denominator)` over pairs.

    Normalised identity `1 - sum(errors) / sum(sibling_errors)` is the ratio of `sibling_errors - errors` to
    `sibling_errors`. Both sums are taken anew in every resample. Arguments and errors as for `mean_interval`;
    in addition a UserError if the denominators of all pairs, or of a resample, do not sum to a positive
    number.
    """
    rows = [np.asarray(row, np.float64) for row in (numerator, denominator)]
    sums = _cluster_sums(np.stack(rows) if rows[0].shape == rows[1].shape else rows, np.asarray(clusters))
    mean = float(_ratio(sums.sum(axis=1)))
    drawn = _ratio(sums @ _draws(sums.shape[1], resamples, seed))
    low, high = np.quantile(drawn, _quantiles(level, sums.shape[1])) if sums.shape[1] > 1 else (mean, mean)
    return Interval(mean, float(low), float(high), len(rows[0]), sums.shape[1])


def paired_difference(
    a: Any, b: Any, clusters: Any, level: float = 0.95, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of `a - b`, pair by pair; arguments and errors as for `mean_interval`.

    Narrower than two separate intervals suggest, because what is hard about a pair is hard for both.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(f"a paired difference needs two equally long lists, found {a.shape} and {b.shape}")
    return mean_interval(a - b, clusters, level, resamples=resamples, seed=seed)


def ratio_difference(
    a: Any,
    b: Any,
    reference: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """`(1 - sum(a) / sum(reference)) - (1 - sum(b) / sum(reference))`.

    The subject effect: `a` the errors with the right subject, `b` with a shuffled one, `reference` the
    sibling's. Arguments and errors as for `ratio_interval`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(f"a ratio difference needs equally long lists, found {a.shape} and {b.shape}")
    return ratio_interval(b - a, reference, clusters, level, resamples=resamples, seed=seed)


def auc(positive: Any, negative: Any) -> float:
    """The chance that a positive exceeds a negative, ties half: the area under the ROC curve.

    Hanley & McNeil 1982. Args: similarities [m] of pairs that belong together and [n] of pairs that do not. Raises
    UserError if either list is empty.
    """
    if not len(positive) or not len(negative):
        raise UserError(f"AUC: found {len(positive)} positives and {len(negative)} negatives, expected some of both")
    return float(_wins(np.asarray(positive, np.float64), np.asarray(negative, np.float64)).mean()) / len(negative)


def auc_interval(
    positive: Any,
    positive_clusters: Any,
    negative: Any,
    negative_clusters: Any,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The AUC; a resample draws whole clusters, and with each of them its positives and its negatives.

    Args:
        positive: [m] similarities of pairs that belong together.
        positive_clusters: [m] the class of each: integers or strings.
        negative: [n] similarities of pairs that do not.
        negative_clusters: [n].
        level: as for `mean_interval`, like the rest.

    Raises:
        UserError: as for `mean_interval`, or a cluster that has positives or negatives alone.
    """
    rows = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    names = np.asarray(positive_clusters), np.asarray(negative_clusters)
    sizes = [_cluster_sums(np.ones((1, len(c))), c)[0] for c in names]
    if not np.array_equal(np.unique(names[0]), np.unique(names[1])):
        raise UserError("AUC: found clusters with positives or negatives alone, expected both in every one")
    if not all(np.isfinite(row).all() for row in rows):
        raise UserError("AUC: found similarities that are not finite numbers")
    clusters = np.unique(names[0])
    won = np.stack([_wins(rows[0], rows[1][names[1] == c]) for c in clusters])
    table = _cluster_sums(won, names[0])  # [clusters of negatives, clusters of positives]
    drawn = _draws(len(clusters), resamples, seed)
    values = ((table @ drawn) * drawn).sum(0) / ((sizes[0] @ drawn) * (sizes[1] @ drawn))
    mean = auc(*rows)
    low, high = np.quantile(values, _quantiles(level, len(clusters))) if len(clusters) > 1 else (mean, mean)
    return Interval(mean, float(low), float(high), len(rows[0]), len(clusters))


def _wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Per positive [m], how many negatives [n] it exceeds, a tie counting half: [m]."""
    order = np.sort(negative)
    return (np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")) / 2


def _cluster_sums(rows: Any, clusters: np.ndarray) -> np.ndarray:
    """Sums of each row within each cluster, [rows, clusters], clusters in sorted order."""
    lengths = {np.shape(row) for row in rows} | {clusters.shape}
    if len(lengths) != 1 or len(clusters.shape) != 1:
        raise UserError(f"statistics: expected lists of one length, found shapes {sorted(lengths)}")
    if not len(clusters):
        raise UserError("statistics: found no pairs, expected at least one")
    if bad := int(np.sum(~np.isfinite(rows).all(axis=0))):
        raise UserError(f"statistics: {bad} of {len(clusters)} values are not finite numbers")
    names, index = np.unique(clusters, return_inverse=True)
    # Sorted values, so that not even the last bit of a sum depends on the order of the pairs.
    order = [np.lexsort((row, index)) for row in rows]
    return np.stack(
        [np.bincount(index[o], weights=row[o], minlength=len(names)) for row, o in zip(rows, order, strict=True)]
    )


def _ratio(sums: np.ndarray) -> np.ndarray:
    numerator, denominator = sums
    if np.any(denominator <= 0):
        raise UserError("statistics: the denominators of a ratio sum to zero or less, expected more")
    return numerator / denominator


@functools.lru_cache(maxsize=4)
def _draws(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each resample, [clusters, resamples] float64.

    Kept, because a table asks for the same draws again and again.
    """
    rng = np.random.default_rng((seed, clusters))
    counts = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).T.astype(np.float64)
    counts.setflags(write=False)
    return counts


def _quantiles(level: float, clusters: int) -> tuple[float, float]:
    """Expanded percentiles: the bootstrap's own spread has divisor n instead of n - 1, and normal tails."""
    if not 0 < level < 1:
        raise UserError(f"level: found {level}, expected a number between 0 and 1")
    tail = (1 - level) / 2
    students = special.stdtrit(clusters - 1, tail)
    tail = float(special.ndtr(students * np.sqrt(clusters / (clusters - 1))))
    return tail, 1 - tail
