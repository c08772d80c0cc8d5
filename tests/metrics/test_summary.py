"""From scores to tables: clusters, groups, differences, corrections, regressions."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import scipy.stats

from nabla_jax import evaluate
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.metrics import summary
from nabla_jax.metrics.summary import PairScore


def scores(model: float = 0.0, classes: int = 12, seed: int = 0, individuals: bool = False) -> list[PairScore]:
    """Both directions of three rows per class; `model` is added to every error, all else is the pair's alone."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(3 * classes):
        for direction in ("1in2", "2in1"):
            class_id = row % classes
            base = 20 + 5 * np.sin(class_id) + rng.normal()
            found.append(
                PairScore(
                    pair=f"{row}_{direction}",
                    subject_id="a",
                    target_id="b",
                    class_id=class_id,
                    order=f"Order {class_id % 2}",
                    species=f"Bird {class_id // 2}",
                    qualifier="Male" if class_id % 2 else "",
                    pixels=100,
                    rmse=base + model,
                    ssim=0.5,
                    right_error=base + model,
                    shuffled_error=base + 4,
                    sibling_error=base + 10 * rng.random(),
                    sibling_plumage_error=None if class_id % 3 else base + 3,
                    rank=1 + (rng.random() < 0.3),
                    lineup=10,
                    family=f"Family {class_id % 4}",
                    cluster=f"individual {row}" if individuals else "",
                    area=0.03 * (1 + row % 4),
                )
            )
    return found


def by(rows, *fields):
    return {tuple(row[f] for f in fields): row for row in rows}


def test_pairs_of_one_individual_are_one_cluster_others_those_of_a_class():
    of_class, of_individual = (summary.rows("m", "b", scores(individuals=i)) for i in (False, True))
    assert {r["clusters"] for r in of_class} == {12} and {r["clusters"] for r in of_individual} == {36}
    assert [r["mean"] for r in of_class] == [r["mean"] for r in of_individual]
    assert {r["n"] for r in of_class} == {72}
    # Errors differ by class: drawing classes knows less than drawing individuals would say.
    wide, narrow = (by(rows, "metric")["rmse",] for rows in (of_class, of_individual))
    assert wide["high"] - wide["low"] > 1.3 * (narrow["high"] - narrow["low"])


def test_means_are_those_of_the_pairs():
    pairs = scores()
    rows = by(summary.rows("m", "b", pairs), "metric")
    assert rows["rmse",]["mean"] == pytest.approx(np.mean([s.rmse for s in pairs]), abs=1e-6)
    right, sibling = ([getattr(s, name) for s in pairs] for name in ("right_error", "sibling_error"))
    assert rows["normalised_identity",]["mean"] == pytest.approx(1 - np.sum(right) / np.sum(sibling), abs=1e-6)
    assert (
        rows["ssim",] | {"low": 0.5, "mean": 0.5, "high": 0.5, "reason": "all clusters agree exactly"} == rows["ssim",]
    )


def test_excluded_pairs_and_missing_numbers_do_not_count():
    pairs = scores()
    pairs[0] = dataclasses.replace(pairs[0], excluded="the mask of a is empty")
    pairs[1] = dataclasses.replace(pairs[1], rmse=None)
    rows = by(summary.rows("m", "b", pairs), "metric")
    assert (rows["rmse",]["n"], rows["ssim",]["n"]) == (70, 71)
    assert summary.rows("m", "b", [dataclasses.replace(s, excluded="no") for s in pairs]) == []


def test_an_interval_stays_where_the_metric_can_be():
    pairs = [dataclasses.replace(s, rank=1 if s.class_id else 2, rmse=0.001 * (s.class_id == 3)) for s in scores()]
    rows = by(summary.rows("m", "b", pairs), "metric")
    assert rows["identification_rate",]["high"] == 1 and rows["identification_rate",]["mean"] == pytest.approx(11 / 12)
    assert rows["rmse",]["low"] == 0 < rows["rmse",]["mean"]


