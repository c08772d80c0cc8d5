"""From scores of pairs to rows of a table: {model, benchmark, metric, mean, low, high, n, clusters, method, reason}.

Intervals are 95 % intervals clustered by class, or by individual where the pairs have one (observations of
iNaturalist), because pictures of one share its difficulty: `nabla_jax.metrics.statistics`. `low` and `high` are None
where there is no interval, and `reason` says why.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import pathlib
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.metrics import identity, statistics

METRICS = ("rmse", "ssim", "normalised_identity", "subject_effect", "identification_rate")
# Of networks and of masks of generated birds; a table has those that its pairs have.
FURTHER_METRICS = (
    "lpips",
    "dinov2",
    "siglip",
    "lpips_box",
    "dinov2_box",
    "siglip_box",
    "dinov2_subject",
    "siglip_subject",
    "patch_precision",
    "patch_recall",
    "retrieval_rate",
    "mask_iou",
    "keypoint_distance",
    "keypoint_rate",
)
ALL_METRICS = (*METRICS, *FURTHER_METRICS)
# The published table's three beside RMSE; the rest would not fit on a line.
PRINTED = (*METRICS, "lpips", "dinov2", "siglip")
LOWER_IS_BETTER = frozenset({"rmse", "lpips", "lpips_box", "keypoint_distance"})
BREAKDOWN_METRICS = (
    "rmse",
    "normalised_identity",
    "normalised_identity_plumage",
    "subject_effect",
    "identification_rate",
    "lpips",
    "dinov2",
    "siglip",
    "retrieval_rate",
)
# What a metric cannot exceed, and so neither can the ends of its interval.
BOUNDS = {
    "rmse": (0.0, 255.0),
    "ssim": (-1.0, 1.0),
    "normalised_identity": (-math.inf, 1.0),
    "normalised_identity_plumage": (-math.inf, 1.0),
    "identification_rate": (0.0, 1.0),
    "keypoint_distance": (0.0, math.inf),
    "keypoint_rate": (0.0, 1.0),
}
AREA_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4)  # shares of the picture: between a bird far off and one that fills it


@dataclasses.dataclass(frozen=True)
class PairScore:
    """Every raw number of one picture set and one pair; None where a number does not exist.

    Errors are masked RMSE 0..255. `rmse` and `ssim` compare with the target's photo; `right_error` (right
    subject) and `shuffled_error` (another subject) compare with the oracle's right answer for the right
    subject; `sibling_error` and `sibling_plumage_error` are the wrong birds' renders against it. `rank` is
    the right species' place among `lineup` species. `pixels` counts the mask, `area` is its share of the target's
    picture. `excluded` says why a pair does not count ('' if it does). `family` is '' where the data set has none.
    `cluster` names the individual that subject and target share; '' leaves the class as the cluster of the pair.
    `distance` is the taxonomic distance of the target's class to the nearest class of training
    (`nabla_jax.data.taxonomy.distance`).

    Of the networks: ``lpips`` (distance), ``dinov2`` and ``siglip`` (cosines) compare with the target, masked, as the
    published evaluation does; ``*_box`` with both birds cut out; ``*_subject`` the cut-outs of the generated bird and
    the subject; ``patch_precision`` and ``patch_recall`` their foreground patches (``metrics.patches``).
    ``retrieval_rank`` is the place of the true class among ``retrieval_classes`` siblings (``metrics.retrieval``).
    ``mask_iou`` compares the generated bird's mask, where there is one, with the target's; ``keypoint_distance`` and
    ``keypoint_rate`` the keypoints found in its picture with those visible in the target's (``metrics.pose``).
    """

    pair: str
    subject_id: str
    target_id: str
    class_id: int
    order: str
    species: str
    qualifier: str
    pixels: int
    rmse: float | None = None
    ssim: float | None = None
    right_error: float | None = None
    shuffled_error: float | None = None
    sibling_error: float | None = None
    sibling_plumage_error: float | None = None
    rank: int | None = None
    lineup: int | None = None
    excluded: str = ""
    family: str = ""
    cluster: str = ""
    area: float | None = None
    distance: int | None = None
    lpips: float | None = None
    dinov2: float | None = None
    siglip: float | None = None
    lpips_box: float | None = None
    dinov2_box: float | None = None
    siglip_box: float | None = None
    dinov2_subject: float | None = None
    siglip_subject: float | None = None
    patch_precision: float | None = None
    patch_recall: float | None = None
    retrieval_rank: int | None = None
    retrieval_classes: int | None = None
    mask_iou: float | None = None
    keypoint_distance: float | None = None
    keypoint_rate: float | None = None


_TYPES = typing.get_type_hints(PairScore)
_FIELDS = [field.name for field in dataclasses.fields(PairScore)]


def kind(model: str, references: Sequence[str]) -> str:
    """'reference' for one of the reference points, 'bound' for pictures that know the answer, or 'model'."""
    return "reference" if model in references else "bound" if model.endswith("ceiling") else "model"


def to_csv(scores: Iterable[PairScore]) -> str:
    """One line per pair, floats with all their digits, empty where there is no number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_FIELDS)
    for score in scores:
        writer.writerow("" if (v := getattr(score, name)) is None else v for name in _FIELDS)
    return stream.getvalue()


