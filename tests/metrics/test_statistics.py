"""Intervals, tests and regressions: coverage by simulation, SciPy and closed forms, invariances."""

import itertools
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from benchmarks import coverage
from nabla_jax.errors import UserError
from nabla_jax.metrics.statistics import (
    FEW,
    METHODS,
    NO_SPREAD,
    NOTHING_LEFT,
    ONE_CLUSTER,
    Interval,
    auc,
    auc_interval,
    holm,
    mean_interval,
    paired_difference,
    ratio_difference,
    ratio_interval,
    regress,
    sign_flip_test,
    sign_flip_tests,
)


def _sample(seed: int, clusters: int, sizes: tuple[int, int] = (2, 9)) -> tuple[np.ndarray, np.ndarray]:
    """Values with a shared part per cluster (sd 1) and a part of their own (sd 1); true mean 0."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(*sizes, size=clusters)
    labels = np.repeat(np.arange(clusters), counts)
    return rng.normal(size=clusters)[labels] + rng.normal(size=len(labels)), labels


@pytest.mark.parametrize(("clusters", "level"), [(6, 0.95), (20, 0.95), (60, 0.95), (20, 0.8)])
def test_coverage_of_the_mean(clusters: int, level: float) -> None:
    runs = 1000
    intervals = [mean_interval(*_sample(seed, clusters), level, resamples=1000) for seed in range(runs)]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    # Three standard errors of the simulation, and one point for what no interval can know about skew.
    assert abs(covered - level) < 3 * np.sqrt(level * (1 - level) / runs) + 0.01


@pytest.mark.parametrize(("sizes", "errors"), [("2 to 8", "exponential"), ("geometric (mean 5)", "ratio")])
def test_with_100_clusters_the_interval_covers_the_truth_93_to_97_in_100(sizes: str, errors: str) -> None:
    found = coverage.coverage(sizes, errors, 100, runs=1000, resamples=1000)
    assert 0.93 <= found.inside <= 0.97


def test_few_uneven_clusters_cover_better_than_the_bootstrap_would() -> None:
    chosen, bca = (
        coverage.coverage("Pareto (1 to 200)", "normal", 10, runs=500, resamples=1000, method=m)
        for m in ("auto", "bca")
    )
    assert 0.93 <= chosen.inside <= 0.98 and bca.inside < 0.9


def test_ignoring_the_clusters_would_cover_far_less() -> None:
    samples = [_sample(seed, 20) for seed in range(300)]
    intervals = [mean_interval(v, np.arange(len(v)), resamples=1000) for v, _ in samples]
    assert np.mean([i.low <= 0 <= i.high for i in intervals]) < 0.8


def test_coverage_of_a_ratio() -> None:
    def interval(seed: int) -> Interval:
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(30), rng.integers(2, 9, size=30))
        reference = rng.gamma(4, 5, size=30)[labels] * rng.uniform(0.5, 1.5, len(labels))
        share = 0.4 + 0.1 * rng.normal(size=30)[labels] + 0.1 * rng.normal(size=len(labels))
        return ratio_interval(share * reference, reference, labels, resamples=1000)

    assert abs(np.mean([interval(s).low <= 0.4 <= interval(s).high for s in range(600)]) - 0.95) < 0.035


@pytest.mark.parametrize(("clusters", "level"), [(2, 0.95), (12, 0.95), (40, 0.9)])
def test_equal_clusters_give_students_interval_of_the_cluster_means(clusters: int, level: float) -> None:
    values, labels = _sample(1, clusters, sizes=(5, 6))
    means = values.reshape(clusters, 5).mean(axis=1)
    expected = scipy.stats.t.interval(level, clusters - 1, means.mean(), scipy.stats.sem(means))
    ours = mean_interval(values, labels, level)
    assert ours.method == "t"
    np.testing.assert_allclose((ours.mean, ours.low, ours.high), (means.mean(), *expected), rtol=1e-9)


def test_a_large_cluster_among_small_ones_counts_as_few() -> None:
    """The closed form: jackknife by hand, and (sum w)^2 / sum w^2 - 1 degrees of freedom."""
    sizes = [12, 2, 3, 1, 6]
    labels = np.repeat(np.arange(5), sizes)
    values = np.random.default_rng(0).normal(size=24) + labels
    left_out = np.array([values[labels != c].mean() for c in range(5)])
    error = np.sqrt(4 / 5 * np.sum((left_out - values.mean()) ** 2))
    half = error * scipy.stats.t.ppf(0.975, 24**2 / np.sum(np.square(sizes)) - 1)
    found = mean_interval(values, labels)
    np.testing.assert_allclose((found.low, found.high), (values.mean() - half, values.mean() + half))


def test_the_bootstrap_t_is_the_slow_way_written_out() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(60), rng.integers(1, 7, size=60))
    below = rng.uniform(1, 2, size=len(labels))
    above = rng.exponential(size=60)[labels] * below
    top, bottom = (np.array([row[labels == c].sum() for c in range(60)]) for row in (above, below))

    def error(t: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.sum((t - t.sum() / b.sum() * b) ** 2)) / b.sum())

    ratio, values = top.sum() / bottom.sum(), []
    for _ in range(4000):
        t, b = (row[drawn] for drawn in [rng.integers(60, size=60)] for row in (top, bottom))
        values.append(abs(t.sum() / b.sum() - ratio) / error(t, b))
    half = np.quantile(values, 0.95) * error(top, bottom)
    found = ratio_interval(above, below, labels)
    assert found.method == "bootstrap-t" and found.mean == pytest.approx(ratio)
    np.testing.assert_allclose((found.low, found.high), (ratio - half, ratio + half), atol=0.08 * half)


def test_bca_is_that_of_scipy_where_every_pair_is_a_cluster() -> None:
    values = np.random.default_rng(0).lognormal(0, 1, size=80)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=40_000, method="BCa", rng=0).confidence_interval
    ours = mean_interval(values, np.arange(80), method="bca", resamples=40_000)
    width = theirs.high - theirs.low
    np.testing.assert_allclose((ours.low, ours.high), theirs, atol=0.02 * width)
    middle = (ours.low + ours.high) / 2
    assert ours.method == "bca" and middle - ours.mean > 0.05 * width  # skewed to the right, as the values are


def test_many_clusters_tend_to_the_normal_interval() -> None:
    values = np.random.default_rng(4).exponential(size=4000)
    normal = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    for method in METHODS:
        ours = mean_interval(values, np.arange(4000), method=method)
        np.testing.assert_allclose((ours.low, ours.high), normal, atol=0.003)


@pytest.mark.parametrize("clusters", [FEW - 1, FEW])
def test_the_number_of_clusters_chooses_the_kind_of_interval(clusters: int) -> None:
    values, labels = _sample(0, clusters)
    chosen = "t" if clusters < FEW else "bootstrap-t"
    assert mean_interval(values, labels) == mean_interval(values, labels, method=chosen)
    assert mean_interval(values, labels).method == chosen


def test_a_resample_without_spread_makes_it_students() -> None:
    """One failure in sixty classes: a third of all resamples are without it."""
    values = np.ones(60)
    values[7] = 0
    found = mean_interval(values, np.arange(60))
    assert found.method == "t" and found.low < found.mean == 59 / 60 < found.high


Statistic = Callable[[list[np.ndarray], Any], Interval]
STATISTICS: dict[str, Statistic] = {
    "mean": lambda rows, labels: mean_interval(rows[0], labels),
    "ratio": lambda rows, labels: ratio_interval(rows[0], 1 + np.abs(rows[1]), labels),
    "paired": lambda rows, labels: paired_difference(rows[0], rows[1], labels),
    "ratio difference": lambda rows, labels: ratio_difference(rows[0], rows[1], 1 + np.abs(rows[2]), labels),
}


def _rows(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    _, labels = _sample(seed, 15)
    return list(np.random.default_rng(seed).normal(size=(3, len(labels)))), labels


@pytest.mark.parametrize("name", STATISTICS)
def test_order_of_the_pairs_and_names_of_the_clusters_do_not_matter(name: str) -> None:
    rows, labels = _rows()
    before = STATISTICS[name](rows, labels)
    order = np.random.default_rng(5).permutation(len(labels))
    shuffled = STATISTICS[name]([row[order] for row in rows], labels[order])
    np.testing.assert_allclose(
        (shuffled.mean, shuffled.low, shuffled.high), (before.mean, before.low, before.high), rtol=1e-13
    )
    assert STATISTICS[name](rows, [f"class {label:03}" for label in labels]) == before
    assert STATISTICS[name](rows, labels) == before


@pytest.mark.parametrize("name", STATISTICS)
def test_the_estimate_lies_in_its_interval_and_counts_are_right(name: str) -> None:
    rows, labels = _rows()
    found = STATISTICS[name](rows, labels)
    assert found.low < found.mean < found.high
    assert (found.n, found.clusters) == (len(labels), 15)


def test_shift_and_scale() -> None:
    (values, *_), labels = _rows()
    before, after = mean_interval(values, labels), mean_interval(3 * values + 7, labels)
    for field in ("mean", "low", "high"):
        assert getattr(after, field) == pytest.approx(3 * getattr(before, field) + 7, rel=1e-12)
    mirrored = mean_interval(-values, labels)
    assert (mirrored.low, mirrored.high) == pytest.approx((-before.high, -before.low), rel=1e-12)


def test_a_ratio_has_no_unit() -> None:
    rows, labels = _rows()
    below = 1 + np.abs(rows[1])
    before, after = ratio_interval(rows[0], below, labels), ratio_interval(255 * rows[0], 255 * below, labels)
    np.testing.assert_allclose((after.mean, after.low, after.high), (before.mean, before.low, before.high))


def test_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    found = ratio_interval([1.0, 1.0, 4.0], [1.0, 2.0, 8.0], [0, 1, 2])
    assert found.mean == pytest.approx(6 / 11)


def test_subject_effect_is_the_difference_of_normalised_identities() -> None:
    rng = np.random.default_rng(0)
    right, shuffled, sibling = rng.uniform(1, 30, size=(3, 40))
    labels = np.repeat(np.arange(8), 5)
    effect = ratio_difference(right, shuffled, sibling, labels)
    with_right = ratio_interval(sibling - right, sibling, labels)
    with_shuffled = ratio_interval(sibling - shuffled, sibling, labels)
    assert with_right.mean == pytest.approx(1 - right.sum() / sibling.sum())
    assert effect.mean == pytest.approx(with_right.mean - with_shuffled.mean)
    swapped = ratio_difference(shuffled, right, sibling, labels)
    negated = (-effect.high, -effect.mean, -effect.low)
    assert (swapped.low, swapped.mean, swapped.high) == pytest.approx(negated)
    assert ratio_difference(right, right, sibling, labels).high == 0


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    values, labels = _sample(0, 30)
    better = values + 0.1 + 0.01 * np.random.default_rng(1).normal(size=len(values))
    difference, alone = paired_difference(better, values, labels), mean_interval(values, labels)
    assert difference.low > 0.09 and difference.high < 0.11
    assert difference.high - difference.low < 0.1 * (alone.high - alone.low)


def test_seeds_differ_within_the_noise_of_the_bootstrap() -> None:
    values, labels = _sample(0, 60)
    first, second = mean_interval(values, labels, seed=0), mean_interval(values, labels, seed=1)
    assert first != second and first.mean == second.mean
    assert abs(first.low - second.low) < 0.1 * (first.high - first.low)


def test_a_higher_level_is_wider() -> None:
    (values, *_), labels = _rows()
    widths = [(i.high - i.low) for i in (mean_interval(values, labels, level) for level in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths) and widths[0] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_what_says_nothing_of_the_spread_has_a_defined_result(method: str) -> None:
    def interval(top: Any, bottom: Any, labels: Any) -> Interval:
        return ratio_interval(top, bottom, labels, method=method)

    assert interval([1.0, 3.0], [1.0, 1.0], [4, 4]) == Interval(2.0, None, None, 2, 1, "", ONE_CLUSTER)
    assert interval([0.5] * 70, [1.0] * 70, range(70)) == Interval(0.5, 0.5, 0.5, 70, 70, "", NO_SPREAD)
    # 0.1 + 0.2 is not 0.3: equal but for rounding.
    rounded = interval([0.1, 0.2, 0.3, 0.6], [1.0, 2.0, 3.0, 6.0], [0, 0, 1, 1])
    assert rounded.reason == NO_SPREAD and rounded.low == rounded.mean == rounded.high
    zeros = interval([0.0] * 4, [1.0] * 4, range(4))
    assert (zeros.low, zeros.mean, zeros.high) == (0, 0, 0)
    assert interval([1.0, 2.0], [0.0, 3.0], ["a", "b"]) == Interval(1.0, None, None, 2, 2, "", NOTHING_LEFT)


def test_ten_thousand_pairs_and_resamples_take_seconds_and_little_memory() -> None:
    values = np.random.default_rng(0).gamma(2, size=10_000)
    tracemalloc.start()
    started = time.process_time()
    found = mean_interval(values, np.arange(10_000), resamples=10_000)
    test = sign_flip_test(values - 2, np.arange(10_000))
    assert time.process_time() - started < 40  # 3 s without other work on the machine
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6
    normal = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose((found.low, found.high), normal, atol=0.002)
    assert test.p == pytest.approx(scipy.stats.ttest_1samp(values, 2).pvalue, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([], []), "found no pairs"),
        (lambda: mean_interval([1.0, np.nan, np.inf], [0, 1, 2]), "2 of 3 values are not finite"),
        (lambda: mean_interval([1.0, 2.0], [0]), "one length"),
        (lambda: ratio_interval([1.0, 2.0], [1.0], [0, 1]), "one length"),
        (lambda: paired_difference([1.0, 2.0], [1.0], [0, 1]), "equally long"),
        (lambda: ratio_difference([1.0, 2.0], [1.0], [1.0, 1.0], [0, 1]), "equally long"),
        (lambda: ratio_interval([1.0, 2.0], [0.0, 0.0], [0, 1]), "zero or less"),
        (lambda: mean_interval([1.0, 2.0], [0, 1], level=1.0), "level"),
        (lambda: mean_interval([1.0, 2.0], [0, 1], method="normal"), "method: found 'normal', expected one of auto"),
        (lambda: mean_interval([1.0, 2.0], [0, 1], method="bca", resamples=0), "resamples: found 0"),
        (lambda: sign_flip_test([1.0, np.nan], [0, 1]), "1 of 2 values are not finite"),
        (lambda: sign_flip_test([1.0], [0], flips=0), "flips: found 0"),
        (lambda: holm([0.5, 1.5]), "outside 0 .. 1"),
        (lambda: holm(0.5), "expected a list"),
        (lambda: regress([([1.0], [1.0], [0])], []), "found 1 and 0 models"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call: Callable[[], Interval], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_auc_is_the_rank_sum_statistic() -> None:
    rng = np.random.default_rng(0)
    # Few distinct values: ties count half.
    positive, negative = rng.integers(2, 12, 70), rng.integers(0, 10, 90)
    expected = scipy.stats.mannwhitneyu(positive, negative).statistic / (70 * 90)
    assert auc(positive, negative) == pytest.approx(expected, rel=1e-12)
    assert auc([1.0], [0.0, 0.5]) == 1 and auc([0.0], [1.0]) == 0 and auc([3.0], [3.0]) == 0.5
    with pytest.raises(UserError, match="found 0 positives and 1 negatives"):
        auc([], [1.0])


def test_auc_intervals_draw_whole_clusters() -> None:
    rng = np.random.default_rng(1)
    positive_of, negative_of = rng.permutation(np.repeat(np.arange(9), 6)), rng.permutation(np.repeat(np.arange(9), 11))
    easy = rng.normal(size=9)
    positive = 1 + easy[positive_of] + rng.normal(size=54)
    negative = easy[negative_of] + rng.normal(size=99)
    found = auc_interval(positive, positive_of, negative, negative_of, resamples=400)
    assert (found.n, found.clusters) == (54, 9) and found.mean == pytest.approx(auc(positive, negative))
    # The same resamples the slow way: every drawn cluster's pairs written out.
    values = []
    for seed in range(400):
        drawn = np.random.default_rng((99, seed)).integers(9, size=9)
        rows = [
            np.concatenate([row[of == c] for c in drawn])
            for row, of in ((positive, positive_of), (negative, negative_of))
        ]
        values.append(auc(*rows))
    # Expanded percentiles of 9 clusters lie outside the plain ones; both are simulations of 400 draws.
    low, high = np.quantile(values, [0.0085, 0.9915])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    again = auc_interval(positive, [f"c{c}" for c in positive_of], negative, [f"c{c}" for c in negative_of])
    assert again == auc_interval(positive, positive_of, negative, negative_of)
    one = auc_interval(positive, np.zeros(54), negative, np.zeros(99))
    assert (one.low, one.high, one.reason) == (None, None, ONE_CLUSTER)


def test_auc_intervals_name_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="positives or negatives alone"):
        auc_interval([1.0, 2.0], ["a", "b"], [1.0], ["a"])
    with pytest.raises(UserError, match="not finite"):
        auc_interval([1.0, np.nan], ["a", "a"], [1.0], ["a"])


@pytest.mark.parametrize("clusters", [2, 5, 11])
def test_few_clusters_have_every_flip_counted(clusters: int) -> None:
    values, labels = _sample(clusters, clusters)
    values = values + 0.4
    found = sign_flip_test(values, labels)
    sums = np.bincount(labels, weights=values)
    # SciPy flips the signs of a single sample, all of them where they are few enough.
    theirs = scipy.stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert found.exact and found.p == pytest.approx(theirs.pvalue, abs=1e-12)
    slow = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-9 for signs in itertools.product((-1, 1), repeat=clusters)]
    assert found.p == np.mean(slow)


def test_many_clusters_have_drawn_flips_counted() -> None:
    values, labels = _sample(5, 40)
    values = values - values.mean() + 0.3
    found = sign_flip_test(values, labels)
    sums = np.bincount(labels, weights=values)
    theirs = scipy.stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=20_000, rng=0)
    assert not found.exact and found.flips == 100_000 and found.clusters == 40 and found.n == len(values)
    assert found.p == pytest.approx(theirs.pvalue, abs=0.02) and 0.001 < found.p < 0.5
    assert sign_flip_tests([values, values + 5], labels)[0] == found
    assert sign_flip_test(values, labels) == found != sign_flip_test(values, labels, seed=1)
    assert sign_flip_test(-values, labels).p == pytest.approx(found.p, abs=0.02)
    assert sign_flip_test(values + 5, labels).p == pytest.approx(1 / 100_001)


def test_flips_reject_a_true_null_as_often_as_they_say() -> None:
    p = np.array([sign_flip_test(*_sample(seed, 15), flips=500).p for seed in range(1000)])
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(p <= level) - level) < 3 * np.sqrt(level * (1 - level) / 1000)


def test_flips_of_nothing() -> None:
    nothing = sign_flip_test([0.0, 0.0, 1.0, -1.0], [0, 0, 1, 1])
    assert (nothing.p, nothing.exact, nothing.reason) == (1.0, True, "all differences are zero")
    one = sign_flip_test([1.0, 2.0], [3, 3])
    assert (one.p, one.reason) == (1.0, ONE_CLUSTER)
    # Two of three clusters differ: four flips, all as far or half as far.
    assert sign_flip_test([1.0, 1.0, 0.0], [0, 1, 2]).p == 0.5


def test_holm() -> None:
    # Worked by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 may not fall below the one before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.6, 0.7]), [0.03, np.nan, 1, 1])
    assert holm([]).shape == (0,) and np.isnan(holm([np.nan])).all()


def test_holm_bounds_the_chance_of_any_false_rejection() -> None:
    rng = np.random.default_rng(0)
    tables = rng.random((4000, 6))
    false = np.mean([holm(table).min() <= 0.05 for table in tables])
    assert false == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.012)


def _benchmarks(models: int, noise: float, seed: int = 0, clusters: int = 40) -> tuple[list[Any], list[Any]]:
    """Terms of models on two benchmarks whose true scores lie on y = 0.2 + 0.5 x."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 1, size=models)
    found = []
    for scores in (truth, 0.2 + 0.5 * truth):
        labels = np.repeat(np.arange(clusters), 5)
        hard = noise * rng.normal(size=clusters)[labels]
        found.append([(s + hard + noise * rng.normal(size=len(labels)), np.ones(len(labels)), labels) for s in scores])
    return found[0], found[1]


