"""How well the embedded metric networks judge birds of a world: ``python -m benchmarks.metric_networks --seed 0``.

Everything is drawn in memory: the iNaturalist-like photographs of the world (true pairs of one individual, seen and
unseen species), through JPEG as its files are, masked with black ground as the metrics mask them.

- DINOv2 and SigLIP: AUC of cosines, pairs of one individual against pairs of sibling species (same family); intervals
  from a bootstrap of families.
- LPIPS: distances from a bird to distortions of it at rising strength.
"""

import argparse
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageFilter

from nabla_jax import assets
from nabla_jax.checkpoints.transformers_folder import load_dinov2, load_lpips, load_siglip
from nabla_jax.metrics.preprocessing import ImageProcessor, lpips_pixels
from nabla_jax.metrics.statistics import Interval, auc_interval
from nabla_jax.models import layers
from nabla_jax.pretrain.perceptual import distort
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.identity import MARKS, SPECIES_PER_FAMILY, Identity, draw_identity
from nabla_jax.toybirds.render import render
from nabla_jax.toybirds.scene import Scene

LOADERS = {"dinov2": load_dinov2, "siglip": load_siglip}
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
# Hues turn by up to 90 degrees; "half turn" goes on to 180, where colours are nearly as different as they can be.
KINDS = ("blur", "noise", "hue", "half turn", "colour", "marks")
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A bird on black ground, uint8 [H, W, 3], with all that decided its pixels."""

    masked: np.ndarray
    mask: np.ndarray
    identity: Identity
    scene: Scene


def photograph(identity: Identity, scene: Scene) -> Photograph:
    """The picture through JPEG, as a world's files hold it, then masked."""
    shot = render(identity, scene)
    file = io.BytesIO()
    Image.fromarray(shot.rgb).save(file, format="JPEG", quality=95, subsampling=0)
    picture = np.asarray(Image.open(file))
    return Photograph(np.where(shot.mask[..., None], picture, np.uint8(0)), shot.mask, identity, scene)


@dataclasses.dataclass(frozen=True)
class World:
    """Two photographs of every observed individual.

    ``siblings`` are the second ones with a sibling species in the bird's place: same scene, same outline, same kind of
    plumage.
    """

    first: list[Photograph]
    second: list[Photograph]
    siblings: list[Photograph]

    @property
    def paths(self) -> np.ndarray:
        """[observations, 6]: world seed, order, family, species, plumage, individual."""
        return np.array([shot.identity.path for shot in self.first])


def draw_world(seed: int, orders: int = 4, size: int = 48) -> World:
    """All observations of the world that ``python -m nabla_jax.toybirds --seed SEED`` writes, without its files."""
    settings = plan.Settings(seed=seed, orders=orders, size=size)
    observed = [o for subset in ("na", "unseen") for o in plan.observations(settings, subset)]
    first, second = (
        [photograph(draw_identity(*o.pictures[k].identity), plan.scene_of(settings, o.pictures[k])) for o in observed]
        for k in range(2)
    )
    return World(first, second, [sibling_in_place(shot, number) for number, shot in enumerate(second)])


def sibling_in_place(shot: Photograph, number: int) -> Photograph:
    """The photograph of a sibling species in the bird's place; the siblings take turns with ``number``."""
    seed, order, family, species, plumage, _ = shot.identity.path
    other = (species + 1 + number % (SPECIES_PER_FAMILY - 1)) % SPECIES_PER_FAMILY
    sibling = draw_identity(seed, order, family, other, plumage, 0)
    return photograph(dataclasses.replace(sibling, shape=shot.identity.shape), shot.scene)


Vectors = Callable[[Sequence[np.ndarray]], np.ndarray]


def encoder(name: str, folder: Path) -> Vectors:
    """Pictures uint8 [H, W, 3] of any sizes -> pooled vectors of unit length [n, D], by a folder's own processor."""
    network = LOADERS[name](folder)
    processor = ImageProcessor.from_json(folder / "preprocessor_config.json")
    run = jax.jit(lambda params, pixels: layers.bind(network.graphdef, params)(pixels).pooled)

    def vectors(pictures: Sequence[np.ndarray]) -> np.ndarray:
        pixels = processor(pictures)
        found = np.concatenate([run(network.params, pixels[i : i + _BATCH]) for i in range(0, len(pixels), _BATCH)])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return vectors


