"""Every pair of a benchmark as columns of one script file, and the thumbnails it names.

Pages that are opened from disk may not fetch, so the data come as scripts that call a function of the page's; text
goes through JSON into text nodes, never into markup.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import runs
from nabla_jax.data import read_dataset
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.metrics.summary import ALL_METRICS, PairScore
from nabla_jax.report.reading import Results, values_of
from nabla_jax.report.thumbnails import Thumbnail
from nabla_jax.untrusted import below

# Numbers of a PairScore that are no measure of the picture, or are shown through a metric made of them.
_INTERNAL = frozenset(
    (
        *("class_id", "lineup", "retrieval_classes"),
        *("right_error", "shuffled_error", "sibling_error", "sibling_plumage_error"),
        *ALL_METRICS,
    )
)


class Index:
    """Texts, each once, and their numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The text's number."""
        return self.numbers.setdefault(text, len(self.numbers))


def columns(results: Results, benchmark: str, limit: int | None) -> tuple[dict[str, Any], list[Thumbnail]]:
    """(What the page needs of a benchmark's pairs, the thumbnails it names).

    At most `limit` pairs, spread evenly over the list; excluded pairs are not shown. Columns hold one entry a pair;
    classes, orders, pictures and credits are numbers of the lists beside them, -1 where there is none.

    Raises UserError when the benchmark's folder no longer has a pair's pictures.
    """
    about = results.benchmarks[benchmark]
    tables = {m: {s.pair: s for s in results.scores.get((benchmark, m), ())} for m in results.kinds}
    complete = max(tables.values(), key=len, default={})
    kept = [score for score in complete.values() if not score.excluded]
    if limit is not None and len(kept) > limit:
        kept = [kept[len(kept) * i // limit] for i in range(limit)]
    root = Path(about["root"])
    dataset = read_dataset(root)
    credits = credits_of(dataset.examples, root)
    texts = {name: Index() for name in ("classes", "orders", "pictures", "credits")}
    wanted: dict[str, Thumbnail] = {}

    def picture(kind: str, *sources: Path | None) -> int:
        if any(path is None for path in sources):
            return -1
        thumbnail = Thumbnail(kind, tuple(path for path in sources if path is not None))
        wanted[thumbnail.name] = thumbnail
        return texts["pictures"](thumbnail.name)

    found: dict[str, list[Any]] = {
        name: []
        for name in (
            "pair",
            "class",
            "order",
            "subject",
            "control",
            "target",
            "answer",
            "credit_subject",
            "credit_target",
        )
    }
    for score in kept:
        subject, target = (_example(dataset.by_id, i, about) for i in (score.subject_id, score.target_id))
        found["pair"].append(score.pair)
        found["class"].append(texts["classes"](target.class_name))
        found["order"].append(texts["orders"](score.order) if score.order else -1)
        found["subject"].append(picture("picture", subject.image))
        found["control"].append(picture("control", target.image, target.mask))
        found["target"].append(picture("picture", target.image))
        found["answer"].append(picture("answer", _answer(results, benchmark, score.pair)))
        for side, example in (("credit_subject", subject), ("credit_target", target)):
            found[side].append(texts["credits"](credits[example.id]) if credits[example.id] else -1)
    sets = []
    for member in results.sets:
        if member.benchmark != benchmark:
            continue
        files: Mapping[str, str] = member.about["files"]
        scores = [tables[member.model].get(s.pair) for s in kept]
        entry: dict[str, Any] = {"name": member.model, "generated": [], "difference": []}
        for score in kept:
            target = dataset.by_id[score.target_id]
            file = Path(files[score.pair]) if score.pair in files else None
            entry["generated"].append(picture("picture", file))
            entry["difference"].append(picture("difference", file, target.image, target.mask))
        entry["values"] = values(scores, [m for m in results.metrics if m in ALL_METRICS])
        sets.append(entry)
    lists = {name: list(index.numbers) for name, index in texts.items()}
    return {"benchmark": benchmark, **lists, "columns": found, "sets": sets}, list(wanted.values())


def values(scores: Sequence[PairScore | None], metrics: Sequence[str]) -> dict[str, list[float | None]]:
    """Metric -> its value for each pair, None where it has none; metrics no pair has are left out.

    Besides `metrics`, every other number of a PairScore that measures its picture.
    """
    plain = [f.name for f in dataclasses.fields(PairScore) if f.name not in _INTERNAL]
    found: dict[str, list[float | None]] = {}
    for name in metrics:
        found[name] = [None if s is None else values_of([s], name) for s in scores]
    for name in plain:
        column = [None if s is None else getattr(s, name) for s in scores]
        if any(isinstance(v, float | int) and not isinstance(v, bool) for v in column):
            found[name] = column
    return {
        name: [None if v is None else round(float(v), 5) for v in column]
        for name, column in found.items()
        if any(v is not None for v in column)
    }


def credits_of(examples: Sequence[Example], root: Path) -> dict[str, str]:
    """Example id -> 'photographer, licence' as far as known, from the data set and from what fetch noted."""
    fetched = {}
    if (root / "manifest.jsonl").is_file():
        fetched = {
            row["image"]: row for row in runs.read_rows(root / "manifest.jsonl") if type(row.get("image")) is str
        }
    found = {}
    for example in examples:
        row = fetched.get(example.image.relative_to(root).as_posix(), {}) if fetched else {}
        # iNaturalist's attribution is a sentence that holds name and licence.
        words = [row["attribution"]] if row.get("attribution") else [example.credit, example.licence]
        found[example.id] = ", ".join(str(word) for word in words if word)
    return found


def _example(examples: Mapping[str, Example], id: str, about: Mapping[str, Any]) -> Example:
    if id not in examples:
        raise UserError(f"{about['root']}: picture {id} of benchmark {about['name']} is no longer there")
    return examples[id]


def _answer(results: Results, benchmark: str, pair: str) -> Path | None:
    about = results.benchmarks[benchmark]
    if about["oracle"] is None:
        return None
    places = (below(folder / "cache", f"{about['fingerprint']}/{pair}.npz") for folder in results.folders.values())
    return next((path for path in places if path is not None and path.is_file()), None)


def groups(results: Results) -> dict[str, Any]:
    """The breakdown as columns, with classes beside the evaluation's own groups; sets and bounds only.

    Returns {models, metrics, groups: [{benchmark, group, metric, values, n, cells}]}; cells are, for each model, one
    [mean, low, high] a value, low and high None where there is no interval.
    """
    models = results.of_kind("model", "bound")
    collected: dict[tuple[str, str, str], dict[str, dict[str, tuple[Any, ...]]]] = {}
    for row in results.breakdown:
        if row["model"] in models and row["group"] != "all":
            cell = (_short(row["mean"]), _short(row["low"]), _short(row["high"]), row["n"])
            place = collected.setdefault((row["benchmark"], str(row["group"]), row["metric"]), {})
            place.setdefault(str(row["value"]) or "none", {})[row["model"]] = cell
    for benchmark in results.benchmarks:
        for model in models:
            by_class: dict[str, list[PairScore]] = {}
            for score in results.scores.get((benchmark, model), ()):
                if not score.excluded:
                    name = f"{score.species} ({score.qualifier})" if score.qualifier else score.species
                    by_class.setdefault(name, []).append(score)
            for metric in (m for m in results.metrics if m in ALL_METRICS):
                place = collected.setdefault((benchmark, "class", metric), {})
                for name, members in by_class.items():
                    value = values_of(members, metric)
                    if value is not None:
                        place.setdefault(name, {})[model] = (_short(value), None, None, len(members))
    listed: list[dict[str, Any]] = []
    for (benchmark, group, metric), places in collected.items():
        if len(places) < 2:
            continue
        listed.append(
            {
                "benchmark": benchmark,
                "group": group,
                "metric": metric,
                "values": list(places),
                "n": [max(cell[3] for cell in cells.values()) for cells in places.values()],
                "cells": [[places[v][m][:3] if m in places[v] else None for v in places] for m in models],
            }
        )
    places_of = {name: i for i, name in enumerate(("order", "family", "species", "class"))}
    benchmarks, metrics = list(results.benchmarks), results.metrics
    listed.sort(
        key=lambda g: (
            benchmarks.index(g["benchmark"]),
            places_of.get(g["group"], len(places_of)),
            metrics.index(g["metric"]) if g["metric"] in metrics else len(metrics),
        )
    )
    return {"models": models, "groups": listed}


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


def script(function: str, value: Any) -> str:
    """A script file that hands `value` to a function of the page. NaN and infinity are not JSON: ValueError."""
    return f"nablaReport.{function}({json.dumps(value, separators=(',', ':'), allow_nan=False)});\n"
