"""A plate: several birds redrawn in one pose and place, side by side and labelled, with arrows to what differs.

Field guides teach identification so, and the paper proposes it as a use of its method. Here are the lists that say what
is on a plate, and the page itself; ``generate --plate`` draws the birds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax.data import tables
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from nabla_jax.untrusted import below, whole_number

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Array = np.ndarray[Any, Any]

BIRDS = ("label", "picture")  # columns of the list of birds, all needed; `mask` may stand beside them
ARROWS = ("label", "row", "column", "text")
EVERY = "*"  # label of an arrow that every bird gets

_SIDE = 320  # of a drawn bird, at least: small pictures are enlarged
_IN_A_ROW = 5
_GAP = 16
_TEXT = 20
_SMALL = 13
_INK, _PALE = (24, 24, 24), (110, 110, 110)
_FINE = 3  # arrows are drawn so many times larger and shrunk, which smooths their edges
_DIRECTIONS = 32


@dataclasses.dataclass(frozen=True)
class Bird:
    """What to draw: a label, a photo, and its silhouette's file where it has one."""

    label: str
    picture: Path
    mask: Path | None


@dataclasses.dataclass(frozen=True)
class Arrow:
    """``label``: of the bird, or ``*`` for every one. Its tip in pixels of the target's picture, and what it says."""

    label: str
    row: int
    column: int
    text: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A bird on the plate: its label, the photo it is drawn from, the result [H, W, 3] at the target's size."""

    label: str
    photo: Array
    result: Array


def read_birds(path: Path) -> list[Bird]:
    """The birds of a plate: CSV with columns label, picture and perhaps mask; paths start at the list's folder.

    Raises UserError naming line and column for a list that is malformed or empty, a label twice, and missing files.
    """
    problems = Problems()
    birds: list[Bird] = []
    lines: dict[str, int] = {}
    for line, row in tables.read_csv(path, BIRDS, problems, (*BIRDS, "mask")):
        label = row["label"]
        if label in lines:
            problems.error(path, line, f"label {label!r} is on line {lines[label]}, too", "give each bird its own")
        lines.setdefault(label, line)
        files: dict[str, Path] = {}
        for name in ("picture", "mask"):
            file = below(path.parent, row.get(name, "")) if row.get(name) else None
            if row.get(name) and file is None:
                problems.error(path, line, f"{name}: {row[name]} leaves the list's folder", "copy the file below it")
            elif file is not None and not file.is_file():
                problems.error(path, line, f"{name}: found no file {file}", "paths start at the list's folder")
            elif file is not None:
                files[name] = file
        if "picture" in files:
            birds.append(Bird(label, files["picture"], files.get("mask")))
    problems.refuse()
    if not birds:
        raise UserError(f"{path}: found no bird, expected at least one row of {', '.join(BIRDS)}")
    return birds


def read_arrows(path: Path, labels: Sequence[str], height: int, width: int) -> list[Arrow]:
    """The arrows of a plate: CSV with columns label (``*`` for every bird), row and column (of the target), and text.

    Raises UserError naming line and column for a list that is malformed, another label, or a tip outside the picture.
    """
    problems = Problems()
    arrows = []
    for line, row in tables.read_csv(path, ARROWS[:-1], problems, ARROWS):
        if row["label"] not in (*labels, EVERY):
            known = ", ".join(labels)
            problems.error(path, line, f"label {row['label']!r} is of no bird", f"use one of {known}, or {EVERY}")
        outside = False
        for name, size in (("row", height), ("column", width)):
            text = row[name]
            number = whole_number(text)
            if number is None or number >= size:
                problems.error(path, line, f"{name}: found {text!r}", f"give a whole number from 0 to {size - 1}")
                outside = True
        if not outside:
            arrows.append(Arrow(row["label"], int(row["row"]), int(row["column"]), row.get("text", "")))
    problems.refuse()
    return arrows


