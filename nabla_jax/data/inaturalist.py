"""The iNaturalist pair-list layout: one row per observation, two photos of the same bird.

    final_pairs.csv (or pairs.csv)   observation_id, common_name, relative_path, image_1, image_2, and
    optionally                       scientific_name, query_species, observed_on, photo_count, user_login,
                                     inat_url, licence, taxonomy (names above the species: Birds > Larks)
    RELATIVE_PATH/IMAGE              for example images/Cactus_Wren/123456/987654.jpg
    mask/..., depth/...              the same path with images replaced by mask or depth, as .png
    captions_short.json              by "<observation id>_<file stem>"
    manifest.jsonl                   licence and attribution of each photo, as nabla_jax.fetch writes it

A photo's name alone is not unique (photo_1.jpg occurs in many observations): its id is "<observation
id>_<stem>".
"""

import dataclasses
import datetime
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from nabla_jax import runs
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.nabirds import read_captions
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import header_of, read_csv
from nabla_jax.data.taxonomy import normalise_name, parse_path
from nabla_jax.errors import UserError
from nabla_jax.untrusted import below, is_file_name, whole_number

LISTS = ("final_pairs.csv", "pairs.csv")
COLUMNS = ("observation_id", "common_name", "relative_path", "image_1", "image_2")
_POSITION = re.compile(r"photo_([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the pair list; ``number`` counts rows from 0, ``line`` lines of the file from 1."""

    number: int
    line: int
    observation: str
    values: dict[str, str]

    def id(self, column: str) -> str:
        """Example id of the photo in ``image_1`` or ``image_2``."""
        return f"{self.observation}_{Path(self.values[column]).stem}"

    def position(self, column: str) -> int | None:
        """n of a photo named photo_<n>, its place within the observation; None for one named by its own id."""
        found = _POSITION.fullmatch(Path(self.values[column]).stem)
        return whole_number(found.group(1)) if found else None

    @property
    def species(self) -> str:
        """``query_species`` where the list has it, or else ``common_name``."""
        return normalise_name(self.values.get("query_species") or self.values["common_name"])

    @property
    def taxonomy(self) -> tuple[str, ...]:
        """Names from the root to the species; just two where the list has no column ``taxonomy``."""
        return parse_path(self.values.get("taxonomy") or "Birds", self.species)

    @property
    def observed(self) -> datetime.datetime | None:
        """When; aware of its time zone only where the list is."""
        return parse_date(self.values.get("observed_on", ""))


class _Fetched(TypedDict):
    """What is read of every row of manifest.jsonl."""

    image: str


def parse_date(text: str) -> datetime.datetime | None:
    """The moment in one of the lists' formats, or None.

    2023-06-24 18:29:00; 2024-05-01 7:42 PM; 2022-03-05 11:03:27-04:00; 2025-08-31T17:58.
    """
    for parse in (datetime.datetime.fromisoformat, lambda t: datetime.datetime.strptime(t, "%Y-%m-%d %I:%M %p")):
        try:
            return parse(text.strip())
        except ValueError:
            continue
    return None


def list_path(root: Path) -> Path | None:
    """The pair list of ``root``, if it is one with observations."""
    for name in LISTS:
        path = root / name
        if path.is_file() and "observation_id" in header_of(path):
            return path
    return None


def is_layout(root: Path) -> bool:
    """Whether ``root`` looks like a folder with an iNaturalist pair list."""
    return list_path(root) is not None


def rows(root: str | os.PathLike[str], path: Path | None = None) -> list[Row]:
    """The lines of the folder's pair list, or of another list ``path``. Raises UserError naming file and line."""
    path = list_path(Path(root)) if path is None else path
    if path is None:
        raise UserError(f"{root}: found no {LISTS[0]} with a column observation_id")
    problems = Problems()
    found = scan_rows(path, problems)
    problems.refuse(root)
    return found


def scan_rows(path: Path, problems: Problems) -> list[Row]:
    """The rows of the pair list ``path`` that are whole; what is wrong goes to ``problems``."""
    found = []
    for number, (line, values) in enumerate(read_csv(path, COLUMNS, problems)):
        row = Row(number, line, values["observation_id"], values)
        found.append(row)
        if values["image_1"] == values["image_2"]:
            problems.error(
                path, line, "image_1 and image_2 are one picture, expected two", "name two photos, or delete the row"
            )
        if values.get("observed_on") and row.observed is None:
            problems.warn(
                path,
                line,
                f"observed_on: found {values['observed_on']!r}, expected a date such as 2023-06-24 18:29:00",
                "taken as unknown; write it like 2023-06-24 18:29:00",
            )
        for column in ("image_1", "image_2"):
            if below(Path(), values["relative_path"]) is None:
                what = f"relative_path {values['relative_path']} leaves the folder"
                problems.error(path, line, what, "write it relative to the list")
                break
            if not is_file_name(values[column]):
                what = f"{column}: found {values[column]!r}, expected the name of a file"
                problems.error(path, line, what, "write the folder as relative_path")
        url = values.get("inat_url", "")
        if url and url.rstrip("/").rsplit("/", 1)[-1] != row.observation:
            problems.warn(
                path,
                line,
                f"inat_url {url} is not observation {row.observation}",
                "the id is used; correct one of them",
            )
        count = values.get("photo_count", "")
        for column in ("image_1", "image_2"):
            place = row.position(column)
            photos = whole_number(count)
            if place is not None and photos is not None and not 1 <= place <= photos:
                problems.warn(
                    path,
                    line,
                    f"{column}: {values[column]} is not one of the {count} photos of observation {row.observation}",
                    "kept; correct the name or photo_count",
                )
    if not found and not problems.errors:
        problems.error(path, None, "found no pair, expected at least one", "add a row for each pair")
    return found


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads the pair list; no picture is opened. Every photo is of split 'test'.

    A class is a species: ``query_species`` where the list has it, or else ``common_name``; ids count the
    sorted names. The individual is the observation. Raises UserError naming file and line.
    """
    problems = Problems()
    dataset = scan(Path(root), problems)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems) -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems`` and returns the examples that are whole."""
    path = list_path(root)
    if path is None:
        problems.error(root, None, f"found no {LISTS[0]} with a column observation_id", "copy the pair list there")
        return Dataset(root.name, root, ())
    table = scan_rows(path, problems)
    ids = {name: i for i, name in enumerate(sorted({row.species for row in table}))}
    try:
        captions = read_captions(root / "captions_short.json")
    except UserError as error:
        file = root / "captions_short.json"
        problems.error(file, None, str(error).removeprefix(f"{file}: "), 'write {"OBSERVATION_STEM": "caption", ...}')
        captions = {}
    fetched = _fetched(root / "manifest.jsonl", problems)
    examples: dict[str, Example] = {}
    taxonomies: dict[str, tuple[str, ...]] = {}
    for row in table:
        name = row.species
        if taxonomies.setdefault(name, row.taxonomy) != row.taxonomy:
            found = f"species {name} is {' > '.join(row.taxonomy)} here and {' > '.join(taxonomies[name])} above"
            problems.error(path, row.line, found, "give a species one taxonomy")
            continue
        for column in ("image_1", "image_2"):
            image = below(root, f"{row.values['relative_path']}/{row.values[column]}")
            if image is None:
                continue  # a problem of the row already
            if not image.is_file():
                problems.error(
                    path, row.line, f"{column}: found no picture {image}", "python -m nabla_jax.fetch downloads it"
                )
                continue
            id = row.id(column)
            if id in examples and examples[id].image != image:
                found = f"{column}: {id} is also {examples[id].image}, expected one file"
                problems.error(path, row.line, found, "rename one of the files")
                continue
            if id in examples and examples[id].class_name != name:
                found = f"{id} is of {name} here and of {examples[id].class_name} above"
                problems.error(path, row.line, found, "give the observation one species")
                continue
            about = fetched.get(image.relative_to(root).as_posix(), {})
            examples[id] = Example(
                id=id,
                image=image,
                class_id=ids[name],
                class_name=name,
                taxonomy=row.taxonomy,
                mask=_control(root, image, "mask"),
                depth=_control(root, image, "depth"),
                caption=captions.get(id),
                individual=row.observation,
                split="test",
                licence=about.get("license_code") or row.values.get("licence") or None,
                credit=about.get("attribution") or row.values.get("user_login") or None,
                scientific_name=row.values.get("scientific_name") or None,
            )
    bare = [example for example in examples.values() if example.mask is None]
    if len(bare) == len(examples) and bare:
        problems.warn(root / "mask", None, f"none of {len(bare)} pictures has a mask", "make them: generate needs them")
    else:
        for example in bare:
            problems.warn(example.image, None, "has no mask", "make it before generate needs it")
    return Dataset(root.name, root, tuple(examples.values()))


def _fetched(path: Path, problems: Problems) -> dict[str, dict[str, Any]]:
    """Path below the folder -> what the fetcher learned of the photo; empty for photos from elsewhere."""
    try:
        return {row["image"]: row for row in runs.read_rows(path, _Fetched)}
    except UserError as error:
        problems.error(path, None, str(error).removeprefix(f"{path}: "), "fetch the photos again")
        return {}


def _control(root: Path, image: Path, folder: str) -> Path | None:
    """The PNG beside ``image``: only the first folder below the root is exchanged."""
    relative = image.relative_to(root)
    path = (root / folder).joinpath(*relative.parts[1:]).with_suffix(".png")
    return path if path.is_file() else None


# ------------------------------------------------------------------------------------------------------------
# Which unseen species are truly unseen
# ------------------------------------------------------------------------------------------------------------


def binomial(scientific_name: str) -> str:
    """Genus and species, without subspecies, form or the second parent of a cross; '' for fewer than two words.

    'Anas crecca crecca × carolinensis' -> 'anas crecca'; 'Columba livia domestica' -> 'columba livia'.
    """
    words = scientific_name.lower().split()
    return " ".join(words[:2]) if len(words) > 1 else ""


def parents(scientific_name: str) -> tuple[str, ...]:
    """The binomials of a cross's parents: 'Anas superciliosa × platyrhynchos' -> both; empty for no cross.

    A parent in one word is a species of the first one's genus, unless the first has a subspecies: then it is another
    subspecies of the same species.
    """
    sides = [side.split() for side in scientific_name.lower().split("×")]
    if len(sides) < 2 or len(sides[0]) < 2:
        return ()
    first = sides[0]
    found = [" ".join(first[:2])]
    for side in sides[1:]:
        if len(side) > 1:
            found.append(" ".join(side[:2]))
        elif side:
            found.append(found[0] if len(first) > 2 else f"{first[0]} {side[0]}")
    return tuple(dict.fromkeys(found))


def name_key(name: str) -> str:
    """A common name without case, hyphens, apostrophes and spaces: "Abert's Towhee" and 'Aberts Towhee' are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def contaminated(unseen: Iterable[Row], seen: Iterable[Row], names: Iterable[str] = ()) -> list[Row]:
    """The rows of an unseen list whose species is one of the seen: the same, or a subspecies, form or cross of it.

    By the first two words of the scientific name, or by the common name among the seen list's and ``names``
    (species of the training set). A cross counts as its first parent.
    """
    seen = list(seen)
    taxa = {binomial(row.values.get("scientific_name", "")) for row in seen} - {""}
    keys = {name_key(name) for name in names}
    keys |= {name_key(name) for row in seen for name in (row.species, row.values["common_name"])}
    return [
        row
        for row in unseen
        if binomial(row.values.get("scientific_name", "")) in taxa or name_key(row.values["common_name"]) in keys
    ]
