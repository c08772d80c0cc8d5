"""From the evaluations of the queue (scripts/toy_table.py) to results.json, and from that alone to results.md.

python -m scripts.results runs/toy_table --out docs
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.errors import UserError
from nabla_jax.metrics import summary
from nabla_jax.metrics.summary import PairScore
from nabla_jax.report import published, reading
from nabla_jax.report.reading import Results
from nabla_jax.report.vocabulary import describe

Row = dict[str, Any]

SYSTEMS = "systems.json"
TIMES = "times.jsonl"
PAPER = published.COLUMNS
IDENTITY = ("normalised_identity", "identification_rate")
COMPARED = (*PAPER, *IDENTITY, "subject_effect")
MAIN = ("rmse", "normalised_identity")
UNUSED = {f.name for f in dataclasses.fields(PairScore)} & {*summary.ALL_METRICS, "retrieval_rank"} - {*COMPARED}
NATIVE = "untuned:kontext_native"
SEED = "omk_fill+seed"  # the same training but for its seed
SETTINGS = ("base.path", "data.", "conditioning.", "lora.", "optim.", "train.", "sample.")
PLACES = ("data.root", "data.prepared", "data.obtain", "train.workdir")  # settings of no interest


# ----------------------------------------------------------------------------------------------------------
# results.json
# ----------------------------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """Everything that results.json holds, from the queue's folder.

    Raises UserError for what is missing, damaged or of different evaluations.
    """
    about = runs.read_json(folder / SYSTEMS)
    folders = {group: Path(at) for group, at in about["evaluations"].items() if (Path(at) / "summary.json").is_file()}
    if not folders:
        raise UserError(f"{folder / SYSTEMS}: found no evaluation, expected summary.json in one of its folders")
    found = reading.read(folders)
    # What another part of the queue has yet to evaluate is no row.
    systems = [s for s in about["systems"] if s["group"] in folders]
    absent = [s["model"] for s in systems if s["model"] not in found.kinds]
    if absent:
        raise UserError(f"{folder}: found no scores of {', '.join(absent)}, or others under one name; evaluate again")
    rows = [row for row in found.rows if row["benchmark"] in about["benchmarks"]]
    first, second = about["benchmarks"][:2]
    return {
        "date": runs.environment()["time"],
        "commit": runs.environment()["git_commit"],
        "machine": machine(),
        "steps": about["steps"],
        "limit": about["limit"],
        "world": about["world"],
        "benchmarks": about["benchmarks"],
        "models": {group: _models(found.abouts[group]) for group in folders},
        "systems": [_system(s) for s in systems],
        "adapters": about["published"],
        "rows": rows,
        "comparisons": comparisons(found, systems),
        "order": order(found, systems, first),
        "regressions": regressions(folders["table"], first, second) if "table" in folders else [],
        "distances": distances(found, systems, about["benchmarks"]),
        "published": [dataclasses.asdict(row) for row in published.ROWS],
        "source": published.SOURCE,
        "seconds": {row["job"]: row["seconds"] for row in runs.read_rows(folder / TIMES)},
    }


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    import jax

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    devices = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "devices": [f"{count} x {kind}" for kind, count in devices.items()],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": runs.environment()["versions"],
    }


def regressions(folder: Path, x: str, y: str) -> list[Row]:
    """The lines of one benchmark over another through the models of one evaluation, with the paper's R²."""
    lines = [row for row in runs.read_json(folder / "regressions.json") if (row["x"], row["y"]) == (x, y)]
    return [
        {**line, "published": published.REGRESSIONS.get(metric)}
        for metric in COMPARED
        for line in lines
        if line["metric"] == metric
    ]


def _models(about: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*(s["model"] for s in about["sets"]), *about["references"]]))


def _system(system: Mapping[str, Any]) -> Row:
    """A system with its settings and, where it was trained, when and from which commit."""
    config = configs.load(system["config"], system["overrides"])
    flat = json.loads(json.dumps(configs.flatten(configs.to_dict(config))))
    settings = {k: v for k, v in flat.items() if k.startswith(SETTINGS) and k not in PLACES}
    starts = runs.RunFolder(Path(system["run"])).environment if system["run"] else None
    trained = None
    if starts is not None and starts.is_file():
        last = runs.read_json(starts)[-1]
        trained = {"commit": last["git_commit"], "date": last["time"], "devices": last.get("devices")}
    return {**{k: v for k, v in system.items() if k != "run"}, "settings": settings, "trained": trained}


