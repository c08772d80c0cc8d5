"""How well the embedded keypoint head finds the parts of a world's birds: ``python -m benchmarks.keypoints --seed 0``.

Everything is drawn in memory: the iNaturalist-like photographs of the world, through JPEG as its files are, with the
true places of all parts that the world's own geometry gives, to a fraction of a pixel. Nobody annotates such photos.

- PCK at 0.1 of the box's longer side by part, and how often visible and hidden is told right
- the keypoint distance of ``evaluate`` for pictures whose pose is right and wrong
"""

import argparse
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nabla_jax import assets
from nabla_jax.conditioning.geometry import Box, mask_box
from nabla_jax.data.skeleton import PARTS
from nabla_jax.metrics import references
from nabla_jax.metrics.networks import Detector, load_detector
from nabla_jax.metrics.pose import PoseError, keypoint_error, within
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.identity import draw_identity
from nabla_jax.toybirds.render import render


@dataclasses.dataclass(frozen=True)
class Shot:
    """A photograph [H, W, 3] uint8, its mask, [11, 3] (row, column, visible) with the first pixel's centre at 0 0."""

    picture: np.ndarray
    mask: np.ndarray
    keypoints: np.ndarray

    @property
    def box(self) -> Box:
        """Round the mask."""
        return mask_box(self.mask)

    @property
    def side(self) -> int:
        """Longer side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


def draw_world(seed: int, limit: int | None = None, orders: int = 4, size: int = 48) -> tuple[list[Shot], list[Shot]]:
    """Two photographs of each observed individual of the world that ``nabla_jax.toybirds --seed SEED`` writes.

    ``limit`` takes every n-th individual so that about as many are left.
    """
    settings = plan.Settings(seed=seed, orders=orders, size=size)
    observed = [o for subset in ("na", "unseen") for o in plan.observations(settings, subset)]
    observed = observed[:: max(1, len(observed) // limit) if limit else 1]
    first, second = ([_shot(settings, o.pictures[k]) for o in observed] for k in range(2))
    return first, second


def _shot(settings: plan.Settings, picture: plan.Picture) -> Shot:
    shot = render(draw_identity(*picture.identity), plan.scene_of(settings, picture))
    file = io.BytesIO()
    Image.fromarray(shot.rgb).save(file, format="JPEG", quality=95, subsampling=0)
    x, y, visible = shot.keypoints.astype(float).T
    return Shot(np.asarray(Image.open(file)), shot.mask, np.stack([y - 0.5, x - 0.5, visible], axis=1))


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """``parts`` is the PCK of each part, nan where it is never visible; ``pck`` that of all visible keypoints together,
    ``distance`` their mean distance over the box's longer side, ``visibility`` how often visible or hidden is right.
    """

    pck: float
    distance: float
    visibility: float
    parts: dict[str, float]


def accuracy(detector: Detector, shots: Sequence[Shot]) -> Accuracy:
    """Against the true keypoints."""
    found = detector([shot.picture for shot in shots], [shot.box for shot in shots])
    true, sides = np.stack([shot.keypoints for shot in shots]), np.array([shot.side for shot in shots])
    seen = true[..., 2] != 0
    distances = np.linalg.norm(found[..., :2] - true[..., :2], axis=-1) / sides[:, None]
    hits = np.where(seen, within(distances), np.nan)
    return Accuracy(
        float(np.nanmean(hits)),
        float(distances[seen].mean()),
        float(((found[..., 2] > 0.5) == seen).mean()),
        {part: float(np.nanmean(hits[:, k])) if seen[:, k].any() else float("nan") for k, part in enumerate(PARTS)},
    )


def errors(detector: Detector, subjects: Sequence[Shot], targets: Sequence[Shot]) -> Mapping[str, list[PoseError]]:
    """Pose errors by kind of picture, against the targets' true keypoints.

    - ``target``: the target itself: the head's own error
    - ``shifted``: the target moved sideways by a fifth of the box's longer side, the gap filled from its other end
    - ``mirrored``: the target mirrored about its box, the bird facing the other way
    - ``same individual``: another photo of the bird in its place, stretched to the target's size
    - ``paste subject``: that photo's bird pasted into the target's box
    """
    pictures: dict[str, list[np.ndarray]] = {
        name: [] for name in ("target", "shifted", "mirrored", "same individual", "paste subject")
    }
    for subject, target in zip(subjects, targets, strict=True):
        height, width = target.mask.shape
        pictures["target"].append(target.picture)
        pictures["shifted"].append(np.roll(target.picture, round(target.side / 5), axis=1))
        left, right = target.box[1], target.box[3]
        mirrored = target.picture.copy()
        mirrored[:, left:right] = mirrored[:, left:right][:, ::-1]
        pictures["mirrored"].append(mirrored)
        pictures["same individual"].append(references.stretch(subject.picture, height, width))
        pictures["paste subject"].append(
            references.paste_subject(subject.picture, subject.mask, target.picture, target.mask)
        )
    boxes = [target.box for target in targets]
    found = {name: detector(shown, boxes) for name, shown in pictures.items()}
    return {
        name: [
            error
            for points, target in zip(values, targets, strict=True)
            if (error := keypoint_error(points, target.keypoints, target.side)) is not None
        ]
        for name, values in found.items()
    }


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--head", default="asset:toy-keypoints", help="folder of the keypoint head")
    parser.add_argument("--dinov2", default="asset:toy-dinov2", help="folder of its DINOv2")
    args = parser.parse_args()
    detector = load_detector(Path(assets.resolve(args.head)), Path(assets.resolve(args.dinov2)), batch=32)
    first, second = draw_world(args.seed)
    found = accuracy(detector, [*first, *second])
    print(f"world {args.seed}: {len(first) + len(second)} photographs")
    print("PCK at 0.1 by part: " + ", ".join(f"{part} {value:.3f}" for part, value in found.parts.items()))
    print(f"all {found.pck:.3f}, distance {found.distance:.4f}, visibility {found.visibility:.3f}")
    for name, values in errors(detector, first, second).items():
        distance, rate = np.mean([v.distance for v in values]), np.mean([v.rate for v in values])
        print(f"{name:<16} keypoint distance {distance:.4f}, in place {rate:.3f} ({len(values)} pictures)")


if __name__ == "__main__":
    main()
