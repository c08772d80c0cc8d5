"""Reads what `evaluate` wrote, one folder or several, as one set of results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from nabla_jax import runs, untrusted
from nabla_jax.errors import UserError
from nabla_jax.metrics import summary
from nabla_jax.metrics.summary import PairScore
from nabla_jax.report.published import COLUMNS

Rows = list[dict[str, Any]]
FILES = ("summary.json", "summary.md", "comparisons.json", "breakdown.json", "regressions.json", "evaluation.json")


class _Benchmark(TypedDict):
    name: str
    root: str
    list: str | None
    pairs: int
    classes: int
    excluded: dict[str, str]
    duplicates: int
    fingerprint: str
    oracle: dict[str, Any] | None


class _Set(TypedDict):
    model: str
    benchmark: str
    pictures: int
    shuffled: int
    fingerprint: str
    files: dict[str, str]


class _About(TypedDict):
    """What is read of evaluation.json."""

    nabla_jax: str
    version: int
    seed: int
    references: list[str]
    benchmarks: list[_Benchmark]
    sets: list[_Set]


class _Interval(TypedDict):
    mean: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str
    reason: str


class _Row(_Interval):
    model: str
    benchmark: str
    metric: str


class _Comparison(_Row):
    baseline: str
    relative: float | None
    p: float
    p_holm: float


class _Part(_Row):
    group: str
    value: str


class _Regression(TypedDict):
    x: str
    y: str
    metric: str
    models: list[str]
    slope: _Interval | None
    intercept: _Interval | None
    r2: _Interval | None
    reason: str


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures of one model on one benchmark as evaluation.json describes them, and the evaluation's folder."""

    model: str
    benchmark: str
    about: Mapping[str, Any]
    folder: Path


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that a page shows. Models are named as on the page: with their run's label where runs are compared.

    `kinds`: model -> 'model', 'bound' (pictures that know the answer) or 'reference', in table order. `scores`:
    (benchmark, model) -> one PairScore per pair, in the list's order. `differences` are paired: of models from the
    baseline of their evaluation, and of later runs from the first. `regressions` have the models of all evaluations as
    points of their lines.
    """

    folders: dict[str, Path]
    abouts: dict[str, dict[str, Any]]
    benchmarks: dict[str, dict[str, Any]]
    kinds: dict[str, str]
    rows: Rows
    breakdown: Rows
    differences: Rows
    regressions: Rows
    scores: dict[tuple[str, str], list[PairScore]]
    sets: list[PictureSet]

    @property
    def metrics(self) -> list[str]:
        """Metrics of the summary: the paper's first, the others in its order."""
        names = list(dict.fromkeys(r["metric"] for r in self.rows))
        return [m for m in COLUMNS if m in names] + [m for m in names if m not in COLUMNS]

    def of_kind(self, *kinds: str) -> list[str]:
        """Models of these kinds, in table order."""
        return [m for m, kind in self.kinds.items() if kind in kinds]

    def find(self, model: str, benchmark: str, metric: str) -> dict[str, Any] | None:
        """The summary row, or None."""
        return self._cells.get((model, benchmark, metric))

    def regression(self, x: str, y: str, metric: str) -> dict[str, Any] | None:
        """The line of benchmark y over benchmark x, or None."""
        return next((r for r in self.regressions if (r["x"], r["y"], r["metric"]) == (x, y, metric)), None)

    @functools.cached_property
    def _cells(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {(r["model"], r["benchmark"], r["metric"]): r for r in self.rows}


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    folder: Path
    about: dict[str, Any]
    rows: Rows
    comparisons: Rows
    breakdown: Rows
    regressions: Rows
    scores: dict[tuple[str, str], list[PairScore]]


def read(folders: Mapping[str, Path]) -> Results:
    """The evaluations in `folders` (label -> folder), side by side.

    A model or reference point that has the same name and the same numbers in several folders is shown once; one with
    other numbers is shown as `NAME (LABEL)`.

    Raises UserError for a missing or damaged file, and for evaluations that cannot be compared: made by other
    versions of the metrics, or with other pairs under one benchmark's name.
    """
    found = {label: _read_one(folder) for label, folder in folders.items()}
    _check_comparable(found)
    names = _page_names(found)
    kinds: dict[str, str] = {}
    for kind in ("model", "bound", "reference"):
        for label, evaluation in found.items():
            kinds |= {names[label, m]: k for m, k in _kinds(evaluation.about).items() if k == kind}
    first: dict[str, str] = {}  # page name -> the label whose rows are shown
    for (label, _), name in names.items():
        first.setdefault(name, label)

    benchmarks: dict[str, dict[str, Any]] = {}
    for evaluation in found.values():
        for benchmark in evaluation.about["benchmarks"]:
            benchmarks.setdefault(benchmark["name"], benchmark)

    def renamed(rows: Rows, label: str) -> Rows:
        mine = [r for r in rows if first[names[label, r["model"]]] == label]
        return [r | {"model": names[label, r["model"]]} for r in mine]

    scored = {
        (benchmark, names[label, model]): values
        for label, evaluation in reversed(found.items())
        for (benchmark, model), values in evaluation.scores.items()
    }
    scores = {(b, m): scored[b, m] for b in benchmarks for m in kinds if (b, m) in scored}
    differences: Rows = []
    for label, evaluation in found.items():
        for row in renamed(evaluation.comparisons, label):
            differences.append(row | {"baseline": names[label, row["baseline"]]})
    return Results(
        folders=dict(folders),
        abouts={label: e.about for label, e in found.items()},
        benchmarks=benchmarks,
        kinds=kinds,
        rows=[r for label, e in found.items() for r in renamed(e.rows, label)],
        breakdown=[r for label, e in found.items() for r in renamed(e.breakdown, label)],
        differences=differences + _between_runs(found, names),
        regressions=_regressions(found, scores, [m for m, kind in kinds.items() if kind == "model"]),
        scores=scores,
        sets=sorted(
            (
                PictureSet(names[label, s["model"]], s["benchmark"], s, e.folder)
                for label, e in found.items()
                for s in e.about["sets"]
                if first[names[label, s["model"]]] == label
            ),
            key=lambda s: list(kinds).index(s.model),
        ),
    )


def _read_one(folder: Path) -> _Evaluation:
    about = _checked(folder / "evaluation.json", _About)
    kinds: dict[str, Any] = {"summary": list[_Row], "comparisons": list[_Comparison], "breakdown": list[_Part]}
    rows, comparisons, breakdown = (_checked(folder / f"{n}.json", kind) for n, kind in kinds.items())
    benchmarks, models = {b["name"] for b in about["benchmarks"]}, _kinds(about)
    fingerprints = [b["fingerprint"] for b in about["benchmarks"]]
    for name in [*benchmarks, *models, *fingerprints]:
        if not untrusted.is_file_name(name):
            raise UserError(f"{folder / 'evaluation.json'}: found the name {name!r}, expected one without a path")
    for file, found in (("evaluation", about["sets"]), *zip(kinds, (rows, comparisons, breakdown), strict=True)):
        for row in found:
            named = {row["model"], row.get("baseline", row["model"])}
            if row["benchmark"] not in benchmarks or not named <= models.keys():
                which = f"{row['model'][:100]} on {row['benchmark'][:100]}"
                raise UserError(f"{folder / file}.json: {which} is not in evaluation.json: evaluate again")
    scores = {}
    for benchmark in about["benchmarks"]:
        for model in _kinds(about):
            path = folder / "pairs" / benchmark["name"] / f"{model}.csv"
            if path.is_file():
                scores[benchmark["name"], model] = summary.from_csv(path)
    path = folder / "regressions.json"  # evaluations of one benchmark have none
    regressions = _checked(path, list[_Regression]) if path.is_file() else []
    return _Evaluation(folder, about, rows, comparisons, breakdown, regressions, scores)


def _checked(path: Path, kind: Any) -> Any:
    found = runs.read_json(path)
    try:
        untrusted.check(found, kind, str(path))
    except UserError as error:
        raise UserError(f"{error}; evaluate again") from error
    return found


def _kinds(about: Mapping[str, Any]) -> dict[str, str]:
    names = dict.fromkeys([*(s["model"] for s in about["sets"]), *about["references"]])
    return {name: summary.kind(name, about["references"]) for name in names}


def _check_comparable(found: Mapping[str, _Evaluation]) -> None:
    versions = {label: e.about.get("version") for label, e in found.items()}
    if len(set(versions.values())) > 1:
        text = ", ".join(f"{label}: {version}" for label, version in versions.items())
        raise UserError(f"evaluations by different versions of the metrics do not compare ({text}): evaluate again")
    lists: dict[str, tuple[str, frozenset[tuple[str, str, str]]]] = {}
    for label, evaluation in found.items():
        for (name, model), scores in evaluation.scores.items():
            if model not in evaluation.about["references"]:
                continue  # a set may lack pictures, reference points are there for every pair
            pairs = frozenset((s.pair, s.subject_id, s.target_id) for s in scores)
            other, expected = lists.setdefault(name, (label, pairs))
            if pairs != expected:
                raise UserError(
                    f"{evaluation.folder}: benchmark {name} has {len(pairs)} pairs, {len(pairs & expected)} of them "
                    f"among the {len(expected)} of {other}: evaluations are compared on the same pairs"
                )


def _page_names(found: Mapping[str, _Evaluation]) -> dict[tuple[str, str], str]:
    """(label, model) -> name on the page."""
    names = {}
    for label, evaluation in found.items():
        for model in _kinds(evaluation.about):
            holders = [other for other, e in found.items() if model in _kinds(e.about)]
            contents = [
                [found[o].scores.get((b, model)) for b in sorted({b for b, _ in found[o].scores})] for o in holders
            ]
            same = all(content == contents[0] for content in contents)
            names[label, model] = model if same else f"{model} ({label})"
    return names


def _between_runs(found: Mapping[str, _Evaluation], names: Mapping[tuple[str, str], str]) -> Rows:
    """Paired differences of a model from the model of the same name in the first run."""
    rows: Rows = []
    (base, *others) = found
    for label in others:
        for (benchmark, model), scores in found[label].scores.items():
            theirs = found[base].scores.get((benchmark, model))
            if theirs is None or names[label, model] == names[base, model]:
                continue
            compared = summary.compare(names[label, model], names[base, model], benchmark, scores, theirs)
            rows += compared
    return rows


def _regressions(
    found: Mapping[str, _Evaluation], scores: Mapping[tuple[str, str], list[PairScore]], models: Sequence[str]
) -> Rows:
    """As evaluated, or anew over the models of several evaluations, with the first one's seed."""
    (first, *others) = found.values()
    return summary.regressions(scores, models, first.about["seed"]) if others else first.regressions


def values_of(scores: Sequence[PairScore], metric: str) -> float | None:
    """The metric over some pairs, without an interval; None if none of them has it or its terms sum to nothing."""
    top, bottom, *_ = summary.terms(scores, metric)
    return float(top.sum() / bottom.sum()) if len(top) and bottom.sum() else None