def soften(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A masked picture blurred by a pixel inside its mask, as generated ones are soft."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))
    return np.where(mask[..., None], blurred, np.uint8(0))


def identity_aucs(world: World, vectors: Vectors) -> dict[str, Interval]:
    """AUCs of same individual against sibling species, by what the siblings are.

    - ``sibling species``: all first with all second photographs of another species of the family
    - ``same plumage``: those of them in one kind of plumage
    - ``same scene``: the second photograph with a sibling in the bird's place
    - ``soft``: as the first, every second photograph blurred
    """
    a, b = vectors([s.masked for s in world.first]), vectors([s.masked for s in world.second])
    in_place = vectors([s.masked for s in world.siblings])
    soft = vectors([soften(s.masked, s.mask) for s in world.second])
    _, order, family, species, plumage, _ = world.paths.T
    families = order * plan.FAMILIES_PER_ORDER + family
    sibling = (families[:, None] == families) & (species[:, None] != species)
    alike = sibling & (plumage[:, None] == plumage)
    clusters = np.broadcast_to(families[:, None], sibling.shape)
    rows = {
        "sibling species": (b, (a @ b.T)[sibling], clusters[sibling]),
        "same plumage": (b, (a @ b.T)[alike], clusters[alike]),
        "same scene": (b, np.sum(a * in_place, axis=1), families),
        "soft": (soft, (a @ soft.T)[sibling], clusters[sibling]),
    }
    return {
        name: auc_interval(np.sum(a * other, axis=1), families, negative, of)
        for name, (other, negative, of) in rows.items()
    }


def without_marks(identity: Identity, strength: float) -> Identity:
    """The bird with its marks faded: 0 is as it was, 1 has none left."""
    faded = {
        name: dataclasses.replace(getattr(identity, name), strength=(1 - strength) * getattr(identity, name).strength)
        for name in MARKS
    }
    return dataclasses.replace(identity, **faded)


def changed(shot: Photograph, kind: str, strength: float, number: int) -> np.ndarray:
    """A masked photograph changed inside its mask; the random choices are the photograph's at every strength."""
    if kind == "marks":
        return photograph(without_marks(shot.identity, strength), shot.scene).masked
    kind, strength = {"hue": ("hue", strength / 2), "half turn": ("hue", strength)}.get(kind, (kind, strength))
    picture = distort(np.random.default_rng(number), shot.masked, kind, strength)
    return np.where(shot.mask[..., None], picture, np.uint8(0))


Distances = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], np.ndarray]


def perceptual_distance(folder: Path) -> Distances:
    """LPIPS of pairs of pictures uint8 [H, W, 3] of one size -> [pairs]."""
    network = load_lpips(folder)
    run = jax.jit(lambda params, a, b: layers.bind(network.graphdef, params)(a, b))
    return lambda a, b: np.asarray(run(network.params, lpips_pixels(a), lpips_pixels(b)))


@dataclasses.dataclass(frozen=True)
class Ordering:
    """Distances at rising strength: their means, the share of pictures whose distances all rise, and of steps that do.

    ``n`` pictures; those that the strongest change leaves as they are (no mark to be seen) are not counted.
    """

    means: tuple[float, ...]
    pictures: float
    steps: float
    n: int


def orderings(world: World, distances: Distances) -> dict[str, Ordering]:
    """How LPIPS orders the strengths of every kind of change, over the square first photographs."""
    shots = [shot for shot in world.first if shot.mask.shape[0] == shot.mask.shape[1]]
    originals = [shot.masked for shot in shots]
    found = {}
    for kind in KINDS:
        made = [[changed(shot, kind, strength, i) for i, shot in enumerate(shots)] for strength in STRENGTHS]
        visible = [bool((last != first).any()) for last, first in zip(made[-1], originals, strict=True)]
        table = np.stack([distances(originals, pictures) for pictures in made], axis=1)[visible]
        rises = np.diff(table, axis=1) > 0
        means = tuple(float(m) for m in table.mean(0))
        found[kind] = Ordering(means, float(rises.all(1).mean()), float(rises.mean()), len(table))
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="worlds")
    parser.add_argument("--orders", type=int, default=4)
    asset = functools.partial(parser.add_argument, type=assets.resolve)
    asset("--dinov2", default="asset:toy-dinov2")
    asset("--siglip", default="asset:toy-siglip")
    asset("--lpips", default="asset:toy-lpips")
    options = parser.parse_args()
    for seed in options.seed:
        world = draw_world(seed, options.orders)
        print(
            f"\nworld {seed}: {len(world.first)} individuals\n\n"
            "| network | negatives | AUC (95 % interval) |\n|---|---|---|"
        )
        for name in LOADERS:
            for what, found in identity_aucs(world, encoder(name, getattr(options, name))).items():
                print(f"| {name} | {what} | {found.mean:.4f} ({found.low:.4f} to {found.high:.4f}) |", flush=True)
        strengths = " | ".join(map(str, STRENGTHS))
        print(f"\n| LPIPS | {strengths} | all in order | steps in order | pictures |\n|---|" + "---|" * 7)
        for kind, order in orderings(world, perceptual_distance(options.lpips)).items():
            means = " | ".join(f"{m:.3f}" for m in order.means)
            print(f"| {kind} | {means} | {order.pictures:.3f} | {order.steps:.3f} | {order.n} |", flush=True)


if __name__ == "__main__":
    main()
