"""Any folder of pictures with a list of them, manifest.csv: one row per picture, columns in any order.

    image            path below the folder (required)
    class            name of the leaf class; equal names are one proxy identity (required)
    id               default: the path without its suffix
    split            train or test; default: train
    taxonomy         names from the root to above the class, separated by ' > '
    box              left top right bottom in pixels, right and bottom excluded, space-separated
    mask, depth      paths below the folder; default: masks/... and depth/... beside images/..., as .png, if there
    keypoints        'x y visible' for each part, parts separated by ';', the same number in each row
    caption, individual, licence, credit, scientific_name

``individual`` marks pictures that show one true individual. Class ids count the sorted names.
"""

import os
from pathlib import Path, PurePosixPath

import numpy as np

from nabla_jax.data.dataset import Dataset, Example, existing_control
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import read_csv
from nabla_jax.data.taxonomy import normalise_name, parse_path
from nabla_jax.untrusted import below

LIST = "manifest.csv"
REQUIRED = ("image", "class")
COLUMNS = (
    *REQUIRED,
    *("id", "split", "taxonomy", "box", "mask", "depth", "keypoints"),
    *("caption", "individual", "licence", "credit", "scientific_name"),
)


def is_layout(root: Path) -> bool:
    """Whether ``root`` has a manifest."""
    return (root / LIST).is_file()


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads the manifest; no picture is opened. Raises UserError naming file and line."""
    problems = Problems()
    dataset = scan(Path(root), problems)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems) -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems`` and returns the examples that are whole."""
    path = root / LIST
    rows = read_csv(path, REQUIRED, problems, COLUMNS)
    ids = {name: i for i, name in enumerate(sorted({normalise_name(values["class"]) for _, values in rows}))}
    taxonomies: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    parts: int | None = None
    examples = []
    for line, values in rows:
        before = len(problems.errors)
        image = _file(root, values["image"], "image", path, line, problems)
        mask, depth = (
            _file(root, values[c], c, path, line, problems)
            if values.get(c)
            else (existing_control(root, image, folder) if image is not None else None)
            for c, folder in (("mask", "masks"), ("depth", "depth"))
        )
        # A name that is none, such as ".", is told of above and has no suffix to take off.
        id = values.get("id") or str(PurePosixPath(values["image"]).with_suffix("") if image else values["image"])
        if lines.setdefault(id, line) != line:
            found = f"id {id} is that of line {lines[id]} too, expected one row for each picture"
            problems.error(path, line, found, "delete a row, or give the picture an id of its own")
        split = values.get("split") or "train"
        if split not in ("train", "test"):
            problems.error(path, line, f"split: found {split!r}, expected train or test", "write train or test")
        name = normalise_name(values["class"])
        taxonomy = parse_path(values.get("taxonomy", ""), name)
        if taxonomies.setdefault(name, taxonomy) != taxonomy:
            found = f"class {name} is {' > '.join(taxonomy)} here and {' > '.join(taxonomies[name])} above"
            problems.error(path, line, found, "give a class one taxonomy")
        keypoints = _keypoints(values.get("keypoints", ""), path, line, problems)
        if keypoints is not None and parts not in (None, len(keypoints)):
            problems.error(
                path, line, f"keypoints: found {len(keypoints)} parts, expected {parts} as above", "list the same parts"
            )
        elif keypoints is not None:
            parts = len(keypoints)
        box = _box(values.get("box", ""), path, line, problems)
        if image is None or len(problems.errors) > before:
            continue
        examples.append(
            Example(
                id=id,
                image=image,
                class_id=ids[name],
                class_name=name,
                taxonomy=taxonomy,
                box=box,
                mask=mask,
                depth=depth,
                keypoints=keypoints,
                caption=values.get("caption") or None,
                individual=values.get("individual") or None,
                split=split,
                licence=values.get("licence") or None,
                credit=values.get("credit") or None,
                scientific_name=values.get("scientific_name") or None,
            )
        )
    if not rows and not problems.errors:
        problems.error(path, None, "found no picture, expected at least one", "add a row for each picture")
    return Dataset(root.name, root, tuple(examples))


def _file(root: Path, name: str, column: str, path: Path, line: int, problems: Problems) -> Path | None:
    file = below(root, name)
    if file is None:
        problems.error(path, line, f"{column}: {name} leaves the folder", f"write the path below {root}")
        return None
    if not file.is_file():
        problems.error(path, line, f"{column}: found no picture {file}", "put it there, or correct the path")
        return None
    return file


def _box(text: str, path: Path, line: int, problems: Problems) -> tuple[int, int, int, int] | None:
    if not text:
        return None
    try:
        left, top, right, bottom = (int(word) for word in text.split())
    except ValueError:
        left, top, right, bottom = 0, 0, 0, 0
    if not (0 <= left < right and 0 <= top < bottom):
        found = f"box: found {text!r}, expected left top right bottom with 0 <= left < right and 0 <= top < bottom"
        problems.error(path, line, found, "write four integers separated by spaces")
        return None
    return top, left, bottom, right


def _keypoints(
    text: str, path: Path, line: int, problems: Problems
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]] | None:
    if not text:
        return None
    try:
        points = [[int(word) for word in part.split()] for part in text.split(";") if part.strip()]
        if any(len(point) != 3 for point in points):
            raise ValueError
    except ValueError:
        found = f"keypoints: found {text!r}, expected 'x y visible' for each part"
        problems.error(path, line, found, "write three integers for each part, parts separated by ';'")
        return None
    if any(abs(number) >= 2**31 for point in points for number in point):
        problems.error(path, line, f"keypoints: found {text!r}, expected pixels", "write the points' places in pixels")
        return None
    return np.array([(y, x, visible) for x, y, visible in points], np.int32)
