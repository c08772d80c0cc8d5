"""The NABirds folder layout: whitespace-separated lists joined by picture id.

    images.txt               id  folder/file
    image_class_labels.txt   id  class id (not zero-padded)
    classes.txt              class id  name with spaces
    hierarchy.txt            child class id  parent class id
    train_test_split.txt     id  1 (train) or 0 (test)
    bounding_boxes.txt       id  x y width height      may run past the border: clipped
    sizes.txt                id  width height
    photographers.txt        id  name with spaces
    parts/parts.txt          part id  name with spaces
    parts/part_locs.txt      id  part id  x y visible
    masks/CLASS/FILE.png, depth/CLASS/FILE.png, captions.json (by id), pairs.csv

The first five are required. Lists may differ in order and length; a line is joined by its id, never by its
number.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nabla_jax.conditioning.geometry import clip_box
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.problems import Problems
from nabla_jax.data.taxonomy import Taxonomy, normalise_name
from nabla_jax.errors import UserError
from nabla_jax.untrusted import parse_json, whole_number

REQUIRED = ("images.txt", "image_class_labels.txt", "classes.txt", "hierarchy.txt", "train_test_split.txt")
_FORMAT = {
    "images.txt": "ID FOLDER/FILE",
    "image_class_labels.txt": "ID CLASS",
    "classes.txt": "CLASS NAME",
    "hierarchy.txt": "CHILD PARENT",
    "train_test_split.txt": "ID 1 (train) or ID 0 (test)",
    "bounding_boxes.txt": "ID X Y WIDTH HEIGHT",
    "sizes.txt": "ID WIDTH HEIGHT",
    "photographers.txt": "ID NAME",
    "parts.txt": "PART NAME",
    "part_locs.txt": "ID PART X Y VISIBLE",
}

_BEYOND = 2**31  # pixels, ids and flags are smaller; arrays hold them in 32 bits

Array = np.ndarray[Any, Any]
Table = dict[str, tuple[int, Any]]
"""First word of a line -> (line number, the rest, parsed)."""


def is_layout(root: Path) -> bool:
    """Whether ``root`` looks like a NABirds folder."""
    return (root / "images.txt").is_file()


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads the lists of a NABirds folder; no picture is opened.

    Raises UserError naming file and line for a malformed or unmatched line, a missing list, a missing
    picture.
    """
    problems = Problems()
    dataset = scan(Path(root), problems)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems) -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems`` and returns the examples that are whole."""
    missing = [name for name in REQUIRED if not (root / name).is_file()]
    if missing:
        problems.error(
            root, None, f"not a NABirds folder, missing {', '.join(missing)}", "copy the lists from the NABirds archive"
        )

    def table(name: str, fields: int, parse: Callable[[list[str]], Any], known: Table | None = None) -> Table:
        path = root / name
        return _table(path, fields, parse, problems, known) if path.is_file() else {}

    files = table("images.txt", 1, _text)
    labels = table("image_class_labels.txt", 1, _integers, files)
    splits = table("train_test_split.txt", 1, _integers, files)
    boxes = table("bounding_boxes.txt", 4, _integers, files)
    sizes = _sizes(root / "sizes.txt", table("sizes.txt", 2, _integers, files), problems)
    credits = table("photographers.txt", 1, _text, files)
    taxonomy = _taxonomy(root, table("classes.txt", 1, _text), table("hierarchy.txt", 1, _integers), problems)
    parts = _part_names(root / "parts" / "parts.txt", table("parts/parts.txt", 1, _text), problems)
    keypoints = _keypoints(root / "parts" / "part_locs.txt", files, parts, sizes, problems)
    captions = _captions(root / "captions.json", files, problems)
    for name, rows in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
        _require_all(root / name, files, rows, problems.error)
    for name, rows in (("bounding_boxes.txt", boxes), ("sizes.txt", sizes), ("photographers.txt", credits)):
        _require_all(root / name, files, rows, problems.warn)
    paths = _class_paths(root / "image_class_labels.txt", labels, taxonomy, problems)
    folders = [root / folder for folder in ("images", "masks", "depth")]
    images, masks, depths = map(_listing, folders)
    _unlisted(root, files, images, masks, depths, problems)
    listed: dict[str, str] = {}
    examples = []
    for id, (line, file) in files.items():
        if file in listed:
            problems.error(
                root / "images.txt", line, f"{file} is also the picture of {listed[file]}", "give each id its own file"
            )
            continue
        listed[file] = id
        if file not in images:
            problems.error(
                root / "images.txt",
                line,
                f"picture images/{file} is missing",
                _near(file, images) or f"put it at {root / 'images' / file}",
            )
            continue
        if id not in labels or id not in splits:
            continue
        (class_id,), (split,) = labels[id][1], splits[id][1]
        if split not in (0, 1):
            problems.error(
                root / "train_test_split.txt",
                splits[id][0],
                f"picture {id} has {split}, expected 0 or 1",
                "write 1 for train, 0 for test",
            )
            continue
        if class_id not in paths:
            continue
        folder = file.split("/", 1)[0]
        inside = whole_number(folder)
        if inside is not None and inside != class_id:
            problems.warn(
                root / "image_class_labels.txt",
                labels[id][0],
                f"picture {id} is of class {class_id}, but lies in the folder of class {inside}",
                f"the class is taken to be {class_id}; move the picture or correct the line",
            )
        if file.endswith(".JPG"):
            problems.note("pictures named .JPG")
        control = _png(file)
        examples.append(
            Example(
                id=id,
                image=folders[0] / file,
                class_id=class_id,
                class_name=paths[class_id][-1],
                taxonomy=paths[class_id],
                box=_box(root / "bounding_boxes.txt", id, boxes.get(id), sizes.get(id), problems),
                mask=folders[1] / control if control in masks else None,
                depth=folders[2] / control if control in depths else None,
                keypoints=keypoints.get(id),
                caption=captions.get(id),
                split="train" if split else "test",
                credit=credits[id][1] if id in credits else None,
            )
        )
    if not examples and not problems.errors:
        problems.error(
            root / "images.txt", None, "found no picture, expected at least one", "list the pictures: ID FOLDER/FILE"
        )
    return Dataset(root.name, root, tuple(examples), tuple(parts.values()))


def read_sizes(root: Path) -> dict[str, tuple[int, tuple[int, int]]]:
    """Id -> (line, (height, width)) as sizes.txt has it; lines that cannot be read are left out."""
    path = root / "sizes.txt"
    rows = _table(path, 2, _integers, Problems()) if path.is_file() else {}
    return {id: (line, (height, width)) for id, (line, (width, height)) in rows.items()}


def read_captions(path: Path) -> dict[str, str]:
    """Id -> caption; an absent file means none. Raises UserError for anything but an object of strings."""
    if not path.is_file():
        return {}
    try:
        captions = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise UserError(f"{path}: expected one object of id: caption")
    return captions


def lines(path: Path) -> list[tuple[int, str]]:
    """(line number from 1, text) of the non-empty lines. Raises UserError when the file cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a lone carriage return ends no line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return [numbered for numbered in enumerate(text.split("\n"), 1) if numbered[1].strip()]


