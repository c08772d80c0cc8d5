"""Endless pairs of fresh birds for pre-training: every index is a bird of a family nobody has seen."""

from __future__ import annotations

import dataclasses

from nabla_jax.toybirds.captions import caption
from nabla_jax.toybirds.identity import SPECIES_PER_FAMILY, Identity, draw_identity, fresh_identity
from nabla_jax.toybirds.render import Render, render
from nabla_jax.toybirds.rng import chance, generator, pick
from nabla_jax.toybirds.scene import Scene, draw_canvas, draw_scene


def fresh_scenes(
    seed: int,
    index: int,
    size: int = 48,
    views: int = 2,
    pose_range: float = 1.0,
    mirror_probability: float = 0.5,
    pose: str = "photo",
) -> list[Scene]:
    """The scenes of `fresh_pair`: each view after the first faces the other way with `mirror_probability`.

    Canvases are those of a world's photographs: half are square, the others shorter one way.
    """
    rng = generator(seed, "fresh scenes", index)
    first = "left" if chance(rng, 0.5) else "right"
    other = "right" if first == "left" else "left"
    scenes = []
    for view in range(views):
        turned = view > 0 and chance(rng, mirror_probability)
        canvas = draw_canvas(generator(seed, "fresh canvas", index, view), size)
        scenes.append(draw_scene(rng, size, pose_range, other if turned else first, pose, canvas))
    return scenes


def fresh_pair(
    seed: int,
    index: int,
    size: int = 48,
    views: int = 2,
    pose_range: float = 1.0,
    mirror_probability: float = 0.5,
    pose: str = "photo",
    antialias: int | None = None,
) -> list[Render]:
    """`views` pictures of one fresh bird, the longer side `size` pixels; (seed, index) fixes every pixel.

    `pose_range` in [0, 1] scales how much the poses differ from a profile (0: only background, light and
    facing differ).
    """
    identity = fresh_identity(seed, index)
    scenes = fresh_scenes(seed, index, size, views, pose_range, mirror_probability, pose)
    return [render(identity, scene, antialias) for scene in scenes]


def fresh_disguise(
    seed: int,
    index: int,
    size: int = 48,
    views: int = 2,
    pose_range: float = 1.0,
    mirror_probability: float = 0.5,
    pose: str = "photo",
    antialias: int | None = None,
) -> Render:
    """The last view of `fresh_pair` with the same arguments, the bird in a stranger's coat: its mask is the same."""
    shape = fresh_identity(seed, index).shape
    stranger = dataclasses.replace(fresh_identity(seed + 1, index), shape=shape)
    scenes = fresh_scenes(seed, index, size, views, pose_range, mirror_probability, pose)
    return render(stranger, scenes[-1], antialias)


def fresh_captions(
    seed: int,
    index: int,
    size: int = 48,
    views: int = 2,
    pose_range: float = 1.0,
    mirror_probability: float = 0.5,
    pose: str = "photo",
) -> list[str]:
    """The captions of the views of `fresh_pair` with the same arguments."""
    identity = fresh_identity(seed, index)
    scenes = fresh_scenes(seed, index, size, views, pose_range, mirror_probability, pose)
    return [caption(identity, scene) for scene in scenes]


def fresh_siblings(seed: int, index: int, species: int = SPECIES_PER_FAMILY) -> list[Identity]:
    """One individual of each of the first `species` of a family nobody has seen: one shape, one palette.

    All wear one kind of plumage, adult colours half of the time; in one family of four each draws its own.
    """
    rng = generator(seed, "fresh family", index)
    world = int(rng.random() * 2**53)
    kinds = (0, 0, 1, 2)
    mixed, one = chance(rng, 0.25), pick(rng, kinds)
    return [draw_identity(world, 0, 0, s, pick(rng, kinds) if mixed else one, 1) for s in range(species)]


def fresh_family(
    seed: int,
    index: int,
    size: int = 48,
    species: int = SPECIES_PER_FAMILY,
    views: int = 2,
    pose_range: float = 1.0,
    mirror_probability: float = 0.5,
    pose: str = "photo",
    antialias: int | None = None,
) -> list[list[Render]]:
    """`views` pictures of each of `fresh_siblings`, [species][views]; (seed, index) fixes every pixel.

    All siblings pose in the same scenes: pictures of one view differ in plumage alone and have one mask.
    """
    scenes = fresh_scenes(seed, index, size, views, pose_range, mirror_probability, pose)
    return [[render(bird, scene, antialias) for scene in scenes] for bird in fresh_siblings(seed, index, species)]
