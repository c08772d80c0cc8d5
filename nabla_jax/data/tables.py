"""CSV lists with a header, read with line numbers."""

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from nabla_jax.data.nabirds import lines
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError


def header_of(path: Path) -> list[str]:
    """The column names in the first line; empty for a file that cannot be read as text."""
    try:
        found = lines(path)
        return [name.strip() for name in next(csv.reader(text for _, text in found), [])]
    except (UserError, csv.Error):
        return []


def read_csv(
    path: Path, required: Sequence[str], problems: Problems, allowed: Sequence[str] | None = None
) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> text without outer spaces) of each row.

    Added to ``problems`` and left out: rows of another number of fields, and rows with an empty ``required``
    field. A missing column, or one that is not ``allowed`` (None: any), is a problem of line 1; without a required
    column there are no rows.
    """
    try:
        numbered = lines(path)
    except UserError as error:
        problems.error(path, None, str(error).removeprefix(f"{path}: "), "save the list as UTF-8 text")
        return []
    try:
        # With its end, a line that a quoted field goes on from is not taken for a part of the next one.
        reader = csv.reader(f"{text}\n" for _, text in numbered)
        table = [(numbered[reader.line_num - 1][0], words) for words in reader]
    except csv.Error as error:
        line = numbered[min(reader.line_num, len(numbered)) - 1][0]
        problems.error(path, line, f"not CSV ({error})", "quote fields, and end each line with a newline")
        return []
    header = [name.strip() for name in table[0][1]] if table else []
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        problems.error(path, 1, f"column {', '.join(twice)} occurs twice, expected once", "rename or delete one")
        return []
    missing = [name for name in required if name not in header]
    if missing:
        found = f"missing column {', '.join(missing)}"
        problems.error(path, 1, found, f"name the columns in the first line: {', '.join(required)}")
    for name in header:
        if allowed is not None and name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1, 0.5)
            expected = f"expected {close[0]}" if close else f"expected one of {', '.join(allowed)}"
            problems.error(path, 1, f"unknown column {name!r}, {expected}", "rename or delete the column")
    if missing:
        return []
    rows = []
    for line, words in table[1:]:
        if len(words) != len(header):
            found = f"found {len(words)} fields, expected {len(header)}"
            problems.error(path, line, found, "quote fields that hold commas, and write one for each column")
            continue
        values = {name: word.strip() for name, word in zip(header, words, strict=True)}
        empty = [name for name in required if not values[name]]
        if empty:
            problems.error(path, line, f"{empty[0]} is empty", "fill it in, or delete the row")
            continue
        rows.append((line, values))
    return rows