def _text(words: list[str]) -> Any:
    return " ".join(words)


def _integers(words: list[str]) -> Any:
    try:
        values = [int(word) for word in words]
    except ValueError:
        # Lists converted by other tools hold 12.0 for 12; 12.5 is a mistake.
        floats = [float(word) for word in words]
        if any(value != int(value) for value in floats):
            raise
        values = [int(value) for value in floats]
    if any(abs(value) >= _BEYOND for value in values):
        raise OverflowError
    return values


def _table(
    path: Path, fields: int, parse: Callable[[list[str]], Any], problems: Problems, known: Table | None = None
) -> Table:
    """The lines of a list; malformed ones, ids outside ``known`` and repeated ids are left out and reported."""
    table: Table = {}
    fix = f"write the line as {_FORMAT[path.name]}"
    for number, line in _lines(path, problems):
        key, *words = line.split()
        wrong_count = len(words) < fields if parse is _text else len(words) != fields
        if wrong_count:
            found = f"found {len(words) + 1} fields, expected {fields + 1}: {line.strip()!r}"
            problems.error(path, number, found, fix)
        elif key in table:
            problems.error(
                path, number, f"{key} occurs twice, expected once", f"delete this line or line {table[key][0]}"
            )
        elif known is not None and key not in known:
            problems.error(path, number, f"{key} is not in images.txt", "delete the line, or add the picture there")
        else:
            try:
                table[key] = number, parse(words)
            except (ValueError, OverflowError):
                problems.error(path, number, f"expected {fields} integers after the id: {line.strip()!r}", fix)
    return table


