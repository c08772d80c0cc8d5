"""What reviewers said of pairs: read from the files that their pages gave them, settled, and written as a pair list."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nabla_jax import runs
from nabla_jax.data.dataset import Dataset
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import header_of, read_csv
from nabla_jax.errors import UserError
from nabla_jax.untrusted import whole_number

COLUMNS = ("class_id", "image_1", "image_2", "reviewer", "verdict")
ACCEPT, REJECT, SKIP = "accept", "reject", "skip"
VERDICTS = (ACCEPT, REJECT, SKIP)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One reviewer's word on one pair; pictures are ids of the data set."""

    first: str
    second: str
    reviewer: str
    verdict: str

    @property
    def pair(self) -> frozenset[str]:
        """The two pictures in no order."""
        return frozenset((self.first, self.second))


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A pair for the list, and who accepted it."""

    first: str
    second: str
    reviewers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settled:
    """All judged pairs, each in one place."""

    accepted: tuple[Accepted, ...]
    rejected: frozenset[frozenset[str]]  # by all who decided
    disputed: frozenset[frozenset[str]]  # accepted by one, rejected by another
    open: frozenset[frozenset[str]]  # skipped, or accepted by too few


def read(paths: Sequence[Path], dataset: Dataset) -> list[Verdict]:
    """The verdicts of all files. A row that repeats another changes nothing.

    Raises UserError naming line and column: for a malformed file, a picture that the data set lacks or has in another
    class, and a reviewer who says two things of one pair.
    """
    problems = Problems()
    by_file = {e.image.relative_to(dataset.root).as_posix(): e for e in dataset.examples}
    found: dict[tuple[frozenset[str], str], tuple[Verdict, str]] = {}
    for path in paths:
        for line, row in read_csv(path, COLUMNS, problems, COLUMNS):
            if row["verdict"] not in VERDICTS:
                said = f"verdict: found {row['verdict']!r}"
                problems.error(path, line, said, f"write one of {', '.join(VERDICTS)}")
                continue
            sides = []
            for column in ("image_1", "image_2"):
                example = by_file.get(PurePosixPath(row[column]).as_posix())
                if example is None:
                    said = f"{column}: {row[column]} is not a picture of {dataset.root}"
                    problems.error(path, line, said, "was the page made for another folder?")
                elif whole_number(row["class_id"]) != example.class_id:
                    said = f"class_id {row['class_id']}, but {column} is of class {example.class_id}"
                    problems.error(path, line, said, "correct the class or the picture")
                else:
                    sides.append(example.id)
            if len(sides) < 2:
                continue
            if sides[0] == sides[1]:
                problems.error(path, line, "image_1 and image_2 are one picture, expected two", "delete the row")
                continue
            verdict = Verdict(sides[0], sides[1], row["reviewer"], row["verdict"])
            before, where = found.setdefault((verdict.pair, verdict.reviewer), (verdict, f"{path}:{line}"))
            if before.verdict != verdict.verdict:
                said = f"{verdict.reviewer} says {verdict.verdict} here and {before.verdict} at {where}"
                problems.error(path, line, said, "keep one of the two rows")
    problems.refuse()
    return [verdict for verdict, _ in found.values()]


def settle(verdicts: Sequence[Verdict], agree: int = 1) -> Settled:
    """Each pair in its place: accepted if at least ``agree`` reviewers accept it and nobody rejects it."""
    by_pair: dict[frozenset[str], list[Verdict]] = {}
    for verdict in verdicts:
        by_pair.setdefault(verdict.pair, []).append(verdict)
    accepted: list[Accepted] = []
    rejected: set[frozenset[str]] = set()
    disputed: set[frozenset[str]] = set()
    undecided: set[frozenset[str]] = set()
    for pair, own in by_pair.items():
        said = [v.verdict for v in own]
        if REJECT in said:
            (disputed if ACCEPT in said else rejected).add(pair)
        elif said.count(ACCEPT) >= agree:
            names = tuple(v.reviewer for v in own if v.verdict == ACCEPT)
            accepted.append(Accepted(own[0].first, own[0].second, names))
        else:
            undecided.add(pair)
    return Settled(tuple(accepted), frozenset(rejected), frozenset(disputed), frozenset(undecided))


def row(dataset: Dataset, first: str, second: str) -> tuple[str, str, str]:
    """(class_id, image_1, image_2) of a pair of ids, as pair lists have them."""
    files = [dataset.by_id[id].image.relative_to(dataset.root).as_posix() for id in (first, second)]
    return f"{dataset.by_id[first].class_id:04d}", files[0], files[1]


def check_list(path: Path, dataset: Dataset) -> None:
    """Raises UserError if a pair list at ``path`` would not be read with the data set, or is one that nobody judged."""
    if path.parent.resolve() != dataset.root.resolve():
        raise UserError(
            f"--list: found {path}, expected a file in {dataset.root}: a pair list lies beside its pictures"
        )
    if path.exists() and not {"reviewer", "verdict"} <= set(header_of(path)):
        raise UserError(f"{path}: is a list without reviewers: name another with --list, or move it away")


def write_list(path: Path, accepted: Sequence[Accepted], dataset: Dataset) -> None:
    """Writes the accepted pairs as a pair list of ``dataset``, by class; see ``check_list``."""
    by_class = sorted(accepted, key=lambda a: dataset.by_id[a.first].class_id)
    rows = [(*row(dataset, a.first, a.second), "; ".join(a.reviewers), ACCEPT) for a in by_class]
    runs.write_atomic(path, table(COLUMNS, rows))


def describe(settled: Settled, dataset: Dataset) -> list[str]:
    """How the verdicts turned out, in lines of text."""
    classes = {dataset.by_id[a.first].class_id for a in settled.accepted}
    people = sorted({name for a in settled.accepted for name in a.reviewers})
    lines = [
        f"  pairs: {len(settled.accepted):,}, of {len(classes):,} classes, accepted by {', '.join(people)}",
        f"  not listed: {len(settled.rejected):,} rejected, {len(settled.disputed):,} disputed, "
        f"{len(settled.open):,} open",
    ]
    places = Counter(id for a in settled.accepted for id in (a.first, a.second))
    several = sum(count > 1 for count in places.values())
    if several:
        lines.append(f"  {several:,} pictures are in more than one pair: their proposals were made apart (--after)")
    return lines


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """CSV text with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
