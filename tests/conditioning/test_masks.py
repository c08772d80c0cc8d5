"""Mask policies: what must hold of every one, and what tells them apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nabla_jax import draws
from nabla_jax.conditioning import masks
from nabla_jax.conditioning.geometry import Placement, mask_box, scale_box, square_box
from nabla_jax.errors import UserError


def blob(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 6)
    mask = noise > np.quantile(noise, 0.85)
    return np.asarray(mask)


def made(policy: str, mask: np.ndarray, number: int = 0, seed: int = 0) -> np.ndarray:
    return masks.repaint_mask(mask, policy, draws.generator(seed, number, draws.REPAINT_MASK))


@pytest.mark.parametrize("policy", masks.POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_every_mask_holds_the_bird_and_depends_on_its_key_alone(policy: str, seed: int) -> None:
    mask = blob(seed=seed)
    before = mask.copy()
    first = made(policy, mask, seed)
    assert first.dtype == bool and first.shape == mask.shape and (first | ~mask).all()
    made(policy, mask, seed + 100)
    np.testing.assert_array_equal(made(policy, mask, seed), first)
    np.testing.assert_array_equal(mask, before)
    assert first is not mask


def test_silhouette_and_dilated() -> None:
    mask = blob()
    np.testing.assert_array_equal(made("silhouette", mask), mask)
    far = ndimage.distance_transform_cdt(~mask, "chessboard")
    np.testing.assert_array_equal(made("dilated", mask), far <= masks.DILATION)


def rectangle() -> np.ndarray:
    """A bird of 100 x 200 pixels amid 400 x 400."""
    mask = np.zeros((400, 400), bool)
    mask[150:250, 100:300] = True
    return mask


def test_box_is_a_box_of_the_drawn_size() -> None:
    mask = rectangle()
    sizes = []
    for number in range(200):
        found = made("box", mask, number)
        top, left, bottom, right = mask_box(found)
        assert found[top:bottom, left:right].all()
        assert abs((top + bottom) / 2 - 200) <= 1 and abs((left + right) / 2 - 200) <= 1
        sizes.append((right - left) / 200)
    assert min(sizes) >= 1.1 and max(sizes) <= 1.21
    # Uniform between the two: mean 1.15 and a standard error of 0.002, and up to two pixels of rounding.
    assert 1.14 < np.mean(sizes) < 1.17


def test_bezier_bulges_on_every_side_differently() -> None:
    mask = rectangle()
    reached = []
    for number in range(60):
        found = made("bezier", mask, number)
        top, left, bottom, right = mask_box(found)
        reached.append([150 - top, 100 - left, bottom - 250, right - 300])
    reached = np.array(reached) / [100, 200, 100, 200]
    assert reached.min() >= 0 and reached.max() <= masks.BULGE + masks.JITTER + 0.01
    # Half of the bulge at the mean, and jitter takes the outermost of many points.
    assert (np.abs(reached.mean(0) - (masks.BULGE / 2 + masks.JITTER / 2)) < 0.08).all()
    assert np.abs(np.corrcoef(reached.T) - np.eye(4)).max() < 0.5


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="found 'circle', expected one of silhouette, dilated, box, bezier"):
        made("circle", blob())
    with pytest.raises(UserError, match="no foreground"):
        made("box", np.zeros((5, 5), bool))


def test_purposes_and_samples_are_independent_streams() -> None:
    streams = [
        draws.generator(seed, number, purpose).random()
        for seed in (0, 1)
        for number in (0, 1, 0xFFFFFFFF)
        for purpose in (draws.REPAINT_MASK, draws.NOISE)
    ]
    assert len(set(streams)) == len(streams)


boxes = st.tuples(st.integers(0, 59), st.integers(0, 79), st.integers(1, 60), st.integers(1, 80)).filter(
    lambda b: b[0] < b[2] and b[1] < b[3]
)


@settings(max_examples=80, deadline=None)
@given(boxes, st.floats(1, 4))
def test_larger_boxes(box: tuple[int, int, int, int], ratio: float) -> None:
    top, left, bottom, right = scale_box(box, ratio, 60, 80)
    assert 0 <= top <= box[0] and 0 <= left <= box[1] and box[2] <= bottom <= 60 and box[3] <= right <= 80
    grown = ratio * (box[2] - box[0]), ratio * (box[3] - box[1])
    if top > 0 and bottom < 60:
        assert grown[0] - 1e-6 <= bottom - top < grown[0] + 2 + 1e-6
    y0, x0, y1, x1 = square_box(box, 60, 80)
    assert y0 <= box[0] and x0 <= box[1] and y1 >= box[2] and x1 >= box[3]
    side = max(box[2] - box[0], box[3] - box[1])
    assert (y1 - y0 == side or y0 == 0 or y1 == 60) and (x1 - x0 == side or x0 == 0 or x1 == 80)


@settings(max_examples=40, deadline=None)
@given(boxes, st.floats(1, 2))
def test_padding_by_a_ratio_keeps_the_crop_in_the_middle(box: tuple[int, int, int, int], ratio: float) -> None:
    placement = Placement.crop(60, 80, box, 32).padded(ratio)
    assert placement.side == max(int(n * ratio) for n in placement.crop_size)
    before, after = placement.padding[:2], placement.padding[2:]
    assert all(0 <= b - a <= 2 for a, b in zip(before, after, strict=True))
    image = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    whole = Placement(60, 80, placement.box, placement.padding, placement.side)
    np.testing.assert_array_equal(whole.invert(whole.apply(image)), image[box[0] : box[2], box[1] : box[3]])


def test_subjects_with_room_round_them() -> None:
    mask = np.zeros((50, 70), bool)
    mask[10:30, 40:52] = True
    assert Placement.subject(mask, 32, 1.5).side == 30
    assert Placement.subject(mask, 32).side == 20