def comparisons(found: Results, systems: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Paired differences of every system from the row it is `against`, and of tuned Om-K from native Kontext; p values
    are corrected over all of them.
    """
    wanted = [(s["model"], s["against"]) for s in systems if s["against"]]
    wanted += [(s["model"], NATIVE) for s in systems if s["paper"] == "Om-K"]
    rows: list[Row] = []
    for model, baseline in dict.fromkeys(wanted):
        for benchmark in found.benchmarks:
            rows += compare(found, benchmark, model, baseline)
    return summary.correct(rows) if rows else []


def compare(found: Results, benchmark: str, model: str, baseline: str) -> list[Row]:
    """Rows of `summary.compare` for the metrics of COMPARED; none where one of the two was not drawn."""
    mine, theirs = (found.scores.get((benchmark, name)) for name in (model, baseline))
    if not mine or not theirs or model == baseline:
        return []
    # The tests of metrics that are not shown would take most of the time.
    unused: dict[str, Any] = dict.fromkeys(UNUSED)
    mine, theirs = ([dataclasses.replace(s, **unused) for s in scores] for scores in (mine, theirs))
    seed = next(iter(found.abouts.values()))["seed"]
    rows = summary.compare(model, baseline, benchmark, mine, theirs, seed)
    return [row for row in rows if row["metric"] in COMPARED]


def order(found: Results, systems: Sequence[Mapping[str, Any]], first: str) -> list[Row]:
    """For every two tuned rows of the paper whose numbers on a benchmark are known and differ: its difference, and the
    paired one measured here. `first` is the twin of the benchmark that the paper has most rows of.
    """
    named = {(s["paper"], s["control"]): s["model"] for s in systems if s["paper"]}
    rows: list[Row] = []
    for a, b in itertools.combinations([r for r in published.ROWS if (r.model, r.control) in named], 2):
        if a.benchmark != b.benchmark or twin_of(first) != a.benchmark:
            continue
        one, other = (named[r.model, r.control] for r in (a, b))
        measured = {row["metric"]: row for row in compare(found, first, one, other)}
        for metric in PAPER:
            values = getattr(a, metric), getattr(b, metric)
            if None in values or values[0] == values[1] or metric not in measured:
                continue
            rows.append({**measured[metric], "published": list(values)})
    return rows


def twin_of(benchmark: str) -> str:
    """The name of the paper's benchmark."""
    return benchmark.removeprefix("toy-")


def distances(found: Results, systems: Sequence[Mapping[str, Any]], benchmarks: Sequence[str]) -> list[Row]:
    """Rows of the systems by taxonomic distance from the training species: those of the breakdown, and a benchmark's
    own where all of its pairs are at one distance.
    """
    models = [m for s in systems for m in (s["model"], s["untuned"]) if m]
    rows = [r for r in found.breakdown if r["group"] == "distance" and r["model"] in models and r["metric"] in MAIN]
    for benchmark, model in itertools.product(benchmarks, models):
        there = {score.distance for score in found.scores.get((benchmark, model), ())}
        if len(there) == 1 and None not in there:
            own = [row for metric in MAIN if (row := found.find(model, benchmark, metric)) is not None]
            rows += [{**row, "group": "distance", "value": str(next(iter(there)))} for row in own]
    rows = [row for row in rows if row["benchmark"] in benchmarks]
    return sorted(rows, key=lambda r: (benchmarks.index(r["benchmark"]), int(r["value"]), models.index(r["model"])))


# ----------------------------------------------------------------------------------------------------------
# results.md, a function of results.json
# ----------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """The page: every sentence and number follows from `results`."""
    parts = [_head(results)]
    if "table" in results["models"]:
        parts += [_benchmark(results, name) for name in results["benchmarks"]]
        parts += [_tuned(results), _order(results), _regressions(results)]
    titles = {"beyond": "Beyond the paper", "taxonomy": "Taxonomy"}
    parts += [_variants(results, group, title) for group, title in titles.items() if group in results["models"]]
    parts += [_distances(results), _settings(results)]
    return "\n".join(part for part in parts if part)


def _head(results: Mapping[str, Any]) -> str:
    on = results["machine"]
    devices = ", ".join(on["devices"])
    shortened = []
    if results["steps"] is not None:
        shortened.append(f"every training has {results['steps']} steps instead of its configuration's")
    if results["limit"] is not None:
        shortened.append(f"every benchmark has {results['limit']} pairs instead of all")
    lines = [
        "# Results at toy size",
        "",
        "Generated from [results.json](results.json) by `python -m scripts.results`; do not edit.",
        "`make toy-table` makes all of it again.",
        "",
        f"Evaluated {results['date'][:10]} at commit `{results['commit'] or 'unknown'}` on {on['processor']}, "
        f"{on['cores']} cores, {devices}, {on['system']}, jax {on['versions'].get('jax', 'unknown')}; world "
        f"`{results['world']}`. Jobs took {sum(results['seconds'].values()) / 3600:.1f} hours.",
        "",
    ]
    if shortened:
        lines += [f"**Shortened**: {' and '.join(shortened)}. These numbers test the queue; they are no result.", ""]
    lines += [
        "Numbers are means with 95 % intervals over classes, or individuals where the pairs show one",
        "([how](numbers.md#intervals)). Each system is trained once: intervals speak of other pairs like these, not of",
        "other trainings. The paper's numbers are of photos, 12 billion parameters and 1024 pixels, ours of drawn",
        "birds, 2.4 million and 48: only signs and orders compare. *unknown*: the paper has this row, and no public",
        "source quotes the number. –: no such row or number.",
        "",
        results["source"],
    ]
    return "\n".join(lines) + "\n"


def _benchmark(results: Mapping[str, Any], benchmark: str) -> str:
    cells = {(r["model"], r["metric"]): r for r in results["rows"] if r["benchmark"] == benchmark}
    models = [m for m in results["models"]["table"] if (m, "rmse") in cells]
    rows = _paper_rows(results, benchmark)
    shown = [m for m in (*PAPER, *IDENTITY) if any((model, m) in cells for model in models)]
    head = ["model", "the paper's"]
    for metric in shown:
        name = f"{describe(metric).label} {describe(metric).arrow}"
        head += [f"{name} paper", "here"] if metric in PAPER else [name]
    lines = []
    for model in models:
        row, title = rows.get(model, (None, "–"))
        line = [f"`{model}`", title]
        for metric in shown:
            if metric in PAPER:
                line.append(_quoted(row, metric, title != "–"))
            line.append(_cell(cells.get((model, metric))))
        lines.append(line)
    n = max((r["n"] for r in cells.values()), default=0)
    return f"## {benchmark}\n\n{n} pairs.\n\n{_table(head, lines)}"


def _paper_rows(results: Mapping[str, Any], benchmark: str) -> dict[str, tuple[Row | None, str]]:
    """Model -> (the paper's row or None, its name there), of the models that the paper has."""
    known = {(r["benchmark"], r["control"], r["model"]): r for r in results["published"]}
    there = twin_of(benchmark)
    found: dict[str, tuple[Row | None, str]] = {}
    if there not in {r["benchmark"] for r in results["published"]}:
        return found
    for system in results["systems"]:
        if system["paper"] and system["group"] == "table":
            for model, star in ((system["model"], ""), (system["untuned"], "*")):
                name = f"{system['paper']}{star}"
                found[model] = known.get((there, system["control"], name)), f"{name} {system['control']}"
    return found


def _quoted(row: Mapping[str, Any] | None, metric: str, in_paper: bool) -> str:
    value = None if row is None else row[metric]
    if value is None:
        return "unknown" if in_paper else "–"
    return f"{value:.{ {'dinov2': 2, 'siglip': 2, 'lpips': 3, 'rmse': 1}[metric] }f}"


def _tuned(results: Mapping[str, Any]) -> str:
    pairs = {(s["model"], s["untuned"]) for s in results["systems"] if s["group"] == "table" and s["untuned"]}
    rows = [r for r in results["comparisons"] if (r["model"], r["baseline"]) in pairs and r["metric"] in MAIN]
    if not rows:
        return ""
    counts = collections.Counter(verdict(row) for row in rows)
    others = [row for row in rows if verdict(row) != "better"]
    failed = [f"`{r['model']}` on {r['benchmark']} ({describe(r['metric']).label})" for r in others]
    said = ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word])
    lines = [
        "## Tuned against untuned",
        "",
        f"Paired differences of each system from its own untuned base: of {len(rows)}, {said} "
        "(better or worse: the interval excludes zero). toy-nabla and toy-inat-seen show species of the training, "
        f"toy-inat-unseen others.{'' if not failed else ' Not better: ' + ', '.join(failed) + '.'}",
        "",
        _differences(results, rows),
    ]
    native = [r for r in results["comparisons"] if r["baseline"] == NATIVE and r["metric"] in MAIN]
    if native:
        lines += [f"From `{NATIVE}`, what the base does of itself, the fair rival:\n", _differences(results, native)]
    return "\n".join(lines)