def from_csv(path: pathlib.Path) -> list[PairScore]:
    """Inverse of `to_csv` on a file. Raises UserError naming the file."""
    try:
        return parse_csv(path.read_text())
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({error}), delete it to have it made again") from error


def parse_csv(text: str) -> list[PairScore]:
    """Inverse of `to_csv`. Raises KeyError, TypeError or ValueError for other text."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [PairScore(**{name: _parse(_TYPES[name], row[name]) for name in _FIELDS}) for row in rows]


def _parse(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    options = typing.get_args(kind) or (kind,)
    if text == "" and type(None) in options:
        return None
    return (int if int in options else float)(text)


def estimate(scores: Sequence[PairScore], metric: str, seed: int = 0) -> dict[str, Any] | None:
    """{mean, low, high, n, clusters, method, reason} of a metric over the pairs that have it; None if none has."""
    top, bottom, clusters = terms(scores, metric)
    if not len(top):
        return None
    return _values(statistics.ratio_interval(top, bottom, clusters, seed=seed), BOUNDS.get(metric))


def terms(scores: Sequence[PairScore], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numerators, denominators, clusters), each [pairs with this metric]; means have denominators of one.

    Clusters are names of individuals, or of classes where the pairs have none.
    """
    used, make = _TERMS[metric]
    chosen = [s for s in scores if not s.excluded and all(getattr(s, name) is not None for name in used)]
    columns = [np.array([float(getattr(s, name)) for s in chosen]) for name in used]
    top, bottom = make(*columns)
    return top, bottom, np.array([cluster_of(s) for s in chosen], dtype=np.str_)


def cluster_of(score: PairScore) -> str:
    """The name of the pair's individual, or of its class where it has none."""
    # Digits in front, so that names sort as the numbers do.
    return score.cluster or f"class {score.class_id:09}"


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values, np.ones_like(values)


_TERMS: dict[str, tuple[tuple[str, ...], Callable[..., tuple[np.ndarray, np.ndarray]]]] = {
    "rmse": (("rmse",), _mean),
    "ssim": (("ssim",), _mean),
    "normalised_identity": (("right_error", "sibling_error"), identity.normalised_identity_terms),
    "normalised_identity_plumage": (
        ("right_error", "sibling_plumage_error"),
        identity.normalised_identity_terms,
    ),
    "subject_effect": (("right_error", "shuffled_error", "sibling_error"), identity.subject_effect_terms),
    "identification_rate": (("rank",), lambda rank: _mean((rank == 1).astype(float))),
    **{name: ((name,), _mean) for name in FURTHER_METRICS},
    "retrieval_rate": (("retrieval_rank",), lambda rank: _mean((rank == 1).astype(float))),
}


def rows(model: str, benchmark: str, scores: Sequence[PairScore], seed: int = 0) -> list[dict[str, Any]]:
    """The summary rows of one model on one benchmark: those of METRICS and FURTHER_METRICS that its pairs have."""
    found = []
    for metric in ALL_METRICS:
        values = estimate(scores, metric, seed)
        if values is not None:
            found.append({"model": model, "benchmark": benchmark, "metric": metric} | values)
    return found


