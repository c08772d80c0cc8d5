"""What the paper reports, where it is known.

*Not All Birds Look The Same: Identity-Preserving Generation For Birds* (Sun, Saha, Maji, CVPR 2026,
arXiv:2512.04485). The values are those that public summaries of the paper quote; cells nobody quotes are None and
shown as unknown. A star marks a model before tuning. What the paper calls MSE is a root mean squared error on 0..255
(so its code computes it, and its size says so), hence the column `rmse`.
"""

from __future__ import annotations

import dataclasses

SOURCE = (
    "Published values: arXiv:2512.04485, as quoted by public summaries of the paper, not checked against its PDF. The "
    "paper's “MSE” is a root mean squared error on 0–255. A star marks a model before tuning."
)
COLUMNS = ("dinov2", "siglip", "lpips", "rmse")
REGRESSIONS = {"dinov2": 0.986, "rmse": 0.963}
"""R² of the models' means on NABLA against those on iNat-Seen."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Means of one model; None is unknown."""

    benchmark: str
    control: str
    model: str
    dinov2: float | None = None
    siglip: float | None = None
    lpips: float | None = None
    rmse: float | None = None


ROWS = (
    Row("nabla", "fill", "Om-S*", 0.41, 0.84, 0.087, 77.1),
    Row("nabla", "fill", "Om-S", 0.57, 0.91, 0.063, 54.7),
    Row("nabla", "fill", "Om-K*"),
    Row("nabla", "fill", "Om-K", 0.78, 0.94, 0.060, 51.0),
    Row("nabla", "fill", "Ins-A*", 0.75, 0.92, 0.069, 62.9),
    Row("nabla", "fill", "Ins-A", 0.77, 0.94, 0.063, 55.0),
    Row("nabla", "depth", "Om-K", rmse=57.0),
    Row("nabla", "keypoints", "Om-K"),
    Row("inat-seen", "fill", "Om-K"),
    Row("inat-unseen", "fill", "Om-K", 0.78, 0.94, 0.029, 46.9),
)
TITLES = {"nabla": "NABLA", "inat-seen": "iNat-Seen", "inat-unseen": "iNat-Unseen"}
