"""From what `evaluate` wrote to `index.html` and its thumbnails."""

from __future__ import annotations

import importlib.resources
import json
import math
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax import runs
from nabla_jax.data import read_dataset
from nabla_jax.errors import UserError
from nabla_jax.images import read_mask, read_rgb, write_image
from nabla_jax.metrics import oracle, summary
from nabla_jax.metrics.references import stretch
from nabla_jax.metrics.summary import LOWER_IS_BETTER, METRICS, PairScore
from nabla_jax.report import plots

Array = np.ndarray[Any, Any]
Rows = Sequence[dict[str, Any]]

THUMBNAIL = 512  # longest side in pixels; the page shows a quarter of it, a click all
NAMES = {
    "rmse": "RMSE",
    "ssim": "SSIM",
    "normalised_identity": "normalised identity",
    "subject_effect": "subject effect",
    "identification_rate": "identification rate",
    "normalised_identity_plumage": "normalised identity against sibling plumages",
}
TERMS = {
    "rmse": "root mean squared error against the target's photo, inside the bird's mask, grey levels 0–255; "
    "lower is better",
    "ssim": "structural similarity to the target's photo, averaged inside the mask",
    "normalised_identity": "1 − error / a sibling species' error, against the rendered right answer: 1 is "
    "perfect, 0 is as wrong as a sibling. It rewards blur, so read it with the next two",
    "subject_effect": "normalised identity with the right subject minus that with another subject: 0 if the "
    "model ignores its subject",
    "identification_rate": "how often the right species is the nearest of ten rendered in the same pose; "
    "chance is 0.1 (dashed)",
}


def write(evaluation: Path, out: Path, run: Path | None = None, gallery: int = 60) -> Path:
    """Writes `out/index.html` and its pictures from the folder `evaluation`; returns the page's path.

    `run` is a training run with `metrics.jsonl`, whose loss is plotted. `gallery` is the number of pairs
    shown per benchmark, spread evenly over its list. The result tables are copied beside the page.

    Raises UserError for a missing or damaged file, and when `out` cannot be written.
    """
    rows: Rows = runs.read_json(evaluation / "summary.json")
    about = runs.read_json(evaluation / "evaluation.json")
    comparisons = runs.read_json(evaluation / "comparisons.json")
    breakdown = runs.read_json(evaluation / "breakdown.json")
    kinds = model_kinds(about)
    sections = [
        ("results", "Results", results(rows, kinds, about)),
        ("intervals", "Intervals", interval_plots(rows, kinds)),
        ("differences", "Differences from the untuned model", differences(comparisons)),
        ("groups", "By plumage and order", groups(breakdown, kinds)),
        ("training", "Training", loss_curve(run) if run is not None else ""),
        ("gallery", "Gallery", gallery_section(evaluation, out, about, kinds, gallery)),
        ("provenance", "Provenance", provenance(about, run)),
    ]
    sections = [section for section in sections if section[2]]
    names = [b["name"] for b in about["benchmarks"]]
    pairs = sum(b["pairs"] for b in about["benchmarks"])
    page = string.Template(_asset("page.html")).substitute(
        title="Re-posed birds",
        lead=f"{len(kinds)} models and reference points on {escape(', '.join(names))}: {pairs} pairs. "
        "Means with 95 % intervals clustered by class.",
        navigation="".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections),
        sections="".join(
            f'<section id="{id}"><h2>{escape(title)}</h2>{body}</section>' for id, title, body in sections
        ),
        style=_asset("style.css"),
        script=_asset("gallery.js"),
    )
    if out.resolve() != evaluation.resolve():
        with runs.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            for file in (
                "summary.json",
                "summary.md",
                "comparisons.json",
                "breakdown.json",
                "evaluation.json",
            ):
                shutil.copyfile(evaluation / file, out / file)
    runs.write_atomic(out / "index.html", page)
    return out / "index.html"


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def model_kinds(about: Mapping[str, Any]) -> dict[str, str]:
    """Set or reference point -> 'model', 'bound' (pictures that know the answer) or 'reference', in table
    order.
    """
    sets = list(dict.fromkeys(s["model"] for s in about["sets"]))
    kinds = {name: "bound" if name.endswith("ceiling") else "model" for name in sets}
    return kinds | dict.fromkeys(about["references"], "reference")


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


