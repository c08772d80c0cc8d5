"""From what `evaluate` wrote to `index.html` and the files beside it."""

from __future__ import annotations

import importlib.resources
import itertools
import json
import math
import os
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nabla_jax import runs, untrusted
from nabla_jax.errors import UserError
from nabla_jax.metrics import summary
from nabla_jax.report import gallery as pairs
from nabla_jax.report import plots, published, reading, thumbnails
from nabla_jax.report.reading import Results
from nabla_jax.report.vocabulary import THEMES, Metric, describe, interval, text

Rows = Sequence[dict[str, Any]]

FOLDER = "report_files"
"""Below a report's folder: the page's script, its data and its thumbnails."""
WIDE = 8
"""Columns beyond which a table is cut into several."""


def write(
    evaluations: Path | Mapping[str, Path],
    out: Path,
    run: Path | None = None,
    gallery: int | None = None,
    workers: int | None = None,
) -> Path:
    """Writes `out/index.html` and `out/report_files`; returns the page's path.

    `evaluations` is a folder that `evaluate` wrote, or several by label, shown side by side. `run` is a training run
    with `metrics.jsonl`, whose loss is plotted. `gallery` is the largest number of pairs shown per benchmark, spread
    evenly over its list; None shows all. `workers` threads make thumbnails, by default one a core; those that are
    there already are kept. The result tables are copied to the report.

    Raises UserError for a missing or damaged file, for evaluations that do not compare, and when `out` cannot be
    written.
    """
    several = not isinstance(evaluations, Path)
    results = reading.read({evaluations.name: evaluations} if isinstance(evaluations, Path) else evaluations)
    data: list[dict[str, Any]] = []
    wanted: dict[str, thumbnails.Thumbnail] = {}
    for benchmark in results.benchmarks:
        columns, thumbs = pairs.columns(results, benchmark, gallery)
        data.append(columns)
        wanted |= {t.name: t for t in thumbs}
    grouped = pairs.groups(results)
    loss = loss_curve(run) if run is not None else ""
    files = _copy_tables(results, out, several)
    thumbnails.write_missing(wanted.values(), out / FOLDER / "thumbnails", workers or os.cpu_count() or 1)
    scripts = {f"pairs-{i}.js": pairs.script("pairs", columns) for i, columns in enumerate(data)}
    scripts["groups.js"] = pairs.script("groups", grouped)
    for name, content in scripts.items():
        runs.write_atomic(out / FOLDER / name, content)
    runs.write_atomic(out / FOLDER / "report.js", _asset("report.js") + "\n")
    runs.write_atomic(out / "index.html", page(results, data, bool(grouped["groups"]), loss, run, files))
    _remove_stale(out / FOLDER, {*scripts, "report.js"}, set(wanted))
    return out / "index.html"


def page(
    results: Results, data: Rows, has_groups: bool, loss: str, run: Path | None, files: Mapping[str, Sequence[str]]
) -> str:
    """The whole page. `data` are the benchmarks' columns of the gallery, `loss` a plot or ''."""
    shown = any(columns["columns"]["pair"] for columns in data)
    sections = [
        ("paper", "Paper", "The paper’s table", paper_table(results)),
        ("results", "Results", "Results", result_tables(results)),
        ("intervals", "Intervals", "Intervals", interval_plots(results)),
        ("differences", "Differences", "Paired differences", differences(results)),
        ("groups", "Groups", "By order, species and class", _asset("groups.html") if has_groups else ""),
        ("regression", "Regression", "Benchmark against benchmark", regressions(results)),
        ("extremes", "Extremes", "Worst and best pairs", _asset("extremes.html") if shown else ""),
        ("gallery", "Gallery", "Gallery", _asset("gallery.html") if shown else ""),
        ("training", "Training", "Training", loss),
        ("provenance", "Provenance", "Provenance", provenance(results, run, files)),
    ]
    sections = [section for section in sections if section[3]]
    models, bounds, references = (len(results.of_kind(k)) for k in ("model", "bound", "reference"))
    counts = [f"{b['pairs']:,} pairs of {b['classes']:,} classes on {b['name']}" for b in results.benchmarks.values()]
    names = f"{models} model{'s' * (models != 1)}, {bounds + references} reference points"
    lead = f"{names}; {', '.join(counts)}. Means with 95 % intervals clustered by class."
    return string.Template(_asset("page.html")).substitute(
        title="Re-posed birds"
        if len(results.folders) == 1
        else f"Re-posed birds: {escape(', '.join(results.folders))}",
        lead=escape(lead),
        navigation="".join(f'<a href="#{id}">{escape(name)}</a>' for id, name, _, _ in sections),
        sections="".join(
            f'<section id="{id}" aria-labelledby="{id}-title"><h2 id="{id}-title">{escape(title)}</h2>{body}</section>'
            for id, _, title, body in sections
        ),
        style=_asset("style.css").replace("$ramp", _ramp()),
        folder=FOLDER,
        meta=_meta(results, data),
    )


