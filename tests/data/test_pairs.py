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
# 3 and 4 are plumages of one species, 8 another species of their family, 11 of another family of their order.
TAXONOMY = {
    3: ("Birds", "Ducks", "Dabbling", "Teal", "Teal (Male)"),
    4: ("Birds", "Ducks", "Dabbling", "Teal", "Teal (Female)"),
    8: ("Birds", "Ducks", "Dabbling", "Mallard"),
    11: ("Birds", "Ducks", "Diving", "Scaup"),
}
FEATURES = np.random.default_rng(5).normal(size=(12, 8))
FLOOR = 0.1
MIX = "0 self=1 class=2 species=1 family=3 order=2"
OPTIONS = pairs.Options(taxonomy=TAXONOMY, levels=(MIX,), features=lambda: FEATURES, similarity=FLOOR)


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
        (".JPG", ".jpg", r"pairs.csv:2: image_1: .* is not in the lists"),
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


def image_uniform(groups: list[tuple[int, ...]]) -> Counter[tuple[int, int]]:
    """Target uniform over pictures with a partner, subject uniform over the rest of its group, by enumeration."""
    usable = [g for g in groups if len(g) > 1]
    images = sum(map(len, usable))
    return Counter({p: 1 / images / (len(g) - 1) for g in usable for p in itertools.permutations(g, 2)})


def alike() -> dict[int, list[int]]:
    """Target -> its look-alikes, by plain cosines."""
    unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert np.abs(cosines - FLOOR).min() > 1e-3  # no pair hangs on a rounding
    members = {i: c for c in CLASSES.values() for i in c}
    found = {t: [s for s in members[t] if s != t and cosines[s, t] >= FLOOR] for t in members}
    return {t: subjects for t, subjects in found.items() if subjects}


def expected(name: str) -> dict[tuple[int, int], float]:
    """Probability of each (subject, target) by enumeration."""
    if name == "level":
        groups = {
            "self": [],
            "class": list(CLASSES.values()),
            "species": [CLASSES[3] + CLASSES[4], CLASSES[8], CLASSES[11]],
            "family": [CLASSES[3] + CLASSES[4] + CLASSES[8], CLASSES[11]],
            "order": [sum(CLASSES.values(), ())],
        }
        weights = {"self": 1, "class": 2, "species": 1, "family": 3, "order": 2}
        mixed = Counter({(i, i): weights["self"] / 12 for i in range(12)})
        for level, parts in groups.items():
            for pair, p in image_uniform(parts).items() if parts else ():
                mixed[pair] += weights[level] * p
        return {pair: p / 9 for pair, p in mixed.items()}
    if name == "mined":
        partners = alike()
        return {(s, t): 1 / len(partners) / len(found) for t, found in partners.items() for s in found}
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
    draw = pairs.sampler(name, CLASSES, OPTIONS)
    n = 8_000
    counts = Counter((d.subject, d.target) for d in (draw(7, i) for i in range(n)))
    assert set(counts) == set(probabilities)
    result = chisquare([counts[p] for p in probabilities], [n * q for q in probabilities.values()])
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("name", list(pairs.SAMPLERS))
def test_a_sample_depends_on_seed_and_number_alone(name: str) -> None:
    forward = [pairs.sampler(name, CLASSES, OPTIONS)(3, i) for i in range(50)]
    backward = pairs.sampler(name, dict(reversed(CLASSES.items())), OPTIONS)
    shuffled = {i: backward(3, i) for i in reversed(range(50))}
    assert forward == [shuffled[i] for i in range(50)]
    assert forward != [pairs.sampler(name, CLASSES, OPTIONS)(4, i) for i in range(50)]


def test_streams_of_earlier_versions_are_unchanged() -> None:
    """Runs that are continued, and published numbers, hang on them."""
    streams = {
        "all_pairs": [(11, 4), (11, 4), (8, 11), (0, 9), (1, 2), (8, 7), (7, 8), (6, 4)],
        "class_uniform": [(8, 7), (6, 7), (11, 8), (5, 0), (5, 0), (1, 2), (2, 1), (2, 1)],
        "image_uniform": [(7, 10), (6, 10), (11, 8), (5, 0), (0, 5), (6, 7), (11, 4), (2, 1)],
    }
    for name, known in streams.items():
        draw = pairs.sampler(name, CLASSES)
        assert [(d.subject, d.target) for d in (draw(42, i) for i in range(8))] == known


def finest(subject: int, target: int) -> str:
    """The finest level that two pictures share."""
    own, other = (next(c for c in CLASSES if i in CLASSES[c]) for i in (subject, target))
    if subject == target:
        return "self"
    if own == other:
        return "class"
    if {own, other} == {3, 4}:
        return "species"
    return "order" if 11 in (own, other) else "family"


@pytest.mark.parametrize("name", list(pairs.SAMPLERS))
def test_a_draw_says_what_its_pictures_share(name: str) -> None:
    draw = pairs.sampler(name, CLASSES, OPTIONS)
    draws = [draw(1, i) for i in range(400)]
    assert [d.level for d in draws] == [finest(d.subject, d.target) for d in draws]
    assert {d.level for d in draws} == (set(pairs.LEVELS) if name == "level" else {"class"})


