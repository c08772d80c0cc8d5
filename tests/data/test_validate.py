"""The listing of problems: everything at once, with file, line and remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.scan_dataset import write_folder
from nabla_jax import images
from nabla_jax.data import read_dataset, scan_dataset
from nabla_jax.data.problems import Problems
from nabla_jax.data.validate import _plain_jpeg_size, check_folder, check_pictures, listing
from nabla_jax.errors import UserError
from nabla_jax.prepare import main
from tests.data.folders import file_of, id_of, write_inat, write_nabirds


@pytest.fixture
def nabirds(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


def edit(path: Path, old: str, new: str) -> int:
    """Exchanges a text and returns its line."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


def found(root: Path, level: str = "error") -> dict[tuple[str, int | None], str]:
    problems = Problems()
    dataset = scan_dataset(root, problems)
    check_pictures(dataset, problems)
    return {(p.file.relative_to(root).as_posix(), p.line): p.what for p in problems if p.level == level}


def test_a_whole_folder_has_no_errors(nabirds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = Problems()
    check_folder(str(nabirds), problems)
    assert list(problems) == []
    out = capsys.readouterr().out
    assert "16 pictures (8 test, 8 train) of 4 classes, 3 species" in out
    assert "train: 8 ordered pairs within 4 classes" in out
    assert "3 qualifiers: 2 read as sex, age, season or morph, 1 kept verbatim" in out
    assert "1 pictures named .JPG" in out and "4 boxes that run past the border, clipped" in out


def test_every_mistake_is_listed_with_its_line(nabirds: Path) -> None:
    teal, crow, junco = id_of(295, 0), id_of(1010, 1), id_of(817, 3)
    expected = {
        ("image_class_labels.txt", edit(nabirds / "image_class_labels.txt", f"{teal} 295", f"{teal} 999")),
        ("train_test_split.txt", edit(nabirds / "train_test_split.txt", f"{crow} 1", f"{crow} 7")),
        ("bounding_boxes.txt", edit(nabirds / "bounding_boxes.txt", f"{junco} 4 6 20 15", f"{junco} 4 6 20")),
        ("sizes.txt", edit(nabirds / "sizes.txt", f"{junco} ", "nobody ")),
        ("parts/part_locs.txt", edit(nabirds / "parts" / "part_locs.txt", f"{teal} 3 13 23 1", f"{teal} 3 13 23")),
        ("parts/part_locs.txt", edit(nabirds / "parts" / "part_locs.txt", f"{crow} 5 ", f"{crow} 6 ")),
        ("classes.txt", edit(nabirds / "classes.txt", "31 Ducks", "x Ducks")),
        ("captions.json", None),
        ("images.txt", edit(nabirds / "images.txt", file_of(297, 1), file_of(297, 1).replace(".jpg", ".JPG"))),
    }
    (nabirds / "captions.json").write_text("[]")
    errors = found(nabirds)
    assert expected <= errors.keys()
    # Consequences, named too: the class without a name is a parent and an ancestor.
    assert {file for file, _ in errors.keys() - expected} == {"hierarchy.txt"}
    with pytest.raises(
        UserError, match=rf"\(and \d+ more: python -m nabla_jax.prepare --validate {nabirds} lists all\)"
    ):
        read_dataset(nabirds)


def test_a_part_listed_twice_is_one_error_wherever_it_stands(nabirds: Path) -> None:
    path = nabirds / "parts" / "part_locs.txt"
    with path.open("a") as out:
        out.write(f"{id_of(295, 1)} 3 1 1 1\n")
    errors = found(nabirds)
    assert errors == {("parts/part_locs.txt", 177): f"part 3 of {id_of(295, 1)} occurs twice, expected once"}


def test_warnings_say_what_is_done_instead(nabirds: Path) -> None:
    (nabirds / "images" / "0817" / "stray.jpg").write_bytes(b"")
    (nabirds / "masks" / file_of(295, 1)).with_suffix(".png").unlink()
    own = id_of(1010, 2)
    rows = (nabirds / "photographers.txt").read_text().splitlines()
    (nabirds / "photographers.txt").write_text("\n".join(r for r in rows if not r.startswith(own)))
    box = edit(nabirds / "bounding_boxes.txt", f"{own} 4 6 20 15", f"{own} 4 600 20 15")
    warnings = found(nabirds, "warning")
    assert warnings.keys() == {
        ("images/0817/stray.jpg", None),
        (f"masks/{Path(file_of(295, 1)).with_suffix('.png')}", None),
        ("photographers.txt", None),
        ("bounding_boxes.txt", box),
    }
    assert found(nabirds) == {} and read_dataset(nabirds).by_id[own].credit is None


def test_pictures_are_compared_with_lists_and_controls(nabirds: Path) -> None:
    broken, wide, masked = (nabirds / "images" / file_of(c, 1) for c in (295, 297, 1010))
    broken.write_bytes(b"")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(wide)
    mask = (nabirds / "masks" / file_of(1010, 1)).with_suffix(".png")
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(mask)
    errors = found(nabirds)
    assert errors.pop((f"images/{file_of(295, 1)}", None)) == "not a picture in a known format"
    assert "is 5x6" in errors.pop((f"masks/{file_of(1010, 1)}".replace(".jpg", ".png"), None))
    assert {file.split("/")[0] for file, _ in errors} == {"masks", "depth"}  # of the picture that is 9 x 9 now
    line = 1 + [row.split()[0] for row in (nabirds / "sizes.txt").read_text().splitlines()].index(id_of(297, 1))
    assert "on disk" in found(nabirds, "warning")[("sizes.txt", line)]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"comment": b"x" * 3000}])
