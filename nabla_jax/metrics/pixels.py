"""Errors between two pictures inside a mask, in pixel values.

Every function takes uint8 RGB pictures [H, W, 3] and a mask [h, w], and gives None where the mask is empty:
such a pair has no error, neither a perfect one nor a bad one, and the caller excludes and counts it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nabla_jax.errors import UserError
from nabla_jax.images import resize

Array = np.ndarray[Any, Any]

SSIM_SIGMA = 1.5
SSIM_WINDOW = 11  # what a Gaussian of SSIM_SIGMA cut at 3.5 sigma spans: 2 * int(3.5 * 1.5 + 0.5) + 1


def foreground(mask: Array) -> Array:
    """`mask` [h, w] as bool: stored as bool, 0/1 or 0..255, the upper half of the range is foreground."""
    if mask.dtype == np.bool_:
        return mask
    return mask > (127.5 if mask.max(initial=0) > 1 else 0.5)


def at_size_of(generated: Array, target: Array, mask: Array) -> tuple[Array, Array]:
    """(target, mask as bool), both resized to the generated picture's height and width.

    The picture is averaged over areas and the mask taken by nearest pixel, as the published evaluation does.
    """
    height, width = generated.shape[:2]
    return resize(target, height, width, "area"), resize(foreground(mask), height, width, "nearest")


def masked_rmse(generated: Array, target: Array, mask: Array) -> float | None:
    """Root mean squared error over the mask's pixels and the three channels, 0..255; None if the mask is
    empty.

    `target` and `mask` are brought to the generated size. This is the number published tables of this task
    call "MSE".
    """
    target, inside = at_size_of(generated, target, mask)
    return rmse_of_pixels(generated[inside], target[inside])


def rmse_of_pixels(a: Array, b: Array) -> float | None:
    """Root mean squared difference of two uint8 [pixels, 3] lists, 0..255; None if there are no pixels."""
    if a.size == 0:
        return None
    difference = a.astype(np.int32) - b.astype(np.int32)
    # Integer sum: exact, so the value depends on no summation order.
    return float(np.sqrt(np.sum(difference * difference, dtype=np.int64) / difference.size))


def masked_ssim(generated: Array, target: Array, mask: Array) -> float | None:
    """Structural similarity (Wang et al. 2004), -1..1, averaged inside the mask; None if the mask is empty.

    The map is computed on the whole pictures (Gaussian window of sigma 1.5, 11x11 pixels, range 255, per
    channel), then averaged over the mask's pixels and the channels: windows at the outline see both sides of
    it. Raises UserError for pictures smaller than the window.
    """
    # scikit-image takes a second to import, and only this function needs it.
    from skimage.metrics import structural_similarity

    target, inside = at_size_of(generated, target, mask)
    if not inside.any():
        return None
    if min(generated.shape[:2]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM: picture is {generated.shape[0]}x{generated.shape[1]}, "
            f"expected at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels"
        )
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    # Only windows that touch the mask count: crop to its box plus one window, the map inside stays the same.
    box = (
        slice(max(rows[0] - SSIM_WINDOW, 0), rows[-1] + 1 + SSIM_WINDOW),
        slice(max(columns[0] - SSIM_WINDOW, 0), columns[-1] + 1 + SSIM_WINDOW),
    )
    _, similarity = structural_similarity(
        target[box],
        generated[box],
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        full=True,
    )
    return float(np.mean(similarity[inside[box]], dtype=np.float64))