def breakdown(model: str, benchmark: str, scores: Sequence[PairScore], seed: int = 0) -> list[dict[str, Any]]:
    """Rows like those of the summary, for all pairs against sibling plumages and by each of GROUPS.

    Extra fields: group ('all' or one of GROUPS) and value. A group in which all pairs are alike is left out, and so are
    pairs of which the value is not known.
    """
    groups: list[tuple[str, str, list[PairScore]]] = [("all", "", list(scores))]
    for group, value_of in GROUPS.items():
        found: dict[Any, list[PairScore]] = {}
        for score in scores:
            if (value := value_of(score)) is not None:
                found.setdefault(value, []).append(score)
        if len(found) > 1:
            groups += [(group, _value_name(group, value), found[value]) for value in sorted(found)]
    rows_ = []
    for group, name, members in groups:
        for metric in BREAKDOWN_METRICS:
            if group == "all" and metric in ALL_METRICS:
                continue
            values_of = estimate(members, metric, seed)
            if values_of is not None:
                head = {"model": model, "benchmark": benchmark, "metric": metric, "group": group, "value": name}
                rows_.append(head | values_of)
    return rows_


# What a pair belongs to, as something that sorts; None where it is not known.
GROUPS: dict[str, Callable[[PairScore], Hashable]] = {
    "qualifier": lambda s: s.qualifier,
    "order": lambda s: s.order,
    "family": lambda s: s.family,
    "species": lambda s: s.species,
    "area": lambda s: None if s.area is None else int(np.searchsorted(AREA_EDGES, s.area, "right")),
    "direction": lambda s: s.pair.rpartition("_")[2],
    "distance": lambda s: s.distance,
}


def _value_name(group: str, value: Any) -> str:
    if group != "area":
        return str(value)
    edges = [f"{100 * edge:g}" for edge in AREA_EDGES]
    if value == 0:
        return f"under {edges[0]} %"
    return f"{edges[-1]} % or more" if value == len(edges) else f"{edges[value - 1]} to {edges[value]} %"


