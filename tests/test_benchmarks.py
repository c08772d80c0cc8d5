"""The five benchmarks on a small world: lists, directions, quick looks, shared pictures, and true identity."""

import atexit
import collections
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nabla_jax import config as configs
from nabla_jax import evaluate, generate, runs
from nabla_jax.data import inaturalist, read_dataset
from nabla_jax.data.pairs import Pair, benchmark_pairs, duplicate_rows, shuffled_subjects, split_list, spread
from nabla_jax.images import picture_size, read_rgb, write_image
from tests import fixtures

COUNTS = {"inat-seen": 48, "inat-unseen": 44, "inat-unseen-strict": 36, "clips": 36}
"""Pairs of a world of one order, both directions: 12 seen species of two observations; 6 unseen ones of three, and 4
rows of seen ones; 6 clips of three pairs of frames."""
NAMES = ["nabla", *COUNTS]


@functools.cache
def world() -> Path:
    """Made once per process. Tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="nabla_jax_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return fixtures.write_small_world(folder / "world")


def root_of(name: str) -> Path:
    """The folder or list of a benchmark in the tests' world: that of the configuration, elsewhere."""
    root = configs.load("configs/omk_fill.py:toy").benchmarks[f"toy-{name}"]
    return world() / Path(root).relative_to("data/toybirds")


