"""What a pair list holds, row by row, from the list alone: ``prepare --validate --pairs FILE...``.

Every row is accounted for: as a pair of its own or as a repetition, by how its photos are named, and, for a list of
unseen species, as strictly unseen or as one of the seen. No picture is needed; with a NABirds folder, classes get
species names.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from nabla_jax.data import inaturalist
from nabla_jax.data.dataset import Dataset
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import header_of, read_csv
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.untrusted import whole_number

Kind = Literal["classes", "seen", "unseen"]

PUBLISHED: dict[Kind, tuple[str, str]] = {
    "classes": ("nabla_pairs.csv", "fea3f0a0c946180f496fa554c41a55a23585889545c8564f27dca477aa06f250"),
    "seen": ("inat_nabirds_pairs.csv", "806330bdb9205b2bdd38c5d6b086c618ba7768004f50867d5ae31f4cc7c18bc3"),
    "unseen": ("inat_unseen_pairs.csv", "75f16139bb91854c697b609a471f9e6997f24773aa8bd7d497c4a9de9257a817"),
}
"""Kind -> (name, sha256) of the list that the paper's authors published."""

TITLES: dict[Kind, str] = {
    "classes": "pairs of a NABirds folder",
    "seen": "iNaturalist pairs of seen species",
    "unseen": "iNaturalist pairs of unseen species",
}
Named = tuple[tuple[int, str, str], ...]
"""(line, common name, scientific name) of some rows."""

CLASS_COLUMNS = ("class_id", "image_1", "image_2")


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of one list, counted in every way that matters. Line numbers count the file's lines from 1."""

    path: Path
    kind: Kind
    sha256: str
    rows: int
    exact: tuple[tuple[int, int], ...]  # (line, earlier line with the same two pictures in the same order)
    mirrored: tuple[tuple[int, int], ...]  # (line, earlier line with them in the other order)
    pictures: int  # distinct
    reused: int  # pictures that occur in more than one place
    capital: tuple[int, ...]  # lines with a name in .JPG
    capital_names: int
    positional: tuple[int, ...]  # lines with a photo_<n>
    groups: int  # classes, or species
    species: int | None  # None where only class ids are known
    observations: int
    dates: dict[str, int]  # format of observed_on -> rows
    hyphens: tuple[int, ...]  # lines whose common name and query_species differ in punctuation alone
    seen: Named | None  # rows of seen species; None: no seen list to compare with
    half_seen: Named  # crosses whose second parent alone is seen

    @property
    def unique(self) -> int:
        """Unordered pairs of pictures."""
        return self.rows - len(self.exact) - len(self.mirrored)


