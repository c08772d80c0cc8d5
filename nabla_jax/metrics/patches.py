"""Masked patch matching: are the parts of one bird found in another, wherever they are?

After MaSC (arXiv 2605.22469, with SigLIP 2 features), in both directions and among foreground patches alone. As for
words in BERTScore (Zhang et al. 2020), precision asks whether all that the generated bird shows is the subject's,
recall whether all of the subject is shown.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Of a patch's pixels that the mask covers.
FOREGROUND = 0.5


class PatchMatch(NamedTuple):
    """Mean best cosines, -1..1.

    ``precision``: for every foreground patch of the generated bird the best cosine among the subject's foreground
    patches. ``recall``: for every foreground patch of the subject the best among the generated bird's (MaSC compares
    with all patches of the generated picture; here its background is black).
    """

    precision: float
    recall: float


def foreground_patches(shares: Array) -> Array:
    """Which patches are foreground, [N] bool, of the mask's shares [N] of each.

    Those covered by half or more; where a bird is so thin that none is, those covered most.
    """
    chosen: Array = shares >= min(FOREGROUND, shares.max())
    return chosen


def match(generated: Array, subject: Array) -> PatchMatch:
    """Matches unit vectors of foreground patches, [M, D] and [N, D], one patch or more each."""
    cosines = generated.astype(np.float32) @ subject.astype(np.float32).T
    return PatchMatch(float(cosines.max(1).mean()), float(cosines.max(0).mean()))
