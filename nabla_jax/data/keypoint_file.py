"""Keypoints that were found, not annotated: keypoints.json at the top of a dataset folder of any layout.

    {"ID": [[x, y, visible], ...], ...}      a row for each of the eleven parts of ``skeleton.PARTS``, in their order

Annotations of a picture, such as NABirds' ``parts/part_locs.txt``, go before it. ``nabla_jax.extract`` writes the file.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax import runs
from nabla_jax.data.dataset import Dataset
from nabla_jax.data.problems import Problems
from nabla_jax.data.skeleton import PARTS
from nabla_jax.errors import UserError
from nabla_jax.untrusted import parse_json

FILE = "keypoints.json"

Array = np.ndarray[Any, Any]
Rows = list[list[int]]


def read(path: Path) -> dict[str, Rows]:
    """Id -> rows (x, y, visible) of the parts; an absent file means none. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected one object of id: rows")
    for id, rows in found.items():
        whole = isinstance(rows, list) and len(rows) == len(PARTS)
        if not whole or not all(
            isinstance(row, list) and len(row) == 3 and all(_is_pixel(value) for value in row) for row in rows
        ):
            raise UserError(f"{path}: {id}: expected {len(PARTS)} rows of three integers, x y visible")
    return found


def _is_pixel(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**31


def write(path: Path, keypoints: Mapping[str, Rows]) -> None:
    """Writes the file in one step, a line for each picture; the inverse of ``read``."""
    lines = [f"{json.dumps(id)}: {json.dumps(rows)}" for id, rows in keypoints.items()]
    runs.write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def to_rows(keypoints: Array) -> Rows:
    """Keypoints [11, 3] int (row, column, visible) as the file has them; hidden parts are 0 0 0."""
    return [[int(x), int(y), 1] if visible else [0, 0, 0] for y, x, visible in keypoints]


def from_rows(rows: Rows) -> Array:
    """The inverse of ``to_rows``: [11, 3] int32 (row, column, visible)."""
    return np.array(rows, np.int32)[:, [1, 0, 2]]


def add(dataset: Dataset, problems: Problems) -> Dataset:
    """The dataset with the file's keypoints where a picture has no others; what is wrong goes to ``problems``."""
    path = dataset.root / FILE
    try:
        found: Mapping[str, Rows] = read(path)
    except UserError as error:
        fix = 'write {"ID": [[x, y, visible], ...], ...}'
        problems.error(path, None, str(error).removeprefix(f"{path}: "), fix)
        return dataset
    if not found:
        return dataset
    for id in sorted(found.keys() - dataset.by_id.keys()):
        problems.warn(path, None, f"keypoints of {id}, which is no picture of the folder", "ignored; delete them")
    examples = tuple(
        dataclasses.replace(example, keypoints=from_rows(found[example.id]))
        if example.keypoints is None and example.id in found
        else example
        for example in dataset.examples
    )
    return dataclasses.replace(dataset, examples=examples)
