"""Pictures that a source keeps inside other files (shards, videos), written beside it once, below unpacked/.

    FOLDER/...              the pictures
    FOLDER/index.json       what they were made from and one row per picture, written last

A folder whose index says it was made from the same things is used as it is; one that was interrupted is made again,
which finds its pictures and writes only what is missing.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import runs, untrusted
from nabla_jax.errors import UserError

FOLDER = "unpacked"
INDEX = "index.json"

Row = dict[str, Any]


def rows(
    folder: Path, made_from: Any, make: Callable[[Path], Iterable[Row]], kind: Any, files: Sequence[str]
) -> list[Row]:
    """The rows of ``folder``'s index, made by ``make(folder)`` where it has none from the same things.

    ``made_from`` is plain JSON that the pictures depend on. ``make`` writes pictures with ``write`` and gives a row of
    plain JSON for each, a TypedDict ``kind``; ``files`` are its fields that hold paths below the folder.

    Raises UserError when the folder cannot be written, and for an index with other fields or with paths that leave it.
    """
    index = folder / INDEX
    if index.is_file():
        found = runs.read_json(index)
        if isinstance(found, dict) and found.get("made_from") == made_from:
            return _checked(index, found.get("rows"), kind, files)
    with runs.lock(folder / ".lock", str(folder)):
        made = list(make(folder))
        runs.write_json(index, {"made_from": made_from, "rows": made})
    return made


def _checked(index: Path, found: Any, kind: Any, files: Sequence[str]) -> list[Row]:
    """The rows of an index, which may have come with the folder."""
    rows: list[Row] = found
    try:
        untrusted.check(rows, list[kind], str(index), "rows")
        for row in rows:
            for name in (name for name in files if name in row):
                file = untrusted.below(index.parent, row[name]) if type(row[name]) is str else None
                if file is None or not file.is_file():
                    what = f"{name}: found {str(row[name])[:100]!r}"
                    raise UserError(f"{index}: {what}, expected the path of a file below the folder")
    except UserError as error:
        raise UserError(f"{error}; delete {index.parent} to have it made again") from error
    return rows


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically, unless the same bytes are there already."""
    if not (path.is_file() and path.read_bytes() == data):
        runs.write_atomic(path, data)
