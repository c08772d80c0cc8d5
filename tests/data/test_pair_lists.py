"""The account of pair lists, on generated ones with the published lists' counts of each trap."""

from pathlib import Path

import pytest

from nabla_jax.data import inaturalist, pair_lists
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from nabla_jax.prepare import main
from tests.data.pair_files import DATES, write_classes, write_seen, write_unseen


def report(paths: list[Path]) -> tuple[list[pair_lists.Report], Problems]:
    problems = Problems()
    return pair_lists.report_all(paths, problems), problems


def test_every_row_of_a_class_list_is_accounted_for(tmp_path: Path) -> None:
    expected = write_classes(tmp_path / "pairs.csv")
    (found,), problems = report([tmp_path / "pairs.csv"])
    assert (found.kind, found.rows, found.unique, found.groups) == ("classes", 4759, 4750, 539)
    assert [line for line, _ in found.exact] == expected["exact"] and len(found.exact) == 4
    assert [line for line, _ in found.mirrored] == expected["mirrored"] and len(found.mirrored) == 5
    assert list(found.capital) == expected["capital"]
    assert (len(found.capital), found.capital_names, found.positional) == (7, 9, ())
    rows = (tmp_path / "pairs.csv").read_text().splitlines()
    for line, first in found.exact:
        assert rows[line - 1] == rows[first - 1] and line > first
    for line, first in found.mirrored:
        assert rows[line - 1].split(",")[1:] == rows[first - 1].split(",")[:0:-1]
    assert [p.level for p in problems] == ["warning"] and "sha256" in problems.found[0].what


def test_photos_by_position_are_keyed_by_observation(tmp_path: Path) -> None:
    positional = write_seen(tmp_path / "seen.csv")
    (found,), _ = report([tmp_path / "seen.csv"])
    assert (found.kind, found.rows, found.species, found.observations) == ("seen", 677, 395, 677)
    assert list(found.positional) == positional and len(positional) == 29
    # photo_1.jpg occurs in many observations and is another picture in each.
    assert (found.pictures, found.reused, found.unique) == (1354, 0, 677)
    assert sum(found.dates.values()) == 677 and len(found.dates) == 4
    assert len(found.hyphens) == 2


def test_seventeen_rows_are_of_seen_species(tmp_path: Path) -> None:
    write_seen(tmp_path / "seen.csv")
    expected, half = write_unseen(tmp_path / "unseen.csv")
    (_, found), _ = report([tmp_path / "seen.csv", tmp_path / "unseen.csv"])
    assert found.seen is not None and [line for line, _, _ in found.seen] == expected and len(expected) == 17
    assert [line for line, _, _ in found.half_seen] == [half]
    strict = pair_lists.strictly_unseen(found).splitlines()
    rows = (tmp_path / "unseen.csv").read_text(encoding="utf-8").splitlines()
    assert strict == [row for number, row in enumerate(rows, 1) if number not in expected]
    assert len(strict) == 1 + 379 and any("Tūī" in row for row in strict)


def test_without_a_seen_list_nothing_is_called_unseen(tmp_path: Path) -> None:
    write_unseen(tmp_path / "unseen.csv")
    (found,), _ = report([tmp_path / "unseen.csv"])
    assert found.seen is None and "not compared" in "\n".join(pair_lists.describe(found))
    with pytest.raises(UserError, match="a seen list to compare it with"):
        pair_lists.strictly_unseen(found)


def test_broken_rows_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "class_id,image_1,image_2\n0295,./images/0295/a.jpg,./images/0295/a.jpg\n\n0295,./images/0295/a.jpg\n"
        "0295,./images/0296/a.jpg,./images/0295/b.jpg\n0295,,./images/0295/b.jpg\n"
    )
    _, problems = report([path])
    assert [(p.line, p.what.split(",")[0]) for p in problems.errors] == [
        (4, "found 2 fields"),
        (6, "image_1 is empty"),
        (2, "image_1 and image_2 are one picture"),
        (5, "class_id 0295"),
    ]


def test_the_command_writes_the_strict_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seen(tmp_path / "seen.csv")
    write_unseen(tmp_path / "unseen.csv")
    files = [str(tmp_path / "seen.csv"), str(tmp_path / "unseen.csv")]
    main(["--validate", "--strict_unseen", str(tmp_path / "strict.csv"), "--pairs", *files])
    out = capsys.readouterr().out
    assert "396 rows = 379 strictly unseen + 17 of seen species" in out and "no errors, 2 warnings" in out
    assert len(inaturalist.scan_rows(tmp_path / "strict.csv", Problems())) == 379
    with pytest.raises(UserError, match="expected class_id"):
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        main(["--validate", "--pairs", str(tmp_path / "other.csv")])
    with pytest.raises(UserError, match="expected FOLDER"):
        main(["--validate"])


def test_all_four_dates_are_read() -> None:
    dates = [inaturalist.parse_date(text) for text in DATES]
    assert [d.isoformat() if d else None for d in dates] == [
        "2023-06-24T18:29:00", "2024-05-01T19:42:00", "2022-03-05T11:03:27-04:00", "2025-08-31T17:58:00",
    ]  # fmt: skip
    assert inaturalist.parse_date("yesterday") is None


@pytest.mark.parametrize(
    ("name", "binomial", "parents"),
    [
        ("Columba livia domestica", "columba livia", ()),
        ("Anas crecca crecca × carolinensis", "anas crecca", ("anas crecca",)),
        ("Anas superciliosa × platyrhynchos", "anas superciliosa", ("anas superciliosa", "anas platyrhynchos")),
        ("Anas acuta × Mareca strepera", "anas acuta", ("anas acuta", "mareca strepera")),
        ("Larus", "", ()),
    ],
)
def test_binomials_and_parents(name: str, binomial: str, parents: tuple[str, ...]) -> None:
    assert (inaturalist.binomial(name), inaturalist.parents(name)) == (binomial, parents)
