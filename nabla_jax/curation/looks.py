"""What look-alikes are found by: DINOv2's features and the colours of each animal, cut out; stored, and continued."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax import config as configs
from nabla_jax.conditioning.geometry import Box, clip_box, mask_box
from nabla_jax.curation.proposals import Looks, combine
from nabla_jax.data.dataset import Example, class_index
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.images import picture_size, read_mask, read_rgb

Array = np.ndarray[Any, Any]

CROPS = ("mask", "box", "image")
"""What of a picture counts: the silhouette, all in the box, or everything."""
MARGIN = 0.2
"""Of the cut-out's longer side, shown round it on the page."""


def require(examples: Sequence[Example], crop: str) -> None:
    """Raises UserError if an example lacks what ``crop`` cuts it out by; opens no file."""
    if crop not in CROPS:
        raise UserError(f"--crop: found {crop!r}, expected one of {', '.join(CROPS)}")
    bare = [e for e in examples if crop != "image" and getattr(e, crop) is None]
    if bare:
        remedy = "python -m nabla_jax.extract makes masks; " if crop == "mask" else ""
        raise UserError(
            f"{bare[0].image}: found no {crop}, nor for {len(bare) - 1} more of {len(examples)} pictures; {remedy}"
            "--crop box or --crop image takes all in the box, or the whole picture"
        )


def read(example: Example, crop: str) -> tuple[Array, Array]:
    """(picture [H, W, 3] uint8, what of it counts [H, W] bool). Raises UserError naming a file that cannot be used."""
    picture = read_rgb(example.image)
    if crop == "mask":
        assert example.mask is not None
        return picture, read_mask(example.mask, picture.shape[:2])
    if crop == "image":
        return picture, np.ones(picture.shape[:2], bool)
    assert example.box is not None
    inside = np.zeros(picture.shape[:2], bool)
    top, left, bottom, right = clip_box(example.box, *inside.shape)
    inside[top:bottom, left:right] = True
    return picture, inside


def shown(example: Example, crop: str) -> Box:
    """The part of the picture that a reviewer sees: the cut-out and a margin round it."""
    height, width = picture_size(example.image)
    if crop == "image":
        return 0, 0, height, width
    if crop == "box":
        assert example.box is not None
        top, left, bottom, right = example.box
    else:
        assert example.mask is not None
        top, left, bottom, right = mask_box(read_mask(example.mask, (height, width)))
    margin = round(MARGIN * max(bottom - top, right - left))
    return clip_box((top - margin, left - margin, bottom + margin, right + margin), height, width)


def fingerprints(examples: Sequence[Example], crop: str) -> dict[str, str]:
    """Example id -> what identifies the bytes it is cut out of, the picture's hash first."""
    found = {}
    for e in examples:
        where = file_sha256(e.mask) if crop == "mask" and e.mask is not None else str(e.box if crop == "box" else "")
        found[e.id] = f"{file_sha256(e.image)} {crop} {where}"
    return found


def describe(
    examples: Sequence[Example],
    crop: str,
    dinov2: str,
    colour: float,
    batch: int,
    cache: Path,
    fingerprint: Mapping[str, str],
) -> tuple[list[Example], Looks]:
    """(the examples with a foreground pixel, their looks), in order; stored below ``cache``, so that it continues.

    ``colour`` is the weight of colours, the rest that of DINOv2's features; what has no weight is not computed.
    Raises UserError for files that cannot be used.
    """
    from nabla_jax.metrics import networks as nets
    from nabla_jax.metrics import perception

    weights = {perception.RETRIEVAL: 1 - colour, nets.COLOURS: colour}
    names = [name for name, weight in weights.items() if weight]
    networks = nets.load_networks(configs.Metrics(dinov2=dinov2, batch=batch))
    assert networks is not None
    by_id = {e.id: e for e in examples}
    found = perception.describe_real(
        networks, list(by_id), names, lambda id: read(by_id[id], crop), fingerprint.__getitem__, cache
    )
    kept = [e for e in examples if e.id in found]
    if not kept:
        raise UserError(f"{examples[0].mask}: found no foreground, nor in any other mask")
    classes = class_index(e.class_id for e in kept)
    parts = [(weights[name], np.stack([found[e.id][name] for e in kept])) for name in names]
    return kept, combine(parts, classes)


def identical(examples: Sequence[Example], fingerprint: Mapping[str, str]) -> set[frozenset[int]]:
    """The pairs of positions of one class whose picture files have equal bytes."""
    groups: dict[tuple[int, str], list[int]] = {}
    for position, e in enumerate(examples):
        groups.setdefault((e.class_id, fingerprint[e.id].split()[0]), []).append(position)
    return {frozenset((a, b)) for own in groups.values() for a in own for b in own if a < b}
