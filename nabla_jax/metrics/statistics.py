"""Means, ratios, differences, tests and regressions over pairs that come in clusters.

Pictures of one class share its difficulty, so the cluster, never the single picture, is what is drawn, left out or
flipped. A cluster is a class, or an individual where the pairs have one (an observation of iNaturalist).

Two kinds of interval, by the number of clusters (``method`` says which was used, ``benchmarks/coverage.py`` measures
how often either covers the truth):

- ``t``, fewer than FEW clusters: Student's interval around the estimate. The standard error is the delete-one-cluster
  jackknife's (MacKinnon, Nielsen & Webb 2023, "Fast and reliable jackknife and bootstrap methods for cluster-robust
  inference", CV3); the degrees of freedom are the effective number of clusters less one, (sum w)^2 / sum w^2 - 1 of
  the clusters' weights w (Kish 1965; Carter, Schnepel & Steigerwald 2017), so that one large class among small ones
  widens the interval.
- ``bootstrap-t``, FEW clusters or more: whole clusters are drawn with replacement, each resample's error is divided by
  that resample's own standard error, and the interval is symmetric (Hall 1992, section 3.6; Cameron, Gelbach & Miller
  2008). Where a resample has no spread, as that of a rate that fails in one cluster alone, it is ``t`` all the same.

``bca`` (Efron 1987) can be asked for. It is not the default because it covers less where clusters are few or uneven.

Input that says nothing of the spread has a defined result: with one cluster ``low`` and ``high`` are None; where all
clusters agree exactly ``low = mean = high``; ``reason`` says so. A value that is not finite is an error: a pair without
a value is to be left out, and counted, by the caller. Everything is a function of the rows and the seed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]

RESAMPLES = 5000
FLIPS = 100_000
FEW = 50
METHODS = ("auto", "t", "bootstrap-t", "bca")
ONE_CLUSTER = "one cluster: its spread is unknown"
NO_SPREAD = "all clusters agree exactly"
NOTHING_LEFT = "one cluster holds all that is divided by"
_BLOCK = 2**22  # numbers that a block of resamples may hold at a time


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate over all pairs and the interval around it.

    `low` and `high` are None where there is no interval; `reason` then says why. It also says where an interval has
    no width.
    """

    mean: float
    low: float | None
    high: float | None
    n: int  # pairs
    clusters: int
    method: str = ""  # t, bootstrap-t, bca or percentile; '' where none was needed
    reason: str = ""


