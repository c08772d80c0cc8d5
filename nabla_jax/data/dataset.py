"""What every data source yields: examples, and the dataset that holds them."""

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.data import taxonomy as tax
from nabla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture of one bird and what is known about it. Paths are absolute or relative to the working
    folder.
    """

    id: str
    image: Path
    class_id: int
    class_name: str  # spaces normalised
    taxonomy: tuple[str, ...]  # names from the root to the leaf; any depth
    box: tuple[int, int, int, int] | None = None  # (top, left, bottom, right), half-open, inside the picture
    mask: Path | None = None  # PNG, foreground above 127
    depth: Path | None = None  # PNG, 8-bit grey
    # [parts, 3] int: row, column, visible
    keypoints: np.ndarray[Any, Any] | None = dataclasses.field(default=None, compare=False)
    caption: str | None = None
    individual: str | None = None  # equal for pictures of one true individual
    split: str = "test"  # train or test
    licence: str | None = None
    credit: str | None = None
    scientific_name: str | None = None

    @property
    def species(self) -> str:
        """The leaf's name without its qualifier of sex, age, season or morph."""
        return tax.species_name(self.class_name)

    @property
    def plumages(self) -> tuple[tax.Plumage, ...]:
        """What the leaf's qualifier says, as alternatives; empty where it has none or is not understood."""
        return tax.plumages(tax.qualifier(self.class_name))

    @property
    def sex(self) -> str | None:
        """'male' or 'female' where the qualifier leaves no doubt."""
        return tax.agreed(self.plumages, "sex")

    @property
    def age(self) -> str | None:
        """'adult', 'subadult', 'immature' or 'juvenile' where the qualifier leaves no doubt."""
        return tax.agreed(self.plumages, "age")

    @property
    def season(self) -> str | None:
        """'breeding', 'nonbreeding', 'eclipse', 'summer' or 'winter' where the qualifier leaves no doubt."""
        return tax.agreed(self.plumages, "season")

    @property
    def morph(self) -> str | None:
        """The colour morph, 'dark' or the like, where the qualifier leaves no doubt."""
        return tax.agreed(self.plumages, "morph")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples of one dataset folder in the order of its lists."""

    name: str
    root: Path
    examples: tuple[Example, ...]
    parts: tuple[str, ...] = ()  # names of the rows of ``Example.keypoints``, where the folder names them

    @cached_property
    def by_id(self) -> dict[str, Example]:
        """Example id -> example."""
        return {example.id: example for example in self.examples}

    @cached_property
    def classes(self) -> dict[int, tuple[int, ...]]:
        """Class id -> positions in ``examples``, classes in ascending order."""
        return class_index(example.class_id for example in self.examples)

    def of_split(self, split: str) -> tuple[Example, ...]:
        """The examples of 'train', 'test' or 'all'. Raises UserError when there are none."""
        chosen = tuple(e for e in self.examples if split in ("all", e.split))
        if not chosen:
            found = ", ".join(sorted({e.split for e in self.examples}))
            raise UserError(f"{self.root}: found no picture of split {split}, the folder has {found}")
        return chosen


def class_index(class_ids: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Class id -> positions at which it occurs, classes in ascending order."""
    index: dict[int, list[int]] = {}
    for position, class_id in enumerate(class_ids):
        index.setdefault(class_id, []).append(position)
    return {class_id: tuple(index[class_id]) for class_id in sorted(index)}


def control_file(root: Path, image: Path, folder: str) -> Path:
    """Where a control of ``image`` belongs: root/FOLDER/..., the path below the root without a leading unpacked/ or
    images/, as .png.
    """
    parts = image.relative_to(root).parts
    for leading in ("unpacked", "images"):
        if parts[0] == leading and len(parts) > 1:
            parts = parts[1:]
    return root.joinpath(folder, *parts).with_suffix(".png")


def existing_control(root: Path, image: Path, folder: str) -> Path | None:
    """``control_file`` where it is there, or None."""
    path = control_file(root, image, folder)
    return path if path.is_file() else None