def _lines(path: Path, problems: Problems) -> list[tuple[int, str]]:
    try:
        return lines(path)
    except UserError as error:
        problems.error(path, None, str(error).removeprefix(f"{path}: "), "save the list as UTF-8 text")
        return []


def _taxonomy(root: Path, classes: Table, links: Table, problems: Problems) -> Taxonomy:
    """Names and parents of the classes whose ids are integers."""
    names: dict[int, str] = {}
    parents: dict[int, int] = {}
    for key, (line, name) in classes.items():
        id = _class_id(key, root / "classes.txt", line, problems)
        if id is not None:
            if normalise_name(name) != name:
                problems.note("class names with odd spaces inside brackets, normalised")
            names[id] = normalise_name(name)
    for key, (line, (parent,)) in links.items():
        id = _class_id(key, root / "hierarchy.txt", line, problems)
        if id is None:
            continue
        for node in (id, parent):
            if classes and node not in names:
                problems.error(
                    root / "hierarchy.txt", line, f"class {node} has no name", f"add {node} and its name to classes.txt"
                )
        parents[id] = parent
    return Taxonomy(names, parents)


def _class_id(word: str, path: Path, line: int, problems: Problems) -> int | None:
    try:
        (id,) = _integers([word])
        return int(id)
    except (ValueError, OverflowError):
        problems.error(path, line, f"class id {word!r}, expected an integer", f"write the line as {_FORMAT[path.name]}")
        return None


def _class_paths(path: Path, labels: Table, taxonomy: Taxonomy, problems: Problems) -> dict[int, tuple[str, ...]]:
    """Class id -> names from the root, for the classes that have pictures; each broken class is reported once."""
    paths: dict[int, tuple[str, ...]] = {}
    broken: set[int] = set()
    inner = set(taxonomy.parents.values())
    for id, (line, (class_id,)) in labels.items():
        if class_id in paths or not taxonomy.names:
            continue
        if class_id not in taxonomy.names:
            problems.error(
                path,
                line,
                f"picture {id} has class {class_id}, which classes.txt lacks",
                "correct the class, or add its name to classes.txt and its parent to hierarchy.txt",
            )
        elif class_id not in broken:
            try:
                paths[class_id] = taxonomy.path(class_id)
            except UserError as error:
                broken.add(class_id)
                problems.error(path.with_name("hierarchy.txt"), None, str(error), "correct the parent links")
            if class_id in inner:
                problems.warn(
                    path,
                    line,
                    f"picture {id} has class {class_id}, which has classes below it",
                    "kept as a class of its own; label pictures with leaves",
                )
    return paths


def _require_all(
    path: Path, files: Table, table: Mapping[str, Any], report: Callable[[Path, int | None, str, str], None]
) -> None:
    if path.is_file():
        for id, (line, file) in files.items():
            if id not in table:
                report(path, None, f"has no line for picture {id} (images.txt:{line}, {file})", "add the line")


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


