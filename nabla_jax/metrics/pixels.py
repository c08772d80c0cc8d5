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
SSIM_RADIUS = 5
SSIM_WINDOW = 2 * SSIM_RADIUS + 1


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
    it. Equals scikit-image's `structural_similarity` with Gaussian weights and population covariance. Raises
    UserError for pictures smaller than the window.
    """
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
    similarity = _ssim_map(target[box].astype(np.float64), generated[box].astype(np.float64))
    return float(np.mean(similarity[inside[box]]))


def _ssim_map(a: Array, b: Array) -> Array:
    """Local similarity of two float64 pictures [H, W, 3] of range 255 (the paper's equation 13)."""
    from scipy.ndimage import gaussian_filter

    def local_mean(x: Array) -> Array:
        means: Array = gaussian_filter(x, (SSIM_SIGMA, SSIM_SIGMA, 0), truncate=SSIM_RADIUS / SSIM_SIGMA)
        return means

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = local_mean(a), local_mean(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance = local_mean(a * b) - product
    variances = local_mean(a * a + b * b) - squares
    return (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
