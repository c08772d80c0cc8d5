"""From scores of pairs to rows of a table: {model, benchmark, metric, mean, low, high, n}.

Intervals are 95 % bootstrap intervals clustered by class, because pictures of one class share its difficulty.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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
)
# The published table's three beside RMSE; the rest would not fit on a line.
PRINTED = (*METRICS, "lpips", "dinov2", "siglip")
LOWER_IS_BETTER = frozenset({"rmse", "lpips", "lpips_box"})
BREAKDOWN_METRICS = (
    "rmse",
    "normalised_identity",
    "normalised_identity_plumage",
    "subject_effect",
    "identification_rate",
)


@dataclasses.dataclass(frozen=True)
class PairScore:
    """Every raw number of one picture set and one pair; None where a number does not exist.

    Errors are masked RMSE 0..255. `rmse` and `ssim` compare with the target's photo; `right_error` (right
    subject) and `shuffled_error` (another subject) compare with the oracle's right answer for the right
    subject; `sibling_error` and `sibling_plumage_error` are the wrong birds' renders against it. `rank` is
    the right species' place among `lineup` species. `pixels` counts the mask. `excluded` says why a pair does
    not count ('' if it does).

    Of the networks: ``lpips`` (distance), ``dinov2`` and ``siglip`` (cosines) compare with the target, masked, as the
    published evaluation does; ``*_box`` with both birds cut out; ``*_subject`` the cut-outs of the generated bird and
    the subject; ``patch_precision`` and ``patch_recall`` their foreground patches (``metrics.patches``).
    ``retrieval_rank`` is the place of the true class among ``retrieval_classes`` siblings (``metrics.retrieval``).
    ``mask_iou`` compares the generated bird's mask, where there is one, with the target's.
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


_TYPES = typing.get_type_hints(PairScore)
_FIELDS = [field.name for field in dataclasses.fields(PairScore)]


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
    except (KeyError, TypeError, ValueError) as error:
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
    """{mean, low, high, n} of a metric over the pairs that have it; None if no pair has it."""
    top, bottom, classes = terms(scores, metric)
    if not len(top):
        return None
    if np.all(bottom == 1):
        interval = statistics.mean_interval(top, classes, seed=seed)
    else:
        interval = statistics.ratio_interval(top, bottom, classes, seed=seed)
    return _rounded(interval.mean, interval.low, interval.high) | {"n": len(top)}


def terms(scores: Sequence[PairScore], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numerators, denominators, class ids), each [pairs with this metric]; means have denominators of
    one.
    """
    used, make = _TERMS[metric]
    chosen = [s for s in scores if not s.excluded and all(getattr(s, name) is not None for name in used)]
    columns = [np.array([float(getattr(s, name)) for s in chosen]) for name in used]
    top, bottom = make(*columns)
    return top, bottom, np.array([s.class_id for s in chosen], dtype=np.int64)


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
    for metric in (*METRICS, *FURTHER_METRICS):
        values = estimate(scores, metric, seed)
        if values is not None:
            found.append({"model": model, "benchmark": benchmark, "metric": metric} | values)
    return found


def breakdown(model: str, benchmark: str, scores: Sequence[PairScore], seed: int = 0) -> list[dict[str, Any]]:
    """Rows like those of the summary, for all pairs against sibling plumages and by qualifier and order.

    Extra fields: group ('all', 'qualifier' or 'order') and value.
    """
    groups: list[tuple[str, str, list[PairScore]]] = [("all", "", list(scores))]
    for group in ("qualifier", "order"):
        values = sorted({getattr(s, group) for s in scores})
        groups += [(group, v, [s for s in scores if getattr(s, group) == v]) for v in values]
    found = []
    for group, value, members in groups:
        for metric in BREAKDOWN_METRICS:
            if group == "all" and metric in METRICS:
                continue
            values_of = estimate(members, metric, seed)
            if values_of is not None:
                head = {
                    "model": model,
                    "benchmark": benchmark,
                    "metric": metric,
                    "group": group,
                    "value": value,
                }
                found.append(head | values_of)
    return found


def compare(
    model: str,
    baseline: str,
    benchmark: str,
    scores: Sequence[PairScore],
    others: Sequence[PairScore],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences model minus baseline over the pairs both have, for the metrics that are means.

    Fields: those of a summary row, baseline, and relative (difference of means / the baseline's mean).
    """
    found = []
    by_pair = {s.pair: s for s in others if not s.excluded}
    both = [s for s in scores if not s.excluded and s.pair in by_pair]
    for metric in ("rmse", "ssim", "identification_rate"):
        column = _TERMS[metric][0][0]
        paired = [s for s in both if getattr(s, column) is not None and getattr(by_pair[s.pair], column) is not None]
        if not paired:
            continue
        mine, _, classes = terms(paired, metric)
        theirs, _, _ = terms([by_pair[s.pair] for s in paired], metric)
        interval = statistics.paired_difference(mine, theirs, classes, seed=seed)
        base = float(theirs.mean())
        values = _rounded(interval.mean, interval.low, interval.high)
        relative = round(float(mine.mean() - base) / base, 6) if base else None
        head: dict[str, Any] = {
            "model": model,
            "baseline": baseline,
            "benchmark": benchmark,
            "metric": metric,
            "relative": relative,
        }
        found.append(head | values | {"n": len(paired)})
    return found


def _rounded(mean: float, low: float, high: float) -> dict[str, float]:
    # Six decimals: far below any interval, and no file depends on the last bit of a sum; + 0.0 makes -0 a 0.
    return {k: round(float(v), 6) + 0.0 for k, v in (("mean", mean), ("low", low), ("high", high))}


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
    """'12.3 [11.9, 12.8]', with digits to suit the metric; '–' where there is no number."""
    if row is None or not math.isfinite(row["mean"]):
        return "–"
    digits = 1 if row["metric"] == "rmse" else 3
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
