"""The NABirds folder layout: whitespace-separated lists joined by picture id.

    images.txt               id  folder/file
    image_class_labels.txt   id  class id (not zero-padded)
    classes.txt              class id  name with spaces
    hierarchy.txt            child class id  parent class id
    train_test_split.txt     id  1 (train) or 0 (test)
    bounding_boxes.txt       id  x y width height      may run past the border: clipped
    sizes.txt                id  width height
    photographers.txt        id  name with spaces
    parts/part_locs.txt      id  part id  x y visible
    masks/CLASS/FILE.png, depth/CLASS/FILE.png, captions.json (by id), pairs.csv

The first five are required. Lists may differ in order and length; a line is joined by its id, never by its
number.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.conditioning.geometry import clip_box
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.taxonomy import Taxonomy, normalise_name
from nabla_jax.errors import UserError

REQUIRED = ("images.txt", "image_class_labels.txt", "classes.txt", "hierarchy.txt", "train_test_split.txt")


def is_layout(root: Path) -> bool:
    """Whether ``root`` looks like a NABirds folder."""
    return (root / "images.txt").is_file()


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads the lists of a NABirds folder; no picture is opened.

    Raises UserError naming file and line for a malformed or unmatched line, a missing list, a missing
    picture.
    """
    root = Path(root)
    missing = [name for name in REQUIRED if not (root / name).is_file()]
    if missing:
        raise UserError(f"{root}: not a NABirds folder, missing {', '.join(missing)}")
    files = _unique(root / "images.txt", 1, _text)
    labels = _unique(root / "image_class_labels.txt", 1, _integers, files)
    splits = _unique(root / "train_test_split.txt", 1, _integers, files)
    boxes = _optional(root / "bounding_boxes.txt", 4, _integers, files)
    sizes = _optional(root / "sizes.txt", 2, _integers, files)
    credits = _optional(root / "photographers.txt", 1, _text, files)
    taxonomy = Taxonomy(
        {
            _integer(i, root / "classes.txt"): normalise_name(n)
            for i, n in _unique(root / "classes.txt", 1, _text).items()
        },
        {_integer(i, root / "hierarchy.txt"): p[0] for i, p in _unique(root / "hierarchy.txt", 1, _integers).items()},
    )
    keypoints = _keypoints(root / "parts" / "part_locs.txt", files)
    captions = read_captions(root / "captions.json")
    images, masks, depths = (_listing(root / folder) for folder in ("images", "masks", "depth"))
    _require_all(root / "image_class_labels.txt", files, labels)
    _require_all(root / "train_test_split.txt", files, splits)
    absent = [file for file in files.values() if file not in images]
    if absent:
        raise UserError(f"{root / 'images'}: {len(absent)} of {len(files)} pictures are missing, first {absent[0]}")
    paths: dict[int, tuple[str, ...]] = {}
    examples = []
    for id, file in files.items():
        (class_id,) = labels[id]
        if class_id not in paths:
            if class_id not in taxonomy.names:
                raise UserError(
                    f"{root / 'image_class_labels.txt'}: picture {id} has class {class_id}, which classes.txt lacks"
                )
            paths[class_id] = taxonomy.path(class_id)
        if splits[id][0] not in (0, 1):
            raise UserError(f"{root / 'train_test_split.txt'}: picture {id} has {splits[id][0]}, expected 0 or 1")
        control = str(Path(file).with_suffix(".png"))  # whatever the case of .jpg or .JPG
        examples.append(
            Example(
                id=id,
                image=root / "images" / file,
                class_id=class_id,
                class_name=paths[class_id][-1],
                taxonomy=paths[class_id],
                box=_box(boxes.get(id), sizes.get(id), f"{root / 'bounding_boxes.txt'}: picture {id}"),
                mask=root / "masks" / control if control in masks else None,
                depth=root / "depth" / control if control in depths else None,
                keypoints=keypoints.get(id),
                caption=captions.get(id),
                split="train" if splits[id][0] else "test",
                credit=credits.get(id),
            )
        )
    if not examples:
        raise UserError(f"{root / 'images.txt'}: found no picture, expected at least one")
    return Dataset(root.name, root, tuple(examples))