def test_regression_is_least_squares_over_models() -> None:
    x, y = _benchmarks(7, 0.3)
    means = [[float(np.mean(top)) for top, _, _ in terms] for terms in (x, y)]
    theirs = scipy.stats.linregress(*means)
    found = regress(x, y)
    assert found.slope.mean == pytest.approx(theirs.slope) and found.intercept.mean == pytest.approx(theirs.intercept)
    assert found.r2.mean == pytest.approx(theirs.rvalue**2)
    for part in (found.slope, found.intercept, found.r2):
        assert part.low < part.high and (part.n, part.clusters, part.method) == (7, 40, "percentile")
    assert found.slope.low < 0.5 < found.slope.high and found.r2.low >= 0 and found.r2.high <= 1
    assert regress(x, y) == found
    fixed = regress(x, y, draw_models=False)
    assert fixed.slope.mean == found.slope.mean
    assert fixed.slope.high - fixed.slope.low < found.slope.high - found.slope.low


def test_regression_intervals_cover_the_slope() -> None:
    covered = []
    for seed in range(200):
        slope = regress(*_benchmarks(12, 0.3, seed), resamples=400).slope
        covered.append(slope.low <= 0.5 <= slope.high)
    # Noise in x flattens the line a little; a percentile interval of 12 models is not exact either.
    assert np.mean(covered) > 0.88


