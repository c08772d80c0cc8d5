"""The oracle of a data set: the world that drew it, which can also draw the right answer of any pair.

A dataset folder whose pictures were rendered says so in `oracle.json` ({"world": NAME, ...}); NAME is an
entry point of the group `nabla_jax.worlds`, an object with an attribute `Oracle`. `Oracle(root)` must have
the methods of `World`. Rendering is slow, so an answer is kept in a file once it is made.
"""

from __future__ import annotations

import importlib.metadata
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.metrics.identity import RightAnswer
from nabla_jax.untrusted import check, parse_json

Array = np.ndarray[Any, Any]

GROUP = "nabla_jax.worlds"
FILE = "oracle.json"


class World(Protocol):
    """What an oracle can do. Pictures are [H, W, 3] uint8 at the target's size, in its pose, light and
    place.
    """

    def right(self, subject_id: str, target_id: str) -> Array:
        """The subject's identity."""

    def sibling(self, subject_id: str, target_id: str) -> Array:
        """Another species of the subject's family, same kind of plumage."""

    def sibling_plumage(self, subject_id: str, target_id: str) -> Array | None:
        """Another plumage of the subject's species; None where it has one only."""

    def lineup(self, subject_id: str, target_id: str) -> Sequence[Array]:
        """Ten species, the right answer first."""


def open_oracle(root: pathlib.Path) -> World | None:
    """The oracle named in `<root>/oracle.json`; None if the data set has none.

    Raises UserError if the file is damaged or its world is not installed.
    """
    path = root / FILE
    if not path.is_file():
        return None
    try:
        name = parse_json(path.read_bytes())["world"]
        check(name, str, str(path), "world")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: found no readable field 'world' ({error}), expected the name of a world") from error
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none (is nabla_jax installed? pip install -e .)"
        raise UserError(f"{path}: world {name!r} is not installed, entry points of {GROUP} are {known}")
    oracle: World = found[name].load().Oracle(root)
    return oracle


def ask(oracle: World, subject_id: str, target_id: str, mask: Array) -> tuple[Array, RightAnswer]:
    """(the right answer's whole picture [H, W, 3], the oracle's pixels inside `mask` [H, W] bool)."""
    lineup = oracle.lineup(subject_id, target_id)
    right = lineup[0]
    if right.shape[:2] != mask.shape:
        raise UserError(
            f"oracle: right answer of {subject_id} in {target_id} is {right.shape[0]}x{right.shape[1]}, "
            f"expected {mask.shape[0]}x{mask.shape[1]}, the size of the target"
        )
    plumage = oracle.sibling_plumage(subject_id, target_id)
    answer = RightAnswer(
        right=right[mask],
        sibling=oracle.sibling(subject_id, target_id)[mask],
        sibling_plumage=None if plumage is None else plumage[mask],
        lineup=np.stack([picture[mask] for picture in lineup]),
    )
    return right, answer


def pack(right: Array, answer: RightAnswer) -> bytes:
    """An answer as the bytes of an .npz."""
    arrays = {
        "right": right,
        "inside": answer.right,
        "sibling": answer.sibling,
        "lineup": answer.lineup,
    }
    if answer.sibling_plumage is not None:
        arrays["sibling_plumage"] = answer.sibling_plumage
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def unpack(path: pathlib.Path) -> tuple[Array, RightAnswer]:
    """Inverse of `pack` on a file. Raises UserError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            plumage = stored.get("sibling_plumage")
            return stored["right"], RightAnswer(stored["inside"], stored["sibling"], plumage, stored["lineup"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged cache file ({error}), delete it to have it made again") from error
