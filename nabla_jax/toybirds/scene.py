"""How a bird is pictured: pose, light, camera, background and canvas."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.toybirds.rng import chance, pick, uniform

Colour = tuple[float, float, float]

# Quiet mid-tones: birds are black, white and vivid, so they stand out.
_GROUNDS: tuple[Colour, ...] = (
    (0.46, 0.55, 0.40), (0.56, 0.64, 0.52), (0.50, 0.60, 0.68), (0.62, 0.70, 0.76),
    (0.62, 0.56, 0.46), (0.55, 0.50, 0.46), (0.44, 0.52, 0.50), (0.66, 0.64, 0.58),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photographer's choice. Angles in radians, canvas (height, width) in pixels, colours 0..1.

    `yaw` 0 faces right, pi faces left, pi/2 faces the camera. `fill` is the bird's longest bounding-box side
    relative to the canvas; `shift` (down, right) in -1..1 moves it within the room that is left.
    """

    canvas: tuple[int, int]
    yaw: float
    pitch: float
    head_yaw: float
    head_pitch: float
    tail: float
    wing: float
    fill: float
    shift: tuple[float, float]
    light: tuple[float, float, float]
    ambient: float
    tint: Colour
    ground_top: Colour
    ground_bottom: Colour
    blobs: tuple[tuple[float, float, float, Colour, float], ...]
    perch: float
    perch_slope: float
    perch_colour: Colour

    @property
    def facing(self) -> str:
        """'left' or 'right': where the bird's bill points in the picture."""
        return "right" if math.cos(self.yaw) >= 0 else "left"


def draw_scene(
    rng: np.random.Generator,
    size: int = 48,
    pose_range: float = 1.0,
    facing: str | None = None,
    pose: str = "photo",
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """A random scene on a (size, size) canvas, or on `canvas` (height, width).

    `pose_range` in [0, 1] scales every pose angle around a profile view (0: always the same pose). `facing`
    fixes 'left' or 'right'. `pose='photo'` keeps the bird within 40 degrees of profile and turned towards the
    camera, because a silhouette cannot tell towards from away; `pose='free'` draws yaw from the full circle.
    """
    if not 0.0 <= pose_range <= 1.0:
        raise UserError(f"pose_range: found {pose_range}, expected a number from 0 to 1")
    if facing not in (None, "left", "right"):
        raise UserError(f"facing: found {facing!r}, expected 'left', 'right' or None")
    if pose not in ("photo", "free"):
        raise UserError(f"pose: found {pose!r}, expected 'photo' or 'free'")
    drawn_facing = "left" if chance(rng, 0.5) else "right"
    degrees = math.pi / 180
    turn = uniform(rng, 0, 40) * degrees * pose_range
    circle = uniform(rng, 0, 2 * math.pi)
    head_turn = uniform(rng, -25, 25) * degrees * pose_range
    if pose == "free":
        yaw = circle
    else:
        # The head stays on the camera's side too: reflect what would turn away.
        head_turn = abs(turn + head_turn) - turn
        yaw = turn if (facing or drawn_facing) == "right" else math.pi - turn
        head_turn = head_turn if (facing or drawn_facing) == "right" else -head_turn
    light_side = uniform(rng, -0.55, 0.55)
    ground = pick(rng, _GROUNDS)
    level = uniform(rng, -0.05, 0.05)
    lift = uniform(rng, 0.02, 0.10)
    top, bottom = _shifted(ground, level + lift), _shifted(ground, level - lift)
    blobs = []
    for _ in range(3):
        # Blobs brighten on the side the light comes from, so that the background tells of the light.
        centre = (uniform(rng, 0, 1), uniform(rng, 0, 1))
        strength = uniform(rng, 0.2, 0.7)
        bright = 1.0 if (centre[1] - 0.5) * light_side > 0 else -1.0
        blob = pick(rng, _GROUNDS)
        offsets = [bright * uniform(rng, 0.03, 0.14) for _ in range(3)]
        colour = (blob[0] + offsets[0], blob[1] + offsets[1], blob[2] + offsets[2])
        blobs.append((*centre, uniform(rng, 0.25, 0.55), colour, strength))
    return Scene(
        canvas=canvas or (size, size),
        yaw=yaw,
        pitch=uniform(rng, -15, 15) * degrees * pose_range,
        head_yaw=head_turn,
        head_pitch=uniform(rng, -15, 15) * degrees * pose_range,
        tail=uniform(rng, -18, 18) * degrees * pose_range,
        wing=uniform(rng, -12, 12) * degrees * pose_range,
        fill=uniform(rng, 0.80, 0.94) if pose_range > 0 else 0.87,
        shift=(uniform(rng, -0.7, 0.7) * pose_range, uniform(rng, -0.7, 0.7) * pose_range),
        light=(light_side, uniform(rng, 0.65, 0.9), 0.55),
        ambient=uniform(rng, 0.50, 0.58),
        tint=(1 + uniform(rng, -0.03, 0.03), 1.0, 1 + uniform(rng, -0.03, 0.03)),
        ground_top=top,
        ground_bottom=bottom,
        blobs=tuple(blobs),
        perch=1.0 if chance(rng, 0.5) else 0.0,
        perch_slope=uniform(rng, -0.12, 0.12),
        perch_colour=pick(rng, ((0.34, 0.27, 0.20), (0.42, 0.36, 0.30), (0.30, 0.32, 0.24))),
    )


def draw_canvas(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Half of the canvases are square; the others have every kind of short side, odd numbers too."""
    short = round(size * uniform(rng, 0.78, 0.98))
    return pick(rng, ((size, size), (size, size), (size, short), (short, size)))


def _shifted(colour: Colour, level: float) -> Colour:
    return colour[0] + level, colour[1] + level, colour[2] + level


def mirrored(scene: Scene) -> Scene:
    """The same pose facing the other way; background and light stay."""
    return dataclasses.replace(scene, yaw=math.pi - scene.yaw, head_yaw=-scene.head_yaw)


def between(first: Scene, last: Scene, t: float) -> Scene:
    """`first` at t = 0, and on the way to the pose, place and distance of `last` at t = 1.

    Light, camera and background stay. A bird that ends facing the other way turns round at once, halfway: it
    never points at the camera in between.
    """
    turns = first.facing != last.facing
    end = mirrored(last) if turns else last

    def on_the_way(a: float, b: float) -> float:
        return a + (b - a) * t

    way = (end.yaw - first.yaw + math.pi) % (2 * math.pi) - math.pi  # the shorter one
    scene = dataclasses.replace(
        first,
        yaw=first.yaw + way * t,
        shift=(on_the_way(first.shift[0], end.shift[0]), on_the_way(first.shift[1], end.shift[1])),
        pitch=on_the_way(first.pitch, end.pitch),
        head_yaw=on_the_way(first.head_yaw, end.head_yaw),
        head_pitch=on_the_way(first.head_pitch, end.head_pitch),
        tail=on_the_way(first.tail, end.tail),
        wing=on_the_way(first.wing, end.wing),
        fill=on_the_way(first.fill, end.fill),
    )
    return mirrored(scene) if turns and t > 0.5 else scene