def _meta(results: Results, data: Rows) -> str:
    """What the script must know at once, as JSON that cannot end its element."""
    names = {name for columns in data for entry in columns["sets"] for name in entry["values"]} | set(results.metrics)
    names |= {r["metric"] for r in results.breakdown}
    order = [*results.metrics, *sorted(names - set(results.metrics))]
    metrics = {
        m.name: {"label": m.label, "better": m.better, "digits": m.digits, "marks": m.marks}
        for m in (describe(name) for name in order)
    }
    benchmarks = [
        {"name": c["benchmark"], "file": f"{FOLDER}/pairs-{i}.js", "pairs": len(c["columns"]["pair"])}
        for i, c in enumerate(data)
    ]
    kinds = results.kinds
    value = {"folder": FOLDER, "metrics": metrics, "order": order, "benchmarks": benchmarks, "kinds": kinds}
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _ramp() -> str:
    """The colours of differences as stops of a CSS gradient."""
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in thumbnails.scale()[::51])


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _copy_tables(results: Results, out: Path, several: bool) -> dict[str, list[str]]:
    """Copies the tables of each evaluation beside the page; label -> their addresses relative to it."""
    found = {}
    for number, (label, folder) in enumerate(results.folders.items()):
        below = Path(FOLDER) / f"evaluation-{number}" if several else Path()
        files = [name for name in reading.FILES if (folder / name).is_file()]
        if (out / below).resolve() != folder.resolve():
            with runs.writing(out / below):
                (out / below).mkdir(parents=True, exist_ok=True)
                for name in files:
                    shutil.copyfile(folder / name, out / below / name)
        found[label] = [(below / name).as_posix() for name in files]
    return found


def _remove_stale(folder: Path, scripts: set[str], wanted: set[str]) -> None:
    """Removes what an earlier report left in its own folder and this one does not name."""
    with runs.writing(folder):
        for path in [*folder.glob("*.js"), *(folder / "thumbnails").glob("*.webp")]:
            if path.name not in (scripts if path.suffix == ".js" else wanted):
                path.unlink()


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


def paper_table(results: Results) -> str:
    """Published values and, in the same columns, those measured here; cells that are not known say so.

    Empty where no benchmark is the paper's or a twin of one.
    """
    columns = [describe(m) for m in published.COLUMNS]
    head = "<th>model</th><th>control</th>" + "".join(f"<th>{m.label} {m.arrow}</th>" for m in columns)
    body = []
    for name, title in published.TITLES.items():
        ours = [b for b in results.benchmarks if b == name or b.endswith(f"-{name}")]
        if not ours:
            continue
        body.append(_group_row(f"{title}, published", len(columns) + 2))
        for row in published.ROWS:
            if row.benchmark == name:
                cells = "".join(_published(getattr(row, m.name), m.name) for m in columns)
                body.append(
                    f'<tr class="published"><td>{escape(row.model)}</td><td>{escape(row.control)}</td>{cells}</tr>'
                )
        for benchmark in ours:
            twin = "" if benchmark == name else ": another world, its values do not compare with those above"
            body.append(_group_row(f"{benchmark}, measured here{twin}", len(columns) + 2))
            for model in results.of_kind("model", "bound"):
                cells = "".join(f"<td>{_cell(results.find(model, benchmark, m.name))}</td>" for m in columns)
                body.append(f'<tr class="{results.kinds[model]}"><td>{escape(model)}</td><td></td>{cells}</tr>')
    if not body:
        return ""
    return f"<p>{escape(published.SOURCE)}</p>" + _html_table(head, "".join(body), "The paper’s table", 2)


def _published(value: float | None, metric: str) -> str:
    if value is None:
        return '<td class="unknown" title="no public source quotes it">unknown</td>'
    digits = {"dinov2": 2, "siglip": 2, "lpips": 3, "rmse": 1}[metric]
    return f"<td>{value:.{digits}f}</td>"


