"""Trees of classes, and the names of their leaves. No level has a fixed depth."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from nabla_jax.errors import UserError

_QUALIFIER = re.compile(r"\s*\(([^()]*)\)$")
_WORDS = {
    "sex": ("male", "female"),
    "age": ("adult", "subadult", "immature", "juvenile"),
    "season": ("breeding", "nonbreeding", "eclipse", "summer", "winter"),
}
_FIELD = {word: field for field, words in _WORDS.items() for word in words}
_MORPH = ("morph", "phase", "form")


def normalise_name(name: str) -> str:
    """Single spaces, and none inside brackets' edges: 'Teal  (Dark morph )' -> 'Teal (Dark morph)'."""
    return re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", " ".join(name.split())))


def species_name(name: str) -> str:
    """The name without a qualifier in brackets: 'Dark-eyed Junco (Oregon)' -> 'Dark-eyed Junco'."""
    return _QUALIFIER.sub("", normalise_name(name))


def qualifier(name: str) -> str | None:
    """The qualifier in brackets at the end of a leaf's name (sex, age, season, morph), or None."""
    found = _QUALIFIER.search(normalise_name(name))
    return found.group(1) if found else None


def parse_path(above: str, name: str) -> tuple[str, ...]:
    """Names from the root to the class: 'Birds > Larks', 'Skylark' -> those three; the class may end the text too."""
    names = tuple(normalise_name(part) for part in above.split(">") if part.strip())
    return names if names[-1:] == (name,) else (*names, name)


@dataclasses.dataclass(frozen=True)
class Plumage:
    """What a qualifier says of a bird, in lower case; None where it says nothing."""

    sex: str | None = None  # male or female
    age: str | None = None  # adult, subadult, immature or juvenile
    season: str | None = None  # breeding, nonbreeding, eclipse, summer or winter
    morph: str | None = None  # the words before "morph": dark, light, ...


def plumages(qualifier: str | None) -> tuple[Plumage, ...]:
    """The alternatives a qualifier names: 'Female/Eclipse male' -> female, or male in eclipse.

    A slash, a comma and "or" part alternatives. Empty when any word of it is not understood, as in the name of a
    subspecies group: half a reading could be the wrong half, so such a qualifier is kept verbatim alone.
    """
    found = []
    for alternative in re.split(r"/|,|\bor\b", (qualifier or "").lower()):
        words = alternative.replace("non-breeding", "nonbreeding").split()
        values: dict[str, str] = {}
        for end in (i for i, word in enumerate(words) if word in _MORPH):
            start = next((i + 1 for i in reversed(range(end)) if words[i] in _FIELD), 0)
            values["morph"] = " ".join(words[start:end])
            words = words[:start] + words[end + 1 :]
            break
        for word in words:
            if word not in _FIELD or _FIELD[word] in values:
                return ()
            values[_FIELD[word]] = word
        if not values or not all(values.values()):
            return ()
        found.append(Plumage(**values))
    return tuple(found)


def same_plumage(name: str, other: str) -> bool:
    """Whether two leaves, of whatever species, are of one plumage: equal qualifiers, or a common alternative."""
    mine, theirs = qualifier(name), qualifier(other)
    return mine == theirs or bool(set(plumages(mine)) & set(plumages(theirs)))


def agreed(alternatives: tuple[Plumage, ...], field: str) -> str | None:
    """The value of ``field`` that all alternatives share, or None: 'Female/juvenile' is of neither one sex nor age."""
    values = {getattr(plumage, field) for plumage in alternatives}
    return values.pop() if len(values) == 1 else None


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Names and parent links of classes by id; ids may have gaps, a root has no parent."""

    names: Mapping[int, str]
    parents: Mapping[int, int]

    def path(self, class_id: int) -> tuple[str, ...]:
        """Names from the root to the class.

        Raises UserError for a class or ancestor without a name, and for a cycle.
        """
        ids: list[int] = []
        node: int | None = class_id
        while node is not None:
            if node in ids:
                raise UserError(f"hierarchy: class {class_id} has itself among its ancestors, expected a tree")
            if node not in self.names:
                raise UserError(f"hierarchy: class {node}, at or above class {class_id}, has no name")
            ids.append(node)
            node = self.parents.get(node)
        return tuple(self.names[i] for i in reversed(ids))


def species_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Names from the root to the species: without qualifiers, and without the leaf of a species that has several."""
    return tuple(dict.fromkeys(species_name(name) for name in path))


def distance(path: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> int:
    """Levels from the leaf of `path` up to the lowest group that it shares with any of `others`.

    Paths are names from the root to the leaf. 0: it is one of them; 1: one of them has the same parent, and so on;
    len(path): not even a root is shared, or there are no others.
    """
    if not path:
        raise ValueError("taxonomic distance: found an empty path, expected names from the root to the leaf")
    groups = {other[:depth] for other in others for depth in range(1, len(other) + 1)}
    return next(up for up in range(len(path) + 1) if up == len(path) or path[: len(path) - up] in groups)
