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
    """`better` is '' where neither direction is; `marks` are values worth a dashed line, such as chance."""

    name: str
    label: str
    better: Better
    digits: int = 3
    meaning: str = ""
    marks: tuple[float, ...] = ()

    @property
    def arrow(self) -> str:
        """↓, ↑, or nothing."""
        return {"lower": "↓", "higher": "↑", "": ""}[self.better]


_LISTED = {
    m.name: m
    for m in (
        Metric("dino", "DINO", "higher", 3, "cosine of DINOv2's class tokens, both pictures blacked outside the mask"),
        Metric("siglip", "SigLIP", "higher", 3, "cosine of SigLIP's picture embeddings, blacked likewise"),
        Metric("lpips", "LPIPS", "lower", 3, "learned distance (VGG), blacked likewise, averaged over the whole picture"),
        Metric(
            "rmse",
            "RMSE",
            "lower",
            1,
            "root mean squared error against the target's photo, inside the bird's mask, grey levels 0–255; the "
            "paper prints it as MSE",
        ),
        Metric("ssim", "SSIM", "higher", 3, "structural similarity to the target's photo, averaged inside the mask"),
        Metric(
            "normalised_identity",
            "normalised identity",
            "higher",
            3,
            "1 − error / a sibling species' error, against the rendered right answer: 1 is perfect, 0 is as wrong as a "
            "sibling. It rewards blur, so read it with the next two",
            (0.0,),
        ),
        Metric(
            "normalised_identity_plumage",
            "normalised identity against sibling plumages",
            "higher",
            3,
            "the same against the other plumages of the species",
            (0.0,),
        ),
        Metric(
            "subject_effect",
            "subject effect",
            "higher",
            3,
            "normalised identity with the right subject minus that with another subject: 0 if the model ignores its "
            "subject",
            (0.0,),
        ),
        Metric(
            "identification_rate",
            "identification rate",
            "higher",
            3,
            "how often the right species is the nearest of ten rendered in the same pose; chance is 0.1 (dashed)",
            (0.1,),
        ),
        Metric("masc", "MaSC", "higher", 3, "mean best match of the subject's patches, SigLIP 2 patch features"),
        Metric("mask_iou", "mask IoU", "higher", 3, "overlap of the generated bird's silhouette with the target's"),
        Metric("keypoint_distance", "keypoint distance", "lower", 3, "of the generated bird's parts from the target's"),
        Metric("rank", "species' rank", "lower", 0, "place of the right species among those it is compared with"),
        Metric("pixels", "bird's area", "", 0, "pixels of the target's mask"),
    )
}
_VARIANTS = {"box": "bird's box", "crop": "bird's box", "cropped": "bird's box", "subject": "to the subject"}


def describe(name: str) -> Metric:
    """What is known of a metric. `lpips_box` is LPIPS in the bird's box; similarity to the subject is neither good
    nor bad (a pasted subject has much of it); any other name is shown with its words and the direction that the
    summary gives it.
    """
    if name in _LISTED:
        return _LISTED[name]
    base, _, variant = name.rpartition("_")
    if base in _LISTED and variant in _VARIANTS:
        known, words = _LISTED[base], _VARIANTS[variant]
        better: Better = "" if variant == "subject" else known.better
        return Metric(name, f"{known.label} ({words})", better, known.digits, f"{known.label}, {words}", known.marks)
    better = "lower" if name in LOWER_IS_BETTER else "higher" if name in METRICS else ""
    return Metric(name, name.replace("_", " "), better)


def text(value: float | None, metric: str) -> str:
    """A number with the metric's digits and a true minus; '–' where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{describe(metric).digits}f}".replace("-", "−")


def interval(row: Mapping[str, Any]) -> str:
    """'[low, high]' of a summary row."""
    return f"[{text(row['low'], row['metric'])}, {text(row['high'], row['metric'])}]"