def test_breakdowns_count_pairs_and_clusters():
    pairs = scores()
    rows = by(summary.breakdown("m", "b", pairs), "group", "value", "metric")
    assert {g for g, _, _ in rows} == {"all", "qualifier", "order", "family", "species", "area", "direction"}
    for group, value, chosen in [
        ("order", "Order 1", [s for s in pairs if s.order == "Order 1"]),
        ("family", "Family 2", [s for s in pairs if s.family == "Family 2"]),
        ("species", "Bird 5", [s for s in pairs if s.species == "Bird 5"]),
        ("qualifier", "", [s for s in pairs if not s.qualifier]),
        ("direction", "2in1", [s for s in pairs if s.pair.endswith("_2in1")]),
        ("area", "2 to 5 %", [s for s in pairs if s.area == 0.03]),
        ("area", "10 to 20 %", [s for s in pairs if s.area == 0.12]),
    ]:
        row = rows[group, value, "rmse"]
        assert (row["n"], row["clusters"]) == (len(chosen), len({s.class_id for s in chosen}))
        assert row["mean"] == pytest.approx(np.mean([s.rmse for s in chosen]), abs=1e-6)
    areas = list(dict.fromkeys(value for group, value, _ in rows if group == "area"))
    assert areas == ["2 to 5 %", "5 to 10 %", "10 to 20 %"]  # from small to large; 0.06 and 0.09 share a bin
    far = [dataclasses.replace(s, distance=2 if s.class_id < 3 else 10) for s in pairs]
    found = by(summary.breakdown("m", "b", far), "group", "value", "metric")
    assert [v for g, v, m in found if g == "distance" and m == "rmse"] == ["2", "10"]
    assert found["distance", "2", "rmse"]["clusters"] == 3


@pytest.mark.parametrize(
    ("area", "name"), [(0.0, "under 2 %"), (0.02, "2 to 5 %"), (0.4, "40 % or more"), (1.0, "40 % or more")]
)
def test_area_bins_hold_their_lower_edge(area, name):
    pairs = [dataclasses.replace(s, area=area if s.class_id else 0.3) for s in scores()]
    assert {r["value"] for r in summary.breakdown("m", "b", pairs) if r["group"] == "area"} == {name, "20 to 40 %"}