def _png(file: str) -> str:
    """The name of a picture's control, whatever the case of its suffix."""
    stem, dot, suffix = file.rpartition(".")
    return f"{stem if dot and '/' not in suffix else file}.png"


def _near(file: str, images: set[str]) -> str | None:
    """How to mend a name that differs from a file's in its suffix alone."""
    stem = PurePosixPath(file)
    if not stem.name:
        return None
    for suffix in (".jpg", ".JPG", ".jpeg", ".JPEG", ".png"):
        other = str(stem.with_suffix(suffix))
        if other != file and other in images:
            return f"the folder holds {other}: suffixes are case-sensitive, write the name as it is on disk"
    return None


def _unlisted(
    root: Path, files: Table, images: set[str], masks: set[str], depths: set[str], problems: Problems
) -> None:
    """Warns of pictures and controls that belong to no line, and counts pictures without a mask."""
    listed = {file for _, file in files.values()}
    controls = {_png(file) for file in listed}
    for folder, found, wanted in (("images", images, listed), ("masks", masks, controls), ("depth", depths, controls)):
        for file in sorted(found - wanted):
            problems.warn(
                root / folder / file, None, "belongs to no line of images.txt", "ignored; delete it or list its picture"
            )
    bare = sorted(controls - masks)
    if masks:
        for file in bare:
            problems.warn(root / "masks" / file, None, "no mask of this picture", "make it before prepare needs it")
    elif bare:
        problems.warn(root / "masks", None, f"none of {len(bare)} pictures has a mask", "make them: prepare needs them")


def _sizes(path: Path, rows: Table, problems: Problems) -> dict[str, tuple[int, int]]:
    """Id -> (height, width)."""
    sizes = {}
    for id, (line, (width, height)) in rows.items():
        if min(width, height) < 1:
            found = f"picture {id} of {width} x {height} pixels, expected at least 1 x 1"
            problems.error(path, line, found, "write the picture's width and height")
        else:
            sizes[id] = height, width
    return sizes


