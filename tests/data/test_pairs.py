import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from nabla_jax.data import Dataset, pairs, read_dataset
from nabla_jax.errors import UserError
from tests.data.folders import file_of, id_of, write_inat, write_nabirds

CLASSES = {3: (0, 5, 9), 4: (1, 2), 8: (3,), 11: (4, 6, 7, 8, 10, 11)}


@pytest.fixture
def nabirds(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


# --------------------------------------------------------------------------------- benchmarks


def test_each_row_gives_both_directions_once(nabirds: Path) -> None:
    found = pairs.benchmark_pairs(nabirds)
    assert [p.key for p in found] == [f"{row}_{d}" for row in range(5) for d in ("1in2", "2in1")]
    assert (found[0].subject_id, found[0].target_id) == (id_of(817, 0), id_of(817, 1))
    assert (found[1].subject_id, found[1].target_id) == (id_of(817, 1), id_of(817, 0))
    assert {p.class_id for p in found[:2]} == {817}


def test_repeated_rows_are_kept_and_counted(nabirds: Path) -> None:
    found = pairs.benchmark_pairs(nabirds)
    assert pairs.duplicate_rows(found) == 2
    assert pairs.duplicate_rows(found[:6]) == 0
    same = [p for p in found if (p.subject_id, p.target_id) == (id_of(295, 2), id_of(295, 3))]
    assert [p.key for p in same] == ["1_1in2", "3_1in2", "4_2in1"]


def test_a_quick_look_is_fixed_nested_and_spread_over_the_classes() -> None:
    made = [
        pairs.Pair(f"{row}_{way}", f"{row}{a}", f"{row}{b}", row // 6)  # six rows of each of ten classes
        for row in range(60)
        for way, a, b in (("1in2", "x", "y"), ("2in1", "y", "x"))
    ]
    chosen = {limit: pairs.spread(made, limit) for limit in range(1, 121)}
    for limit, found in chosen.items():
        assert len(found) == limit and found == sorted(found, key=made.index)
        rows = Counter(pair.key.split("_")[0] for pair in found)
        assert sum(count == 1 for count in rows.values()) == limit % 2
        per_class = Counter(pair.class_id for pair in found)
        assert len(per_class) == min(10, (limit + 1) // 2) and max(per_class.values()) - 2 <= min(per_class.values())
        assert set(found) >= set(chosen.get(limit - 1, []))
    assert pairs.spread(made, None) == made == pairs.spread(made, 999)
    # Not the first rows of each class: those are often alike.
    assert len({int(p.key.split("_")[0]) % 6 for p in chosen[20]}) > 3


def test_a_list_in_a_folder_is_a_benchmark_of_its_own(nabirds: Path, tmp_path: Path) -> None:
    whole = pairs.benchmark_pairs(nabirds)
    lines = (nabirds / "pairs.csv").read_text().splitlines(keepends=True)
    part = nabirds / "part.csv"
    part.write_text("".join([lines[0], *lines[3:5]]))
    found = pairs.benchmark_pairs(part)
    assert [(p.subject_id, p.target_id) for p in found] == [(p.subject_id, p.target_id) for p in whole[4:8]]
    inat = write_inat(tmp_path / "inat")
    rows = pairs.benchmark_pairs(inat)
    assert len(rows) > 2
    name = "final_pairs.csv" if (inat / "final_pairs.csv").is_file() else "pairs.csv"
    strict = inat / "strict_unseen.csv"
    strict.write_text("".join((inat / name).read_text().splitlines(keepends=True)[:2]))
    assert pairs.benchmark_pairs(strict) == rows[:2]
    assert len(read_dataset(inat).examples) > 2  # the other list is no part of the data


def test_inat_pairs(tmp_path: Path) -> None:
    root = write_inat(tmp_path / "inat")
    found = pairs.benchmark_pairs(root, read_dataset(root))
    assert [(p.key, p.subject_id, p.target_id) for p in found[2:4]] == [
        ("1_1in2", "222_photo_1", "222_photo_2"),
        ("1_2in1", "222_photo_2", "222_photo_1"),
    ]
    assert len(found) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".JPG", ".jpg", r"pairs.csv:2: image_1: .* is not in images.txt"),
        ("0817", "0816", r"pairs.csv:2: class_id 0816, but image_1 is of class 817"),
        ("class_id,", "class,", r"pairs.csv:1: missing column class_id"),
        (f"./images/{file_of(817, 1)}", f"./images/{file_of(817, 0)}", r"pairs.csv:2: .* are one picture"),
        ("0295,", "0295,x,", r"pairs.csv:3: found 4 fields"),
    ],
)
def test_a_bad_row_is_named(nabirds: Path, old: str, new: str, message: str) -> None:
    path = nabirds / "pairs.csv"
    rows = path.read_text().split("\n")
    rows = (
        [row.replace(old, new, 1) for row in rows] if old != "0817" else [r.replace("0817,", "0816,", 1) for r in rows]
    )
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        pairs.benchmark_pairs(nabirds)