def result_tables(results: Results) -> str:
    """One table per benchmark, the best model of each metric in bold, then what the metrics mean, then notes."""
    tables = [_tables(results, benchmark) for benchmark in results.benchmarks]
    known = [m for m in (describe(name) for name in results.metrics) if m.meaning]
    terms = "".join(f"<div><b>{escape(m.label)}</b>: {escape(m.meaning)}.</div>" for m in known)
    notes = dict.fromkeys(note for about in results.abouts.values() for note in summary.notes(about))
    sentences = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        "".join(tables)
        + f'<div class="terms">{terms}</div>'
        + (f'<ul class="notes">{sentences}</ul>' if sentences else "")
    )


def _tables(results: Results, benchmark: str) -> str:
    """One table, or one per theme where there are too many metrics for a page's width."""
    rows = [r for r in results.rows if r["benchmark"] == benchmark]
    metrics = [m for m in map(describe, results.metrics) if any(r["metric"] == m.name for r in rows)]
    if not rows:
        return ""
    parts = [f'<h3>{escape(benchmark)} <small class="lead">n = {max(r["n"] for r in rows):,}</small></h3>']
    if len(metrics) <= WIDE:
        parts.append(_table(results, benchmark, metrics, f"Results on {benchmark}"))
    else:
        for theme in THEMES:
            members = [m for m in metrics if m.theme == theme]
            if members:
                caption = f"{theme}, on {benchmark}"
                parts.append(f"<h4>{escape(theme)}</h4>{_table(results, benchmark, members, caption)}")
    return "".join(parts)


def _table(results: Results, benchmark: str, metrics: Sequence[Metric], label: str) -> str:
    best = {
        m.name: best_models([r for r in results.rows if _is_models(results, r, benchmark, m.name)]) for m in metrics
    }
    head = "<th>model</th>" + "".join(f"<th>{escape(m.label)} {m.arrow}</th>" for m in metrics)
    body = []
    for kind, title in (("model", "Models"), ("bound", "Bound"), ("reference", "Reference points")):
        members = [m for m in results.of_kind(kind) if any(results.find(m, benchmark, n.name) for n in metrics)]
        if members:
            body.append(_group_row(title, len(metrics) + 1))
        for model in members:
            cells = "".join(
                f"<td>{_cell(results.find(model, benchmark, m.name), model in best[m.name])}</td>" for m in metrics
            )
            body.append(f'<tr class="{kind}"><td>{escape(model)}</td>{cells}</tr>')
    return _html_table(head, "".join(body), label)


def _is_models(results: Results, row: Mapping[str, Any], benchmark: str, metric: str) -> bool:
    return (row["benchmark"], row["metric"], results.kinds.get(row["model"])) == (benchmark, metric, "model")


def best_models(rows: Rows) -> list[str]:
    """The models with the best mean of one metric, several if they tie; none where no direction is better."""
    better = describe(rows[0]["metric"]).better if rows else ""
    if not better:
        return []
    best = (min if better == "lower" else max)(r["mean"] for r in rows)
    return [r["model"] for r in rows if r["mean"] == best]


def _html_table(head: str, body: str, label: str, headings: int = 1) -> str:
    head = head.replace("<th>", '<th scope="col">')
    # Focusable, so that a keyboard can scroll it.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="lead-{headings}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _group_row(title: str, columns: int) -> str:
    return f'<tr class="group"><th scope="rowgroup" colspan="{columns}">{escape(title)}</th></tr>'


def _cell(row: Mapping[str, Any] | None, bold: bool = False) -> str:
    if row is None or not math.isfinite(row["mean"]):
        return "–"
    mean = text(row["mean"], row["metric"])
    why = escape(row.get("reason") or "")
    ends = (
        f'<small title="{why}">{interval(row) or "no interval"}</small>' if why else f"<small>{interval(row)}</small>"
    )
    return f"{f'<b>{mean}</b>' if bold else mean}{ends}"


def interval_plots(results: Results) -> str:
    """One plot per metric and benchmark, folded beyond the first few metrics."""
    folds = []
    for metric in (describe(name) for name in results.metrics):
        figures = []
        for benchmark in results.benchmarks:
            chosen = [r for m in results.kinds if (r := results.find(m, benchmark, metric.name)) is not None]
            if chosen:
                drawn = plots.intervals(chosen, [results.kinds[r["model"]] for r in chosen], metric.marks)
                figures.append(f"<figure><figcaption>{escape(benchmark)}</figcaption>{drawn}</figure>")
        which = {"lower": "lower is better", "higher": "higher is better", "": ""}[metric.better]
        folds.append((f'{escape(metric.label)} <span class="lead">{which}</span>', figures))
    return _folds(folds)