def _differences(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A table of paired differences: a line a model and benchmark."""
    places = list(dict.fromkeys((r["model"], r["benchmark"]) for r in rows))
    places.sort(key=lambda place: results["benchmarks"].index(place[1]))
    cells = {(r["model"], r["benchmark"], r["metric"]): r for r in rows}
    head = ["benchmark", "model"]
    for metric in MAIN:
        head += [f"{describe(metric).label} difference {describe(metric).arrow}", "p (Holm)", ""]
    head.append("clusters")
    lines = []
    for model, benchmark in places:
        line = [benchmark, f"`{model}`"]
        found = [cells.get((model, benchmark, metric)) for metric in MAIN]
        for row in found:
            line += [_cell(row), "–" if row is None else _p(row), "–" if row is None else verdict(row)]
        lines.append([*line, str(max(row["clusters"] for row in found if row is not None))])
    return _table(head, lines)


def _order(results: Mapping[str, Any]) -> str:
    rows = results["order"]
    if not rows:
        return ""
    words = [_same_order(row) for row in rows]
    counts = collections.Counter(words)
    said = ", ".join(f"{counts[word]} {word}" for word in ("reproduced", "reversed", "open") if counts[word])
    head = [
        "metric",
        "first",
        "second",
        "paper: both",
        "paper: first − second",
        "here: first − second",
        "p alone",
        "order",
    ]
    lines = []
    for row, word in zip(rows, words, strict=True):
        metric, (a, b) = row["metric"], row["published"]
        quoted = ", ".join(_quoted({metric: value}, metric, True) for value in (a, b))
        difference = _quoted({metric: a - b}, metric, True).replace("-", "−")
        name = f"{describe(metric).label} {describe(metric).arrow}"
        lines.append([name, f"`{row['model']}`", f"`{row['baseline']}`", quoted, difference, _cell(row), _p(row), word])
    return (
        f"## The paper's order on {rows[0]['benchmark']}\n\nEvery two tuned systems whose published numbers are known "
        f"and differ: {said}. Reproduced or reversed: the interval of the paired difference excludes zero; open: it "
        f"does not. Nothing was tuned for it.\n\n{_table(head, lines)}"
    )


def _same_order(row: Row) -> str:
    if row["low"] is None or row["low"] <= 0 <= row["high"]:
        return "open"
    a, b = row["published"]
    return "reproduced" if (a > b) == (row["mean"] > 0) else "reversed"


def _regressions(results: Mapping[str, Any]) -> str:
    if not results["regressions"]:
        return ""
    head = ["metric", "models", "slope", "R² here", "R² paper"]
    lines = []
    for line in results["regressions"]:
        quoted = "–" if line["published"] is None else f"{line['published']:.3f}"
        numbers = [_cell(line[name] and {**line[name], "metric": name}) for name in ("slope", "r2")]
        lines.append([describe(line["metric"]).label, str(len(line["models"])), *numbers, quoted])
    first, second = (results["regressions"][0][name] for name in ("x", "y"))
    return (
        f"## {second} from {first}\n\nA line through one point per model, tuned and untuned "
        f"([how](numbers.md#one-benchmark-from-another)).\n\n{_table(head, lines)}"
    )


def _variants(results: Mapping[str, Any], group: str, title: str) -> str:
    systems = [s for s in results["systems"] if s["group"] == group]
    trained = {s["model"] for s in systems if s["trained"] and s["model"] != SEED}
    cells = {(r["model"], r["benchmark"], r["metric"]): r for r in results["rows"]}
    found = {(r["model"], r["baseline"], r["benchmark"], r["metric"]): r for r in results["comparisons"]}
    out = [
        f"## {title}",
        "",
        "Each variant is `configs/omk_fill.py:toy` but for one thing. Differences are paired, from the row named under "
        "“against”; where the interval holds zero, the variant is not shown to matter. Nor is it where a training of "
        f"its own differs no more than `{SEED}` does, which is told in so many words.",
        "",
        _table(
            ["model", "what differs", "settings"],
            [
                [f"`{s['model']}`", s["about"], ", ".join(f"`{k}={v}`" for k, v in s["overrides"].items())]
                for s in systems
            ],
        ),
    ]
    head = ["model", "against"]
    for metric in MAIN:
        head += [f"{describe(metric).label} {describe(metric).arrow}", "difference", ""]
    for benchmark in results["benchmarks"]:
        against = [s["against"] for s in systems if s["against"] not in {t["model"] for t in systems}]
        lines = []
        for model, base in [*((m, "") for m in dict.fromkeys(against)), *((s["model"], s["against"]) for s in systems)]:
            line = [f"`{model}`", f"`{base}`" if base else "–"]
            for metric in MAIN:
                row = found.get((model, base, benchmark, metric))
                seed = found.get((SEED, "omk_fill", benchmark, metric)) if model in trained else None
                line += [_cell(cells.get((model, benchmark, metric))), _cell(row), _beside_seed(row, seed)]
            lines.append(line)
        out.append(f"### {title}: {benchmark}\n\n{_table(head, lines)}")
    return "\n".join(out)


def _beside_seed(row: Row | None, seed: Row | None) -> str:
    """The verdict on a difference, and whether another seed makes as large a one, where that is known."""
    if row is None:
        return "–"
    found = verdict(row)
    within = seed is not None and abs(row["mean"]) <= abs(seed["mean"])
    return f"{found}, no more than another seed" if within and found != "open" else found


def _distances(results: Mapping[str, Any]) -> str:
    rows = results["distances"]
    if not rows:
        return ""
    places = list(dict.fromkeys((r["benchmark"], r["value"]) for r in rows))
    cells = {(r["model"], r["benchmark"], r["value"], r["metric"]): r for r in rows}
    models = list(dict.fromkeys(m for s in results["systems"] for m in (s["model"], s["untuned"]) if m))
    out = [
        "## By taxonomic distance",
        "",
        "Levels from the target's species up to the lowest group that a species of the training shares: 0 is a species "
        "of the training.",
        "",
    ]
    for metric in MAIN:
        head = ["model"]
        for benchmark, value in places:
            n = max(r["n"] for r in rows if (r["benchmark"], r["value"]) == (benchmark, value))
            head.append(f"{benchmark}, {value} ({n} pairs)")
        lines = [[f"`{m}`", *(_cell(cells.get((m, b, v, metric))) for b, v in places)] for m in models]
        out.append(f"### {describe(metric).label} {describe(metric).arrow}\n\n{_table(head, lines)}")
    return "\n".join(out)


def _settings(results: Mapping[str, Any]) -> str:
    head = ["model", "configuration", "base", "training", "drawn with", "trained", "commit", "seconds of training"]
    lines = []
    for system in results["systems"]:
        values, trained = system["settings"], system["trained"]
        training = (
            f"{values['train.steps']} steps of {values['train.batch']}, rank {values['lora.rank']}, "
            f"{values['optim.name']}, seed {values['train.seed']}"
        )
        drawn = f"{values['sample.steps']} steps, guidance {values['sample.guidance']:g}"
        seconds = results["seconds"].get(f"train {system['model']}")
        lines.append(
            [
                f"`{system['model']}`",
                f"`{system['config']}`",
                f"`{values['base.path']}`",
                training if trained else "–",
                drawn,
                trained["date"][:10] if trained else "–",
                f"`{trained['commit'] or 'unknown'}`" if trained else "–",
                "–" if seconds is None else f"{seconds:.0f}",
            ]
        )
    adapters = "".join(f"\n`{name}` is the adapter `{path}`.\n" for name, path in results["adapters"].items())
    return f"## Settings\n\nEvery value is in results.json.\n\n{_table(head, lines)}{adapters}"


def to_json(results: Mapping[str, Any]) -> str:
    """JSON with a line for each row of a table, so that a change is seen where it is."""
    parts = []
    for key, value in results.items():
        lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value] if type(value) is list else []
        text = "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n ]" if lines else ""
        parts.append(f" {json.dumps(key)}: {text or json.dumps(value, ensure_ascii=False, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


VERDICTS = ("better", "worse", "open")


def verdict(row: Mapping[str, Any]) -> str:
    """'better' or 'worse' where the interval of a difference excludes zero, else 'open'."""
    if row["low"] is None or row["low"] <= 0 <= row["high"]:
        return "open"
    return "better" if (row["mean"] < 0) == (describe(row["metric"]).better == "lower") else "worse"


def _cell(row: Row | None) -> str:
    return summary.format_cell(row).replace("-", "−")


def _p(row: Mapping[str, Any]) -> str:
    p = row.get("p_holm", row["p"])
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.results",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the queue's folder")
    parser.add_argument("--out", type=Path, action="append", required=True, help="where to write; repeatable")
    given = parser.parse_args(argv)
    found = collect(given.folder)
    # As the file will be read: no number or tuple that JSON changes.
    page = markdown(json.loads(json.dumps(found)))
    for out in given.out:
        runs.write_atomic(out / "results.json", to_json(found))
        runs.write_atomic(out / "results.md", page)
        print(out / "results.md")


if __name__ == "__main__":
    runs.run_main(main)