def _box(
    path: Path, id: str, row: tuple[int, list[int]] | None, size: tuple[int, int] | None, problems: Problems
) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) inside the picture; None where there is none."""
    if row is None:
        return None
    line, (x, y, width, height) = row
    if width < 1 or height < 1:
        found = f"picture {id}: box of {width} x {height} pixels, expected at least 1 x 1"
        problems.error(path, line, found, "write X Y WIDTH HEIGHT of the bird")
        return None
    if size is None:
        return max(y, 0), max(x, 0), max(y, 0) + height, max(x, 0) + width
    box = y, x, y + height, x + width
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        found = f"picture {id}: box {x} {y} {width} {height} lies outside its {size[1]} x {size[0]} pixels"
        problems.warn(path, line, found, "clipped to the nearest pixels; correct the box or the size")
    clipped = clip_box(box, *size)
    if clipped != box:
        problems.note("boxes that run past the border, clipped")
    return clipped


def _part_names(path: Path, rows: Table, problems: Problems) -> dict[int, str]:
    """Part id -> name, ids ascending; empty without parts.txt."""
    found: dict[int, str] = {}
    for key, (line, name) in rows.items():
        number = whole_number(key)
        if number is not None and number < _BEYOND:
            found[number] = name
        else:
            problems.error(
                path, line, f"part id {key!r}, expected an integer", f"write the line as {_FORMAT[path.name]}"
            )
    return dict(sorted(found.items()))


def _keypoints(
    path: Path,
    files: Table,
    parts: Mapping[int, str],
    sizes: Mapping[str, tuple[int, int]],
    problems: Problems,
) -> dict[str, Array]:
    """Id -> [parts, 3] int32 of (row, column, visible), parts in ascending order of part id.

    The parts are those of parts.txt, or without it those that occur; a part without a line is invisible at 0 0.
    """
    if not path.is_file():
        return {}
    index = {id: row for row, id in enumerate(files)}
    numbered = _lines(path, problems)
    # Half a million lines: whole columns at a time, line by line only where something is wrong.
    step = 2**15
    chunks = [_part_lines(path, numbered[i : i + step], index, problems) for i in range(0, len(numbered), step)]
    rows = np.concatenate(chunks) if chunks else np.zeros((0, 6), np.int64)
    if not len(rows):
        return {}
    ids = list(files)
    known = np.array(sorted(parts) if parts else np.unique(rows[:, 1]))
    for row in rows[~np.isin(rows[:, 1], known)]:
        problems.error(
            path,
            int(row[5]),
            f"part {row[1]} of {ids[row[0]]} is not in parts.txt",
            "correct the part, or name it there",
        )
    rows = rows[np.isin(rows[:, 1], known)]
    place = rows[:, 0] * len(known) + np.searchsorted(known, rows[:, 1])
    _, first = np.unique(place, return_index=True)
    repeated = np.ones(len(rows), bool)
    repeated[first] = False
    for row in rows[repeated]:
        problems.error(
            path, int(row[5]), f"part {row[1]} of {ids[row[0]]} occurs twice, expected once", "delete one of the lines"
        )
    extent = np.full((len(files), 2), np.iinfo(np.int32).max, np.int64)
    for id, size in sizes.items():
        extent[index[id]] = size
    outside = (rows[:, 4] != 0) & ((rows[:, 2:4] < 0) | (rows[:, 2:4] >= extent[rows[:, 0]])).any(1)
    for row in rows[outside]:
        problems.warn(
            path,
            int(row[5]),
            f"part {row[1]} of {ids[row[0]]} is visible at x {row[3]}, y {row[2]}, outside its picture",
            "kept; correct the point, or write 0 0 0",
        )
    flat = np.zeros((len(files) * len(known), 3), np.int32)
    flat[place[first]] = rows[first, 2:5]
    counts = np.bincount(rows[first, 0], minlength=len(files))
    for position in np.flatnonzero(counts < len(known)):
        problems.warn(
            path,
            None,
            f"picture {ids[position]} has {counts[position]} of {len(known)} parts",
            "the others count as invisible; add their lines",
        )
    table = flat.reshape(len(files), len(known), 3)
    return {id: table[row] for id, row in index.items() if counts[row]}


def _part_lines(path: Path, numbered: list[tuple[int, str]], index: Mapping[str, int], problems: Problems) -> Array:
    """[lines, 6] int64 of (row of the picture, part, y, x, visible, line); what cannot be read is reported."""
    try:
        ids, part, x, y, visible = zip(*(line.split() for _, line in numbered), strict=True)
        columns = [[index[id] for id in ids], *(list(map(int, c)) for c in (part, y, x, visible))]
        table = np.array([*columns, [number for number, _ in numbered]], np.int64).T
        if (np.abs(table[:, 1:5]) < _BEYOND).all():
            return table
    except (ValueError, KeyError, OverflowError):
        pass
    rows = []
    for number, line in numbered:
        key, *words = line.split()
        try:
            p, x_, y_, v = _integers(words)
        except (ValueError, OverflowError):
            found = f"expected id, part, x, y, visible: {line.strip()!r}"
            problems.error(path, number, found, f"write the line as {_FORMAT[path.name]}")
            continue
        if key in index:
            rows.append((index[key], p, y_, x_, v, number))
        else:
            problems.error(path, number, f"{key} is not in images.txt", "delete the line, or add the picture there")
    return np.array(rows, np.int64).reshape(-1, 6)


def _captions(path: Path, files: Table, problems: Problems) -> dict[str, str]:
    try:
        captions = read_captions(path)
    except UserError as error:
        problems.error(path, None, str(error).removeprefix(f"{path}: "), 'write {"ID": "caption", ...}')
        return {}
    for id in captions:
        if id not in files:
            problems.warn(path, None, f"caption of {id}, which is not in images.txt", "ignored; delete it")
    return captions
