"""iNaturalist 2021 (the FGVC8 competition) as it unpacks: train.json or train_mini.json, val.json, and class folders.

    train.json, train_mini.json, val.json    COCO-like: images, annotations, categories, licenses
    train/02912_Animalia_Chordata_Aves_.../PICTURE.jpg

Only the pictures of one taxon are read, birds by default, so only their folders need to be unpacked. Without any JSON
the folders' own names are read: number and the seven ranks. A class is a species, by its scientific name; pictures of
val are of split 'test'. Where both training lists are there, train.json is read.
"""

import array
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from nabla_jax.data.dataset import Dataset, Example, existing_control
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from nabla_jax.untrusted import below, check

LISTS = {"train": ("train.json", "train_mini.json"), "test": ("val.json",)}
RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")
_FOLDER = re.compile(r"\d{5}_[A-Z][A-Za-z-]*(_[^_]+){6,}$")
_SPACE = re.compile(r"[\s,]*")


@dataclasses.dataclass(frozen=True)
class _Category:
    id: int
    name: str
    taxonomy: tuple[str, ...]


class _Image(TypedDict):
    """What is read of every entry of ``images``, beside its id."""

    file_name: str


def is_layout(root: Path) -> bool:
    """Whether ``root`` holds one of the lists, or class folders below train, train_mini or val."""
    return any((root / name).is_file() for names in LISTS.values() for name in names) or bool(_class_folders(root))


def read(root: str | os.PathLike[str], taxon: str = "Aves") -> Dataset:
    """Reads the lists, or the folders' names; no picture is opened.

    ``taxon`` is a name at any rank or a supercategory ('Birds'), '' for everything. Raises UserError naming what is
    wrong.
    """
    problems = Problems()
    dataset = scan(Path(root), problems, taxon)
    problems.refuse(root)
    return dataset


def scan(root: Path, problems: Problems, taxon: str = "Aves") -> Dataset:
    """Like ``read``, but adds what is wrong to ``problems`` and returns the examples that are whole."""
    examples: dict[str, Example] = {}
    before = len(problems.errors)
    listed = False
    for split, names in LISTS.items():
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is not None:
            listed = True
            _scan_list(root, path, split, taxon, examples, problems)
    if not listed:
        _scan_folders(root, taxon, examples)
    if not examples and len(problems.errors) == before:
        problems.error(
            root, None, f"found no picture of {taxon or 'anything'}", "set data.taxon to a rank's name, such as Aves"
        )
    return Dataset(root.name, root, tuple(examples.values()))


def items(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the array, object) for the arrays in the top-level object of JSON ``text``, one object at a time.

    The full list holds 2.7 million pictures: parsed at once it would fill tens of GB. Raises ValueError for text that
    is no such JSON.
    """
    decoder = json.JSONDecoder()

    def decode(place: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, place)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def skip(place: int) -> int:
        found = _SPACE.match(text, place)
        assert found is not None
        return found.end()

    place = skip(0)
    if text[place : place + 1] != "{":
        raise ValueError("expected one object")
    place = skip(place + 1)
    while text[place : place + 1] != "}":
        key, place = decode(place)
        place = skip(place)
        if text[place : place + 1] != ":":
            raise ValueError(f"expected ':' at character {place}")
        place = skip(place + 1)
        if text[place : place + 1] == "[":
            place = skip(place + 1)
            while text[place : place + 1] != "]":
                item, place = decode(place)
                yield key, item
                place = skip(place)
            place += 1
        else:
            _, place = decode(place)
        place = skip(place)


def _scan_list(
    root: Path, path: Path, split: str, taxon: str, examples: dict[str, Example], problems: Problems
) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        categories: dict[int, _Category] = {}
        pictures, labels = array.array("q"), array.array("q")
        licences: dict[Any, str] = {}
        for name, item in items(text):
            if name == "categories":
                category = _category(item, taxon)
                if category is not None:
                    categories[category.id] = category
            elif name == "annotations":
                pictures.append(int(item["image_id"]))
                labels.append(int(item["category_id"]))
            elif name == "licenses":
                licences[str(item["id"])] = str(item.get("url") or item.get("name"))
        classes = {p: c for p, c in zip(pictures, labels, strict=True) if c in categories}
        images = [item for name, item in items(text) if name == "images" and int(item["id"]) in classes]
        for item in images:
            check(item, _Image, "an entry of images")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, UserError) as error:
        what = f"no {error} in an entry" if isinstance(error, KeyError) else str(error)
        problems.error(path, None, f"not a list of iNaturalist 2021: {what}", "download the list again")
        return
    inside = {name: below(root, f"{name}/x") for name in _parents(images)}
    found = {n: {*os.listdir(path.parent)} for n, path in inside.items() if path is not None and path.parent.is_dir()}
    for item in images:
        folder, _, file = item["file_name"].rpartition("/")
        if inside[folder] is None:
            what = f"picture {item['file_name']} leaves the folder"
            problems.error(path, None, what, "download the list again")
            continue
        if file not in found.get(folder, ()):
            problems.error(
                path, None, f"picture {item['file_name']} is missing", f"unpack it to {root / item['file_name']}"
            )
            continue
        category = categories[classes[int(item["id"])]]
        image = root / item["file_name"]
        id = image.stem
        if id in examples:
            problems.error(
                path, None, f"picture {item['file_name']} is also {examples[id].image}", "delete one of them"
            )
            continue
        licence = str(item["license"]) if item.get("license") is not None else None
        examples[id] = _example(
            root, id, image, split, category, licences.get(licence, licence), item.get("rights_holder")
        )
    absent = len(classes) - len(images)
    if absent:
        problems.error(path, None, f"{absent} annotations name pictures that images lacks", "download the list again")


def _parents(images: list[dict[str, Any]]) -> set[str]:
    return {item["file_name"].rpartition("/")[0] for item in images}


def _category(item: dict[str, Any], taxon: str) -> _Category | None:
    ranks = [str(item[rank]) for rank in RANKS[:-1]]
    return _chosen(int(item["id"]), str(item["name"]), [str(item.get("supercategory", "")), *ranks], taxon)


def _chosen(id: int, name: str, above: list[str], taxon: str) -> _Category | None:
    """The class with its taxonomy from ``taxon`` down, so that orders stand where other sources have them."""
    names = [*above, name]
    if taxon and taxon not in names:
        return None
    return _Category(id, name, tuple(n for n in names[names.index(taxon) if taxon else 0 :] if n))


def _class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) of the class folders, in order."""
    return [
        (split, folder)
        for split, names in (("train", ("train", "train_mini")), ("test", ("val",)))
        for name in names
        if (root / name).is_dir()
        for folder in sorted((root / name).iterdir())
        if _FOLDER.match(folder.name)
    ]


def _scan_folders(root: Path, taxon: str, examples: dict[str, Example]) -> None:
    for split, folder in _class_folders(root):
        number, *ranks = folder.name.split("_")
        name = " ".join(ranks[5:])
        category = _chosen(int(number), name, ranks[:6], taxon)
        if category is not None:
            for image in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
                examples.setdefault(image.stem, _example(root, image.stem, image, split, category, None, None))


def _example(root: Path, id: str, image: Path, split: str, category: _Category, licence: Any, credit: Any) -> Example:
    return Example(
        id=id,
        image=image,
        class_id=category.id,
        class_name=category.name,
        taxonomy=category.taxonomy,
        mask=existing_control(root, image, "masks"),
        depth=existing_control(root, image, "depth"),
        split=split,
        licence=str(licence) if licence is not None else None,
        credit=str(credit) if credit else None,
        scientific_name=category.name,
    )
