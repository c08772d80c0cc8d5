"""Where a crop lies, and what mirroring does to the names of parts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nabla_jax.data import skeleton
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.images import write_image
from nabla_jax.keypoints import crops

ORDER = crops.mirror_order(skeleton.PARTS)
BOXES = [(4, 6, 30, 25), (0, 0, 40, 50), (30, 40, 40, 50), (10, 3, 12, 45)]


@pytest.mark.parametrize("box", BOXES)
def test_a_point_of_the_picture_is_where_the_crop_shows_it(box):
    """A white pixel's centre of mass in the crop is the place that its own centre is sent to."""
    place = crops.place(box, 40, 50, 1.25, 96)
    for row, column in ((box[0] + 2, box[1] + 1), (box[2] - 1, box[3] - 2)):
        image = np.zeros((40, 50, 3), np.uint8)
        image[row, column] = 255
        shown = crops.cut(image, place)[..., 0].astype(float)
        weights = shown / shown.sum()
        edges = (np.arange(96) + 0.5) / 96
        found = weights.sum(1) @ edges, weights.sum(0) @ edges
        expected = crops.to_crop(np.array([row, column]), place)
        np.testing.assert_allclose(found, expected, atol=0.3 / place.side)


@given(st.integers(0, 2**32 - 1))
def test_points_come_back(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 200, 2).tolist()
    top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
    box = top, left, int(rng.integers(top + 1, height + 1)), int(rng.integers(left + 1, width + 1))
    place = crops.place(box, height, width, rng.uniform(1, 2), 64)
    points = rng.uniform(-5, 205, (11, 2))
    np.testing.assert_allclose(crops.to_picture(crops.to_crop(points, place), place), points, atol=1e-9)
    # The whole box is inside the crop.
    corners = crops.to_crop(np.array([box[:2], box[2:]]) - 0.5, place)
    assert corners.min() >= -1e-9 and corners.max() <= 1 + 1e-9


def test_mirroring_exchanges_left_and_right():
    mirrored = [skeleton.PARTS[i] for i in ORDER]
    assert mirrored[:4] == ["bill", "crown", "nape", "right eye"] and mirrored[-2:] == ["right wing", "left wing"]
    np.testing.assert_array_equal(ORDER[ORDER], np.arange(len(skeleton.PARTS)))
    with pytest.raises(UserError, match="found 'left leg' without 'right leg'"):
        crops.mirror_order(("tail", "left leg"))


def test_the_crop_of_a_mirrored_picture_is_the_mirrored_crop():
    """Equivariance: mirror the photo and exchange its labels, or mirror the crop: both are the same training sample."""
    rng = np.random.default_rng(0)
    height, width = 60, 80
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    points = rng.integers(0, 60, (11, 2))
    visible = rng.random(11) < 0.6
    box = (10, 20, 51, 66)
    place = crops.place(box, height, width, 1.2, 48)
    there = crops.mirror(crops.cut(image, place), crops.to_crop(points, place), visible, ORDER)
    turned = crops.place((box[0], width - box[3], box[2], width - box[1]), height, width, 1.2, 48)
    flipped = np.stack([points[:, 0], width - 1 - points[:, 1]], axis=1)[ORDER]
    assert turned.side == place.side
    np.testing.assert_array_equal(crops.cut(np.ascontiguousarray(image[:, ::-1]), turned), there[0])
    np.testing.assert_allclose(crops.to_crop(flipped, turned), there[1], atol=1e-12)
    np.testing.assert_array_equal(visible[ORDER], there[2])
    again = crops.mirror(*there, ORDER)
    np.testing.assert_array_equal(again[0], crops.cut(image, place))
    np.testing.assert_allclose(again[1], crops.to_crop(points, place), atol=1e-12)


def test_variations_stay_within_their_limits():
    variation = crops.Variation(scale=1.5, shift=0.2, colour=0.3)
    box = (10, 10, 30, 50)
    found = [crops.vary_place(np.random.default_rng(i), box, variation) for i in range(200)]
    shifts = np.array([b[:2] for b, _ in found]) - box[:2]
    factors = np.array([f for _, f in found])
    assert all((b[2] - b[0], b[3] - b[1]) == (20, 40) for b, _ in found)
    assert np.abs(shifts).max() == 8 and shifts.min() == -8
    assert 1 / 1.5 <= factors.min() < 0.75 and 1.3 < factors.max() <= 1.5
    still = dataclasses.replace(variation, scale=1.0, shift=0.0, colour=0.0, soft=0.0)
    crop = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert crops.vary_place(np.random.default_rng(0), box, still) == (box, 1.0)
    np.testing.assert_array_equal(crops.vary_colour(np.random.default_rng(0), crop, still), crop)
    changed = crops.vary_colour(np.random.default_rng(0), crop, variation)
    assert changed.dtype == np.uint8 and (changed != crop).mean() > 0.5


def test_the_birds_box_is_the_annotated_one_or_the_masks(tmp_path):
    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    write_image(np.zeros((20, 30, 3), np.uint8), image)
    silhouette = np.zeros((20, 30), np.uint8)
    silhouette[3:9, 4:21] = 255
    write_image(silhouette, mask)
    bare = Example("a", image, 0, "Bird", ("Birds", "Bird"))
    assert crops.bird_box(dataclasses.replace(bare, mask=mask)) == (3, 4, 9, 21)
    assert crops.bird_box(dataclasses.replace(bare, mask=mask, box=(1, 2, 3, 4))) == (1, 2, 3, 4)
    with pytest.raises(UserError, match="has neither box nor mask"):
        crops.bird_box(bare)
    write_image(np.zeros((20, 30), np.uint8), mask)
    with pytest.raises(UserError, match="mask is empty"):
        crops.bird_box(dataclasses.replace(bare, mask=Path(mask)))