def _folds(folds: Sequence[tuple[str, Sequence[str]]], opened: int = 4) -> str:
    """Titled groups of figures that fold, the first ones open; '' without any figure."""
    found = [(title, figures) for title, figures in folds if figures]
    return "".join(
        f"<details{' open' if i < opened else ''}><summary>{title}</summary>"
        f'<div class="plots">{"".join(figures)}</div></details>'
        for i, (title, figures) in enumerate(found)
    )


def differences(results: Results) -> str:
    """Paired differences of models and bounds, a table for each baseline and benchmark; those whose interval excludes
    zero are bold. Empty without any.
    """
    parts: list[str] = []
    compared = [r for r in results.differences if results.kinds[r["model"]] != "reference"]
    for baseline, benchmark in dict.fromkeys((r["baseline"], r["benchmark"]) for r in compared):
        rows = [r for r in compared if (r["baseline"], r["benchmark"]) == (baseline, benchmark)]
        test = next((name for name in ("p_holm", "p") if all(row.get(name) is not None for row in rows)), None)
        lines = []
        for row in rows:
            clear = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
            relative = "" if row["relative"] is None else f"{100 * row['relative']:+.1f} %".replace("-", "−")
            p = "" if test is None else f"<td>{'&lt; 0.001' if row[test] < 0.001 else f'{row[test]:.3f}'}</td>"
            lines.append(
                f"<tr><td>{escape(row['model'])}</td>"
                f'<td>{escape(describe(row["metric"]).label)}</td><td class="clear">{_cell(row, clear)}</td>'
                f"<td>{relative}</td>{p}<td>{row['n']:,}</td></tr>"
            )
        heading = {"p_holm": ["p (Holm)"], "p": ["p"], None: []}[test]
        names = ("model", "metric", "difference", "relative", *heading, "pairs")
        head = "".join(f"<th>{name}</th>" for name in names)
        parts.append(
            f"<details{'' if parts else ' open'}><summary>from {escape(baseline)} on {escape(benchmark)}</summary>"
            f"{_html_table(head, ''.join(lines), f'Differences from {baseline} on {benchmark}', 2)}</details>"
        )
    if not parts:
        return ""
    return (
        "<p>Each pair’s value minus the baseline’s on the same pair; bold where the interval excludes zero. Those of "
        f"reference points are in comparisons.json.</p>{''.join(parts)}"
    )


def regressions(results: Results) -> str:
    """Means of models on one benchmark against those on another, with R²; empty with fewer than two benchmarks."""
    folds = []
    for first, second in itertools.combinations(results.benchmarks, 2):
        figures = []
        for metric in (describe(name) for name in results.metrics):
            points: list[dict[str, Any]] = [
                {"name": m, "kind": results.kinds[m], "x": x, "y": y}
                for m in results.kinds
                if (x := results.find(m, first, metric.name)) and (y := results.find(m, second, metric.name))
            ]
            if len(points) < 2:
                continue
            line, models, words = _line(results, first, second, metric.name)
            ends = [p["x"]["mean"] for p in points if p["name"] in models]
            known = published.REGRESSIONS.get(metric.name)
            if known is not None and {first, second} == {"nabla", "inat-seen"}:
                words += f"; published R² = {known}"
            figures.append(
                f'<figure><figcaption>{escape(metric.label)} <span class="lead">{escape(words)}</span></figcaption>'
                f"{plots.scatter(points, (first, second), line, (min(ends, default=0), max(ends, default=0)))}</figure>"
            )
        folds.append((f"{escape(second)} against {escape(first)}", figures))
    drawn = _folds(folds, opened=1)
    if not drawn:
        return ""
    return (
        "<p>Does one benchmark foretell another? Each cross is a model with its two intervals; the line is least "
        f"squares over the models. Reference points (grey) are not in it.</p>{drawn}"
    )


def _line(
    results: Results, first: str, second: str, metric: str
) -> tuple[tuple[float, float] | None, Sequence[str], str]:
    """((slope, intercept) or None, the models they are fitted to, what to say)."""
    row = results.regression(first, second, metric)
    if row is None:
        return None, (), "no line: it takes models on both"
    if row["slope"] is None:
        return None, row["models"], row["reason"]
    r2 = row["r2"]
    ends = "" if r2["low"] is None else f" [{r2['low']:.3f}, {r2['high']:.3f}]"
    words = f"R² = {r2['mean']:.3f}{ends}, {len(row['models'])} models"
    return (row["slope"]["mean"], row["intercept"]["mean"]), row["models"], words


