"""Who a bird is: proportions and plumage, drawn along order -> family -> species -> plumage -> individual.

Plumage lives in each part's canonical coordinates (the unit sphere of its ellipsoid), so identity does not
depend on pose. A family owns a shape and a palette of one dark, one light and one vivid colour; a species
says which region wears which of the three and adds marks; a plumage (sex or age) mutes colours and drops
marks; an individual jitters a little. Three strongly contrasting colours make a flat mean colour a poor
guess at a bird while two siblings still agree on about a third of their surface.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from nabla_jax.toybirds.rng import chance, generator, order, pick, uniform

Colour = tuple[float, float, float]

PALETTE: dict[str, Colour] = {
    "black": (0.07, 0.07, 0.09),
    "white": (0.95, 0.95, 0.93),
    "grey": (0.52, 0.54, 0.57),
    "brown": (0.36, 0.22, 0.12),
    "red": (0.84, 0.10, 0.10),
    "orange": (0.95, 0.48, 0.07),
    "yellow": (0.97, 0.85, 0.12),
    "green": (0.16, 0.60, 0.18),
    "blue": (0.13, 0.33, 0.86),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.95, 0.50, 0.66),
}
_DARK: tuple[Colour, ...] = ((0.06, 0.06, 0.08), (0.06, 0.06, 0.08), (0.20, 0.10, 0.05), (0.05, 0.08, 0.24))
_LIGHT: tuple[Colour, ...] = ((0.96, 0.96, 0.95), (0.96, 0.96, 0.95), (0.96, 0.90, 0.74), (0.84, 0.90, 0.97))
_VIVID = ("red", "orange", "yellow", "green", "blue", "purple", "red", "blue", "orange", "pink")
_BILLS = ("black", "orange", "yellow", "red", "grey")
_EYES: tuple[Colour, ...] = ((0.30, 0.16, 0.06), (0.95, 0.75, 0.10), (0.75, 0.10, 0.08), (0.92, 0.92, 0.90))
_EARTH: Colour = (0.50, 0.42, 0.33)

REGIONS = ("head", "breast", "belly", "back", "wing", "tail")
# Share of a bird's visible surface in an average picture; used to keep the three colours balanced.
_REGION_AREA = np.array([0.18, 0.12, 0.18, 0.12, 0.28, 0.12])
PLUMAGES = ("Adult male", "Female", "Juvenile")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Proportions, in units of half the body's length; angles in radians. Shared by a whole family."""

    body_height: float
    body_width: float
    neck: float
    head: float
    bill_length: float
    bill_height: float
    bill_droop: float
    tail_length: float
    tail_width: float
    tail_angle: float
    wing_length: float
    wing_height: float
    leg_length: float
    pitch: float


@dataclasses.dataclass(frozen=True)
class Mark:
    """One soft-edged mark: strength 0 means absent; position and extent are canonical coordinates."""

    strength: float
    colour: Colour
    position: float = 0.0
    extent: float = 0.0


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything that makes a bird this bird: colours in linear-ish sRGB 0..1 and marks per part.

    `path` is (world seed, order, family, species, plumage, individual); fresh identities carry
    (seed, -1, index, 0, plumage, 0).
    """

    path: tuple[int, int, int, int, int, int]
    shape: Shape
    head: Colour
    breast: Colour
    belly: Colour
    back: Colour
    wing: Colour
    tail: Colour
    bill: Colour
    legs: Colour
    eye: Colour
    cap: Mark
    cheek: Mark
    throat: Mark
    eye_stripe: Mark
    breast_band: Mark
    spots: Mark
    shoulder: Mark
    wing_bar: Mark
    wing_tip: Mark
    tail_tip: Mark
    back_line: float
    breast_edge: float
    spot_phase: float


MARKS = (
    "cap", "cheek", "throat", "eye_stripe", "breast_band", "spots", "shoulder", "wing_bar", "wing_tip",
    "tail_tip",
)  # fmt: skip
COLOURS = REGIONS + ("bill", "legs", "eye")


def mix(a: Colour, b: Colour, weight: float) -> Colour:
    """a (1 - weight) + b weight, per channel."""
    red, green, blue = (x + weight * (y - x) for x, y in zip(a, b, strict=True))
    return red, green, blue


@functools.cache
def _assignments() -> np.ndarray:
    """Every way to give the six regions the colours 0 dark, 1 light, 2 vivid that keeps a bird contrasty."""
    rows = np.array(list(itertools.product(range(3), repeat=len(REGIONS))))
    head, breast, belly, back, wing, tail = rows.T
    share = np.stack([(rows == k) @ _REGION_AREA for k in range(3)], axis=1)
    keep = (wing != belly) & ((head != breast) | (head != back)) & (share.min(1) >= 0.18) & (share.max(1) <= 0.52)
    return rows[keep & ((wing != back) | (wing != tail))]


@functools.lru_cache(maxsize=4096)
def _family_species(world_seed: int, order_index: int, family: int, n: int) -> tuple[tuple[int, ...], ...]:
    """The first n species' assignments of a family: any two differ over some two fifths of the surface."""
    rows = _assignments()
    rows = rows[order(generator(world_seed, "assignments", order_index, family), len(rows))]
    chosen = [0]
    low, high = 0.28, 0.48
    while len(chosen) < n:
        for i in range(len(rows)):
            if i not in chosen and all(low <= (rows[i] != rows[j]) @ _REGION_AREA <= high for j in chosen):
                chosen.append(i)
                break
        else:
            low, high = low - 0.1, high + 0.1
    return tuple(tuple(int(v) for v in rows[i]) for i in chosen)