def kind_of(path: Path) -> Kind:
    """Which kind of list this is, by its columns. Raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a pair list")
    header = header_of(path)
    if "observation_id" in header:
        return "seen" if "query_species" in header else "unseen"
    if "class_id" in header:
        return "classes"
    raise UserError(
        f"{path}:1: found columns {', '.join(header) or 'none'}, "
        f"expected {', '.join(CLASS_COLUMNS)} or {', '.join(inaturalist.COLUMNS)}"
    )


def report_all(
    paths: Sequence[Path], problems: Problems, dataset: Dataset | None = None, *, published: bool = True
) -> list[Report]:
    """A report of each list; lists of unseen species are compared with the seen ones among them and ``dataset``.

    With ``published``, a list that is not the one its authors published is a warning. Rows that cannot be read go to
    ``problems``. Raises UserError for a file that is no pair list.
    """
    kinds = [kind_of(path) for path in paths]
    tables = [_rows(path, kind, problems) for path, kind in zip(paths, kinds, strict=True)]
    seen = [row for kind, table in zip(kinds, tables, strict=True) if kind == "seen" for row in table]
    names = {e.species for e in dataset.examples} if dataset is not None else set()
    reports = [
        _report(path, kind, table, seen, names, dataset, problems)
        for path, kind, table in zip(paths, kinds, tables, strict=True)
    ]
    for report in reports:
        name, sha256 = PUBLISHED[report.kind]
        if published and report.sha256 != sha256:
            problems.warn(
                report.path,
                None,
                f"sha256 {report.sha256}, expected {sha256} of the published {name}",
                "numbers on this list compare with published ones only if it holds the same pairs: get that file",
            )
    return reports


def strictly_unseen(report: Report) -> str:
    """The text of an unseen list without the rows of seen species, lines kept as they are.

    Raises UserError for a list that is not of unseen species, or that was compared with no seen list.
    """
    if report.kind != "unseen" or report.seen is None:
        raise UserError(f"{report.path}: expected a list of unseen species, and a seen list to compare it with")
    drop = {line for line, _, _ in report.seen}
    with report.path.open(encoding="utf-8-sig", newline="") as text:
        return "".join(line for number, line in enumerate(text, 1) if number not in drop)


def _rows(path: Path, kind: Kind, problems: Problems) -> list[inaturalist.Row]:
    if kind != "classes":
        return inaturalist.scan_rows(path, problems)
    rows = []
    for number, (line, values) in enumerate(read_csv(path, CLASS_COLUMNS, problems)):
        rows.append(inaturalist.Row(number, line, "", values))
        if values["image_1"] == values["image_2"]:
            problems.error(
                path, line, "image_1 and image_2 are one picture, expected two", "name two pictures, or delete the row"
            )
        for column in ("image_1", "image_2"):
            folder = PurePosixPath(values[column]).parent.name
            inside, stated = whole_number(folder), whole_number(values["class_id"])
            if inside is not None and stated is not None and inside != stated:
                found = f"class_id {values['class_id']}, but {column} lies in the folder of class {inside}"
                problems.error(path, line, found, "correct the class or the picture")
    return rows


def _report(
    path: Path,
    kind: Kind,
    rows: Sequence[inaturalist.Row],
    seen: Sequence[inaturalist.Row],
    names: set[str],
    dataset: Dataset | None,
    problems: Problems,
) -> Report:
    exact, mirrored = _repeated(rows)
    places = collections.Counter(_picture(row, c) for row in rows for c in ("image_1", "image_2"))
    capital = [row.line for row in rows for c in ("image_1", "image_2") if row.values[c].endswith(".JPG")]
    positional = [
        row.line
        for row in rows
        if kind != "classes" and any(row.position(c) is not None for c in ("image_1", "image_2"))
    ]
    species: int | None = None
    if kind != "classes":
        species = len({row.species for row in rows})
    elif dataset is not None:
        _resolve(path, rows, dataset, problems)
        by_class = {e.class_id: e.species for e in dataset.examples}
        classes = {whole_number(row.values["class_id"]) for row in rows}
        species = len({by_class[c] for c in classes if c in by_class})
    among: Named | None = None
    half: Named = ()
    if kind == "unseen" and (seen or names):
        among = _named(inaturalist.contaminated(rows, seen, names))
        taxa = {inaturalist.binomial(row.values.get("scientific_name", "")) for row in seen}
        dropped = {line for line, _, _ in among}
        half = _named(
            row
            for row in rows
            if row.line not in dropped and taxa & {*inaturalist.parents(row.values.get("scientific_name", ""))}
        )
    return Report(
        path=path,
        kind=kind,
        sha256=file_sha256(path),
        rows=len(rows),
        exact=exact,
        mirrored=mirrored,
        pictures=len(places),
        reused=sum(count > 1 for count in places.values()),
        capital=tuple(dict.fromkeys(capital)),
        capital_names=len(capital),
        positional=tuple(positional),
        groups=len({row.values["class_id"] for row in rows}) if kind == "classes" else len({r.species for r in rows}),
        species=species,
        observations=0 if kind == "classes" else len({row.observation for row in rows}),
        dates={} if kind == "classes" else _dates(rows),
        hyphens=tuple(row.line for row in rows if kind == "seen" and _differ_in_hyphens(row)),
        seen=among,
        half_seen=tuple(half),
    )


def _picture(row: inaturalist.Row, column: str) -> str:
    # photo_1.jpg occurs in many observations: the name alone is no key.
    return f"{row.observation}/{PurePosixPath(row.values[column]).as_posix()}"


def _repeated(rows: Sequence[inaturalist.Row]) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    first: dict[frozenset[str], tuple[int, set[tuple[str, str]]]] = {}
    exact: list[tuple[int, int]] = []
    mirrored: list[tuple[int, int]] = []
    for row in rows:
        pair = (_picture(row, "image_1"), _picture(row, "image_2"))
        if frozenset(pair) not in first:
            first[frozenset(pair)] = row.line, {pair}
            continue
        line, orders = first[frozenset(pair)]
        (exact if pair in orders else mirrored).append((row.line, line))
        orders.add(pair)
    return tuple(exact), tuple(mirrored)


def _named(rows: Iterable[inaturalist.Row]) -> Named:
    return tuple((row.line, row.values["common_name"], row.values.get("scientific_name", "")) for row in rows)


def _differ_in_hyphens(row: inaturalist.Row) -> bool:
    common, query = row.values["common_name"], row.values["query_species"]
    plain = common.replace("'", "").replace("’", "").casefold()
    query = query.replace("'", "").replace("’", "").casefold()
    return plain != query and inaturalist.name_key(plain) == inaturalist.name_key(query)


def _dates(rows: Sequence[inaturalist.Row]) -> dict[str, int]:
    kinds: collections.Counter[str] = collections.Counter()
    for row in rows:
        text = row.values.get("observed_on", "")
        if not text or row.observed is None:
            kinds["none" if not text else "unreadable"] += 1
        elif row.observed.tzinfo is not None:
            kinds["date, time and zone"] += 1
        elif "T" in text:
            kinds["date T time"] += 1
        elif text.upper().endswith(("AM", "PM")):
            kinds["date and AM/PM"] += 1
        else:
            kinds["date and time"] += 1
    return dict(kinds.most_common())


def _resolve(path: Path, rows: Sequence[inaturalist.Row], dataset: Dataset, problems: Problems) -> None:
    """Reports the pictures that the folder lacks or has in another class."""
    by_file = {e.image.relative_to(dataset.root).as_posix(): e for e in dataset.examples}
    for row in rows:
        for column in ("image_1", "image_2"):
            name = PurePosixPath(row.values[column]).as_posix()
            example = by_file.get(name)
            if example is None:
                problems.error(
                    path, row.line, f"{column}: {name} is not a picture of {dataset.root}", "check name and suffix"
                )
            elif row.values["class_id"] not in (str(example.class_id), f"{example.class_id:04d}"):
                found = f"class_id {row.values['class_id']}, but {column} is of class {example.class_id}"
                problems.error(path, row.line, found, "correct the class or the picture")


# ------------------------------------------------------------------------------------------------------------
# In words
# ------------------------------------------------------------------------------------------------------------


def describe(report: Report) -> list[str]:
    """The report as lines of text."""
    published = report.sha256 == PUBLISHED[report.kind][1]
    out = [
        f"{report.path}: {TITLES[report.kind]}",
        f"  sha256 {report.sha256}: {'as published' if published else 'not the published list'}",
        f"  {report.rows:,} rows = {report.unique:,} pairs + {len(report.exact)} exact "
        f"+ {len(report.mirrored)} mirrored repetitions; both directions: {2 * report.rows:,}",
    ]
    for name, repeated in (("exact", report.exact), ("mirrored", report.mirrored)):
        if repeated:
            out.append(f"    {name}: " + ", ".join(f"line {line} repeats {first}" for line, first in repeated))
    reused = f", {report.reused:,} of them in more than one" if report.reused else ", none of them in two"
    out.append(f"  {report.pictures:,} pictures in {2 * report.rows:,} places{reused}")
    if report.kind == "classes":
        known = "" if report.species is None else f" of {report.species:,} species"
        out.append(f"  {report.groups:,} classes{known}")
    else:
        out.append(f"  {report.observations:,} observations of {report.groups:,} species")
        by_id = report.rows - len(report.positional)
        out.append(
            f"  {report.rows:,} rows = {by_id:,} with photos named by id + {len(report.positional)} by position "
            f"(photo_<n>, keyed by observation){_lines(report.positional)}"
        )
        out.append("  observed_on: " + ", ".join(f"{count} {name}" for name, count in report.dates.items()))
    out.append(f"  {len(report.capital)} rows ({report.capital_names} names) in .JPG{_lines(report.capital)}")
    if report.hyphens:
        out.append(
            f"  {len(report.hyphens)} rows whose common_name and query_species differ by a hyphen alone"
            f"{_lines(report.hyphens)}"
        )
    if report.kind == "unseen" and report.seen is None:
        out.append("  not compared with seen species: name the seen list too, or a NABirds folder")
    elif report.seen is not None:
        out.append(
            f"  {report.rows:,} rows = {report.rows - len(report.seen):,} strictly unseen "
            f"+ {len(report.seen)} of seen species:"
        )
        out += [f"    line {line}: {common} ({scientific})" for line, common, scientific in report.seen]
        out += [
            f"    line {line}: {common} ({scientific}) is a cross whose second parent alone is seen; strictly unseen"
            for line, common, scientific in report.half_seen
        ]
    return out


def _lines(numbers: Sequence[int]) -> str:
    return f": lines {' '.join(map(str, numbers))}" if numbers else ""
