"""Captions in a small closed vocabulary: at most 12 words (long ones: at most 40), lower case but for 'A'."""

from __future__ import annotations

import numpy as np

from nabla_jax.toybirds.identity import PALETTE, Colour, Identity
from nabla_jax.toybirds.scene import Scene

CAPTION_WORDS: tuple[str, ...] = (
    "A", "a", "an", "photo", "of", "bird", "with", "and", "on", "in", "the", "facing", "left", "right",
    "head", "cap", "cheek", "throat", "breast", "belly", "back", "wings", "wing", "bars", "spots", "tail",
    "bill", "branch", "background", "light", "dark", *PALETTE,
)  # fmt: skip
FIXED_CAPTION = "A photo of a bird."


def colour_name(colour: Colour) -> str:
    """The nearest palette name of an sRGB colour 0..1."""
    distances = {name: sum((a - b) ** 2 for a, b in zip(colour, c, strict=True)) for name, c in PALETTE.items()}
    return min(distances, key=distances.__getitem__)


def caption(identity: Identity, scene: Scene) -> str:
    """The plumage in at most 12 words, e.g. 'a photo of a bird with red cap, white belly, black wings'.

    The scene decides only which way the bird faces, and whether that is said at all.
    """
    head = ("cap", identity.cap.colour) if identity.cap.strength else ("head", identity.head)
    parts = [head, ("belly", identity.belly), ("wings", identity.wing)]
    words = [f"{colour_name(colour)} {name}" for name, colour in parts]
    start = f"a bird facing {scene.facing}" if scene.perch else "a photo of a bird"
    return f"{start} with {', '.join(words)}"


def background_caption(identity: Identity, scene: Scene) -> str:
    """Where the bird is, not what it wears: what the official short captions say."""
    # Grounds are muted, so the strongest channel names them better than the nearest palette colour.
    channels = np.mean([scene.ground_top, scene.ground_bottom], axis=0)
    ground = "grey" if np.ptp(channels) < 0.05 else ("brown", "green", "blue")[int(channels.argmax())]
    where = " on a branch" if scene.perch else ""
    return f"a photo of a bird{where}, {ground} background"


def long_caption(identity: Identity, scene: Scene) -> str:
    """Every region and mark, then the scene."""
    said = [f"{colour_name(getattr(identity, part))} {part}" for part in ("bill", "head", "breast", "belly", "back")]
    said.append(f"{colour_name(identity.wing)} wings")
    said.append(f"{colour_name(identity.tail)} tail")
    marks = (("cap", identity.cap), ("cheek", identity.cheek), ("throat", identity.throat),
             ("spots", identity.spots), ("wing bars", identity.wing_bar))  # fmt: skip
    said += [f"{colour_name(mark.colour)} {name}" for name, mark in marks if mark.strength]
    ground = background_caption(identity, scene).removeprefix("a photo of a bird").strip(" ,")
    return f"a photo of a bird facing {scene.facing} with {', '.join(said[:-1])} and {said[-1]}, {ground}"