def test_the_quick_look_at_a_jpeg_agrees_with_opening_it(tmp_path: Path, options: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", **options)
    assert _plain_jpeg_size(tmp_path / "a.jpg") == images.picture_size(tmp_path / "a.jpg") == (37, 53)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "b.jpg", exif=turned, **options)
    assert _plain_jpeg_size(tmp_path / "b.jpg") is None and images.picture_size(tmp_path / "b.jpg") == (53, 37)


def test_inaturalist_rows_are_checked_together(tmp_path: Path) -> None:
    root = write_inat(tmp_path / "inat")
    (root / "images" / "Cactus_Wren" / "111" / "9002.jpg").unlink()
    path = root / "final_pairs.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("2025-08-31T17:58,user2", "soon,user2"), encoding="utf-8")
    assert list(found(root)) == [("final_pairs.csv", 2)]
    assert found(root, "warning") == {
        ("final_pairs.csv", 4): "observed_on: found 'soon', expected a date such as 2023-06-24 18:29:00"
    }


def test_the_command_prints_all_and_fails_with_status_2(nabirds: Path) -> None:
    for n in range(4):
        (nabirds / "images" / file_of(295, n)).unlink()
    (nabirds / "depth" / "0295" / "stray.png").write_bytes(b"")
    command = [sys.executable, "-m", "nabla_jax.prepare", "--validate", str(nabirds)]
    out = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in out.stdout.splitlines() if line.startswith("error: ")]
    images = [line for line in errors if "images.txt:" in line]
    assert out.returncode == 2 and len(images) == 4 and all("is missing; put it at" in line for line in images)
    assert "warning: " in out.stdout and "belongs to no line of images.txt" in out.stdout
    assert out.stderr.splitlines()[-1] == f"{len(errors)} errors and 1 warnings, listed above"
    assert len(errors) > 4  # pairs.csv names two of the pictures


def test_a_limit_keeps_the_first_of_a_kind() -> None:
    problems = Problems()
    for n in range(5):
        problems.error(Path("list.txt"), n + 1, f"odd {n}", "mend it")
    problems.warn(Path("list.txt"), 9, "strange", "leave it")
    assert list(listing(problems, 2)) == [
        "error: list.txt:1: odd 0; mend it",
        "error: list.txt:2: odd 1; mend it",
        "error: ... and 3 more like it",
        "warning: list.txt:9: strange; leave it",
    ]
    assert len(list(listing(problems))) == 6


def test_a_configuration_names_its_folders(nabirds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--validate", "--config", "configs/omk_fill.py:toy", f"--config.data.root={nabirds}", "--lists_only"])
    assert f"{nabirds}: 16 pictures" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 errors and 0 warnings"):
        main(["--validate", str(nabirds / "nothing")])


def test_the_generated_folder_of_the_benchmark_is_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "big", 1500)
    problems = Problems()
    check_folder(str(tmp_path / "big"), problems)
    dataset = read_dataset(tmp_path / "big")
    assert problems.errors == [] and len(dataset.examples) == 1500 and len(dataset.parts) == 11
    # Counted without a list of pairs, and with one.
    counts = [len(p) for p in dataset.classes.values()]
    listed = [(a, b) for p in dataset.classes.values() for a in p for b in p if a != b]
    assert sum(n * (n - 1) for n in counts) == len(set(listed))
    example = dataset.examples[7]
    assert example.keypoints is not None and example.keypoints[3].tolist() == [3, 3, 1]