def test_regression_takes_models_with_other_pairs_and_other_denominators() -> None:
    x, y = _benchmarks(5, 0.2)
    top, bottom, labels = x[2]
    x[2] = (3 * top[15:], 3 * bottom[15:], labels[15:])  # three clusters are missing, and the unit is another
    found = regress(x, y)
    means = [[float(np.sum(t) / np.sum(b)) for t, b, _ in terms] for terms in (x, y)]
    assert found.slope.mean == pytest.approx(scipy.stats.linregress(*means).slope)


@pytest.mark.filterwarnings("error")
def test_regression_of_what_has_no_line() -> None:
    x, y = _benchmarks(2, 0.3)
    assert regress(x, y).r2 is None and regress(x, y).reason == "2 models: a line needs at least 3"
    x, y = _benchmarks(4, 0.3)
    alike = regress([x[0]] * 4, y)
    assert alike.slope is None and alike.reason == "all models score alike" and alike.models == 4
    assert regress(x, [y[0]] * 4).reason == "all models score alike"
    single = [[(top[:5], bottom[:5], labels[:5]) for top, bottom, labels in terms] for terms in (x, y)]
    assert regress(*single).slope.method == "percentile"
    fixed = regress(*single, draw_models=False)
    assert (fixed.slope.low, fixed.slope.high, fixed.slope.reason) == (None, None, ONE_CLUSTER)
