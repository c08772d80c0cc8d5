"""The iNaturalist pair-list layout: one row per observation, two photos of the same bird.

    final_pairs.csv (or pairs.csv)   observation_id, common_name, relative_path, image_1, image_2, and
    optionally
                                     scientific_name, query_species, user_login, licence
    RELATIVE_PATH/IMAGE              for example images/Cactus_Wren/123456/987654.jpg
    mask/..., depth/...              the same path with images replaced by mask or depth, as .png
    captions_short.json              by "<observation id>_<file stem>"

A photo's name alone is not unique (photo_1.jpg occurs in many observations): its id is "<observation
id>_<stem>".
"""

import csv
import dataclasses
import os
from pathlib import Path

from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.nabirds import lines, read_captions
from nabla_jax.data.taxonomy import normalise_name
from nabla_jax.errors import UserError

LISTS = ("final_pairs.csv", "pairs.csv")
COLUMNS = ("observation_id", "common_name", "relative_path", "image_1", "image_2")


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


def list_path(root: Path) -> Path | None:
    """The pair list of ``root``, if it is one with observations."""
    for name in LISTS:
        path = root / name
        if path.is_file() and any("observation_id" in line for _, line in list(lines(path))[:1]):
            return path
    return None


def is_layout(root: Path) -> bool:
    """Whether ``root`` looks like a folder with an iNaturalist pair list."""
    return list_path(root) is not None


def rows(root: str | os.PathLike[str]) -> list[Row]:
    """The lines of the pair list. Raises UserError naming file and line."""
    path = list_path(Path(root))
    if path is None:
        raise UserError(f"{root}: found no {LISTS[0]} with a column observation_id")
    reader = csv.reader(text for _, text in lines(path))
    numbers = [number for number, _ in lines(path)]
    header = [name.strip() for name in next(reader)]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise UserError(f"{path}:1: missing column {', '.join(missing)}")
    found = []
    for index, words in enumerate(reader):
        line = numbers[index + 1]
        if len(words) != len(header):
            raise UserError(f"{path}:{line}: found {len(words)} fields, expected {len(header)}")
        values = {name: word.strip() for name, word in zip(header, words, strict=True)}
        empty = [name for name in COLUMNS if not values[name]]
        if empty:
            raise UserError(f"{path}:{line}: {empty[0]} is empty")
        found.append(Row(index, line, values["observation_id"], values))
    if not found:
        raise UserError(f"{path}: found no pair, expected at least one")
    return found


def read(root: str | os.PathLike[str]) -> Dataset:
    """Reads the pair list; no picture is opened. Every photo is of split 'test'.

    A class is a species: ``query_species`` where the list has it, or else ``common_name``; ids count the
    sorted names. The individual is the observation. Raises UserError naming file and line.
    """
    root = Path(root)
    table = rows(root)
    path = list_path(root)
    names = [normalise_name(row.values.get("query_species") or row.values["common_name"]) for row in table]
    ids = {name: i for i, name in enumerate(sorted(set(names)))}
    captions = read_captions(root / "captions_short.json")
    examples: dict[str, Example] = {}
    for row, name in zip(table, names, strict=True):
        for column in ("image_1", "image_2"):
            image = root / row.values["relative_path"] / row.values[column]
            if not image.is_file():
                raise UserError(f"{path}:{row.line}: {column}: found no picture {image}")
            id = row.id(column)
            if id in examples and examples[id].image != image:
                raise UserError(f"{path}:{row.line}: {column}: {id} is also {examples[id].image}, expected one file")
            if id in examples and examples[id].class_name != name:
                raise UserError(f"{path}:{row.line}: {id} is of {name} here and of {examples[id].class_name} above")
            examples[id] = Example(
                id=id,
                image=image,
                class_id=ids[name],
                class_name=name,
                taxonomy=("Birds", name),
                mask=_control(root, image, "mask"),
                depth=_control(root, image, "depth"),
                caption=captions.get(id),
                individual=row.observation,
                split="test",
                licence=row.values.get("licence") or None,
                credit=row.values.get("user_login") or None,
            )
    return Dataset(root.name, root, tuple(examples.values()))


def _control(root: Path, image: Path, folder: str) -> Path | None:
    """The PNG beside ``image``: only the first folder below the root is exchanged."""
    relative = image.relative_to(root)
    path = (root / folder).joinpath(*relative.parts[1:]).with_suffix(".png")
    return path if path.is_file() else None
