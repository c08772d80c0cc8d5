"""The queue of `make toy-table`: its commands are the verbs' own; results.md is a function of results.json."""

import copy
import functools
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nabla_jax import config as configs
from nabla_jax import evaluate, generate, runs
from nabla_jax.errors import UserError
from nabla_jax.metrics.summary import format_cell
from scripts import results, toy_table
from scripts.toy_table import Job, Options
from tests import fake_world

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/toy_table")
PATHS = {"source", "data.prepared", "train.workdir"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@functools.cache
def whole() -> list[Job]:
    return toy_table.list_jobs(Options(OUT))


@functools.cache
def parsed(job: Job) -> tuple[configs.Config, Any]:
    """A job's words as its own verb reads them."""
    verbs = {"nabla_jax.generate": generate._add_arguments, "nabla_jax.evaluate": evaluate._add_arguments}
    return configs.parse_command(job.arguments, "", verbs.get(job.module))


def of(name: str, jobs: list[Job] | None = None) -> Job:
    return {job.name: job for job in (jobs or whole())}[name]


# ------------------------------------------------------------------------------------------------- the commands


def test_every_system_has_a_name_and_a_configuration_of_its_own() -> None:
    assert len(toy_table.SYSTEMS) == sum(len(group) for group in toy_table.GROUPS.values())
    jobs = whole()
    assert len({job.name for job in jobs}) == len(jobs)
    for name, system in toy_table.SYSTEMS.items():
        assert Path(system.config.partition(":")[0]).is_file(), name
        assert set(system.benchmarks) <= set(configs.load(system.config).benchmarks), name
        for other in (system.adapter_of, system.frozen, system.against.removeprefix("untuned:")):
            assert not other or other in toy_table.SYSTEMS, name


@pytest.mark.parametrize("name", toy_table.SYSTEMS)
def test_a_system_differs_from_its_configuration_by_its_overrides_alone(name: str) -> None:
    system = toy_table.SYSTEMS[name]
    plain = configs.flatten(configs.to_dict(configs.load(system.config)))
    jobs = {job.name: job for job in whole()}
    own = [jobs[n] for n in (f"train {name}", f"draw {name}", f"draw untuned:{name}") if n in jobs]
    assert own
    for job in own:
        config, _ = parsed(job)
        found = configs.flatten(configs.to_dict(config))
        differing = {key for key in plain.keys() | found.keys() if plain.get(key) != found.get(key)}
        further = {"lora.frozen"} if system.frozen else set()
        # Where an override says what is the default anyway, the two agree.
        assert differing - PATHS <= system.overrides.keys() | further
        assert all(str(found[key]) for key in system.overrides)
    if "train" in system.steps:
        assert differing - PATHS or name in toy_table.TABLE


def test_each_job_finds_what_it_needs_made_before_it() -> None:
    made: set[str] = set()
    for job in whole():
        if job.module in ("nabla_jax.prepare", "nabla_jax.train"):
            config, _ = parsed(job)
            if job.module == "nabla_jax.prepare":
                made.add(config.data.prepared)
            else:
                assert config.data.mode == "on_the_fly" or config.data.prepared in made, job.name
                assert not getattr(config.lora, "frozen", "") or config.lora.frozen in made, job.name
                made.add(config.train.workdir)
        elif job.module == "nabla_jax.generate":
            _, arguments = parsed(job)
            assert arguments.adapter == "none" or arguments.adapter in made, job.name
            assert arguments.benchmark == list(toy_table.BENCHMARKS)
            made.add(str(arguments.out))
        elif job.module == "nabla_jax.evaluate":
            _, arguments = parsed(job)
            assert {word.partition("=")[2] for word in arguments.pictures} <= made, job.name
            assert len(set(arguments.pictures)) == len(arguments.pictures)
            assert arguments.benchmark == list(toy_table.BENCHMARKS)


def test_variants_share_no_folder() -> None:
    trained = [parsed(job)[0].train.workdir for job in whole() if job.module == "nabla_jax.train"]
    drawn = [parsed(job)[1].out for job in whole() if job.module == "nabla_jax.generate"]
    assert len(set(trained)) == len(trained) and len(set(drawn)) == len(drawn)


def test_the_table_holds_every_system_its_untuned_base_and_the_ceiling() -> None:
    _, arguments = parsed(of("evaluate table"))
    names = {word.partition("=")[0] for word in arguments.pictures}
    seven = {"omk_fill", "omk_depth", "omk_keypoints", "oms_fill", "oms_depth", "oms_keypoints", "insert_fill"}
    assert names == seven | {f"untuned:{n}" for n in seven} | {"untuned:kontext_native", "autoencoder-ceiling"}
    assert all(evaluate.baseline_of(name, list(names)) == f"untuned:{name}" for name in seven)


def test_only_some_systems_come_with_what_they_need() -> None:
    jobs = toy_table.list_jobs(Options(OUT, only=("omk_fill+family+class",)))
    needed = ["omk_fill", "omk_fill+class", "omk_fill+family", "omk_fill+family+class"]
    assert [job.name for job in jobs if job.module == "nabla_jax.train"] == [f"train {name}" for name in needed]
    assert [job.name for job in jobs if job.module == "nabla_jax.evaluate"] == ["evaluate taxonomy"]
    with pytest.raises(UserError, match="found 'omk_fil', expected some of omk_fill"):
        toy_table.list_jobs(Options(OUT, only=("omk_fil",)))


def test_a_shortened_queue_in_another_world() -> None:
    options, _ = toy_table.parse(["--steps", "2", "--quick", "4", "--world", "data/small", "--images", "100"])
    assert options.out == Path("runs/toy_table+steps-2+quick-4+small")
    jobs = toy_table.list_jobs(options)
    assert of("world", jobs).arguments == ("--out", "data/small", "--images", "100", "--orders", "1")
    config, arguments = parsed(of("draw oms_depth", jobs))
    assert (config.train.steps, arguments.limit) == (2, 4)
    assert config.data.root == "data/small/nabirds"
    assert config.benchmarks["toy-inat-unseen-strict"] == "data/small/inat/unseen/strict_unseen.csv"
    assert parsed(of("train omk_fill+order_class", jobs))[0].data.levels == ("0 order", "1 class")
    for words in (["--steps", "0"], ["--images", "100"], ["--published", "omk_fill"]):
        with pytest.raises(UserError, match=words[0]):
            toy_table.parse(words)


def test_a_published_adapter_is_drawn_with_and_evaluated() -> None:
    jobs = toy_table.list_jobs(Options(OUT, published={"omk_fill": "asset:toy-omk-fill"}))
    assert parsed(of("draw published:omk_fill", jobs))[1].adapter == "asset:toy-omk-fill"
    pictures = parsed(of("evaluate table", jobs))[1].pictures
    assert f"published:omk_fill={OUT}/pictures/published-omk_fill" in pictures


def test_an_evaluation_keeps_what_was_drawn_before() -> None:
    done = frozenset({"draw omk_depth", "draw untuned:omk_depth", "draw oms_fill"})
    jobs = toy_table.list_jobs(Options(OUT, groups=("table",), only=("omk_fill",), done=done))
    assert not [job for job in jobs if "oms" in job.name or "depth" in job.name]
    names = [word.partition("=")[0] for word in parsed(of("evaluate table", jobs))[1].pictures]
    assert names == ["omk_fill", "untuned:omk_fill", "omk_depth", "untuned:omk_depth", "autoencoder-ceiling"]


# ------------------------------------------------------------------------------------------------- the queue


def test_time_left_is_guessed_from_the_pace_so_far() -> None:
    jobs = [Job(name, "m", (), seconds) for name, seconds in (("a", 10), ("b", 20), ("c", 40))]
    assert toy_table.time_left(jobs, 0, {}) == 70
    assert toy_table.time_left(jobs, 1, {"a": 30.0}) == 3 * 60
    # What an earlier run completed takes no time again.
    assert toy_table.time_left(jobs, 0, {"a": 30.0, "c": 70.0}) == 2 * 20


def test_jobs_run_in_order_and_the_first_failure_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def say(word: str) -> Job:
        return Job(word, "timeit", ("-n", "1", "-r", "1", f"print('said {word}')"), 1)

    jobs = [say("one"), Job("two", "no_such_module", ("a b",), 1), say("three")]
    with pytest.raises(UserError, match=r"two: ended with status 1; its command: .*no_such_module 'a b'"):
        toy_table.run_all(jobs, tmp_path)
    assert re.findall(r"said (\w+)", capfd.readouterr().out) == ["one"]
    assert [row["job"] for row in runs.read_rows(tmp_path / "times.jsonl")] == ["one"]
    first = runs.read_rows(tmp_path / "times.jsonl")
    toy_table.run_all([jobs[0], jobs[2]], tmp_path)
    said = capfd.readouterr().out
    assert re.findall(r"said (\w+)", said) == ["one", "three"] and "--- 2 of 2: three (left: 0:00:0" in said
    # The time of the run that did the work counts, not of one that finds it done.
    assert runs.read_rows(tmp_path / "times.jsonl")[:1] == first


def test_a_signal_is_passed_on_and_stops_the_queue(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    code = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(143)))\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
    )
    jobs = [Job("long", "timeit", ("-n", "1", "-s", code, "time.sleep(60)"), 1), Job("next", "no_such_module", (), 1)]

    def stop() -> None:
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(runs.Interrupted, match="long: stopped; the same command continues"):
        toy_table.run_all(jobs, tmp_path)
    thread.join()
    assert mark.exists() and runs.read_rows(tmp_path / "times.jsonl") == []


