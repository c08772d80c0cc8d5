"""How metrics are named, rounded and explained on a page. A metric that is not listed here is shown all the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from nabla_jax.metrics.summary import LOWER_IS_BETTER, METRICS

Better = Literal["lower", "higher", ""]


@dataclasses.dataclass(frozen=True)
class Metric:
    """`better` is '' where neither direction is; `marks` are values worth a dashed line, such as chance; `theme` is the
    table it is shown in where there are many.
    """

    name: str
    label: str
    better: Better
    digits: int = 3
    meaning: str = ""
    theme: str = "Other"
    marks: tuple[float, ...] = ()

    @property
    def arrow(self) -> str:
        """↓, ↑, or nothing."""
        return {"lower": "↓", "higher": "↑", "": ""}[self.better]


PAPER, IDENTITY, CUT_OUT, POSE = "The paper’s", "Identity", "Birds cut out", "Pose and shape"
THEMES = (PAPER, IDENTITY, CUT_OUT, POSE, "Other")
_LISTED = {
    m.name: m
    for m in (
        Metric(
            "dinov2",
            "DINO",
            "higher",
            3,
            "cosine of DINOv2’s class tokens, both pictures black outside the mask",
            PAPER,
        ),
        Metric("siglip", "SigLIP", "higher", 3, "cosine of SigLIP’s embeddings, black outside the mask", PAPER),
        Metric(
            "lpips",
            "LPIPS",
            "lower",
            3,
            "learned distance (VGG), black outside the mask, over the whole picture",
            PAPER,
        ),
        Metric(
            "rmse",
            "RMSE",
            "lower",
            1,
            "root mean squared error against the target’s photo, inside the bird’s mask, grey levels 0–255; the "
            "paper prints it as MSE",
            PAPER,
        ),
        Metric(
            "ssim", "SSIM", "higher", 3, "structural similarity to the target’s photo, averaged inside the mask", POSE
        ),
        Metric(
            "normalised_identity",
            "normalised identity",
            "higher",
            3,
            "1 − error / a sibling species’ error, against the rendered right answer: 1 is perfect, 0 is as wrong as a "
            "sibling. It rewards blur, so read it with the next two",
            IDENTITY,
            (0.0,),
        ),
        Metric(
            "normalised_identity_plumage",
            "identity against plumages",
            "higher",
            3,
            "normalised identity against the other plumages of the species",
            IDENTITY,
            (0.0,),
        ),
        Metric(
            "subject_effect",
            "subject effect",
            "higher",
            3,
            "normalised identity with the right subject minus that with another subject: 0 if the model ignores its "
            "subject",
            IDENTITY,
            (0.0,),
        ),
        Metric(
            "identification_rate",
            "identification rate",
            "higher",
            3,
            "how often the right species is the nearest of ten rendered in the same pose; chance is 0.1 (dashed)",
            IDENTITY,
            (0.1,),
        ),
        Metric(
            "retrieval_rate",
            "retrieval rate",
            "higher",
            3,
            "how often the true class is the nearest among its siblings’ real pictures",
            IDENTITY,
        ),
        Metric(
            "patch_precision",
            "patch precision",
            "higher",
            3,
            "mean best match of the generated bird’s patches among the subject’s",
            IDENTITY,
        ),
        Metric(
            "patch_recall",
            "patch recall",
            "higher",
            3,
            "mean best match of the subject’s patches among the generated bird’s (MaSC)",
            IDENTITY,
        ),
        Metric(
            "mask_iou", "mask IoU", "higher", 3, "overlap of the generated bird’s silhouette with the target’s", POSE
        ),
        Metric(
            "keypoint_distance",
            "keypoint distance",
            "lower",
            3,
            "mean distance of the generated bird’s keypoints, as a network finds them, from those visible in the "
            "target, over the longer side of its box; the row copy-target shows the network’s own error",
            POSE,
        ),
        Metric(
            "keypoint_rate",
            "keypoints in place",
            "higher",
            3,
            "share of those keypoints that are at most a tenth of the box’s longer side away (PCK at 0.1)",
            POSE,
        ),
        Metric("rank", "place of the species", "lower", 0, "the right species’ among those rendered", IDENTITY),
        Metric("retrieval_rank", "place in retrieval", "lower", 0, "the true class’s among its siblings", IDENTITY),
        Metric("pixels", "bird’s pixels", "", 0, "pixels of the target’s mask"),
        Metric("area", "bird’s share", "", 3, "share of the target’s picture that its mask covers"),
        Metric("distance", "taxonomic distance", "", 0, "of the target’s class to the nearest class of training"),
    )
}
_VARIANTS = {"box": "cut out", "subject": "to the subject"}
_ARTICLES = {
    "box": "with both birds cut out by their boxes",
    "subject": "of the cut-outs of the generated bird and of the subject: a good likeness and a pasted copy have much",
}


def describe(name: str) -> Metric:
    """What is known of a metric. `lpips_box` is LPIPS of the birds' boxes; similarity to the subject is neither good
    nor bad (a pasted subject has much of it); any other name is shown with its words and the direction that the
    summary gives it.
    """
    if name in _LISTED:
        return _LISTED[name]
    base, _, variant = name.rpartition("_")
    if base in _LISTED and variant in _VARIANTS:
        known = _LISTED[base]
        better: Better = "" if variant == "subject" else known.better
        label = f"{known.label} {_VARIANTS[variant]}"
        return Metric(name, label, better, known.digits, f"{known.label} {_ARTICLES[variant]}", CUT_OUT, known.marks)
    better = "lower" if name in LOWER_IS_BETTER else "higher" if name in METRICS else ""
    return Metric(name, name.replace("_", " "), better)


def text(value: float | None, metric: str) -> str:
    """A number with the metric's digits and a true minus; '–' where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{describe(metric).digits}f}".replace("-", "−")


def interval(row: Mapping[str, Any]) -> str:
    """'[low, high]' of a summary row; '' where it has no interval."""
    if row["low"] is None or row["high"] is None:
        return ""
    return f"[{text(row['low'], row['metric'])}, {text(row['high'], row['metric'])}]"