def pairs_of(name: str) -> list[Pair]:
    return benchmark_pairs(root_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_each_pair_comes_in_both_directions_once(name: str) -> None:
    pairs = pairs_of(name)
    assert len({pair.key for pair in pairs}) == len(pairs)
    directed = collections.Counter((pair.subject_id, pair.target_id) for pair in pairs)
    assert all(directed[b, a] == count for (a, b), count in directed.items())
    repeated = duplicate_rows(pairs)
    # As in the real lists, only look-alikes repeat rows: one as it was and one mirrored.
    assert repeated == (2 if name == "nabla" else 0)
    assert len(pairs) == sum(directed.values()) == len(directed) + 2 * repeated
    rows = {pair.key.removesuffix("_1in2"): pair for pair in pairs if pair.key.endswith("_1in2")}
    for pair in pairs:
        if pair.key.endswith("_2in1"):
            there = rows[pair.key.removesuffix("_2in1")]
            assert (there.target_id, there.subject_id) == (pair.subject_id, pair.target_id)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_show_what_their_list_promises(name: str) -> None:
    dataset = read_dataset(split_list(root_of(name))[0])
    pairs = pairs_of(name)
    # Of look-alikes up to two disjoint pairs of a class, and two repeated rows.
    tests = collections.Counter(example.class_id for example in dataset.of_split("test"))
    look_alikes = 2 * (sum(min(2, n // 2) for n in tests.values()) + 2)
    assert len(pairs) == (look_alikes if name == "nabla" else COUNTS[name])
    assert {dataset.by_id[id].split for pair in pairs for id in (pair.subject_id, pair.target_id)} == {"test"}
    for pair in pairs:
        subject, target = dataset.by_id[pair.subject_id], dataset.by_id[pair.target_id]
        assert subject.class_id == target.class_id == pair.class_id
        # True identity everywhere but among look-alikes.
        assert name == "nabla" or (subject.individual == target.individual and subject.individual)
        assert target.mask is not None and target.depth is not None
    others = shuffled_subjects(pairs, dataset, seed=0)
    assert all(dataset.by_id[others[p.key]].species != dataset.by_id[p.target_id].species for p in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_quick_looks_are_nested_whole_rows_of_many_classes(name: str) -> None:
    pairs = pairs_of(name)
    previous: set[str] = set()
    for limit in (2, 6, 12, 24, len(pairs)):
        chosen = spread(pairs, limit)
        keys = {pair.key for pair in chosen}
        assert len(chosen) == limit and previous <= keys
        assert collections.Counter(key.partition("_")[0] for key in keys) == {k.partition("_")[0]: 2 for k in keys}
        assert len({pair.class_id for pair in chosen}) == min(limit // 2, len({pair.class_id for pair in pairs}))
        previous = keys


def test_the_strict_list_leaves_out_the_rows_of_seen_species_alone() -> None:
    whole, strict = pairs_of("inat-unseen"), pairs_of("inat-unseen-strict")
    assert {(p.subject_id, p.target_id) for p in strict} < {(p.subject_id, p.target_id) for p in whole}
    seen = inaturalist.rows(root_of("inat-seen"))
    named = {e.species for e in read_dataset(root_of("nabla")).examples}
    folder, path = split_list(root_of("inat-unseen-strict"))
    assert inaturalist.contaminated(inaturalist.rows(folder, path), seen, named) == []
    found = inaturalist.contaminated(inaturalist.rows(folder), seen, named)
    left_out = {p.subject_id for p in whole} - {p.subject_id for p in strict}
    assert {row.id(column) for row in found for column in ("image_1", "image_2")} == left_out and len(found) == 4


# ----------------------------------------------------------------------------------------------------------
# A part of a list shares the pictures of the whole
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(folder, benchmarks): observations and a list of them without the first three rows, so that keys differ."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(root_of("inat-unseen"), folder / "unseen")
    lines = (folder / "unseen" / "final_pairs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "unseen" / "part.csv").write_text("".join([lines[0], *lines[4:]]), encoding="utf-8")
    # The part is named first: the whole is made before it all the same.
    return folder, {"a-part": str(folder / "unseen" / "part.csv"), "whole": str(folder / "unseen")}


SETTINGS = {"seed": 0, "adapter": "none", "adapter_sha256": None}


def make(out: Path, benchmarks: dict[str, str], names: Sequence[str], limit: int, **changed: Any) -> Path:
    """What ``generate`` does, with a model that answers in one colour."""
    config = configs.from_dict(fixtures.values(out) | {"benchmarks": benchmarks})
    for work in generate.read_works(config, names, generate.KINDS, out, limit):

        def paint(pairs: Sequence[Pair], work: generate.Work = work) -> list[generate.Made]:
            sizes = [picture_size(work.dataset.by_id[pair.target_id].image) for pair in pairs]
            return [(np.full((*size, 3), 90, np.uint8), {}) for size in sizes]

        generate.make(work, SETTINGS | changed, 4, paint)
    return out


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["pair"]: row for row in runs.read_rows(folder / "manifest.jsonl")}


def test_a_part_shares_the_pictures_of_the_whole(shared: tuple[Path, dict[str, str]]) -> None:
    folder, benchmarks = shared
    out = make(folder / "pictures", benchmarks, list(benchmarks), 10)
    part = spread(benchmark_pairs(benchmarks["a-part"]), 10)
    for kind in ("right", "shuffled"):
        whole, own = manifest(out / "whole" / kind), manifest(out / "a-part" / kind)
        made = {(row["subject_id"], row["target_id"]): row for row in whole.values()}
        assert len(whole) == len(own) == 10 and set(own) == {pair.key for pair in part}
        both = [pair for pair in part if (pair.subject_id, pair.target_id) in made]
        assert 0 < len(both) < 10  # a quick look at the part is not a part of that at the whole
        for pair in part:
            row, theirs = own[pair.key], made.get((pair.subject_id, pair.target_id))
            picture = out / "a-part" / kind / row["file"]
            assert (row["subject_id"], row["target_id"]) == (pair.subject_id, pair.target_id)
            if theirs is None:
                assert picture.parent == out / "a-part" / kind and picture.is_file()
            else:
                assert picture.samefile(out / "whole" / kind / theirs["file"]) and theirs["pair"] != pair.key
                assert row["subject_used"] == theirs["subject_used"]
        assert len(list((out / "a-part" / kind).glob("*.png"))) == 10 - len(both)

    # The same command changes nothing; without the whole's pictures the part's are made, and the rest stays.
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    make(out, benchmarks, list(benchmarks), 10)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    alone = make(folder / "alone", benchmarks, ["a-part"], 2)
    assert sorted(path.name for path in (alone / "a-part" / "right").glob("*.png")) == sorted(
        f"{pair.key}.png" for pair in spread(part, 2)
    )

    # Both are scored from one file, beside which a mask is found by that file's name.
    pair = next(p for p in part if manifest(out / "a-part" / "right")[p.key]["file"].startswith(".."))
    picture = (out / "a-part" / "right" / manifest(out / "a-part" / "right")[pair.key]["file"]).resolve()
    write_image(np.full(read_rgb(picture).shape[:2], 255, np.uint8), picture.parent / "masks" / picture.name)
    roots = {name: Path(root) for name, root in benchmarks.items()}
    evaluate.evaluate({"random": out}, roots, folder / "scores", workers=0, limit=10)
    tables = {name: evaluate.summary.from_csv(folder / "scores" / "pairs" / name / "random.csv") for name in roots}
    assert [len(table) for table in tables.values()] == [10, 10]
    by_pictures = {(s.subject_id, s.target_id): s for s in tables["whole"]}
    scored = {s.pair: s for s in tables["a-part"]}
    theirs = by_pictures[pair.subject_id, pair.target_id]
    assert scored[pair.key].rmse == theirs.rmse and scored[pair.key].mask_iou == theirs.mask_iou is not None
    about = runs.read_json(folder / "scores" / "evaluation.json")["benchmarks"]
    assert {b["name"]: (b["root"], b["list"]) for b in about} == {
        "a-part": (str(folder / "unseen"), "part.csv"),
        "whole": (str(folder / "unseen"), None),
    }


def test_pictures_of_other_settings_are_not_shared(shared: tuple[Path, dict[str, str]]) -> None:
    folder, benchmarks = shared
    out = make(folder / "other", benchmarks, ["whole"], 44, seed=1)
    make(out, benchmarks, ["a-part"], 38)
    assert all("/" not in row["file"] for row in manifest(out / "a-part" / "right").values())
    out = make(folder / "same", benchmarks, ["whole"], 44)
    make(out, benchmarks, ["a-part"], 38)
    assert all("/" in row["file"] for row in manifest(out / "a-part" / "right").values())


# ----------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------


def test_where_identity_is_true_the_target_itself_is_the_right_answer(tmp_path: Path) -> None:
    names = ("inat-unseen-strict", "clips", "nabla")
    rows = evaluate.evaluate({}, {name: root_of(name) for name in names}, tmp_path, workers=0, limit=8)
    mean = {(r["benchmark"], r["model"], r["metric"]): r["mean"] for r in rows}
    for name in names:
        assert mean[name, "copy-target", "identification_rate"] == 1
        assert mean[name, "paste-subject", "subject_effect"] > 0 == mean[name, "copy-target", "subject_effect"]
    # What is left is JPEG's loss; a look-alike differs by more.
    for name in ("inat-unseen-strict", "clips"):
        assert mean[name, "copy-target", "normalised_identity"] > 0.9
        assert mean[name, "copy-target", "normalised_identity"] > mean["nabla", "copy-target", "normalised_identity"]
    scores = {name: evaluate.summary.from_csv(tmp_path / "pairs" / name / "copy-target.csv") for name in names}
    assert all(s.right_error is not None and s.lineup == 10 for table in scores.values() for s in table)
    # Frames of one individual are one cluster; its species is not an order.
    assert len({s.cluster for s in scores["clips"]}) == 4 and {s.order for s in scores["clips"]} == {""}
    assert not any(s.cluster for s in scores["nabla"])
