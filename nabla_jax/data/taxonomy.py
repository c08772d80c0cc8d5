"""Trees of classes, and the names of their leaves. No level has a fixed depth."""

import dataclasses
import re
from collections.abc import Mapping

from nabla_jax.errors import UserError

_QUALIFIER = re.compile(r"\s*\(([^()]*)\)$")


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