def compose(birds: Sequence[Drawn], arrows: Sequence[Arrow], target: Array, mask: Array) -> Array:
    """The page [H, W, 3] uint8: every bird with its label and the photo it is drawn from, below them the target.

    Args:
      birds: all results of the target's size, at least one.
      arrows: may be none.
      target: [H, W, 3] uint8, whose pose and place all birds take.
      mask: [H, W] bool, where they stand: arrows come from outside of it.
    """
    from PIL import Image

    rows = math.ceil(len(birds) / _IN_A_ROW)
    columns = math.ceil(len(birds) / rows)
    factor = max(1.0, _SIDE / max(target.shape[:2]))
    labels = [_wrapped(bird.label, _font(_TEXT), round(target.shape[1] * factor)) for bird in birds]
    lines = max(map(len, labels))
    cells = []
    for bird, words in zip(birds, labels, strict=True):
        own = [arrow for arrow in arrows if arrow.label in (bird.label, EVERY)]
        cells.append(_cell(bird, own, mask, factor, words, lines))
    width, height = cells[0].size
    footer = _footer(target, columns * (width + _GAP) - _GAP)
    page = Image.new(
        "RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP + footer.height + _GAP), "white"
    )
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        page.paste(cell, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    page.paste(footer, (_GAP, page.height - footer.height - _GAP))
    return np.asarray(page)


def _cell(
    bird: Drawn, arrows: Sequence[Arrow], mask: Array, factor: float, words: Sequence[str], lines: int
) -> Image.Image:
    from PIL import Image, ImageDraw

    picture = _scaled(bird.result, factor)
    for arrow in arrows:
        _draw_arrow(picture, arrow, mask, factor)
    side, line = _SIDE / 4, _TEXT + 5
    photo = _scaled(bird.photo, side / max(bird.photo.shape[:2]))
    top = picture.height + lines * line + 12
    cell = Image.new("RGB", (picture.width, top + round(side)), "white")
    cell.paste(picture, (0, 0))
    pen = ImageDraw.Draw(cell)
    for number, text in enumerate(words):
        pen.text((0, picture.height + 4 + number * line), text, fill=_INK, font=_font(_TEXT))
    cell.paste(photo, (0, top))
    pen.text((photo.width + 8, top), "drawn from\nthis photo", fill=_PALE, font=_font(_SMALL))
    return cell


def _footer(target: Array, width: int) -> Image.Image:
    from PIL import Image, ImageDraw

    picture = _scaled(target, _SIDE / 4 / max(target.shape[:2]))
    footer = Image.new("RGB", (width, picture.height), "white")
    footer.paste(picture, (0, 0))
    said = "Pose and place are this photo's.\nThe birds above are drawn by a model:\nthey are no photographs."
    ImageDraw.Draw(footer).text((picture.width + 8, 0), said, fill=_PALE, font=_font(_SMALL))
    return footer


def _draw_arrow(picture: Image.Image, arrow: Arrow, mask: Array, factor: float) -> None:
    """Onto the enlarged picture: a shaft from outside of the bird to the tip, and its text at the shaft's end."""
    from PIL import Image, ImageDraw

    tip, end = _shaft(arrow, mask, factor, picture.size)
    length = math.dist(tip, end)
    along = np.array([tip[0] - end[0], tip[1] - end[1]]) / length
    across = np.array([-along[1], along[0]])
    head = max(8.0, length / 5)
    neck = np.array(tip) - head * along
    barbs = [tuple(neck + side * head / 2 * across) for side in (1, -1)]
    fine = Image.new("L", (picture.width * _FINE, picture.height * _FINE))
    for colour, extra in (((255, 255, 255), 2.5), (_INK, 0.0)):  # a pale rim, so that it shows on any ground
        fine.paste(0, (0, 0, *fine.size))
        pen = ImageDraw.Draw(fine)
        shaft = [tuple(_FINE * v for v in point) for point in (end, tuple(neck))]
        pen.line(shaft, 255, round(_FINE * (3 + 2 * extra)))
        corners = [tuple(_FINE * v for v in point) for point in (tip, *barbs)]
        pen.polygon(corners, 255)
        if extra:
            pen.line([*corners, corners[0]], 255, round(_FINE * 2 * extra), joint="curve")
        picture.paste(colour, (0, 0), fine.resize(picture.size, Image.Resampling.BOX))
    if arrow.text:
        font = _font(_SMALL + 2)
        left, top, right, bottom = font.getbbox(arrow.text)
        wide, high = right - left, bottom - top
        x = min(max(end[0] - wide / 2 - along[0] * (wide / 2 + 4), 3), max(picture.width - wide - 3, 3))
        y = min(max(end[1] - high / 2 - along[1] * (high / 2 + 6), 3), picture.height - high - 3)
        ImageDraw.Draw(picture).text((x - left, y - top), arrow.text, _INK, font, stroke_width=2, stroke_fill="white")


def _shaft(
    arrow: Arrow, mask: Array, factor: float, size: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(tip, other end), each (x, y) in the enlarged picture: inside it, over as little of the bird as possible."""
    tip = ((arrow.column + 0.5) * factor, (arrow.row + 0.5) * factor)
    length = max(size) / 5
    rows, columns = np.nonzero(mask)
    away = math.atan2(arrow.row - rows.mean(), arrow.column - columns.mean())

    def cost(turn: float) -> tuple[float, float]:
        end = (tip[0] + length * math.cos(away + turn), tip[1] + length * math.sin(away + turn))
        margin = 12
        outside = max(margin - end[0], margin - end[1], end[0] - size[0] + margin, end[1] - size[1] + margin, 0)
        steps = np.linspace(0, 1, 40)[:, None]
        points = ((1 - steps) * tip + steps * end) / factor
        places = np.clip(points.astype(int), 0, np.array(mask.shape[::-1]) - 1)
        covered = float(np.mean(mask[places[:, 1], places[:, 0]]))
        return outside / length + covered, abs(turn)

    turns = [math.tau * n / _DIRECTIONS - math.pi for n in range(_DIRECTIONS)]
    best = away + min(turns, key=cost)
    return tip, (tip[0] + length * math.cos(best), tip[1] + length * math.sin(best))


def _scaled(image: Array, factor: float) -> Image.Image:
    from PIL import Image

    height, width = (max(1, round(size * factor)) for size in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The words of a text as lines that fit, broken between words; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [next(line[:n] for n in range(len(line), -1, -1) if font.getlength(line[:n]) <= width) for line in lines]