def compare(
    model: str,
    baseline: str,
    benchmark: str,
    scores: Sequence[PairScore],
    others: Sequence[PairScore],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences model minus baseline over the pairs both have, for every metric of a summary.

    Fields: those of a summary row, baseline, relative (difference of means / the baseline's mean; None for ratios,
    which have no zero) and p, of the two-sided sign-flip test by cluster. `correct` adds p_holm over a whole table.

    Raises UserError if a ratio's denominators differ between the two: they belong to the pair, not to the model.
    """
    found: list[dict[str, Any]] = []
    alike: dict[tuple[str, ...], list[tuple[int, np.ndarray]]] = {}  # pairs -> rows over them, and their differences
    by_pair = {s.pair: s for s in others if not s.excluded}
    both = [s for s in scores if not s.excluded and s.pair in by_pair]
    for metric in ALL_METRICS:
        used, _ = _TERMS[metric]
        paired = [s for s in both if all(getattr(t, name) is not None for t in (s, by_pair[s.pair]) for name in used)]
        if not paired:
            continue
        mine, bottom, clusters = terms(paired, metric)
        theirs, other_bottom, _ = terms([by_pair[s.pair] for s in paired], metric)
        if not np.allclose(bottom, other_bottom, rtol=1e-9):
            raise UserError(
                f"{benchmark}: {metric} of {model} and {baseline} has different denominators, expected those of the "
                "same pairs and renders; score both anew"
            )
        interval = statistics.ratio_interval(mine - theirs, bottom, clusters, seed=seed)
        base = float(theirs.mean())
        is_mean = bool(np.all(bottom == 1))
        head: dict[str, Any] = {
            "model": model,
            "baseline": baseline,
            "benchmark": benchmark,
            "metric": metric,
            "relative": round(float(mine.mean() - base) / base, 6) if base and is_mean else None,
        }
        alike.setdefault(tuple(s.pair for s in paired), []).append((len(found), mine - theirs))
        found.append(head | _values(interval))
    clusters_of = {s.pair: cluster_of(s) for s in both}
    for pairs, members in alike.items():
        tests = statistics.sign_flip_tests([d for _, d in members], [clusters_of[pair] for pair in pairs], seed=seed)
        for (row, _), test in zip(members, tests, strict=True):
            found[row]["p"] = round(test.p, 6)
    return found


def correct(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `compare` with p_holm, their p values adjusted over all rows of the table (Holm 1979)."""
    adjusted = statistics.holm([row["p"] for row in comparisons])
    return [row | {"p_holm": round(float(p), 6)} for row, p in zip(comparisons, adjusted, strict=True)]


def regressions(
    scores: Mapping[tuple[str, str], Sequence[PairScore]], models: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Does one benchmark predict another? A line over the models for each two benchmarks and metric.

    Args:
        scores: by (benchmark, model).
        models: the points of the line. Bounds and reference points are better left out: two far apart draw any line.
        seed: of the bootstrap over clusters and models (`statistics.regress`).

    Returns:
        Rows {x, y, metric, models, slope, intercept, r2, reason}: x and y are benchmarks, models the names of those
        that have pairs on both, slope, intercept and r2 {mean, low, high, n, clusters, method, reason} or None.
    """
    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in scores))
    found = []
    for x, y in itertools.combinations(benchmarks, 2):
        for metric in ALL_METRICS:
            table = {m: [terms(scores.get((b, m), ()), metric) for b in (x, y)] for m in models}
            chosen = [m for m in models if all(len(top) for top, _, _ in table[m])]
            if not chosen:
                continue
            line = statistics.regress([table[m][0] for m in chosen], [table[m][1] for m in chosen], seed=seed)
            parts = {"slope": line.slope, "intercept": line.intercept, "r2": line.r2}
            head = {"x": x, "y": y, "metric": metric, "models": chosen}
            found.append(
                head | {k: None if v is None else _values(v) for k, v in parts.items()} | {"reason": line.reason}
            )
    return found


def _values(interval: statistics.Interval, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
    lowest, highest = bounds or (-math.inf, math.inf)

    # Six decimals: far below any interval, and no file depends on the last bit of a sum; + 0.0 makes -0 a 0.
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(float(value), 6) + 0.0

    return {
        "mean": rounded(interval.mean),
        "low": rounded(None if interval.low is None else max(interval.low, lowest)),
        "high": rounded(None if interval.high is None else min(interval.high, highest)),
        "n": interval.n,
        "clusters": interval.clusters,
        "method": interval.method,
        "reason": interval.reason,
    }


def text_table(summary: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """The summary as aligned text, one line per benchmark and model, one column per metric: mean [low,
    high].
    """
    metrics = [m for m in PRINTED if any(r["metric"] == m for r in summary)]
    cells = {(r["benchmark"], r["model"], r["metric"]): r for r in summary}
    lines = list(dict.fromkeys((r["benchmark"], r["model"]) for r in summary))
    table = [["benchmark", "model", *metrics, "n"]]
    for benchmark, model in lines:
        found = [cells.get((benchmark, model, m)) for m in metrics]
        n = max(r["n"] for r in found if r is not None)
        table.append([benchmark, model, *(format_cell(r) for r in found), str(n)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    padded = [
        [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in table
    ]
    rule = ["-" * w for w in widths]
    if markdown:
        rule = [f"{'-' * (w - 1)}{'-' if i < 2 else ':'}" for i, w in enumerate(widths)]
        return "".join("| " + " | ".join(row) + " |\n" for row in [padded[0], rule, *padded[1:]])
    output = ["  ".join(padded[0]), "  ".join(rule)]
    for (benchmark, _), row, (before, _) in zip(lines, padded[1:], [("", ""), *lines], strict=False):
        if before and benchmark != before:
            output.append("")
        output.append("  ".join(row))
    return "".join(line.rstrip() + "\n" for line in output)


def format_cell(row: dict[str, Any] | None) -> str:
    """'12.3 [11.9, 12.8]', with digits to suit the metric; no brackets where there is no interval, '–' where there is
    no number.
    """
    if row is None or not math.isfinite(row["mean"]):
        return "–"
    digits = 1 if row["metric"] == "rmse" else 3
    if row["low"] is None:
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def notes(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, one sentence each; `about` is the content of evaluation.json."""
    found = []
    for benchmark in about["benchmarks"]:
        if benchmark["oracle"] is None:
            found.append(f"{benchmark['name']}: no oracle, so no identity metrics (they need rendered right answers)")
        if benchmark["excluded"]:
            first, reason = next(iter(benchmark["excluded"].items()))
            found.append(
                f"{benchmark['name']}: {len(benchmark['excluded'])} of {benchmark['pairs']} pairs excluded, "
                f"for example {first}: {reason}"
            )
        if benchmark["duplicates"]:
            found.append(
                f"{benchmark['name']}: {benchmark['duplicates']} rows of the pair list are repeated and "
                "count as often as they occur"
            )
        if benchmark["oracle"] is not None:
            bare = [s["model"] for s in about["sets"] if s["benchmark"] == benchmark["name"] and not s["shuffled"]]
            if bare:
                found.append(f"{benchmark['name']}: no shuffled pictures, so no subject effect, for {', '.join(bare)}")
    for m in about["missing"]:
        found.append(
            f"{m['benchmark']}: {len(m['pairs'])} of {m['of']} {m['kind']} pictures of {m['model']} are missing"
        )
    return found