def test_a_group_of_one_class_has_no_interval_and_says_why():
    pairs = [dataclasses.replace(s, species="Rare" if s.class_id == 4 else "Common") for s in scores()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = by(summary.breakdown("m", "b", pairs), "group", "value", "metric")
    row = rows["species", "Rare", "rmse"]
    assert (row["low"], row["high"], row["clusters"], row["n"]) == (None, None, 1, 6)
    assert row["reason"] == "one cluster: its spread is unknown"
    assert summary.format_cell(row) == f"{row['mean']:.1f}"
    json.dumps(list(rows.values()), allow_nan=False)


def test_differences_are_paired_tested_and_corrected():
    mine, theirs = scores(model=-0.5), scores()
    rows = by(summary.correct(summary.compare("m", "untuned", "b", mine, theirs)), "metric")
    assert {m for (m,) in rows} == set(summary.METRICS)
    rmse = rows["rmse",]
    assert rmse["mean"] == -0.5 and rmse["relative"] == pytest.approx(
        -0.5 / np.mean([s.rmse for s in theirs]), abs=1e-6
    )
    # Twelve classes that agree: of 2^12 flips only none and all are as far.
    assert rmse["p"] == round(2 / 2**12, 6) and rmse["clusters"] == 12
    assert (rows["ssim",]["mean"], rows["ssim",]["p"], rows["ssim",]["reason"]) == (0, 1, "all clusters agree exactly")
    identity = rows["normalised_identity",]
    own, other = (by(summary.rows("m", "b", s), "metric")["normalised_identity",]["mean"] for s in (mine, theirs))
    assert identity["mean"] == pytest.approx(own - other, abs=2e-6) and identity["relative"] is None
    p = [rows[m,]["p"] for m in summary.METRICS]
    adjusted = [rows[m,]["p_holm"] for m in summary.METRICS]
    # Three of five tests at the smallest p: five times it, for all three.
    assert sorted(p)[:3] == [rmse["p"]] * 3 and sorted(adjusted)[:3] == pytest.approx([5 * rmse["p"]] * 3, abs=1e-6)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    assert summary.correct([]) == []


def test_only_pairs_that_both_have_are_compared():
    mine, theirs = scores(model=1.0)[10:], scores()[:-4]
    rows = by(summary.compare("m", "untuned", "b", mine, theirs), "metric")
    assert rows["rmse",]["n"] == 72 - 14 and rows["rmse",]["mean"] == 1
    other = [dataclasses.replace(s, sibling_error=s.sibling_error + 1) for s in theirs]
    with pytest.raises(UserError, match="b: normalised_identity of m and untuned has different denominators"):
        summary.compare("m", "untuned", "b", mine, other)


def test_benchmarks_predict_each_other():
    models = {f"m{i}": float(i) for i in range(5)}
    table = {("seen", m): scores(model=v, seed=1) for m, v in models.items()}
    table |= {("unseen", m): scores(model=2 * v, seed=2, individuals=True) for m, v in models.items()}
    rows = by(summary.regressions(table, list(models)), "x", "y", "metric")
    assert {(x, y) for x, y, _ in rows} == {("seen", "unseen")}
    row = rows["seen", "unseen", "rmse"]
    means = [[np.mean([s.rmse for s in table[b, m]]) for m in models] for b in ("seen", "unseen")]
    line = scipy.stats.linregress(*means)
    assert row["slope"]["mean"] == pytest.approx(line.slope, abs=1e-6) == pytest.approx(2)
    assert row["r2"]["mean"] == pytest.approx(1) and row["models"] == list(models)
    same = rows["seen", "unseen", "ssim"]
    assert same["r2"] is None and same["reason"] == "all models score alike"
    few = summary.regressions(table, ["m0", "m1"])
    assert {r["reason"] for r in few} == {"2 models: a line needs at least 3"}
    assert summary.regressions({k: v for k, v in table.items() if k[0] == "seen"}, list(models)) == []
    json.dumps([*rows.values(), *few], allow_nan=False)


def test_tables_depend_on_the_seed_alone():
    pairs = scores(classes=60)
    first = summary.rows("m", "b", pairs)
    assert {r["method"] for r in first} == {"bootstrap-t", ""}
    assert summary.rows("m", "b", pairs[::-1]) == first != summary.rows("m", "b", pairs, seed=1)


def test_csv_keeps_every_field(tmp_path):
    pairs = [*scores(individuals=True), dataclasses.replace(scores()[0], area=None, distance=3)]
    path = tmp_path / "scores.csv"
    path.write_text(summary.to_csv(pairs))
    assert summary.from_csv(path) == pairs


def example(path, individual=None):
    return Example("a", "a.jpg", 1, path[-1], path, individual=individual)


def test_family_and_individual_of_a_pair():
    path = ("Birds", "Perching Birds", "Sparrows", "Dark-eyed Junco", "Dark-eyed Junco (Oregon)")
    assert evaluate.family_of(example(path)) == "Sparrows"
    assert evaluate.family_of(example((*path[:2], "Dark-eyed Junco", "Dark-eyed Junco (Oregon)"))) == ""
    assert evaluate.family_of(example(("Birds", "Dark-eyed Junco"))) == ""
    assert evaluate.individual_of(example(path, "7"), example(path, "7")) == "individual 7"
    for one, other in [("7", "8"), (None, None), ("7", None)]:
        assert evaluate.individual_of(example(path, one), example(path, other)) == ""
