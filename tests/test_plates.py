"""Plates: what is on the page and where, the lists it is made from, and the command that draws one."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nabla_jax import generate, one_target, plates, runs
from nabla_jax.errors import UserError
from tests import fixtures

HEIGHT, WIDTH = 100, 80
GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[30:70, 20:60] = True
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]


def plain(colour: Sequence[int], height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


def places(page: np.ndarray, colour: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the largest block of exactly this colour: its photo's is smaller."""
    rows, columns = np.nonzero((page == np.array(colour)).all(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.mark.parametrize("count", [1, 5, 6])
def test_every_bird_is_there_whole_and_apart(count: int) -> None:
    birds = [plates.Drawn(f"bird {i}", GREY, plain(COLOURS[i])) for i in range(count)]
    page = plates.compose(birds, [], GREY, MASK)
    boxes = [places(page, COLOURS[i]) for i in range(count)]
    for (top, bottom, left, right), colour in zip(boxes, COLOURS, strict=False):
        assert (bottom - top, right - left) == (320, 256)  # 100 x 80 enlarged
        assert (page[top:bottom, left:right] == np.array(colour)).all()
    # Five at most side by side, as even as can be, in the order of the list.
    rows = sorted({box[0] for box in boxes})
    assert len(rows) == (2 if count == 6 else 1)
    assert [(box[0], box[2]) for box in boxes] == sorted((box[0], box[2]) for box in boxes)
    # Below each picture there is ink: its label.
    for _, bottom, left, right in boxes:
        assert page[bottom : bottom + 30, left:right].min() < 60


def test_an_arrow_touches_its_tip_from_outside_the_bird() -> None:
    bare = plates.compose([plates.Drawn("a", GREY, GREY)], [], GREY, MASK)
    top, left = 16, 16
    factor = 320 / HEIGHT
    for row, column in ((32, 40), (50, 22), (66, 57), (50, 40), (0, 0), (99, 79)):
        page = plates.compose([plates.Drawn("a", GREY, GREY)], [plates.Arrow("a", row, column, "")], GREY, MASK)
        changed = (page != bare).any(-1)
        y, x = top + (row + 0.5) * factor, left + (column + 0.5) * factor
        rows, columns = np.nonzero(changed)
        assert np.hypot(rows - y, columns - x).min() < 3
        # Nothing beyond the picture, and no more of the bird is hidden than the way out takes.
        assert rows.min() >= top and rows.max() < top + 320 and columns.min() >= left and columns.max() < left + 256
        far = np.argmax(np.hypot(rows - y, columns - x))
        end = ((rows[far] - top) / factor, (columns[far] - left) / factor)
        if (row, column) != (50, 40):  # from the middle there is no way out as short as an arrow
            assert not MASK[min(int(end[0]), HEIGHT - 1), min(int(end[1]), WIDTH - 1)]


def test_arrows_go_to_their_birds() -> None:
    birds = [plates.Drawn(name, GREY, plain(COLOURS[i])) for i, name in enumerate(("a", "b"))]
    bare = plates.compose(birds, [], GREY, MASK)
    boxes = [places(bare, COLOURS[i]) for i in range(2)]

    def marked(*arrows: plates.Arrow) -> list[bool]:
        page = plates.compose(birds, arrows, GREY, MASK)
        return [bool((page[t:b, le:r] != bare[t:b, le:r]).any()) for t, b, le, r in boxes]

    assert marked(plates.Arrow("a", 40, 40, "")) == [True, False]
    assert marked(plates.Arrow("b", 40, 40, "dark cap")) == [False, True]
    assert marked(plates.Arrow("*", 40, 40, "")) == [True, True]


def test_long_labels_stay_inside_their_column() -> None:
    label = "A bird of an extraordinarily long name (nonbreeding, immature) Unbreakablenessesofbirdsandothers"
    page = plates.compose([plates.Drawn(label, GREY, plain(COLOURS[0]))], [], GREY, MASK)
    assert (page[:, :16] == 255).all() and (page[:, -16:] == 255).all()


def write(path: Path, *rows: Sequence[object]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("label", "picture")], "found no bird"),
        ([("label", "picture", "photo")], "unknown column 'photo'"),
        ([("label",), ("a",)], "missing column picture"),
        ([("label", "picture"), ("a", "a.png"), ("a", "a.png")], ":3: label 'a' is on line 2, too"),
        ([("label", "picture"), ("a", "b.png")], ":2: picture: found no file"),
        ([("label", "picture", "mask"), ("a", "a.png", "b.png")], ":2: mask: found no file"),
    ],
)
def test_lists_of_birds_that_are_refused(rows: list[Sequence[str]], told: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match="birds.csv") as error:
        plates.read_birds(write(tmp_path / "birds.csv", *rows))
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (("c", "1", "1", ""), "label 'c' is of no bird"),
        (("a", "10", "1", ""), "row: found '10', give a whole number from 0 to 9"),
        (("a", "1", "-1", ""), "column: found '-1'"),
        (("a", "1", "x", ""), "column: found 'x'"),
        (("a", "", "1", ""), "row is empty"),
    ],
)
def test_lists_of_arrows_that_are_refused(row: Sequence[str], told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "arrows.csv", plates.ARROWS, row)
    with pytest.raises(UserError) as error:
        plates.read_arrows(path, ["a", "b"], 10, 20)
    assert told.split(",")[0] in str(error.value).replace(";", ",") and "arrows.csv:2:" in str(error.value)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A plate of two birds and an arrow, as the command takes it."""
    for name, seed in (("a", 1), ("b", 2), ("target", 3)):
        pixels, mask = fixtures.oval_picture(40 + seed, 50 - seed, seed)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{name}_mask.png")
    rows = [(name.upper(), f"{name}.png", f"{name}_mask.png") for name in "ab"]
    birds = write(tmp_path / "birds.csv", ("label", "picture", "mask"), *rows)
    arrows = write(tmp_path / "arrows.csv", plates.ARROWS, ("*", 20, 20, "here"))
    target = ["--target", str(tmp_path / "target.png"), "--target_mask", str(tmp_path / "target_mask.png")]
    return ["--plate", str(birds), "--arrows", str(arrows), *target]


def run(tmp_path: Path, words: Sequence[str], out: str = "plate", **overrides: Any) -> Path:
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **overrides)
    generate.main(["--config", str(config), "--out", str(tmp_path / out), *words])
    return tmp_path / out


def test_the_command_draws_what_single_pictures_are(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tmp_path, words)
    rows = runs.read_rows(out / one_target.MANIFEST)
    assert [row["label"] for row in rows] == ["A", "B"]
    page = np.asarray(Image.open(out / one_target.PLATE))
    for row, name in zip(rows, "ab", strict=True):
        assert {"seed", "steps", "guidance", "adapter", "base_sha256", "picture_sha256", "target_sha256"} <= row.keys()
        one = ["--subject", f"{tmp_path}/{name}.png", "--subject_mask", f"{tmp_path}/{name}_mask.png"]
        made = run(tmp_path, [*one, *words[4:]], f"{name}-alone.png")
        np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(out / row["file"])))
    assert page.shape[1] > 2 * 250

    # Again: nothing is drawn, only the page is composed; another arrow needs no drawing either.
    drawn: list[str] = []
    monkeypatch.setattr("nabla_jax.api.Reposer.repose", lambda *_, **__: drawn.append("drawn"))
    run(tmp_path, words)
    np.testing.assert_array_equal(np.asarray(Image.open(out / one_target.PLATE)), page)
    write(tmp_path / "arrows.csv", plates.ARROWS, ("A", 5, 5, ""))
    run(tmp_path, words)
    assert (np.asarray(Image.open(out / one_target.PLATE)) != page).any()
    assert drawn == []
    monkeypatch.undo()

    # What was made with other settings is made again.
    run(tmp_path, words, sample__seed=7)
    assert [row["seed"] for row in runs.read_rows(out / one_target.MANIFEST)] == [7, 7]


def test_what_does_not_fit_together_is_told(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--plate: its birds are in the list, found --subject beside it"):
        run(tmp_path, [*words, "--subject", "a.png"])
    with pytest.raises(UserError, match="--arrows: found a list of arrows, but no --plate"):
        run(tmp_path, words[2:])
    with pytest.raises(UserError, match="a plate needs --target and --target_mask; missing --target"):
        run(tmp_path, words[:4])
    write(tmp_path / "birds.csv", ("label", "picture"), ("A", "a.png"))
    with pytest.raises(UserError, match="'A' has no mask"):
        run(tmp_path, words[:2] + words[4:])