def results(rows: Rows, kinds: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """One table per benchmark, the best model of each metric in bold, then what the metrics mean, then
    notes.
    """
    parts = [
        _table(name, [r for r in rows if r["benchmark"] == name], kinds)
        for name in dict.fromkeys(r["benchmark"] for r in rows)
    ]
    shown = [m for m in METRICS if any(r["metric"] == m for r in rows)]
    terms = "".join(f"<div><b>{NAMES[m]}</b>: {escape(TERMS[m])}.</div>" for m in shown)
    sentences = "".join(f"<li>{escape(note)}</li>" for note in summary.notes(about))
    return (
        "".join(parts)
        + f'<div class="terms">{terms}</div>'
        + (f'<ul class="notes">{sentences}</ul>' if sentences else "")
    )


def _table(benchmark: str, rows: Rows, kinds: Mapping[str, str]) -> str:
    metrics = [m for m in METRICS if any(r["metric"] == m for r in rows)]
    cells = {(r["model"], r["metric"]): r for r in rows}
    best = {m: best_models([r for r in rows if r["metric"] == m and kinds[r["model"]] == "model"]) for m in metrics}
    head = "".join(f"<th>{NAMES[m]} {'↓' if m in LOWER_IS_BETTER else '↑'}</th>" for m in metrics)
    body = []
    for kind, title in (("model", "Models"), ("bound", "Bound"), ("reference", "Reference points")):
        members = [m for m in kinds if kinds[m] == kind and any((m, metric) in cells for metric in metrics)]
        if members:
            body.append(f'<tr class="group"><td colspan="{len(metrics) + 1}">{title}</td></tr>')
        for model in members:
            values = "".join(f"<td>{_cell(cells.get((model, m)), model in best[m])}</td>" for m in metrics)
            body.append(f'<tr class="{kind}"><td>{escape(model)}</td>{values}</tr>')
    n = max((r["n"] for r in rows), default=0)
    return f'<h3>{escape(benchmark)} <small class="lead">n = {n}</small></h3>' + _html_table(
        f"<th></th>{head}", "".join(body)
    )


def best_models(rows: Rows) -> list[str]:
    """The models with the best mean of one metric, several if they tie."""
    best = (min if rows and rows[0]["metric"] in LOWER_IS_BETTER else max)((r["mean"] for r in rows), default=None)
    return [r["model"] for r in rows if r["mean"] == best]


def _html_table(head: str, body: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(row: Mapping[str, Any] | None, bold: bool = False) -> str:
    if row is None or not math.isfinite(row["mean"]):
        return "–"
    digits = 1 if row["metric"] == "rmse" else 3
    known = [k for k in ("mean", "low", "high") if row[k] is not None]
    mean, *ends = (f"{row[k]:.{digits}f}".replace("-", "−") for k in known)
    interval = f"[{', '.join(ends)}]" if ends else "no interval"
    return f"{f'<b>{mean}</b>' if bold else mean}<small>{interval}</small>"


def interval_plots(rows: Rows, kinds: Mapping[str, str]) -> str:
    """One plot per metric and benchmark."""
    figures = []
    for metric in METRICS:
        for benchmark in dict.fromkeys(r["benchmark"] for r in rows):
            chosen = [r for r in rows if r["metric"] == metric and r["benchmark"] == benchmark]
            if chosen:
                marks = {"identification_rate": [0.1], "rmse": [], "ssim": []}.get(metric, [0.0])
                arrow = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
                figures.append(
                    f"<figure><figcaption>{NAMES[metric]} · {escape(benchmark)} "
                    f'<span class="lead">({arrow})</span></figcaption>'
                    f"{plots.intervals(chosen, [kinds[r['model']] for r in chosen], marks)}</figure>"
                )
    return f'<div class="plots">{"".join(figures)}</div>'


def differences(comparisons: Rows) -> str:
    """Paired differences; those whose interval excludes zero are bold. Empty without any."""
    if not comparisons:
        return ""
    lines = []
    for row in comparisons:
        clear = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
        relative = "" if row["relative"] is None else f"{100 * row['relative']:+.1f} %".replace("-", "−")
        lines.append(
            f"<tr><td>{escape(row['benchmark'])}</td><td>{escape(row['model'])}</td>"
            f"<td>{NAMES[row['metric']]}</td>"
            f'<td class="clear">{_cell(row, clear)}</td><td>{relative}</td><td>{row["n"]}</td></tr>'
        )
    columns = ("benchmark", "model", "metric", "difference", "relative", "pairs")
    head = "".join(f"<th>{name}</th>" for name in columns)
    baseline = escape(comparisons[0]["baseline"])
    return (
        f"<p>Each pair's value minus that of {baseline} on the same pair; bold where the interval "
        "excludes zero.</p><details><summary>Show the table</summary>"
        + _html_table(head, "".join(lines))
        + "</details>"
    )


def groups(breakdown: Rows, kinds: Mapping[str, str]) -> str:
    """Folded tables: rows are values of a group, columns models. Empty without any."""
    models = [m for m in kinds if kinds[m] == "model"]
    tables = []
    heads = dict.fromkeys((r["benchmark"], r["group"], r["metric"]) for r in breakdown if r["model"] in models)
    for benchmark, group, metric in heads:
        chosen = [r for r in breakdown if (r["benchmark"], r["group"], r["metric"]) == (benchmark, group, metric)]
        values = list(dict.fromkeys(r["value"] for r in chosen))
        if group != "all" and len(values) < 2:
            continue
        cells = {(r["value"], r["model"]): r for r in chosen}
        sizes = {value: max(r["n"] for r in chosen if r["value"] == value) for value in values}
        body = "".join(
            f"<tr><td>{escape(value or ('all' if group == 'all' else 'none'))} "
            f"<small>n = {sizes[value]}</small></td>"
            + "".join(f"<td>{_cell(cells.get((value, m)))}</td>" for m in models)
            + "</tr>"
            for value in values
        )
        by = "" if group == "all" else f" by {group}"
        head = "".join(f"<th>{escape(m)}</th>" for m in models)
        tables.append(
            f"<details><summary>{escape(benchmark)}: {NAMES[metric]}{by}</summary>"
            f"{_html_table(f'<th>{group}</th>{head}', body)}</details>"
        )
    return "".join(tables)


def loss_curve(run: Path) -> str:
    """The plot of `metrics.jsonl`. Raises UserError if it has no row with step and loss."""
    path = run / "metrics.jsonl"
    rows = [r for r in runs.read_rows(path) if "step" in r and isinstance(r.get("loss"), int | float)]
    rows = [r for r in rows if math.isfinite(r["loss"])]
    if not rows:
        raise UserError(f"{path}: found no row with step and loss, expected those of a training run")
    rows.sort(key=lambda r: r["step"])
    return (
        "<p>Training loss over steps, every logged value and a running mean; the last step is "
        f"{rows[-1]['step']}.</p>{plots.curve([r['step'] for r in rows], [r['loss'] for r in rows])}"
    )


# ----------------------------------------------------------------------------------------------------------
# Gallery
# ----------------------------------------------------------------------------------------------------------


def gallery_section(evaluation: Path, out: Path, about: Mapping[str, Any], kinds: Mapping[str, str], count: int) -> str:
    """Rows subject | control | target | generated ... | right answer, and the controls that sort them."""
    scores = {
        (b["name"], model): {s.pair: s for s in summary.from_csv(path)}
        for b in about["benchmarks"]
        for model in kinds
        if (path := evaluation / "pairs" / b["name"] / f"{model}.csv").is_file()
    }
    items = []
    for benchmark in about["benchmarks"]:
        keys = [key for key, score in _any_scores(scores, benchmark["name"]).items() if not score.excluded]
        shown = min(count, len(keys))
        chosen = [keys[len(keys) * i // shown] for i in range(shown)]
        dataset = read_dataset(Path(benchmark["root"]))
        for key in runs.track(chosen, f"gallery {benchmark['name']}", unit="pair"):
            items.append(_pair(evaluation, out, about, benchmark, dataset.by_id, scores, kinds, key))
    if not items:
        return ""
    models = [m for m in kinds if kinds[m] != "reference"]
    metrics = [m for m in (*METRICS, "pixels") if m != "identification_rate"]
    labels = {**NAMES, "pixels": "bird's area", "subject_effect": "subject effect"}
    present = [m for m in metrics if any(m in _numbers(s) for f in scores.values() for s in f.values())]
    controls = [
        _select("benchmark", "benchmark", {b["name"]: b["name"] for b in about["benchmarks"]}),
        _select("metric", "sort by", {"": "pair number"} | {m: labels[m] for m in present}),
        _select("model", "of", {m: m for m in models}, models[-1] if "demo" not in models else "demo"),
        _select("order", "order", {"down": "highest first", "up": "lowest first"}),
        '<input type="search" id="search" placeholder="species" aria-label="species">',
    ]
    text = (
        "Every row: the subject, the control the model saw (the target with its bird cut out), the target's "
        "photo, what each model drew, and, where a world can render it, the right answer. Click a picture to "
        "enlarge it."
    )
    return (
        f'<p>{text}</p><div class="bar-of-controls">{"".join(controls)}<span id="count"></span></div>'
        f'<div id="pairs">{"".join(items)}</div>'
    )


def _any_scores(scores: Mapping[tuple[str, str], dict[str, PairScore]], benchmark: str) -> dict[str, PairScore]:
    # Pairs in the list's order: reference points are there for all of them.
    found: dict[str, PairScore] = {}
    for (name, _), values in scores.items():
        if name == benchmark and len(values) > len(found):
            found = values
    return found


def _select(id: str, label: str, options: Mapping[str, str], chosen: str = "") -> str:
    inner = "".join(
        f'<option value="{escape(v)}"{" selected" if v == chosen else ""}>{escape(t)}</option>'
        for v, t in options.items()
    )
    return f'<label>{label}<select id="{id}">{inner}</select></label>'


def _numbers(score: PairScore) -> dict[str, float]:
    """What a pair can be sorted by."""
    found: dict[str, float] = {"pixels": score.pixels}
    for name in ("rmse", "ssim"):
        if (value := getattr(score, name)) is not None:
            found[name] = value
    if score.right_error is not None and score.sibling_error:
        found["normalised_identity"] = 1 - score.right_error / score.sibling_error
        if score.shuffled_error is not None:
            found["subject_effect"] = (score.shuffled_error - score.right_error) / score.sibling_error
    return {name: round(value, 4) for name, value in found.items()}


def _pair(
    evaluation: Path,
    out: Path,
    about: Mapping[str, Any],
    benchmark: Mapping[str, Any],
    examples: Mapping[str, Any],
    scores: Mapping[tuple[str, str], dict[str, PairScore]],
    kinds: Mapping[str, str],
    key: str,
) -> str:
    name = benchmark["name"]
    mine = {model: scores[name, model][key] for model in kinds if key in scores.get((name, model), {})}
    score = next(iter(mine.values()))
    target = read_rgb(examples[score.target_id].image)
    mask = read_mask(examples[score.target_id].mask, target.shape[:2])
    figures = [
        ("subject", "subject", "", read_rgb(examples[score.subject_id].image)),
        ("control", "control", "", np.where(mask[:, :, None], np.uint8(0), target)),
        ("target", "target", "", target),
    ]
    for found in about["sets"]:
        if found["benchmark"] == name and key in found["files"]:
            figures.append(("generated", found["model"], _caption(mine[found["model"]]), read_rgb(found["files"][key])))
    answer = evaluation / "cache" / benchmark["fingerprint"] / f"{key}.npz"
    if benchmark["oracle"] is not None and answer.is_file():
        figures.append(("right", "right answer", "", oracle.unpack(answer)[0]))
    parts = []
    for kind, label, caption, picture in figures:
        file = Path("pictures") / name / f"{label.replace(' ', '-')}" / f"{key}.webp"
        write_image(_thumbnail(picture), out / file, quality=92)
        parts.append(
            f'<figure class="{kind}"><div class="frame"><img loading="lazy" decoding="async" '
            f'src="{escape(str(file))}" alt="{escape(label)} of pair {key}"></div>'
            f"<figcaption><b>{escape(label)}</b>{caption}</figcaption></figure>"
        )
    values = escape(json.dumps({model: _numbers(s) for model, s in mine.items() if kinds[model] != "reference"}))
    title = score.species + (f" ({score.qualifier})" if score.qualifier else "")
    return (
        f'<article class="pair" data-benchmark="{escape(name)}" data-scores="{values}"><h4>{escape(title)}'
        f"<span>{escape(score.order)} pair {key}</span></h4>"
        f'<div class="strip">{"".join(parts)}</div></article>'
    )


def _caption(score: PairScore) -> str:
    words = [] if score.rmse is None else [f"RMSE {score.rmse:.1f}"]
    numbers = _numbers(score)
    if "normalised_identity" in numbers:
        words.append(f"identity {numbers['normalised_identity']:.2f}".replace("-", "−"))
    if score.rank is not None:
        words.append(f"species {score.rank} of {score.lineup}")
    return "<br>".join(words)


def _thumbnail(picture: Array) -> Array:
    scale = max(picture.shape[:2]) / THUMBNAIL
    if scale <= 1:
        return picture
    return stretch(picture, *(max(1, round(side / scale)) for side in picture.shape[:2]))


# ----------------------------------------------------------------------------------------------------------
# Provenance
# ----------------------------------------------------------------------------------------------------------


def provenance(about: Mapping[str, Any], run: Path | None) -> str:
    """Where every number comes from: data, sets and their settings, versions, files."""
    parts = []
    for benchmark in about["benchmarks"]:
        entries = {
            "folder": benchmark["root"],
            "pairs": f"{benchmark['pairs']} of {benchmark['classes']} classes",
            "excluded pairs": str(len(benchmark["excluded"])),
            "repeated rows": str(benchmark["duplicates"]),
            "fingerprint": benchmark["fingerprint"],
        }
        if benchmark["oracle"] is not None:
            entries["oracle"] = ", ".join(f"{k} {v}" for k, v in benchmark["oracle"].items())
        parts.append(f"<h3>Benchmark {escape(benchmark['name'])}</h3>{_list(entries)}")
    for found in about["sets"]:
        settings = ("seed", "steps", "guidance", "adapter", "adapter_sha256", "base_sha256")
        entries = {
            name.replace("_", " "): ", ".join("none" if v is None else str(v) for v in found[name])
            for name in settings
            if found[name]
        }
        entries["pictures"] = f"{found['pictures']} with the right subject, {found['shuffled']} with another"
        entries["fingerprint"] = found["fingerprint"]
        parts.append(
            f"<details><summary>{escape(found['model'])} on {escape(found['benchmark'])}</summary>"
            f"{_list(entries)}</details>"
        )
    files = ", ".join(
        f'<a href="{f}">{f}</a>'
        for f in ("summary.json", "summary.md", "comparisons.json", "breakdown.json", "evaluation.json")
    )
    entries = {"nabla_jax": about["nabla_jax"], "bootstrap seed": str(about["seed"])}
    entries |= dict(_run_entries(run))
    return "".join(parts) + f"<h3>Software and files</h3>{_list(entries)}<p>{files}</p>"


def _run_entries(run: Path | None) -> Iterator[tuple[str, str]]:
    path = None if run is None else run / "environment.json"
    if path is not None and path.is_file():
        last = runs.read_json(path)[-1]
        yield "training run", str(run)
        for name in ("command", "git_commit", "python", "platform"):
            if last.get(name):
                yield (
                    name.replace("_", " "),
                    " ".join(last[name]) if isinstance(last[name], list) else str(last[name]),
                )
        yield "packages", ", ".join(f"{k} {v}" for k, v in last.get("versions", {}).items())


def _list(entries: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"