def test_the_schedule_of_levels_goes_by_steps() -> None:
    options = pairs.Options(taxonomy=TAXONOMY, levels=("0 self", "10 species", "30 class"), batch=4)
    draw = pairs.sampler("level", CLASSES, options)
    levels = [draw(0, n).level for n in range(200)]
    assert set(levels[:40]) == {"self"}
    assert set(levels[40:120]) == {"class", "species"}
    assert set(levels[120:]) == {"class"}


def test_classes_at_uneven_depths_have_the_levels_they_have() -> None:
    shallow = dict(TAXONOMY) | {11: ("Birds", "Scaup")}
    ok = pairs.sampler("level", CLASSES, pairs.Options(taxonomy=shallow, levels=("0 species",)))
    assert {ok(0, i).level for i in range(100)} == {"class", "species"}
    with pytest.raises(UserError, match=r"data.levels: family: class 11 has none \(found Birds > Scaup\)"):
        pairs.sampler("level", CLASSES, pairs.Options(taxonomy=shallow, levels=("0 family",)))


@pytest.mark.parametrize(
    "levels",
    [(), ("class",), ("5 class",), ("0 class", "0 self"), ("0 genus",), ("0 class=-1",), ("0 class=x",), ("0",),
     ("0 class=0",), ("0 class class",), ("",)],
)  # fmt: skip
def test_malformed_schedules_are_refused(levels: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="data.levels: "):
        pairs.sampler("level", CLASSES, pairs.Options(taxonomy=TAXONOMY, levels=levels))


def test_look_alikes_need_features_and_a_floor_they_reach() -> None:
    with pytest.raises(UserError, match="train.sampler: mined needs features"):
        pairs.sampler("mined", CLASSES)
    with pytest.raises(UserError, match=r"data.similarity: found no two pictures"):
        pairs.sampler("mined", CLASSES, pairs.Options(features=lambda: FEATURES, similarity=0.999))
    with pytest.raises(UserError, match="features: found a picture whose features are zero"):
        pairs.sampler("mined", CLASSES, pairs.Options(features=lambda: FEATURES * 0))


def test_similarities_are_exact_in_any_order_of_summation() -> None:
    """So that the pictures with a look-alike, found in blocks, are those that a draw finds it for."""
    rng = np.random.default_rng(0)
    grid = pairs.unit_grid(rng.normal(size=(64, 768)) + 3 * rng.normal(size=768)).astype(np.float32)
    exact = grid.astype(np.float64) @ grid.astype(np.float64).T
    order = rng.permutation(768)
    np.testing.assert_array_equal(grid @ grid.T, exact)
    np.testing.assert_array_equal(grid[:, order] @ grid[:, order].T, exact)
    np.testing.assert_array_equal(np.cumsum(grid[0] * grid[1], dtype=np.float32)[-1], exact[0, 1])
    np.testing.assert_allclose(np.diag(exact), 1, atol=2e-3)


def test_a_large_class_is_mined_without_a_square_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    count = 6000
    features = np.random.default_rng(1).normal(size=(count, 16)).astype(np.float32)
    options = pairs.Options(features=lambda: features, similarity=0.9)
    tracemalloc.start()
    draw = pairs.sampler("mined", {0: range(count)}, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * count * 4 / 4  # a square of float32 would be 144 MB
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert all(unit[d.subject] @ unit[d.target] > 0.899 for d in (draw(0, i) for i in range(50)))


def test_the_paper_s_number_of_pairs_is_counted_without_them() -> None:
    assert pairs.count_pairs(CLASSES) == 6 + 2 + 30
    assert pairs.count_pairs({c: range(1000) for c in range(1000)}) == 1000 * 1000 * 999


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


def test_few_pictures_of_a_class_are_nested_fixed_and_independent_of_the_others() -> None:
    ids = [f"bird-{i}" for i in range(12)]
    chosen = {count: pairs.few(CLASSES, ids, count) for count in range(1, 8)}
    for count, found in chosen.items():
        assert {c: len(members) for c, members in found.items()} == {c: min(count, len(m)) for c, m in CLASSES.items()}
        assert all(set(members) <= set(CLASSES[c]) and list(members) == sorted(members) for c, members in found.items())
        assert count == 1 or all(set(chosen[count - 1][c]) <= set(members) for c, members in found.items())
    # Another order, other classes beside it and other positions choose the same pictures.
    order = np.random.default_rng(0).permutation(12)
    again = pairs.few({11: tuple(int(np.flatnonzero(order == i)[0]) for i in CLASSES[11])}, [ids[i] for i in order], 3)
    assert {int(order[position]) for position in again[11]} == set(chosen[3][11])
    assert len({pairs.few({0: range(12)}, [f"{k} {i}" for i in range(12)], 1)[0] for k in range(40)}) > 8


def test_samplers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match="found 1 classes, none with two pictures"):
        pairs.sampler("all_pairs", {0: (3,)})
    with pytest.raises(UserError, match=r"train.sampler: found 'best', expected one of all_pairs"):
        pairs.sampler("best", CLASSES)