def _draw_shape(world_seed: int, order_index: int, family: int) -> Shape:
    """Orders set the proportions, families vary them."""
    o, f = generator(world_seed, "order", order_index), generator(world_seed, "shape", order_index, family)

    def vary(low: float, high: float, share: float = 0.3) -> float:
        centre = uniform(o, low, high)
        value = centre + share * (high - low) * uniform(f, -0.5, 0.5)
        return min(max(value, low), high)

    return Shape(
        body_height=vary(0.68, 0.84),
        body_width=vary(0.60, 0.72),
        neck=vary(0.0, 0.40),
        head=vary(0.50, 0.62),
        bill_length=vary(0.20, 0.44),
        bill_height=vary(0.09, 0.17),
        bill_droop=vary(-0.05, 0.35),
        tail_length=vary(0.34, 0.62),
        tail_width=vary(0.20, 0.34),
        tail_angle=vary(-0.25, 0.25),
        wing_length=vary(0.74, 0.92),
        wing_height=vary(0.44, 0.54),
        leg_length=vary(0.20, 0.34),
        pitch=vary(0.45, 0.85),
    )


def _draw_coat(
    world_seed: int, order_index: int, family: int, species: int, symbols: tuple[int, ...]
) -> dict[str, Any]:
    """A species' adult colours and marks as keyword arguments of Identity."""
    f = generator(world_seed, "palette", order_index, family)
    vivid = PALETTE[pick(f, _VIVID)]
    palette = (pick(f, _DARK), pick(f, _LIGHT), mix(vivid, pick(f, _EARTH_TINTS), uniform(f, 0.0, 0.12)))
    s = generator(world_seed, "species", order_index, family, species)
    m = generator(world_seed, "family marks", order_index, family)
    of = dict(zip(REGIONS, symbols, strict=True))

    def mark(probability: float, region: str, position: float, extent: float) -> Mark:
        """The family's mark, or in one species of three the species' own; never in the region's colour."""
        # All draws happen whether used or not: dropping a mark then shifts no other draw.
        own = chance(s, 0.35)
        family_draw, species_draw = (
            (float(m.random()), float(m.random())),
            (float(s.random()), float(s.random())),
        )
        on, which = species_draw if own else family_draw
        colour = palette[(of[region] + 1 + int(which * 2)) % 3]
        return Mark(float(on < probability), colour, position, extent * uniform(s, 0.92, 1.08))

    dark_head = of["head"] == 0
    return {
        **{region: palette[k] for region, k in of.items()},
        "bill": PALETTE[pick(s, _BILLS)],
        "legs": PALETTE[pick(m, ("black", "orange", "grey", "brown"))],
        "eye": _EYES[1 + int(s.random() * 3)] if dark_head else pick(s, _EYES),
        "cap": mark(0.50, "head", 0.40, 0.0),
        "cheek": mark(0.35, "head", -0.05, 0.66),
        "throat": mark(0.25, "head", 0.0, 0.75),
        "eye_stripe": mark(0.20, "head", 0.22, 0.26),
        "breast_band": mark(0.25, "breast", 0.62, 0.20),
        "spots": mark(0.22, "belly", 0.0, 0.25),
        "shoulder": mark(0.30, "wing", 0.62, 0.55),
        "wing_bar": mark(0.40, "wing", 0.0, 0.24),
        "wing_tip": mark(0.35, "wing", -0.60, 0.0),
        "tail_tip": mark(0.35, "tail", -0.25, 0.0),
        "back_line": uniform(m, 0.0, 0.25),
        "breast_edge": uniform(m, 0.30, 0.50),
        "spot_phase": uniform(s, 0.0, 1.0),
    }