def loss_curve(run: Path) -> str:
    """The plot of `metrics.jsonl`. Raises UserError if it has no row with step and loss."""
    path = run / "metrics.jsonl"
    rows = [r for r in runs.read_rows(path) if all(_is_number(r.get(name)) for name in ("step", "loss"))]
    if not rows:
        raise UserError(f"{path}: found no row with step and loss, expected those of a training run")
    rows.sort(key=lambda r: r["step"])
    return (
        "<p>Training loss over steps, every logged value and a running mean; the last step is "
        f"{int(rows[-1]['step']):,}.</p>{plots.curve([r['step'] for r in rows], [r['loss'] for r in rows])}"
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**63


# ----------------------------------------------------------------------------------------------------------
# Provenance
# ----------------------------------------------------------------------------------------------------------


def provenance(results: Results, run: Path | None, files: Mapping[str, Sequence[str]]) -> str:
    """Where every number comes from: weights, adapters, seeds and settings of sets, benchmarks, versions, files."""
    parts = []
    for model in dict.fromkeys(s.model for s in results.sets):
        members = [s for s in results.sets if s.model == model]
        # What all benchmarks share is said once.
        found = {m.benchmark: _settings(m.about) for m in members}
        shared = {k: v for k, v in next(iter(found.values())).items() if all(o.get(k) == v for o in found.values())}
        entries = dict(shared)
        for name, settings in found.items():
            own = [f"{k}: {v}" for k, v in settings.items() if k not in shared]
            entries[name] = "; ".join(own)
        parts.append(f"<h3>{escape(model)}</h3>{_list(entries)}")
    for benchmark in results.benchmarks.values():
        entries = {
            "folder": benchmark["root"],
            "list": benchmark["list"] or "the folder’s own",
            "pairs": f"{benchmark['pairs']:,} of {benchmark['classes']:,} classes",
            "excluded pairs": ", ".join(benchmark["excluded"]) or "none",
            "repeated rows": str(benchmark["duplicates"]),
            "fingerprint": benchmark["fingerprint"],
        }
        if benchmark["oracle"] is not None:
            entries["oracle"] = ", ".join(f"{k} {v}" for k, v in benchmark["oracle"].items())
        parts.append(f"<h3>Benchmark {escape(benchmark['name'])}</h3>{_list(entries)}")
    for label, about in results.abouts.items():
        entries = {"nabla_jax": str(about["nabla_jax"]), "bootstrap seed": str(about["seed"])}
        if len(results.abouts) > 1:
            entries = {"folder": str(results.folders[label])} | entries
        else:
            entries |= dict(_run_entries(run))
        links = ", ".join(f'<a href="{escape(f)}">{escape(Path(f).name)}</a>' for f in files[label])
        title = "Software and files" if len(results.abouts) == 1 else f"Evaluation {label}"
        parts.append(f"<h3>{escape(title)}</h3>{_list(entries)}<p>{links}</p>")
    return "".join(parts)


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Every setting that evaluation.json lists for a set, whatever its name."""
    found = {
        name.replace("_", " "): ", ".join("none" if v is None else str(v) for v in value)
        for name, value in about.items()
        if isinstance(value, list) and value
    }
    found["pictures"] = f"{about['pictures']:,} with the right subject, {about['shuffled']:,} with another"
    return found | {"fingerprint": about["fingerprint"]}


def _run_entries(run: Path | None) -> Iterator[tuple[str, str]]:
    path = None if run is None else run / "environment.json"
    if path is not None and path.is_file():
        starts = runs.read_json(path)
        untrusted.check(starts, list[dict[str, Any]], str(path))
        last = starts[-1] if starts else {}
        untrusted.check(last.get("versions", {}), dict[str, Any], str(path), "versions")
        yield "training run", str(run)
        for name in ("command", "git_commit", "python", "platform"):
            if last.get(name):
                value = " ".join(map(str, last[name])) if isinstance(last[name], list) else str(last[name])
                yield name.replace("_", " "), value
        yield "packages", ", ".join(f"{k} {v}" for k, v in last.get("versions", {}).items())


def _list(entries: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"
