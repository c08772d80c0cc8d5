"""The evaluate command on a world whose numbers follow from its construction."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nabla_jax import assets
from nabla_jax import config as configs
from nabla_jax import evaluate as verb
from nabla_jax.conditioning.geometry import mask_box
from nabla_jax.data import keypoint_file, read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from nabla_jax.data.taxonomy import species_path
from nabla_jax.errors import UserError
from nabla_jax.images import read_rgb, write_image
from nabla_jax.metrics import networks as nets
from nabla_jax.metrics import perception, pixels, statistics, summary
from nabla_jax.parallel import processes
from tests import fake_world
from tests.fixtures import free_address

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 14
MODELS = {
    "perfect": lambda right, sibling, target, mask: right,
    "sibling": lambda right, sibling, target, mask: sibling,
    "untuned": lambda right, sibling, target, mask: np.where(mask[..., None], 128.0, target),
    "half": lambda right, sibling, target, mask: (right + sibling) / 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    fake_world.write_world(folder / "birds")
    for name, make in MODELS.items():
        fake_world.write_pictures(folder / "birds", folder / "pictures" / name / "ellipses", make)
    return folder


@pytest.fixture(autouse=True)
def registered(tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(str(fake_world.register(tmp_path_factory.mktemp("installed"))))


def run(world, out, names=tuple(MODELS), root="birds", **options):
    pictures = {name: world / "pictures" / name for name in names}
    return verb.evaluate(pictures, {"ellipses": world / root}, out, workers=0, **options)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(fake_world.register(tmp_path_factory.mktemp("installed"))))
        rows = run(world, out)
    return out, {(r["model"], r["metric"]): r for r in rows}


def test_every_set_and_reference_point_has_every_metric(results):
    _, rows = results
    assert set(rows) == {(m, k) for m in (*MODELS, *verb.REFERENCES) for k in summary.METRICS}
    for row in rows.values():
        assert list(row)[:7] == ["model", "benchmark", "metric", "mean", "low", "high", "n"]
        assert row["clusters"] == len(fake_world.CLASSES) and row["method"] == ("" if row["reason"] else "t")
        assert row["low"] <= row["mean"] <= row["high"] and row["n"] == PAIRS
        assert row["benchmark"] == "ellipses"


def test_the_right_answer_scores_one_the_sibling_zero_and_their_mean_a_half(results):
    _, rows = results
    assert rows["perfect", "normalised_identity"]["mean"] == 1
    assert rows["perfect", "rmse"]["mean"] == 0  # here the target shows the subject's very identity
    assert rows["perfect", "ssim"]["mean"] == 1
    assert rows["perfect", "identification_rate"]["mean"] == 1
    assert rows["sibling", "normalised_identity"]["mean"] == 0
    assert rows["sibling", "identification_rate"]["mean"] == 0
    assert rows["half", "normalised_identity"]["mean"] == pytest.approx(0.5, abs=0.01)


def test_subject_effect_has_the_sign_of_what_the_subject_does(results):
    _, rows = results
    assert rows["perfect", "subject_effect"]["low"] > 0.3
    assert rows["half", "subject_effect"]["mean"] > 0.2  # of seven classes: its interval is wide
    for model in ("untuned", "copy-target"):  # neither looks at the subject
        assert [rows[model, "subject_effect"][k] for k in ("mean", "low", "high")] == [0, 0, 0]
    assert rows["flat-colour", "subject_effect"]["low"] > 0
    assert rows["paste-subject", "subject_effect"]["low"] > 0


def test_reference_points_rank_as_they_must(results):
    _, rows = results
    assert rows["copy-target", "rmse"]["mean"] == 0
    rmse = {m: rows[m, "rmse"]["mean"] for m in verb.REFERENCES}
    assert rmse["paste-subject"] < rmse["flat-colour"]
    assert rmse["same-class"] < rmse["sibling-class"]
    assert rows["paste-subject", "identification_rate"]["mean"] == 1


def test_per_pair_numbers_agree_with_a_direct_computation(world, results):
    out, rows = results
    scores = {s.pair: s for s in summary.from_csv(out / "pairs" / "ellipses" / "half.csv")}
    oracle = fake_world.Oracle(world / "birds")
    right, sibling, classes = [], [], []
    for pair in benchmark_pairs(world / "birds"):
        folder = world / "pictures" / "half" / "ellipses"
        answer = oracle.right(pair.subject_id, pair.target_id)
        class_id, number = oracle.values["images"][pair.target_id]
        mask = fake_world.draw((0, 0, 0), (0, 0, 0), fake_world.scene(number))[1]
        score = scores[pair.key]
        assert score.right_error == pixels.masked_rmse(read_rgb(folder / "right" / f"{pair.key}.png"), answer, mask)
        shuffled = read_rgb(folder / "shuffled" / f"{pair.key}.png")
        assert score.shuffled_error == pixels.masked_rmse(shuffled, answer, mask)
        other = oracle.sibling(pair.subject_id, pair.target_id)
        assert score.sibling_error == pixels.masked_rmse(other, answer, mask)
        assert (score.sibling_plumage_error is None) == (class_id not in (21, 22))
        assert score.pixels == mask.sum() and score.class_id == class_id and score.lineup == 6
        right.append(score.right_error)
        sibling.append(score.sibling_error)
        classes.append(class_id)
    interval = statistics.ratio_interval(np.subtract(sibling, right), sibling, classes, seed=0)
    row = rows["half", "normalised_identity"]
    assert [row[k] for k in ("mean", "low", "high")] == pytest.approx(
        [interval.mean, interval.low, interval.high], abs=1e-6
    )


def test_breakdown_and_comparisons(results):
    out, rows = results
    breakdown = json.loads((out / "breakdown.json").read_text())
    values = {(r["model"], r["group"], r["value"], r["metric"]): r for r in breakdown}
    assert values["perfect", "qualifier", "Female", "normalised_identity"]["mean"] == 1
    assert values["perfect", "qualifier", "Female", "normalised_identity"]["n"] == 2
    assert values["perfect", "all", "", "normalised_identity_plumage"]["n"] == 4
    assert {v for _, g, v, _ in values if g == "order"} == {"Family A", "Family B"}
    comparisons = {(r["model"], r["metric"]): r for r in json.loads((out / "comparisons.json").read_text())}
    row = comparisons["half", "rmse"]
    assert row["baseline"] == "untuned" and row["n"] == PAIRS
    difference = rows["half", "rmse"]["mean"] - rows["untuned", "rmse"]["mean"]
    assert row["mean"] == pytest.approx(difference, abs=2e-6)
    assert row["relative"] == pytest.approx(difference / rows["untuned", "rmse"]["mean"], abs=1e-5)
    assert comparisons["perfect", "rmse"]["relative"] == -1


def test_differences_are_from_the_baseline_that_is_named(world, results, tmp_path):
    _, rows = results
    run(world, tmp_path, ("perfect", "half"), baseline="paste-subject")
    found = json.loads((tmp_path / "comparisons.json").read_text())
    assert {r["baseline"] for r in found} == {"paste-subject"}
    assert {r["model"] for r in found} == {"perfect", "half", *verb.REFERENCES} - {"paste-subject"}
    row = next(r for r in found if (r["model"], r["metric"]) == ("half", "rmse"))
    assert row["mean"] == pytest.approx(rows["half", "rmse"]["mean"] - rows["paste-subject", "rmse"]["mean"], abs=2e-6)
    with pytest.raises(UserError, match="--baseline: found 'tuned', expected one of perfect, "):
        run(world, tmp_path / "other", ("perfect",), baseline="tuned")
    assert not (tmp_path / "other").exists()


def test_a_set_is_compared_with_its_own_untuned_one():
    models = ["untuned", "a", "untuned:a", "b"]
    assert [verb.baseline_of(m, models) for m in models] == ["untuned", "untuned:a", "untuned", "untuned"]


def test_distance_is_that_to_the_nearest_species_of_training(world, tmp_path):
    examples = read_dataset(world / "birds").examples
    trained = [("Birds", "Larks", "Sky", "Skylark"), ("Birds", "Finches", "Siskin")]
    distance = verb.distance_from(trained)

    def of(*path):
        return distance(dataclasses.replace(examples[0], taxonomy=path))

    assert of("Birds", "Larks", "Sky", "Skylark", "Skylark (Male)") == 0
    assert of("Birds", "Skylark") == 0  # a list without groups still names the species
    assert [of("Birds", "Larks", *rest) for rest in (("Sky", "Woodlark"), ("Horned", "Shore Lark"))] == [1, 2]
    assert of("Birds", "Owls", "Barn Owl") == 2
    assert of("Birds", "Barn Owl") is None  # no groups: how far is not known
    assert verb.distance_from([])(examples[0]) is None
    trained = [e.taxonomy for e in examples if e.species == examples[0].species]
    run(world, tmp_path, ("perfect",), trained=[species_path(path) for path in trained])
    scores = summary.from_csv(tmp_path / "pairs" / "ellipses" / "perfect.csv")
    species = {e.id: e.species for e in examples}
    assert all((s.distance == 0) == (species[s.target_id] == examples[0].species) for s in scores)
    assert len({s.distance for s in scores}) > 1
    groups = {r["value"] for r in json.loads((tmp_path / "breakdown.json").read_text()) if r["group"] == "distance"}
    assert groups == {str(s.distance) for s in scores}


def test_the_printed_table_holds_the_summary(results):
    out, rows = results
    text = summary.text_table(list(rows.values()))
    lines = text.splitlines()
    assert len({len(line) for line in lines if line.startswith("ellipses")}) == 1
    assert lines[0].split() == ["benchmark", "model", *summary.METRICS, "n"]
    cell = summary.format_cell(rows["half", "normalised_identity"])
    line = next(line for line in lines if line.split()[1:2] == ["half"])
    assert cell in line and line.endswith(f" {PAIRS}")
    assert (out / "summary.md").read_text().count("\n") == 2 + len(MODELS) + len(verb.REFERENCES)


def files(out):
    return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and "cache" not in p.parts}


def test_a_second_run_changes_nothing_and_works_on_nothing(world, results, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(results[0], out)
    before = files(out)
    for name in ("score_pairs", "render_answers"):
        monkeypatch.setattr(verb, name, lambda *a, name=name: pytest.fail(f"{name} was called again"))
    run(world, out)
    assert files(out) == before


def test_work_stopped_at_any_set_ends_with_the_same_files(world, results, tmp_path, monkeypatch):
    for stop_after in (0, 5):
        out, calls, real = tmp_path / str(stop_after), [], verb._store_scores

        def store(*arguments, calls=calls, real=real, stop_after=stop_after):
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(arguments)
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(verb, "_store_scores", store)
            with pytest.raises(KeyboardInterrupt):
                run(world, out)
        run(world, out)
        expected = files(results[0])
        assert {k: v for k, v in files(out).items() if k.name != ".lock"} == {
            k: v for k, v in expected.items() if k.name != ".lock"
        }


def test_a_changed_picture_or_damaged_table_is_scored_again(world, results, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "world"
    shutil.copytree(world, copy)
    run(copy, out)
    first = (out / "summary.json").read_bytes()
    manifest = copy / "pictures" / "half" / "ellipses" / "right" / "manifest.jsonl"
    manifest.write_text("".join(reversed(manifest.read_text().splitlines(keepends=True))))
    table = out / "pairs" / "ellipses" / "perfect.csv"
    table.write_text(table.read_text().replace("0.0", "9.0"))
    run(copy, out)
    assert (out / "summary.json").read_bytes() == first  # the order of rows is no change, the table is made again
    fake_world.write_pictures(
        copy / "birds", copy / "pictures" / "half" / "ellipses", MODELS["sibling"], settings={"seed": 1}
    )
    rows = {(r["model"], r["metric"]): r["mean"] for r in run(copy, out)}
    assert rows["half", "normalised_identity"] == 0


def test_missing_pictures_are_an_error_that_lists_them(world, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    (copy / "pictures" / "half" / "ellipses" / "right" / "3_1in2.png").unlink()
    (copy / "pictures" / "half" / "ellipses" / "shuffled" / "5_2in1.png").unlink()
    with pytest.raises(UserError, match=r"half ellipses/right: 1 of 14 \(3_1in2\); .*shuffled: 1 of 14 \(5_2in1\)"):
        run(copy, tmp_path / "out", ["half", "untuned"])
    rows = run(copy, tmp_path / "out", ["half", "untuned"], allow_missing=True)
    n = {(r["model"], r["metric"]): r["n"] for r in rows}
    assert n["half", "rmse"] == 13 and n["half", "subject_effect"] == 12 and n["untuned", "rmse"] == PAIRS
    missing = json.loads((tmp_path / "out" / "evaluation.json").read_text())["missing"]
    assert [(m["kind"], m["pairs"]) for m in missing] == [("right", ["3_1in2"]), ("shuffled", ["5_2in1"])]


def test_a_pair_with_an_empty_mask_is_excluded_counted_and_listed(tmp_path, capsys):
    empty = fake_world.picture_id(20, 0)
    fake_world.write_world(tmp_path / "birds", empty=empty)
    rows = verb.evaluate({}, {"ellipses": tmp_path / "birds"}, tmp_path / "out", workers=0)
    # A subject of another pair may have been replaced by the picture without a bird.
    assert {r["n"] for r in rows if r["metric"] != "subject_effect"} == {PAIRS - 2}
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(about["benchmarks"][0]["excluded"]) == {"0_1in2", "0_2in1"}
    assert "2 of 14 pairs excluded" in capsys.readouterr().out


def test_without_an_oracle_there_are_pixel_metrics_only_and_a_note(world, tmp_path, capsys):
    shutil.copytree(world / "birds", tmp_path / "plain")
    (tmp_path / "plain" / "oracle.json").unlink()
    pictures = {"half": world / "pictures" / "half"}
    rows = verb.evaluate(pictures, {"ellipses": tmp_path / "plain"}, tmp_path / "out", workers=0)
    assert {r["metric"] for r in rows} == {"rmse", "ssim"}
    assert "no oracle" in capsys.readouterr().out


def test_every_setting_of_a_manifest_is_listed_whatever_its_name(world, tmp_path):
    settings = {"method": "insert", "window": 2.4, "feather": 2}
    for name, further in (("plain", {}), ("insert", settings)):
        folder = tmp_path / name / "ellipses"
        fake_world.write_pictures(world / "birds", folder, MODELS["half"], settings=further)
    pictures = {name: tmp_path / name for name in ("plain", "insert")}
    verb.evaluate(pictures, {"ellipses": world / "birds"}, tmp_path / "out", workers=0)
    plain, insert = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]
    assert {name: insert.get(name) for name in settings} == {name: [value] for name, value in settings.items()}
    # Nothing that belongs to a single picture is among them.
    assert insert.keys() - plain.keys() == settings.keys()
    assert {name for name, value in plain.items() if isinstance(value, list)} == {
        *("seed", "steps", "guidance", "adapter", "adapter_sha256", "base_sha256")
    }


def test_a_set_without_shuffled_pictures_has_no_subject_effect_and_a_note(world, tmp_path, capsys):
    folder = tmp_path / "pictures" / "ellipses"
    shutil.copytree(world / "pictures" / "half" / "ellipses" / "right", folder / "right")
    rows = verb.evaluate({"half": tmp_path / "pictures"}, {"ellipses": world / "birds"}, tmp_path / "out", workers=0)
    assert {r["metric"] for r in rows if r["model"] == "half"} == set(summary.METRICS) - {"subject_effect"}
    assert "no shuffled pictures" in capsys.readouterr().out


def test_pictures_of_another_size_are_compared_at_their_own(world, tmp_path):
    shutil.copytree(world / "pictures" / "perfect", tmp_path / "pictures")
    for path in (tmp_path / "pictures").rglob("*.png"):
        write_image(read_rgb(path).repeat(2, 0).repeat(2, 1), path)
    rows = verb.evaluate({"large": tmp_path / "pictures"}, {"ellipses": world / "birds"}, tmp_path / "out", workers=0)
    values = {r["metric"]: r["mean"] for r in rows if r["model"] == "large"}
    assert values["rmse"] == 0 and values["normalised_identity"] == 1


def edit_manifest(world, folder, **changes):
    shutil.copytree(world / "pictures" / "half", folder)
    path = folder / "ellipses" / "right" / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_id": fake_world.picture_id(26, 3)}, "manifest.jsonl: pair 1_2in1 is .* expected"),
        ({"subject_used": fake_world.picture_id(26, 3)}, "manifest.jsonl: pair 1_2in1: subject_used is"),
    ],
)
def test_pictures_of_other_pairs_are_refused(world, tmp_path, changes, words):
    edit_manifest(world, tmp_path / "pictures", **changes)
    with pytest.raises(UserError, match=words):
        verb.evaluate({"half": tmp_path / "pictures"}, {"ellipses": world / "birds"}, tmp_path / "out", workers=0)


def test_damaged_inputs_are_named(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    picture = tmp_path / "world" / "pictures" / "half" / "ellipses" / "right" / "0_1in2.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(UserError, match="0_1in2.png: truncated or damaged picture"):
        run(tmp_path / "world", tmp_path / "out", ["half"])
    mask = min((tmp_path / "world" / "birds" / "masks" / "0020").iterdir())
    write_image(np.zeros((9, 9), np.uint8), mask)
    with pytest.raises(UserError, match=f"{mask.name}: mask is 9x9"):
        run(tmp_path / "world", tmp_path / "out", ["perfect"])
    mask.unlink()
    with pytest.raises(UserError, match="found no mask for 1 of 14"):
        run(tmp_path / "world", tmp_path / "out", ["perfect"])


def test_an_unknown_world_is_named(world, tmp_path):
    shutil.copytree(world / "birds", tmp_path / "birds")
    path = tmp_path / "birds" / "oracle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world": "elsewhere"}))
    with pytest.raises(UserError, match="world 'elsewhere' is not installed.*ellipses"):
        verb.evaluate({}, {"ellipses": tmp_path / "birds"}, tmp_path / "out", workers=0)
    path.write_text("{}")
    with pytest.raises(UserError, match="oracle.json: found no readable field 'world'"):
        verb.evaluate({}, {"ellipses": tmp_path / "birds"}, tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("half", "expected NAME=FOLDER"),
        ("copy-target=.", "is taken"),
        ("half=/does/not/exist", "no such folder"),
    ],
)
def test_picture_arguments_are_checked(word, message):
    with pytest.raises(UserError, match=message):
        verb._named_folders([word])


def test_reference_points_draw_from_the_right_classes(world):
    benchmark = verb.open_benchmark(world / "birds")
    species = {e.id: (e.species, e.class_id) for e in benchmark.dataset.examples}
    for pair in benchmark.pairs:
        subject = benchmark.dataset.by_id[pair.subject_id]
        mates = verb._class_mates(benchmark, pair.subject_id, pair)
        assert len(mates) == 2 and {species[i][1] for i in mates} == {subject.class_id}
        siblings = verb._siblings(benchmark, pair.subject_id)
        family = {20: 0, 21: 0, 22: 0, 23: 0}.get(subject.class_id, 1)
        names = {f"Bird {s}" for s in range(3 * family, 3 * family + 3)}
        assert {species[i][0] for i in siblings} == names - {subject.species}


def command(world, out, config, *extra):
    return [
        sys.executable, "-m", "nabla_jax.evaluate", "--config", str(config), "--out", str(out),
        *(w for m in MODELS for w in ("--pictures", f"{m}={world / 'pictures' / m}")), *extra,
    ]  # fmt: skip


@pytest.fixture
def config(world, tmp_path):
    """The shipped configuration with this world as its only benchmark."""
    path = tmp_path / "config.py"
    path.write_text(
        "from configs import omk_fill\n\n\ndef get_config(arg=''):\n    config = omk_fill.get_config(arg)\n"
        f"    config.benchmarks = {{'ellipses': {str(world / 'birds')!r}}}\n"
        "    config.metrics = {}\n    config.sample.seed = 0\n    return config\n"
    )
    return path


def children(pid):
    """Worker processes of a process, from the system's table."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def test_the_command_with_two_processes_equals_the_function_even_when_killed(world, results, config, tmp_path):
    environment = fake_world.environment(fake_world.register(tmp_path / "installed"))
    out = tmp_path / "out"
    started = subprocess.Popen(
        command(world, out, config),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("cache/*/*.npz")) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(started.pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]  # none goes on alone
    done = subprocess.run(
        command(world, out, config, "--report"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "summary.json").read_bytes() == (results[0] / "summary.json").read_bytes()
    assert summary.text_table(json.loads((out / "summary.json").read_text())) in done.stdout
    assert (out / "index.html").is_file()


def test_a_mistake_is_one_line_and_status_two(world, config, tmp_path):
    arguments = ["--pictures", f"other={tmp_path}"]
    done = subprocess.run(
        command(world, tmp_path / "out", config, *arguments),
        cwd=ROOT,
        env=fake_world.environment(fake_world.register(tmp_path / "installed")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "missing pictures: other ellipses/right: 14 of 14" in done.stderr


def test_scoring_loads_no_framework():
    code = "import sys, nabla_jax.evaluate; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_scores_survive_their_table(tmp_path):
    scores = [
        summary.PairScore("0_1in2", "a", "b", 3, "Order, one", 'Bird "x"', "", 12, 0.1 + 0.2, None, 1e-17, rank=3),
        summary.PairScore("0_2in1", "b", "a", 3, "", "Bird", "Male", 0, excluded="the mask of a is empty"),
    ]
    path = tmp_path / "scores.csv"
    path.write_text(summary.to_csv(scores))
    assert summary.from_csv(path) == scores
    path.write_text(path.read_text().replace("0.30000000000000004", "much"))
    with pytest.raises(UserError, match="scores.csv: damaged"):
        summary.from_csv(path)


def test_the_fingerprint_follows_the_data(world, tmp_path):
    shutil.copytree(world / "birds", tmp_path / "birds")

    def fingerprint():
        verb.open_benchmark.cache_clear()
        return verb.open_benchmark(tmp_path / "birds").fingerprint

    before = fingerprint()
    assert fingerprint() == before
    names = tmp_path / "birds" / "classes.txt"
    names.write_text(names.read_text().replace("Bird 0", "Fowl 0"))
    assert fingerprint() != before
    assert len(before) == 16 and set(before) <= set(hashlib.sha256().hexdigest() + "0123456789abcdef")


NETWORKS = configs.Metrics(
    dinov2="asset:toy-dinov2", siglip="asset:toy-siglip", patches="asset:toy-siglip", lpips="asset:toy-lpips",
    keypoints="asset:toy-keypoints", batch=4, box=32,
)  # fmt: skip
OF_NETWORKS = set(summary.FURTHER_METRICS) - {"mask_iou"}


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    """One set and the reference points, judged by the embedded networks in this process."""
    out = tmp_path_factory.mktemp("judged")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(fake_world.register(tmp_path_factory.mktemp("installed"))))
        rows = run(world, out, ["half"], networks=NETWORKS)
    return out, {(r["model"], r["metric"]): r for r in rows}


def test_networks_judge_every_set_and_reference_point(judged):
    out, rows = judged
    models = ("half", *verb.REFERENCES)
    assert set(rows) == {(m, k) for m in models for k in {*summary.METRICS, *OF_NETWORKS}}
    # The target's own picture is at no distance, and the subject's pasted in is not the target.
    for metric in ("lpips", "lpips_box"):
        assert rows["copy-target", metric]["mean"] == pytest.approx(0, abs=1e-6)
        assert rows["paste-subject", metric]["mean"] > 0.01
    for metric in ("dinov2", "siglip", "dinov2_box", "siglip_box"):
        assert rows["copy-target", metric]["mean"] == pytest.approx(1, abs=1e-6)
        assert rows["paste-subject", metric]["mean"] > rows["sibling-class", metric]["mean"]
    # Species differ in colour: real pictures tell them apart, one of a sibling is never retrieved as the true one.
    assert rows["copy-target", "retrieval_rate"]["mean"] > 0.9 and rows["sibling-class", "retrieval_rate"]["mean"] < 0.1
    # Nobody annotated these birds: what is found in the target's own picture is found again.
    assert rows["copy-target", "keypoint_distance"]["mean"] == 0 and rows["copy-target", "keypoint_rate"]["mean"] == 1
    assert rows["same-class", "keypoint_distance"]["mean"] > 0.05
    about = json.loads((out / "evaluation.json").read_text())["networks"]
    assert set(about) == {"dinov2", "siglip", "patches", "lpips", "keypoints"} and all(
        len(n["sha256"][0]) == 64 for n in about.values()
    )


def test_what_networks_said_is_kept_and_an_interrupted_run_goes_on(world, judged, tmp_path, monkeypatch):
    out, real = tmp_path / "out", perception._score_batch
    calls = []

    def score(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(perception, "_score_batch", score)
        with pytest.raises(KeyboardInterrupt):
            run(world, out, ["half"], networks=NETWORKS)
    again = []
    monkeypatch.setattr(perception, "_score_batch", lambda *a: again.append(a) or real(*a))
    run(world, out, ["half"], networks=NETWORKS)
    batches = -(-PAIRS // NETWORKS.batch)
    assert len(again) == batches * (1 + len(verb.REFERENCES)) - 3
    assert (out / "summary.json").read_bytes() == (judged[0] / "summary.json").read_bytes()
    # The same networks elsewhere change nothing, another setting of them does.
    monkeypatch.setattr(perception, "score", lambda *a: pytest.fail("judged again"))
    run(world, out, ["half"], networks=dataclasses.replace(NETWORKS, obtain="elsewhere"))
    with pytest.raises(pytest.fail.Exception, match="judged again"):
        run(world, out, ["half"], networks=dataclasses.replace(NETWORKS, box=48))


PROGRAM = """
import sys
from pathlib import Path
from nabla_jax import config as configs
from nabla_jax import evaluate as verb
from nabla_jax.config import Metrics
from nabla_jax.parallel import processes

if __name__ == "__main__":
    processes.initialize()
    world, out, networks = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
    pictures, benchmarks = {"half": world / "pictures" / "half"}, {"ellipses": world / "birds"}
    rows = verb.evaluate(pictures, benchmarks, out, workers=0, networks=networks)
    print(len(rows))
"""


def test_two_processes_give_the_table_of_one(world, judged, tmp_path):
    """Each with a folder of its own for results, as on machines that share no disk."""
    address = free_address()
    environment = fake_world.environment(fake_world.register(tmp_path / "installed"))
    settings = {processes.COORDINATOR: address, processes.COUNT: "2"}
    outs = [tmp_path / str(index) for index in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(world), str(out), repr(NETWORKS)],
            cwd=ROOT, env=environment | settings | {processes.INDEX: str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, out in enumerate(outs)
    ]  # fmt: skip
    printed = []
    for process in running:
        text, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        printed.append(text.splitlines()[-1])
    assert printed == [str(len(judged[1])), "0"]
    assert {k: v for k, v in files(outs[0]).items() if k.name != ".lock"} == {
        k: v for k, v in files(judged[0]).items() if k.name != ".lock"
    }
    # The work was shared: neither has all answers of the oracle, nor all that the networks said.
    for pattern, whole in (("cache/*/*_1in2.npz", 7), ("cache/judgements/*.npz", 24)):
        counts = [len(list(out.glob(pattern))) for out in outs]
        assert sum(counts) == whole and max(counts) < whole
    assert not (outs[1] / "summary.json").exists()


def test_annotated_keypoints_go_before_those_that_are_found(world, tmp_path):
    """The distance is to the annotation, over the longer side of the box; without a visible part there is none."""
    root = shutil.copytree(world / "birds", tmp_path / "birds")
    benchmark = verb.open_benchmark(root)
    targets = list(dict.fromkeys(pair.target_id for pair in benchmark.pairs))
    detector = nets.load_detector(
        assets.resolve("asset:toy-keypoints"), assets.resolve("asset:toy-dinov2"), NETWORKS.batch
    )
    known = {}
    for number, id in enumerate(targets):
        mask = verb._read(benchmark, id)[1]
        box = mask_box(mask)
        points = np.rint(detector([verb._read(benchmark, id)[0]], [box])[0]).astype(int)
        points[:, 2] = np.arange(11) < 5 if number else 0
        points[:, 1] += round(0.5 * max(box[2] - box[0], box[3] - box[1]))
        known[id] = points
    keypoint_file.write(root / "keypoints.json", {id: keypoint_file.to_rows(points) for id, points in known.items()})
    networks = configs.Metrics(dinov2="asset:toy-dinov2", keypoints="asset:toy-keypoints", batch=4)
    verb.evaluate({}, {"ellipses": root}, tmp_path / "out", workers=0, networks=networks)
    scores = summary.from_csv(tmp_path / "out" / "pairs" / "ellipses" / "copy-target.csv")
    for score in scores:
        if score.target_id == targets[0]:
            assert score.keypoint_distance is None and score.keypoint_rate is None
        else:
            assert score.keypoint_distance == pytest.approx(0.5, abs=0.03) and score.keypoint_rate == 0
    # The annotation is part of what scores are stored by.
    before = verb.open_benchmark(root).fingerprint
    keypoint_file.write(root / "keypoints.json", {})
    verb.open_benchmark.cache_clear()
    assert verb.open_benchmark(root).fingerprint != before


def test_a_head_needs_its_dinov2(world, tmp_path):
    with pytest.raises(UserError, match="metrics.dinov2: found nothing, expected the folder of the DINOv2 that"):
        run(world, tmp_path, ["half"], networks=configs.Metrics(keypoints="asset:toy-keypoints"))


def test_masks_of_generated_birds_give_pose_fidelity(world, tmp_path):
    shutil.copytree(world / "pictures" / "half", tmp_path / "pictures")
    benchmark = verb.open_benchmark(world / "birds")
    for pair in benchmark.pairs:
        mask = verb._read(benchmark, pair.target_id)[1]
        file = tmp_path / "pictures" / "ellipses" / "right" / "masks" / f"{pair.key}.png"
        write_image(np.uint8(255) * (mask & (np.arange(mask.shape[1]) >= mask.shape[1] // 2)), file)
    pictures = {"half": tmp_path / "pictures"}
    rows = verb.evaluate(pictures, {"ellipses": world / "birds"}, tmp_path / "out", workers=0)
    values = {r["model"]: r for r in rows if r["metric"] == "mask_iou"}
    assert set(values) == {"half"} and values["half"]["n"] == PAIRS
    assert values["half"]["mean"] == pytest.approx(0.5, abs=0.15)