_EARTH_TINTS: tuple[Colour, ...] = ((0.4, 0.3, 0.2), (0.9, 0.9, 0.9), (0.1, 0.1, 0.15))


def _dress(coat: dict[str, Any], plumage: int) -> dict[str, Any]:
    """The same species as a female (1) or juvenile (2): muted, with marks dropped or added."""
    if plumage == 0:
        return coat
    amount = 0.27 if plumage == 1 else 0.20
    coat = dict(coat)
    for name in REGIONS:
        colour: Colour = coat[name]
        saturated = max(colour) - min(colour) > 0.3
        coat[name] = mix(colour, _EARTH, amount * (1.35 if saturated else 0.75))
    for name in MARKS:
        mark: Mark = coat[name]
        keep = name not in (("cap", "breast_band") if plumage == 1 else ("cheek", "throat"))
        coat[name] = dataclasses.replace(
            mark, colour=mix(mark.colour, _EARTH, amount), strength=mark.strength if keep else 0.0
        )
    if plumage == 2:
        spots: Mark = coat["spots"]
        coat["spots"] = dataclasses.replace(spots, strength=0.85)
    return coat


def _jitter(coat: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Individual variation: colours by about two percent, borders by a few hundredths."""
    gain = uniform(rng, -0.03, 0.03)

    def shift(colour: Colour) -> Colour:
        red, green, blue = (min(max(c * (1 + gain) + uniform(rng, -0.016, 0.016), 0.0), 1.0) for c in colour)
        return red, green, blue

    out = dict(coat)
    for name in COLOURS:
        out[name] = shift(coat[name])
    for name in MARKS:
        mark: Mark = coat[name]
        out[name] = dataclasses.replace(
            mark, colour=shift(mark.colour), position=mark.position + uniform(rng, -0.012, 0.012)
        )
    out["back_line"] = float(coat["back_line"]) + uniform(rng, -0.012, 0.012)
    out["spot_phase"] = float(coat["spot_phase"]) + uniform(rng, -0.04, 0.04)
    return out


SPECIES_PER_FAMILY = 6


def draw_identity(
    world_seed: int, order: int, family: int, species: int, plumage: int = 0, individual: int = 0
) -> Identity:
    """The identity at a path. Every prefix of the path fixes what its level owns, whatever follows.

    `plumage` indexes PLUMAGES; `individual` may be any integer >= 0. Species beyond SPECIES_PER_FAMILY are
    drawn too, but only the first that many are kept plainly apart.
    """
    n = max(SPECIES_PER_FAMILY, species + 1)
    symbols = _family_species(world_seed, order, family, n)[species]
    coat = _dress(_draw_coat(world_seed, order, family, species, symbols), plumage)
    coat = _jitter(coat, generator(world_seed, "individual", order, family, species, plumage, individual))
    path = (world_seed, order, family, species, plumage, individual)
    return Identity(path=path, shape=_draw_shape(world_seed, order, family), **coat)


def fresh_identity(seed: int, index: int) -> Identity:
    """A bird of a family nobody has seen: its own world per index, for pre-training."""
    rng = generator(seed, "fresh", index)
    world = int(rng.random() * 2**53)
    rows = _assignments()
    symbols = tuple(int(v) for v in rows[min(int(rng.random() * len(rows)), len(rows) - 1)])
    plumage = int(rng.random() * 4) % 3  # adult colours half of the time
    coat = _jitter(_dress(_draw_coat(world, 0, 0, 0, symbols), plumage), rng)
    return Identity(path=(seed, -1, index, 0, plumage, 0), shape=_draw_shape(world, 0, 0), **coat)