# ------------------------------------------------------------------------------------------------- the results


def mixed(share: float, shift: float = 0.0) -> Any:
    """A model that draws so much of the right answer, the rest a sibling's, a little too bright."""
    return lambda right, sibling, target, mask: share * right + (1 - share) * sibling + shift


MODELS = {
    "untuned:omk_fill": mixed(0.1),
    "omk_fill": mixed(0.9, 2),
    "untuned:oms_fill": mixed(0.2),
    "oms_fill": mixed(0.6, 4),
}
NAMES = ("toy-nabla", "toy-inat-seen")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(queue's folder, what results.json would hold): two systems and their bases on two benchmarks."""
    folder = tmp_path_factory.mktemp("queue")
    benchmarks = {}
    for name in NAMES:
        benchmarks[name] = fake_world.write_world(folder / "worlds" / name)
        for model, make in MODELS.items():
            at = toy_table._pictures(Options(folder), model)
            fake_world.write_pictures(benchmarks[name], at / name, make)
    options = Options(folder, groups=("table",), only=("omk_fill", "oms_fill"))
    pictures = {model: toy_table._pictures(options, model) for model in MODELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(fake_world.register(folder / "installed")))
        evaluate.evaluate(pictures, benchmarks, folder / "evaluations" / "table", workers=0)
        about = toy_table.describe(options)
        runs.write_json(folder / results.SYSTEMS, about | {"benchmarks": list(NAMES)})
        found = results.collect(folder)
    return folder, json.loads(json.dumps(found))


def lines(page: str, *cells: str) -> list[list[str]]:
    """Cells of the page's table rows that begin so."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return [row for row in rows if tuple(row[: len(cells)]) == cells]


def test_rows_are_those_of_the_evaluation(collected: tuple[Path, dict[str, Any]]) -> None:
    folder, found = collected
    assert found["rows"] == json.loads((folder / "evaluations" / "table" / "summary.json").read_text())
    # Differences, too, but for p values, which are corrected over another table.
    theirs = json.loads((folder / "evaluations" / "table" / "comparisons.json").read_text())
    key = ("model", "baseline", "benchmark", "metric")
    known = {tuple(r[k] for k in key): r for r in theirs}
    assert {r["model"] for r in found["comparisons"]} == {"omk_fill", "oms_fill"}
    for row in found["comparisons"]:
        other = known[tuple(row[k] for k in key)]
        assert {**row, "p_holm": 0} == {**other, "p_holm": 0}
    assert {(s["model"], s["settings"]["train.steps"]) for s in found["systems"]} == {
        ("omk_fill", 300),
        ("oms_fill", 300),
    }


def test_the_papers_numbers_stand_beside_ours(collected: tuple[Path, dict[str, Any]]) -> None:
    page = results.markdown(collected[1])
    cells = {(r["benchmark"], r["model"], r["metric"]): format_cell(r) for r in collected[1]["rows"]}
    nabla, seen = (lines(page, f"`{model}`")[i] for i, model in enumerate(("omk_fill", "omk_fill")))
    assert nabla[1:4] == ["Om-K fill", "51.0", cells["toy-nabla", "omk_fill", "rmse"]]
    assert seen[1:4] == ["Om-K fill", "unknown", cells["toy-inat-seen", "omk_fill", "rmse"]]
    assert lines(page, "`untuned:oms_fill`")[0][1:3] == ["Om-S* fill", "77.1"]
    assert lines(page, "`untuned:omk_fill`")[0][1:3] == ["Om-K* fill", "unknown"]
    assert lines(page, "`copy-target`")[0][1:3] == ["–", "–"]


def test_verdicts_follow_the_numbers(collected: tuple[Path, dict[str, Any]]) -> None:
    found = collected[1]
    page = results.markdown(found)
    assert "of 8, 8 better" in page
    order = lines(page, "RMSE ↓", "`oms_fill`", "`omk_fill`")
    assert [row[3:5] + row[-1:] for row in order] == [["54.7, 51.0", "3.7", "reproduced"]]
    turned = copy.deepcopy(found)
    for row in turned["order"]:
        row |= {"mean": -row["mean"], "low": -row["high"], "high": -row["low"]}
    for row in turned["comparisons"]:
        row |= {"low": None, "high": None}
    page = results.markdown(turned)
    assert [row[-1] for row in lines(page, "RMSE ↓", "`oms_fill`", "`omk_fill`")] == ["reversed"]
    assert "of 8, 8 open" in page and "`omk_fill` on toy-nabla (RMSE)" in page
    wide = copy.deepcopy(found)
    for row in wide["order"]:
        row |= {"low": -1.0, "high": 99.0}
    assert lines(results.markdown(wide), "RMSE ↓", "`oms_fill`", "`omk_fill`")[0][-1] == "open"


def test_the_regression_stands_beside_the_papers(collected: tuple[Path, dict[str, Any]]) -> None:
    found = collected[1]
    line = next(r for r in found["regressions"] if r["metric"] == "rmse")
    assert sorted(line["models"]) == sorted(MODELS)
    row = lines(results.markdown(found), "RMSE", "4")[0]
    assert row[-1] == "0.963" and row[-2].startswith(f"{line['r2']['mean']:.3f}")


def test_variants_and_distances(collected: tuple[Path, dict[str, Any]]) -> None:
    """A made-up group: its rows show their differences from the row they are against."""
    found = copy.deepcopy(collected[1])
    name = "omk_fill+seed"
    system = next(s for s in found["systems"] if s["model"] == "omk_fill")
    overrides = {"train.seed": "43"}
    found["systems"].append({**system, "model": name, "group": "beyond", "untuned": None, "against": "omk_fill"})
    found["systems"][-1] |= {"overrides": overrides, "about": "another seed", "paper": None}
    found["models"]["beyond"] = ["omk_fill", name]
    found["rows"] += [{**r, "model": name} for r in found["rows"] if r["model"] == "oms_fill"]
    row = next(r for r in found["comparisons"] if r["metric"] == "rmse" and r["benchmark"] == "toy-nabla")
    found["comparisons"].append({**row, "model": name, "baseline": "omk_fill", "mean": 1.5, "low": 0.5, "high": 2.5})
    other = {"model": "omk_fill+other", "baseline": "omk_fill"}
    trained = {"commit": "0" * 40, "date": "2026-11-21", "devices": None}
    found["systems"].append({**found["systems"][-1], "model": other["model"], "trained": trained})
    drawn = {**other, "model": "omk_fill+drawn"}
    found["systems"].append({**found["systems"][-1], "model": drawn["model"], "trained": None})
    found["comparisons"] += [{**row, **pair, "mean": -1.5, "low": -2.5, "high": -0.5} for pair in (other, drawn)]
    first = next(r for r in found["rows"] if (r["model"], r["metric"]) == (name, "rmse"))
    found["distances"] = [{**first, "group": "distance", "value": "2"}]
    page = results.markdown(found)
    assert lines(page, f"`{name}`", "another seed") == [[f"`{name}`", "another seed", "`train.seed=43`"]]
    assert lines(page, f"`{name}`", "`omk_fill`")[0][2:5] == [format_cell(first), "1.5 [0.5, 2.5]", "worse"]
    cells = [lines(page, f"`omk_fill+{what}`", "`omk_fill`")[0][3:5] for what in ("other", "drawn")]
    assert cells == [["−1.5 [−2.5, −0.5]", "better, no more than another seed"], ["−1.5 [−2.5, −0.5]", "better"]]
    assert lines(page, "model", f"toy-nabla, 2 ({first['n']} pairs)")
    assert lines(page, f"`{name}`", format_cell(first))


def test_a_shortened_queue_says_so(collected: tuple[Path, dict[str, Any]]) -> None:
    assert "**Shortened**" not in results.markdown(collected[1])
    page = results.markdown({**collected[1], "steps": 2, "limit": 4})
    assert "every training has 2 steps" in page and "every benchmark has 4 pairs" in page


def test_the_command_writes_both_files(collected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = collected
    results.main([str(folder), "--out", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    for name in ("a", "b"):
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert (tmp_path / name / "results.md").read_text() == results.markdown(found)
        assert found["rows"] == collected[1]["rows"] and found.keys() == collected[1].keys()
        assert found["machine"]["cores"] >= 1 and np.isfinite([r["mean"] for r in found["rows"]]).all()
    (folder / "evaluations" / "table" / "summary.json").rename(folder / "summary.json")
    with pytest.raises(UserError, match=r"found no evaluation"):
        results.main([str(folder), "--out", str(tmp_path / "c")])
    (folder / "summary.json").rename(folder / "evaluations" / "table" / "summary.json")


def test_the_committed_page_is_made_from_the_committed_numbers() -> None:
    page, numbers = ROOT / "docs" / "results.md", ROOT / "docs" / "results.json"
    assert page.exists() == numbers.exists()
    if page.exists():
        assert page.read_text() == results.markdown(json.loads(numbers.read_text()))
