"""From a dataset's pictures to what the frozen encoders take: one function for ``prepare`` and for training without it.

A role is what a picture is encoded as: ``target``, ``subject``, and ``control_KIND`` for each control. Method insert
has the role ``repaint`` in the controls' place: the mask of what is repainted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nabla_jax import draws
from nabla_jax.conditioning.masks import repaint_mask
from nabla_jax.config import Conditioning
from nabla_jax.data import controls
from nabla_jax.data.dataset import Dataset, Example, class_index

Array = np.ndarray[Any, Any]

CONTROL = "control_"
REPAINT = "repaint"

Draw = Callable[[int], np.random.Generator]
"""Purpose (see ``draws``) -> the generator of one sample for it."""


def roles(kinds: Sequence[str]) -> tuple[str, ...]:
    """The roles that are encoded for the controls ``kinds``, in the order of their records."""
    return ("target", "subject", *(CONTROL + kind for kind in kinds))


def inputs(
    example: Example, wanted: Sequence[str], conditioning: Conditioning, factor: int, draw: Draw | None = None
) -> dict[str, Array]:
    """An example on the model's canvas: each role of ``wanted`` [3, size, size] uint8, or [size, size] of ``repaint``.

    Compact conditions (subject and controls) are [3, size / compact, size / compact].
    With the target comes ``mask`` [size / factor, size / factor] uint8, the foreground coverage of each latent. Method
    insert draws the policy of its mask, the mask and the subject's expansion with ``draw``.
    Raises UserError naming the file that cannot be used.
    """
    insert = conditioning.method == "insert"
    if insert and draw is None:
        raise ValueError("draw: found None, expected the generators of a sample for method insert")
    view = controls.read_view(example, *(role.removeprefix(CONTROL) for role in wanted if role.startswith(CONTROL)))
    size = conditioning.size
    found: dict[str, Array] = {}
    placement = controls.target_placement(view.mask, size, conditioning.window if insert else 0)
    for role in wanted:
        if role == REPAINT:
            assert draw is not None
            found[role] = controls.repaint_canvas(drawn_mask(view.mask, conditioning, draw), placement)
            continue
        if role == "target":
            canvas = controls.target_canvas(view.image, size, placement)
            found["mask"] = controls.latent_mask(view.mask, size, factor, placement)
        elif role == "subject":
            expansion = 1.0 if draw is None or not insert else draw(draws.EXPANSION).uniform(*conditioning.expansion)
            canvas = controls.subject_canvas(view.image, view.mask, conditioning.condition_size, expansion)
        else:
            kind = role.removeprefix(CONTROL)
            canvas = controls.control_canvas(view, dataclasses.replace(conditioning, control=kind))
        found[role] = np.ascontiguousarray(canvas.pixels.transpose(2, 0, 1))
    return found


def drawn_mask(mask: Array, conditioning: Conditioning, draw: Draw) -> Array:
    """What training has repainted of a silhouette [H, W] bool, by one of ``conditioning.mask_policies``."""
    rng = draw(draws.REPAINT_MASK)
    return repaint_mask(mask, conditioning.mask_policies[rng.integers(len(conditioning.mask_policies))], rng)


def look(example: Example, size: int) -> Array:
    """What look-alikes are found by: the box round the bird, all else black, [size, size, 3] uint8."""
    assert example.mask is not None
    image, mask = controls.read_pair(example.image, example.mask)
    placement = controls.subject_canvas(image, mask, size).placement
    return placement.apply(np.where(mask[:, :, None], image, np.uint8(0)), 0, "lanczos")


def ordered(dataset: Dataset, split: str) -> tuple[Example, ...]:
    """The examples of a split by id: position i of every stream is the i-th of them."""
    return tuple(sorted(dataset.of_split(split), key=lambda e: e.id))


def distinct_captions(examples: Sequence[Example]) -> tuple[list[str], list[int]]:
    """The distinct captions of examples in the order of their first use, and for each example its row in them.

    Raises UserError for examples without a caption.
    """
    controls.require_field(examples, "caption", "captions.json (captions_short.json for iNaturalist) to hold them")
    rows: dict[str, int] = {}
    found = [rows.setdefault(example.caption or "", len(rows)) for example in examples]
    return list(rows), found


def captions_sha256(captions: Sequence[str]) -> str:
    """What identifies a list of distinct captions."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Examples as a source of training pairs; the twin of a prepared folder that holds pixels, not latents.

    ``captions`` holds each example's row in ``prompt_embeds`` [captions, T, d] and ``pooled`` [captions, p].
    """

    examples: tuple[Example, ...]
    captions: tuple[int, ...]
    prompt_embeds: Array = dataclasses.field(repr=False)
    pooled: Array = dataclasses.field(repr=False)
    conditioning: Conditioning
    factor: int

    @property
    def ids(self) -> Sequence[str]:
        """By picture, its id."""
        return [e.id for e in self.examples]

    @property
    def classes(self) -> dict[int, tuple[int, ...]]:
        """Class id -> positions."""
        return class_index(e.class_id for e in self.examples)

    @property
    def taxonomy(self) -> Mapping[int, tuple[str, ...]]:
        """Class id -> names from the root to the leaf."""
        return {e.class_id: e.taxonomy for e in self.examples}

    @property
    def features(self) -> None:
        """Pictures have none; see ``loader.Prepared``."""
        return

    def read(self, position: int, wanted: Sequence[str], draw: Draw | None = None) -> dict[str, Array]:
        """The roles ``wanted`` of a picture, and ``mask`` with the target; see ``inputs``."""
        return inputs(self.examples[position], wanted, self.conditioning, self.factor, draw)
