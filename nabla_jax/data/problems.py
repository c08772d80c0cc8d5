"""What is wrong with a data folder: collected by every reader, refused by the verbs, listed by --validate."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nabla_jax.errors import UserError

Level = Literal["error", "warning"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing to mend. An error keeps the folder from being read; a warning names what was done instead."""

    file: Path
    line: int | None  # from 1; None for the whole file or folder
    what: str  # found, and expected
    fix: str
    level: Level = "error"

    def __str__(self) -> str:
        return f"{self.file}:{'' if self.line is None else f'{self.line}:'} {self.what}"


class Problems:
    """Collects problems, so that one pass over a folder finds them all."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.notes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the folder from being read."""
        return [problem for problem in self.found if problem.level == "error"]

    def error(self, file: Path, line: int | None, what: str, fix: str) -> None:
        """Adds a problem that keeps the folder from being read."""
        self.found.append(Problem(file, line, what, fix))

    def warn(self, file: Path, line: int | None, what: str, fix: str) -> None:
        """Adds a problem that the reader gets along with; ``fix`` says how."""
        self.found.append(Problem(file, line, what, fix, "warning"))

    def note(self, what: str, count: int = 1) -> None:
        """Counts a peculiarity that needs no mending."""
        self.notes[what] += count

    def refuse(self, root: str | os.PathLike[str] | None = None) -> None:
        """Raises UserError with the first error and the number of others; warnings alone pass.

        ``root``: the data folder that they are of, where a command lists them all.
        """
        errors = self.errors
        if not errors:
            return
        others = ""
        if len(errors) > 1:
            listed = "" if root is None else f": python -m nabla_jax.prepare --validate {root} lists all"
            others = f" (and {len(errors) - 1} more{listed})"
        raise UserError(f"{errors[0]}; {errors[0].fix}{others}")
