"""Intervals: coverage by simulation, closed forms, invariances."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats

from nabla_jax.errors import UserError
from nabla_jax.metrics.statistics import (
    Interval,
    auc,
    auc_interval,
    mean_interval,
    paired_difference,
    ratio_difference,
    ratio_interval,
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
    # Three standard errors of the simulation, and one point for what a bootstrap cannot know about skew.
    assert abs(covered - level) < 3 * np.sqrt(level * (1 - level) / runs) + 0.01


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


@pytest.mark.parametrize(("clusters", "level"), [(12, 0.95), (40, 0.95), (40, 0.9)])
def test_equal_clusters_give_students_interval_of_the_cluster_means(clusters: int, level: float) -> None:
    values, labels = _sample(1, clusters, sizes=(5, 6))
    means = values.reshape(clusters, 5).mean(axis=1)
    expected = scipy.stats.t.interval(level, clusters - 1, means.mean(), scipy.stats.sem(means))
    ours = mean_interval(values, labels, level, resamples=200_000)
    assert ours.mean == pytest.approx(means.mean(), abs=1e-12)
    half = (expected[1] - expected[0]) / 2
    np.testing.assert_allclose((ours.low, ours.high), expected, atol=0.06 * half)


def test_expanded_percentiles_tend_to_plain_ones() -> None:
    values, labels = _sample(3, 2000, sizes=(1, 2))
    drawn = scipy.stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0)
    ours = mean_interval(values, labels)
    np.testing.assert_allclose((ours.low, ours.high), drawn.confidence_interval, atol=3e-3)


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
    (values, *_), labels = _rows()
    first, second = mean_interval(values, labels, seed=0), mean_interval(values, labels, seed=1)
    assert first != second and first.mean == second.mean
    assert abs(first.low - second.low) < 0.1 * (first.high - first.low)


def test_a_higher_level_is_wider() -> None:
    (values, *_), labels = _rows()
    widths = [(i.high - i.low) for i in (mean_interval(values, labels, level) for level in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths) and widths[0] > 0


def test_one_cluster_says_nothing_about_the_spread() -> None:
    assert mean_interval([1.0, 3.0], [4, 4]) == Interval(2.0, 2.0, 2.0, 2, 1)


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
    assert one.low == one.mean == one.high


def test_auc_intervals_name_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="positives or negatives alone"):
        auc_interval([1.0, 2.0], ["a", "b"], [1.0], ["a"])
    with pytest.raises(UserError, match="not finite"):
        auc_interval([1.0, np.nan], ["a", "a"], [1.0], ["a"])