def read_captions(path: Path) -> dict[str, str]:
    """Id -> caption; an absent file means none. Raises UserError for anything but an object of strings."""
    if not path.is_file():
        return {}
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise UserError(f"{path}: expected one object of id: caption")
    return captions


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of the non-empty lines. Raises UserError when the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _text(words: list[str]) -> Any:
    return " ".join(words)


def _integers(words: list[str]) -> Any:
    # Lists converted by other tools hold 12.0 for 12; 12.5 is a mistake.
    values = [float(word) for word in words]
    if any(value != int(value) for value in values):
        raise ValueError
    return [int(value) for value in values]


def _unique(path: Path, fields: int, parse: Any, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """First word of each line -> the parsed rest; ids outside ``known`` and repeated ids are errors."""
    table: dict[str, Any] = {}
    for number, line in lines(path):
        key, *words = line.split()
        wrong_count = len(words) < fields if parse is _text else len(words) != fields
        if wrong_count:
            raise UserError(f"{path}:{number}: found {len(words) + 1} fields, expected {fields + 1}: {line.strip()!r}")
        if key in table:
            raise UserError(f"{path}:{number}: {key} occurs twice, expected once")
        if known is not None and key not in known:
            raise UserError(f"{path}:{number}: {key} is not in images.txt")
        try:
            table[key] = parse(words)
        except (ValueError, OverflowError):
            raise UserError(f"{path}:{number}: expected {fields} integers after the id: {line.strip()!r}") from None
    return table


def _optional(path: Path, fields: int, parse: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    return _unique(path, fields, parse, known) if path.is_file() else {}


def _integer(word: str, path: Path) -> int:
    try:
        return int(word)
    except ValueError:
        raise UserError(f"{path}: class id {word!r}, expected an integer") from None


def _require_all(path: Path, ids: Iterable[str], table: Mapping[str, Any]) -> None:
    absent = [id for id in ids if id not in table]
    if absent:
        raise UserError(f"{path}: lacks {len(absent)} of the pictures in images.txt, first {absent[0]}")


def _listing(folder: Path) -> set[str]:
    """Relative names two levels deep, read folder by folder: one look-up per class, not per picture."""
    if not folder.is_dir():
        return set()
    found = set()
    with os.scandir(folder) as classes:
        for entry in classes:
            if entry.is_dir():
                found |= {f"{entry.name}/{name}" for name in os.listdir(entry.path)}
            else:
                found.add(entry.name)
    return found


def _box(box: list[int] | None, size: list[int] | None, where: str) -> tuple[int, int, int, int] | None:
    if box is None:
        return None
    x, y, width, height = box
    if width < 1 or height < 1:
        raise UserError(f"{where}: box of {width} x {height} pixels, expected at least 1 x 1")
    if size is None:
        return max(y, 0), max(x, 0), max(y, 0) + height, max(x, 0) + width
    if min(size) < 1:
        raise UserError(f"{where}: sizes.txt says {size[0]} x {size[1]} pixels, expected at least 1 x 1")
    return clip_box((y, x, y + height, x + width), size[1], size[0])


def _keypoints(path: Path, known: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Id -> [parts, 3] int32 of (row, column, visible), parts in ascending order of part id."""
    if not path.is_file():
        return {}
    found: dict[str, dict[int, tuple[int, int, int]]] = {}
    for number, line in lines(path):
        key, *words = line.split()
        try:
            part, x, y, visible = _integers(words)
        except ValueError:
            raise UserError(f"{path}:{number}: expected id, part, x, y, visible: {line.strip()!r}") from None
        if key not in known:
            raise UserError(f"{path}:{number}: {key} is not in images.txt")
        if part in found.setdefault(key, {}):
            raise UserError(f"{path}:{number}: part {part} of {key} occurs twice, expected once")
        found[key][part] = (y, x, visible)
    return {key: np.array([parts[p] for p in sorted(parts)], np.int32) for key, parts in found.items()}