def test_shuffled_subjects_are_of_another_species(nabirds: Path) -> None:
    dataset = read_dataset(nabirds)
    found = pairs.benchmark_pairs(nabirds, dataset)
    chosen = pairs.shuffled_subjects(found, dataset, 42)
    assert set(chosen) == {p.key for p in found}
    for pair in found:
        other = dataset.by_id[chosen[pair.key]]
        # The sexes of one species are two classes; the other sex is no other bird.
        assert other.species != dataset.by_id[pair.subject_id].species
        assert other.split == dataset.by_id[pair.subject_id].split
    part = pairs.shuffled_subjects(found[3:4], dataset, 42)
    assert part == {found[3].key: chosen[found[3].key]}
    assert pairs.shuffled_subjects(found, dataset, 43) != chosen


def test_one_species_cannot_be_shuffled(nabirds: Path) -> None:
    dataset = read_dataset(nabirds)
    teals = Dataset("teals", nabirds, tuple(e for e in dataset.examples if e.species == "Blue-winged Teal"))
    with pytest.raises(UserError, match="species other than Blue-winged Teal"):
        pairs.shuffled_subjects([pairs.Pair("0_1in2", id_of(295, 2), id_of(295, 3), 295)], teals, 0)


# ----------------------------------------------------------------------------------- samplers


def expected(name: str) -> dict[tuple[int, int], float]:
    """Probability of each (subject, target) by enumeration."""
    ordered = {c: list(itertools.permutations(members, 2)) for c, members in CLASSES.items()}
    total = sum(len(p) for p in ordered.values())
    usable = [c for c in CLASSES if len(CLASSES[c]) > 1]
    images = sum(len(CLASSES[c]) for c in usable)
    weight = {
        "all_pairs": lambda c: 1 / total,
        "class_uniform": lambda c: 1 / len(usable) / len(ordered[c]),
        "image_uniform": lambda c: 1 / images / (len(CLASSES[c]) - 1),
    }[name]
    return {pair: weight(c) for c in usable for pair in ordered[c]}


@pytest.mark.parametrize("name", list(pairs.SAMPLERS))
def test_distribution_is_the_closed_form(name: str) -> None:
    probabilities = expected(name)
    assert sum(probabilities.values()) == pytest.approx(1)
    draw = pairs.sampler(name, CLASSES)
    n = 8_000
    counts = Counter((d.subject, d.target) for d in (draw(7, i) for i in range(n)))
    assert set(counts) == set(probabilities)
    result = chisquare([counts[p] for p in probabilities], [n * q for q in probabilities.values()])
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("name", list(pairs.SAMPLERS))
def test_a_sample_depends_on_seed_and_number_alone(name: str) -> None:
    forward = [pairs.sampler(name, CLASSES)(3, i) for i in range(50)]
    shuffled = {i: pairs.sampler(name, dict(reversed(CLASSES.items())))(3, i) for i in reversed(range(50))}
    assert forward == [shuffled[i] for i in range(50)]
    assert forward != [pairs.sampler(name, CLASSES)(4, i) for i in range(50)]


def test_draws_of_a_stream_are_independent() -> None:
    draw = pairs.sampler("all_pairs", {0: range(3)})
    ranks = {pair: i for i, pair in enumerate(itertools.permutations(range(3), 2))}
    numbers = [ranks[(d.subject, d.target)] for d in (draw(0, i) for i in range(6_000))]
    table = np.zeros((6, 6))
    np.add.at(table, (numbers[:-1], numbers[1:]), 1)
    assert chisquare(table.ravel()).pvalue > 1e-3


def test_the_real_number_of_pairs_needs_no_list() -> None:
    sizes = [60] * 300 + [13] * 255
    ends = np.cumsum(sizes)
    draw = pairs.sampler("all_pairs", {c: range(e - s, e) for c, (s, e) in enumerate(zip(sizes, ends, strict=True))})
    classes = [int(np.searchsorted(ends, draw(1, i).target, side="right")) for i in range(1500)]
    large = 300 * 60 * 59 / (300 * 60 * 59 + 255 * 13 * 12)
    assert np.mean(np.array(classes) < 300) == pytest.approx(large, abs=0.015)


def test_samplers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match="found 1 classes, none with two pictures"):
        pairs.sampler("all_pairs", {0: (3,)})
    with pytest.raises(UserError, match=r"train.sampler: found 'best', expected one of all_pairs"):
        pairs.sampler("best", CLASSES)
