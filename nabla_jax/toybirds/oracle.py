"""The oracle of a written world: any of its birds, rendered in any of its pictures' scenes."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.identity import SPECIES_PER_FAMILY, Identity, draw_identity
from nabla_jax.toybirds.render import Render, render
from nabla_jax.toybirds.rng import generator, order, pick
from nabla_jax.toybirds.scene import Scene
from nabla_jax.toybirds.world import Picture, Settings, scene_of
from nabla_jax.untrusted import check, parse_json

_SIBLING_INDIVIDUAL = 0  # pictures of the world show individuals from 1 on


class Oracle:
    """Answers for one data-set folder (`nabirds`, `inat/na`, `inat/unseen` or `clips`) with an oracle.json.

    Every answer is a picture uint8 RGB [H, W, 3] before JPEG, in the target's scene and with the target's
    proportions: a fill, depth or keypoint control fixes the silhouette, so candidates differ in plumage alone
    and share the target's mask exactly. Image ids: nabirds the dashed uuid, inat '<observation>_<stem>',
    clips the path without suffix.
    """

    def __init__(self, root: str | Path) -> None:
        """Raises UserError when oracle.json is missing, of another world or of another version."""
        path = Path(root) / "oracle.json"
        if not path.is_file():
            raise UserError(f"{path}: not found; expected a folder written by python -m nabla_jax.toybirds")
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        check(found, dict[str, Any], str(path))
        for name, expected in (("world", plan.WORLD), ("version", plan.VERSION)):
            if found.get(name) != expected:
                raise UserError(
                    f"{path}: field {name}: found {found.get(name)!r}, expected {expected!r}; delete the world's "
                    "folder and write it again with python -m nabla_jax.toybirds"
                )
        fields = [field.name for field in dataclasses.fields(Settings)]
        missing = [name for name in (*fields, "dataset", "images") if name not in found]
        if missing:
            raise UserError(f"{path}: missing fields {', '.join(missing)}")
        kinds = {**typing.get_type_hints(Settings), "dataset": str, "images": dict[str, dict[str, Any]]}
        for name, kind in kinds.items():
            check(found[name], kind, str(path), name)
        self.path = path
        self.settings = Settings(**{name: found[name] for name in fields})
        self._dataset: str = found["dataset"]
        self._images: dict[str, dict[str, Any]] = found["images"]

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._images

    def identity(self, image_id: str) -> Identity:
        """The individual shown in a picture."""
        return draw_identity(*self._picture(image_id).identity)

    def scene(self, image_id: str) -> Scene:
        """The picture's pose, light, camera, background and canvas."""
        return scene_of(self.settings, self._picture(image_id))

    def right(self, subject_id: str, target_id: str) -> np.ndarray:
        """The right answer: the subject's plumage in the target's picture."""
        return self._in_target(self.identity(subject_id), target_id).rgb

    def sibling(self, subject_id: str, target_id: str, seed: int = 0) -> np.ndarray:
        """Another species of the subject's family in the same plumage kind: as wrong as a near miss."""
        _, o, f, s, plumage, _ = self._picture(subject_id).identity
        rng = self._generator("sibling", seed, subject_id, target_id)
        species = pick(rng, [k for k in range(SPECIES_PER_FAMILY) if k != s])
        return self._in_target(self._draw(o, f, species, plumage), target_id).rgb

    def sibling_plumage(self, subject_id: str, target_id: str, seed: int = 0) -> np.ndarray | None:
        """The subject's species in another of its plumages (sex or age), or None when it has only one."""
        _, o, f, s, plumage, _ = self._picture(subject_id).identity
        others = [k for k in plan.plumages(o, f, s) if k != plumage]
        if not others:
            return None
        rng = self._generator("sibling plumage", seed, subject_id, target_id)
        return self._in_target(self._draw(o, f, s, pick(rng, others)), target_id).rgb

    def lineup(self, subject_id: str, target_id: str, n: int = 10, seed: int = 0) -> list[np.ndarray]:
        """The right answer, then n - 1 other species in that picture, members of the family first."""
        _, o, f, s, plumage, _ = self._picture(subject_id).identity
        rng = self._generator("lineup", seed, subject_id, target_id)
        families = [(a, b) for a in range(self.settings.orders) for b in range(plan.FAMILIES_PER_ORDER)]
        family = [(o, f, k) for k in range(SPECIES_PER_FAMILY) if k != s]
        others = [(a, b, k) for a, b in families if (a, b) != (o, f) for k in range(SPECIES_PER_FAMILY)]
        candidates = [family[i] for i in order(rng, len(family))] + [others[i] for i in order(rng, len(others))]
        if not 1 <= n <= len(candidates) + 1:
            raise UserError(f"lineup of {n} species: expected 1 to {len(candidates) + 1}")
        wrong = [self._in_target(self._draw(a, b, k, plumage), target_id).rgb for a, b, k in candidates[: n - 1]]
        return [self.right(subject_id, target_id), *wrong]

    def mask(self, target_id: str) -> np.ndarray:
        """The bird's mask in a picture, bool [H, W]: the same for every answer about that target."""
        return self._in_target(self.identity(target_id), target_id).mask

    def _picture(self, image_id: str) -> Picture:
        if image_id not in self._images:
            raise UserError(f"{self.path}: no image {image_id!r}")
        entry = self._images[image_id]
        return Picture(
            image_id=image_id,
            path="",
            identity=(self.settings.seed, *entry["identity"]),
            scene_key=(self._dataset, entry["scene"]),
            canvas=tuple(entry["canvas"]),
            fill=entry["fill"],
        )

    def _draw(self, order_index: int, family: int, species: int, plumage: int) -> Identity:
        return draw_identity(self.settings.seed, order_index, family, species, plumage, _SIBLING_INDIVIDUAL)

    def _in_target(self, identity: Identity, target_id: str) -> Render:
        shape = self.identity(target_id).shape
        return render(dataclasses.replace(identity, shape=shape), self.scene(target_id))

    def _generator(self, purpose: str, seed: int, subject_id: str, target_id: str) -> np.random.Generator:
        return generator(self.settings.seed, purpose, seed, subject_id, target_id)
