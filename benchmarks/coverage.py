"""How often the intervals cover the truth: ``python -m benchmarks.coverage``.

Draws data sets of clusters whose truth is known, takes the interval of each, and counts. Prints one row per kind of
cluster sizes, kind of errors and number of clusters: coverage of the 95 % interval that `nabla_jax.metrics.statistics`
chooses, how often the truth lay below and above it, its median width and, with --compare, the coverage of every kind of
interval on the same data.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from nabla_jax.metrics.statistics import FEW, METHODS, ratio_interval

SIZES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "equal (6)": lambda rng, k: np.full(k, 6),
    "2 to 8": lambda rng, k: rng.integers(2, 9, size=k),
    "geometric (mean 5)": lambda rng, k: rng.geometric(0.2, size=k),
    "Pareto (1 to 200)": lambda rng, k: np.clip(np.ceil(5 * rng.pareto(2, size=k)), 1, 200).astype(int),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Pairs of one data set, each [n], and the true ratio of their expected sums."""

    numerators: np.ndarray
    denominators: np.ndarray
    clusters: np.ndarray
    truth: float


def _normal(rng: np.random.Generator, labels: np.ndarray, clusters: int) -> Sample:
    values = rng.normal(size=clusters)[labels] + rng.normal(size=len(labels))
    return Sample(values, np.ones(len(labels)), labels, 0.0)


def _exponential(rng: np.random.Generator, labels: np.ndarray, clusters: int) -> Sample:
    values = rng.exponential(size=clusters)[labels] + rng.exponential(size=len(labels))
    return Sample(values, np.ones(len(labels)), labels, 2.0)


def _lognormal(rng: np.random.Generator, labels: np.ndarray, clusters: int) -> Sample:
    values = rng.lognormal(0, 0.75, size=clusters)[labels] * rng.exponential(size=len(labels))
    return Sample(values, np.ones(len(labels)), labels, float(np.exp(0.75**2 / 2)))


def _rate(rng: np.random.Generator, labels: np.ndarray, clusters: int) -> Sample:
    values = rng.random(len(labels)) < rng.beta(2, 1, size=clusters)[labels]
    return Sample(values.astype(float), np.ones(len(labels)), labels, 2 / 3)


def _identity(rng: np.random.Generator, labels: np.ndarray, clusters: int) -> Sample:
    """A ratio of sums, as normalised identity: errors of the sibling vary by class and picture."""
    reference = rng.gamma(4, 5, size=clusters)[labels] * rng.uniform(0.5, 1.5, size=len(labels))
    share = 0.4 + 0.15 * (rng.exponential(size=clusters) - 1)[labels] + 0.1 * rng.normal(size=len(labels))
    return Sample(share * reference, reference, labels, 0.4)


ERRORS = {
    "normal": _normal,
    "exponential": _exponential,
    "lognormal": _lognormal,
    "rate": _rate,
    "ratio": _identity,
}


def draw(sizes: str, errors: str, clusters: int, seed: int) -> Sample:
    """One data set: a part of every value is shared within its cluster."""
    rng = np.random.default_rng((seed, clusters, list(SIZES).index(sizes), list(ERRORS).index(errors)))
    labels = np.repeat(np.arange(clusters), SIZES[sizes](rng, clusters))
    return ERRORS[errors](rng, labels, clusters)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Shares of data sets whose truth lies in, below and above the interval; the interval's median width."""

    inside: float
    below: float
    above: float
    width: float


def coverage(
    sizes: str, errors: str, clusters: int, *, runs: int, method: str = "auto", resamples: int = 2000, seed: int = 0
) -> Coverage:
    """Of `runs` data sets. Data sets in which all clusters agree have an interval without width, which counts."""
    ends = []
    for run in range(runs):
        sample = draw(sizes, errors, clusters, seed * 1_000_000 + run)
        found = ratio_interval(
            sample.numerators, sample.denominators, sample.clusters, method=method, resamples=resamples
        )
        ends.append((found.low, found.high, sample.truth))
    low, high, truth = np.array(ends, dtype=float).T
    below, above = float(np.mean(truth < low)), float(np.mean(truth > high))
    return Coverage(1 - below - above, below, above, float(np.median(high - low)))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 20, 10, 5])
    parser.add_argument("--runs", type=int, default=1000, help="data sets per row")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--compare", action="store_true", help="the other kinds of interval, too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    of = functools.partial(coverage, runs=arguments.runs, resamples=arguments.resamples, seed=arguments.seed)
    others = [name for name in METHODS if name != "auto"] if arguments.compare else []
    head = ["clusters", "sizes", "errors", "covers", "truth below", "above", "width", *others]
    print(f"| {' | '.join(head)} |")
    print("|" + "---|" * (7 + len(others)), flush=True)
    covered: dict[int, list[float]] = {}
    for clusters in arguments.clusters:
        for sizes in SIZES:
            for errors in ERRORS:
                found = of(sizes, errors, clusters)
                same = "t" if clusters < FEW else "bootstrap-t"
                rest = [
                    f"{100 * (found if name == same else of(sizes, errors, clusters, method=name)).inside:.1f}"
                    for name in others
                ]
                shares = [f"{100 * share:.1f}" for share in (found.inside, found.below, found.above)]
                cells = [str(clusters), sizes, errors, *shares, f"{found.width:.3g}", *rest]
                print(f"| {' | '.join(cells)} |", flush=True)
                covered.setdefault(clusters, []).append(found.inside)
    for clusters, insides in covered.items():
        print(
            f"{clusters} clusters: {100 * np.mean(insides):.1f} % on average, "
            f"{100 * min(insides):.1f} to {100 * max(insides):.1f} %"
        )


if __name__ == "__main__":
    main()