def mean_interval(
    values: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    method: str = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` over pairs.

    Args:
        values: [n] finite numbers, one per pair.
        clusters: [n] the cluster of each pair: integers or strings.
        level: coverage of the interval, in (0, 1).
        method: one of METHODS; 'auto' chooses by the number of clusters.
        resamples: draws of the bootstrap.
        seed: of the draws. The result depends on the set of (value, cluster) rows and on the seed, on nothing
        else.

    Raises:
        UserError: no pairs, a value that is not finite, or lists of different lengths.
    """
    values = np.asarray(values, np.float64)
    ones = np.ones_like(values)
    return ratio_interval(values, ones, clusters, level, method=method, resamples=resamples, seed=seed)


def ratio_interval(
    numerator: Any,
    denominator: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    method: str = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The ratio of sums `sum(numerator) / sum(denominator)` over pairs.

    Normalised identity `1 - sum(errors) / sum(sibling_errors)` is the ratio of `sibling_errors - errors` to
    `sibling_errors`. Both sums are taken anew in every resample. Arguments and errors as for `mean_interval`;
    in addition a UserError if the denominators of all pairs do not sum to a positive number. Where those of all but
    one cluster do not, there is no interval.
    """
    if method not in METHODS:
        raise UserError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    _tail(level)
    rows = [np.asarray(row, np.float64) for row in (numerator, denominator)]
    sums = _cluster_sums(np.stack(rows) if rows[0].shape == rows[1].shape else rows, np.asarray(clusters))[1]
    count = sums.shape[1]
    total = sums.sum(axis=1, keepdims=True)
    mean = float(_ratio(total)[0])
    found = Interval(mean, None, None, len(rows[0]), count)
    if count == 1:
        return dataclasses.replace(found, reason=ONE_CLUSTER)
    if np.any((rest := total - sums)[1] <= 1e-12 * total[1]):
        return dataclasses.replace(found, reason=NOTHING_LEFT)
    left_out = _ratio(rest)
    # Deviations of the clusters' sums; beside the sums themselves, those of equal clusters are rounding alone.
    deviations = sums[0] - mean * sums[1]
    if np.all(np.abs(deviations) <= 1e-12 * (np.abs(sums[0]) + abs(mean) * np.abs(sums[1]))):
        return dataclasses.replace(found, low=mean, high=mean, reason=NO_SPREAD)
    half: float | None = None
    if method == "bca":
        low, high = _bca(mean, _ratio(_resampled(sums, resamples, seed)), left_out, level)
        return dataclasses.replace(found, low=low, high=high, method="bca")
    if method == "bootstrap-t" or (method == "auto" and count >= FEW):
        half = _bootstrap_t(deviations, sums[1], level, resamples, seed)
    name = "t" if half is None else "bootstrap-t"
    if half is None:
        error = np.sqrt((count - 1) / count * np.sum((left_out - mean) ** 2))
        effective = sums[1].sum() ** 2 / np.sum(sums[1] ** 2)
        half = float(error * special.stdtrit(max(effective - 1, 1), 1 - _tail(level)))
    return dataclasses.replace(found, low=mean - half, high=mean + half, method=name)


def paired_difference(
    a: Any,
    b: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    method: str = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `a - b`, pair by pair; arguments and errors as for `mean_interval`.

    Narrower than two separate intervals suggest, because what is hard about a pair is hard for both.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(f"a paired difference needs two equally long lists, found {a.shape} and {b.shape}")
    return mean_interval(a - b, clusters, level, method=method, resamples=resamples, seed=seed)


def ratio_difference(
    a: Any,
    b: Any,
    reference: Any,
    clusters: Any,
    level: float = 0.95,
    *,
    method: str = "auto",
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
    return ratio_interval(b - a, reference, clusters, level, method=method, resamples=resamples, seed=seed)


@dataclasses.dataclass(frozen=True)
class SignFlip:
    """A sign-flip test: `p` two-sided; `exact` if all flips were counted, else `flips` drawn ones."""

    p: float
    n: int  # pairs
    clusters: int
    flips: int
    exact: bool
    reason: str = ""


def sign_flip_test(differences: Any, clusters: Any, *, flips: int = FLIPS, seed: int = 0) -> SignFlip:
    """Could paired differences be symmetric around zero? The sign of whole clusters is flipped.

    The statistic is the sum of all differences, so that it tests the mean, and, since the denominators stay, a ratio
    with those numerators too. Exact where the flips of all clusters are at most `flips`; otherwise drawn ones are
    counted, the observed one among them (Phipson & Smyth 2010). p = 1 for a single cluster and where all differences
    are zero (`reason` says so). Clusters whose differences cancel out change nothing and do not count.

    Args:
        differences: [n] finite numbers, a model's value minus the baseline's.
        clusters: [n] the cluster of each pair: integers or strings.
        flips: at most this many.
        seed: of drawn flips.

    Raises:
        UserError: as for `mean_interval`, or fewer than one flip.
    """
    return sign_flip_tests(np.asarray(differences, np.float64)[None], clusters, flips=flips, seed=seed)[0]


def sign_flip_tests(differences: Any, clusters: Any, *, flips: int = FLIPS, seed: int = 0) -> list[SignFlip]:
    """`sign_flip_test` of each row of differences [k, n] of the same pairs, with the same flips, which saves time."""
    if flips < 1:
        raise UserError(f"flips: found {flips}, expected at least 1")
    values = np.asarray(differences, np.float64)
    sums = _cluster_sums(values, np.asarray(clusters))[1]
    n, count = values.shape[1], sums.shape[1]
    sizes = np.abs(sums).sum(axis=1)
    moving = np.abs(sums) > 1e-12 * sizes[:, None]
    # Equal sums are rounded differently by order.
    bars = np.abs(sums.sum(axis=1)) - 1e-12 * sizes
    found: dict[int, SignFlip] = {}
    for row, mine in enumerate(moving):
        if not mine.any():
            found[row] = SignFlip(1.0, n, count, 1, True, "all differences are zero")
        elif mine.sum() < 63 and 2 ** int(mine.sum() - 1) <= flips:
            total = _all_flips(sums[row, mine])
            reason = ONE_CLUSTER if count == 1 else ""
            found[row] = SignFlip(float(np.mean(np.abs(total) >= bars[row])), n, count, len(total), True, reason)
    drawn = [row for row in range(len(values)) if row not in found]
    if drawn:
        rng = np.random.default_rng((seed, count))
        beyond = np.zeros(len(drawn), int)
        for rows in _blocks(flips, count):
            bits = np.unpackbits(rng.integers(256, size=(rows, -(-count // 8)), dtype=np.uint8), axis=1)
            total = 2 * (bits[:, :count].astype(np.float64) @ sums[drawn].T) - sums[drawn].sum(axis=1)
            beyond += np.sum(np.abs(total) >= bars[drawn], axis=0)
        for row, times in zip(drawn, beyond, strict=True):
            found[row] = SignFlip((int(times) + 1) / (flips + 1), n, count, flips, False)
    return [found[row] for row in range(len(values))]


def _all_flips(sums: Array) -> Array:
    """[2^(n-1)] totals of [n] numbers under every flip; flipping everything changes nothing: the last sign stays."""
    total = sums[-1:]
    for value in sums[:-1]:
        total = np.concatenate([total + value, total - value])
    return total


def holm(p: Any) -> Array:
    """Holm's step-down adjustment: [k] p values -> [k] adjusted ones, to be compared with the level.

    Holds the chance of any false rejection in the table below the level, whatever the dependence (Holm 1979). NaN
    stands for a missing test, counts for nothing and stays NaN. Raises UserError for values outside [0, 1].
    """
    values = np.asarray(p, np.float64)
    if values.ndim != 1:
        raise UserError(f"holm: found an array of shape {values.shape}, expected a list")
    if np.any((values < 0) | (values > 1)):
        raise UserError("holm: found p values outside 0 .. 1")
    adjusted = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1) if len(order) else 0
    return adjusted


Terms = tuple[Any, Any, Any]
"""Numerators, denominators and clusters, each [pairs]: a score is a ratio of sums, a mean has denominators of 1."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """`y = intercept + slope x` by least squares over models; `n` of each interval counts models.

    All three are None, and `reason` says why, where a line means nothing.
    """

    slope: Interval | None
    intercept: Interval | None
    r2: Interval | None
    models: int
    reason: str = ""


def regress(
    x: Sequence[Terms],
    y: Sequence[Terms],
    level: float = 0.95,
    *,
    draw_models: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Regression:
    """How well do scores on one benchmark predict those on another? A line through one point per model.

    The interval is a plain percentile bootstrap. A resample draws clusters of each benchmark (the same ones for all
    models, independently for the two benchmarks), scores every model on them, and then, with `draw_models`, draws as
    many models with replacement as there are, at least three of them different. With it the interval speaks of
    models like these; without it, of these very models on other pictures. With few models R^2 of a resample is
    biased upwards, and the interval with it. Resamples in which all drawn models score alike are left out.

    Args:
        x: per model (numerators, denominators, clusters) of its pairs on one benchmark.
        y: the same models, in the same order, on the other.
        level: coverage of the intervals, in (0, 1).
        draw_models: see above.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        UserError: lists of different lengths, or as for `ratio_interval`.
    """
    if len(x) != len(y):
        raise UserError(f"regression: found {len(x)} and {len(y)} models, expected the same ones on both benchmarks")
    tail = _tail(level)
    models = len(x)
    if models < 3:
        return Regression(None, None, None, models, f"{models} models: a line needs at least 3")
    tables = [_model_sums(terms) for terms in (x, y)]
    fit = _line(*(_ratio(table.sum(axis=2).T) for table in tables))
    if not np.isfinite(fit).all():
        return Regression(None, None, None, models, "all models score alike")
    scores = []
    for which, table in enumerate(tables):
        drawn = _resampled(table.reshape(2 * models, -1), resamples, seed, which).reshape(models, 2, -1)
        scores.append(_ratio(drawn.transpose(1, 2, 0)))  # [resamples, models]
    if draw_models:
        rng = np.random.default_rng((seed, models, resamples))
        chosen = rng.integers(models, size=(resamples, models))
        while len(poor := np.flatnonzero((np.diff(np.sort(chosen, axis=1)) != 0).sum(axis=1) < 2)):
            chosen[poor] = rng.integers(models, size=(len(poor), models))
        scores = [np.take_along_axis(score, chosen, axis=1) for score in scores]
    drawn = _line(*scores)
    drawn = drawn[:, np.isfinite(drawn).all(axis=0)]
    clusters = min(table.shape[2] for table in tables)
    if not drawn.size:
        return Regression(None, None, None, models, "all models score alike in every resample")
    method, reason = "percentile", ""
    ends: list[tuple[float | None, float | None]]
    if clusters == 1 and not draw_models:
        ends, method, reason = [(None, None)] * 3, "", ONE_CLUSTER
    else:
        ends = [(float(low), float(high)) for low, high in np.quantile(drawn, [tail, 1 - tail], axis=1).T]
    slope, intercept, r2 = (
        Interval(float(value), low, high, models, clusters, method, reason)
        for value, (low, high) in zip(fit, ends, strict=True)
    )
    return Regression(slope, intercept, r2, models)


def _model_sums(terms: Sequence[Terms]) -> Array:
    """[models, 2, clusters]: each model's sums of numerators and denominators; 0 for a cluster it has no pair of."""
    found = []
    for top, bottom, clusters in terms:
        rows = [np.asarray(row, np.float64) for row in (top, bottom)]
        found.append(_cluster_sums(rows, np.asarray(clusters)))
    names = functools.reduce(np.union1d, [names for names, _ in found])
    table = np.zeros((len(found), 2, len(names)))
    for model, (own, sums) in enumerate(found):
        table[model][:, np.searchsorted(names, own)] = sums
    return table


def _line(x: Array, y: Array) -> Array:
    """[3, ...]: slope, intercept and R^2 of least squares over the last axis; not finite where all x or y agree."""
    dx, dy = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    xx, xy, yy = (np.sum(a * b, axis=-1) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
    scale = [1e-24 * np.sum(v * v, axis=-1) for v in (x, y)]
    known = (xx > scale[0]) & (yy > scale[1])
    slope = np.divide(xy, xx, where=known, out=np.full(np.shape(xx), np.nan))
    r2 = np.divide(xy * xy, xx * yy, where=known, out=np.full(np.shape(xx), np.nan))
    return np.stack([slope, y.mean(axis=-1) - slope * x.mean(axis=-1), r2])


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

    The quantiles are Hesterberg's expanded percentiles (2015, arXiv:1411.5279, section 5.3): plain percentiles are too
    narrow for few clusters, exactly as a normal interval is beside Student's, and they stay within 0 and 1.

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
    sizes = [_cluster_sums(np.ones((1, len(c))), c)[1][0] for c in names]
    if not np.array_equal(np.unique(names[0]), np.unique(names[1])):
        raise UserError("AUC: found clusters with positives or negatives alone, expected both in every one")
    if not all(np.isfinite(row).all() for row in rows):
        raise UserError("AUC: found similarities that are not finite numbers")
    clusters = np.unique(names[0])
    won = np.stack([_wins(rows[0], rows[1][names[1] == c]) for c in clusters])
    table = _cluster_sums(won, names[0])[1]  # [clusters of negatives, clusters of positives]
    mean = auc(*rows)
    found = Interval(mean, None, None, len(rows[0]), len(clusters))
    expanded = _expanded(level, len(clusters))
    if expanded is None:
        return dataclasses.replace(found, reason=ONE_CLUSTER)
    drawn = _draws(len(clusters), resamples, seed).T.astype(np.float64)
    values = ((table @ drawn) * drawn).sum(0) / ((sizes[0] @ drawn) * (sizes[1] @ drawn))
    low, high = np.quantile(values, [expanded, 1 - expanded])
    return dataclasses.replace(found, low=float(low), high=float(high), method="percentile")


def _wins(positive: Array, negative: Array) -> Array:
    """Per positive [m], how many negatives [n] it exceeds, a tie counting half: [m]."""
    order = np.sort(negative)
    return (np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")) / 2


def _cluster_sums(rows: Any, clusters: Array) -> tuple[Array, Array]:
    """(names of the clusters, sorted; sums of each row within each cluster, [rows, clusters])."""
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
    return names, np.stack(
        [np.bincount(index[o], weights=row[o], minlength=len(names)) for row, o in zip(rows, order, strict=True)]
    )


def _ratio(sums: Array) -> Array:
    """[2, ...] -> [...]."""
    numerator, denominator = sums
    if np.any(denominator <= 0):
        raise UserError("statistics: the denominators of a ratio sum to zero or less, expected more")
    return np.asarray(numerator / denominator)


def _blocks(rows: int, width: int) -> list[int]:
    """Sizes of blocks of rows that hold at most _BLOCK numbers each, or one row."""
    size = max(1, _BLOCK // width)
    return [min(size, rows - start) for start in range(0, rows, size)]


@functools.lru_cache(maxsize=4)
def _draws(clusters: int, resamples: int, seed: int, which: int = 0) -> Array:
    """How often each cluster is drawn in each resample, [resamples, clusters] uint8.

    Kept, because a table asks for the same draws again and again. No cluster is drawn 256 times: the chance is below
    1e-500.
    """
    if resamples < 1:
        raise UserError(f"resamples: found {resamples}, expected at least 1")
    rng = np.random.default_rng((seed, clusters, which))
    counts = np.empty((resamples, clusters), np.uint8)
    start = 0
    for rows in _blocks(resamples, clusters):
        places = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(places.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        start += rows
    counts.setflags(write=False)
    return counts


def _resampled(rows: Array, resamples: int, seed: int, which: int = 0) -> Array:
    """Sums of each row [rows, clusters] over the clusters of each resample: [rows, resamples]."""
    counts = _draws(rows.shape[1], resamples, seed, which)
    parts, start = [], 0
    for size in _blocks(resamples, rows.shape[1]):
        parts.append((counts[start : start + size].astype(np.float64) @ rows.T).T)
        start += size
    return np.concatenate(parts, axis=1)


def _bootstrap_t(deviations: Array, weights: Array, level: float, resamples: int, seed: int) -> float | None:
    """Half the width of the symmetric studentised interval; None if a resample has no spread or no denominator.

    `deviations` are the clusters' numerators less the estimate times their denominators `weights`.
    """
    rows = np.stack([deviations, weights, deviations**2, deviations * weights, weights**2])
    total, weight, square, cross, size = _resampled(rows, resamples, seed)
    if np.any(weight <= 0):
        return None
    error = total / weight  # estimate of the resample less that of the data
    variance = square - 2 * error * cross + error**2 * size  # of the resample's own deviations, times weight^2
    if np.any(variance <= 1e-12 * rows[2].sum()):
        return None
    quantile = np.quantile(np.abs(error) * weight / np.sqrt(variance), level)
    return float(quantile * np.sqrt(rows[2].sum()) / weights.sum())


def _bca(estimate: float, drawn: Array, left_out: Array, level: float) -> tuple[float, float]:
    """Bias-corrected and accelerated percentiles of resampled estimates (Efron 1987).

    `left_out` [clusters] are the estimates without each cluster.
    """
    # Ties count half: a rate takes few values. Clipped, so that an estimate beyond all resamples has an interval too.
    below = (np.mean(drawn < estimate) + np.mean(drawn <= estimate)) / 2
    bias = special.ndtri(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    influence = left_out.mean() - left_out
    acceleration = np.sum(influence**3) / (6 * np.sum(influence**2) ** 1.5)
    ends = bias + special.ndtri([_tail(level), 1 - _tail(level)])
    low, high = np.quantile(drawn, special.ndtr(bias + ends / (1 - acceleration * ends)))
    return float(low), float(high)


def _tail(level: float) -> float:
    """The share of the truth beyond either end of an interval."""
    if not 0 < level < 1:
        raise UserError(f"level: found {level}, expected a number between 0 and 1")
    return (1 - level) / 2


def _expanded(level: float, clusters: int) -> float | None:
    """The lower expanded percentile: the bootstrap's own spread has divisor n instead of n - 1, and normal tails.

    None for a single cluster.
    """
    tail = _tail(level)
    if clusters == 1:
        return None
    return float(special.ndtr(special.stdtrit(clusters - 1, tail) * np.sqrt(clusters / (clusters - 1))))
