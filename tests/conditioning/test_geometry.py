import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nabla_jax.conditioning.geometry import Placement, clip_box, mask_box
from nabla_jax.errors import UserError
from nabla_jax.images import resize

SIZES = [
    (1, 1),
    (1, 40),
    (40, 1),
    (7, 3),
    (90, 140),
    (141, 93),
    (100, 161),
    (161, 100),
    (100, 289),
    (33, 500),
    (96, 96),
]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A colour slope that linear interpolation reproduces."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([40 + rows * 0.7, 60 + columns * 0.5, 90 + rows * 0.3 + columns * 0.2], axis=2)


# -------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("shape", [(37, 53), (96, 41), (5, 200)])
@pytest.mark.parametrize("size", [(16, 16), (64, 48), (130, 301)])
def test_bilinear_is_torchs(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = noise(*shape, 3).astype(np.float64)
    ours = resize(image, *size, "bilinear")
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(ours, theirs.permute(1, 2, 0).numpy(), atol=1e-6)


@pytest.mark.parametrize(("shape", "size"), [((64, 96), (16, 32)), ((60, 45), (20, 9)), ((8, 8), (1, 1))])
def test_area_is_the_block_mean(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = noise(*shape, 3)
    blocks = image.reshape(size[0], shape[0] // size[0], size[1], shape[1] // size[1], 3).astype(float)
    np.testing.assert_allclose(resize(image.astype(float), *size, "area"), blocks.mean((1, 3)), atol=1e-9)


@pytest.mark.parametrize(("shape", "size"), [((50, 70), (33, 21)), ((141, 93), (64, 64)), ((101, 7), (100, 5))])
def test_area_with_fractional_cells_is_pillows_box(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = noise(*shape).astype(np.float32)
    # Pillow's box filter counts whole pixels; of a picture enlarged k times it approaches the exact area.
    k = 20
    large = Image.fromarray(np.repeat(np.repeat(image, k, 0), k, 1))
    theirs = np.asarray(large.resize(size[::-1], Image.Resampling.BOX))
    np.testing.assert_allclose(resize(image, *size, "area"), theirs, atol=8)
    assert np.abs(resize(image, *size, "area") - theirs).mean() < 1.5


def test_area_keeps_the_mean_when_shrinking() -> None:
    image = noise(97, 131).astype(float)
    assert resize(image, 20, 30, "area").mean() == pytest.approx(image.mean(), abs=1e-9)


def test_lanczos_is_pillows_for_bytes_and_floats() -> None:
    image = noise(60, 41, 3)
    theirs = np.asarray(Image.fromarray(image).resize((25, 33), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize(image, 33, 25, "lanczos"), theirs)
    np.testing.assert_array_equal(resize(image[:, :, 0], 33, 25, "lanczos"), theirs[:, :, 0])
    soft = image // 4 + 96  # nothing is clipped between the passes
    floats = resize(soft.astype(np.float32), 33, 25, "lanczos")
    assert np.abs(floats - resize(soft, 33, 25, "lanczos")).max() <= 1


def test_nearest_takes_source_pixels() -> None:
    image = noise(9, 10)
    result = resize(image, 4, 30, "nearest")
    np.testing.assert_array_equal(result, image[[0, 2, 4, 6]][:, np.repeat(np.arange(10), 3)])


@pytest.mark.parametrize("filter", ["area", "bilinear", "lanczos", "nearest"])
def test_resizing_a_constant_keeps_it(filter: str) -> None:
    for shape in ((1, 1), (3, 50), (64, 64)):
        assert (resize(np.full(shape, 137, np.uint8), 17, 5, filter) == 137).all()  # type: ignore[arg-type]


def test_resize_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="bicubic"):
        resize(noise(4, 4), 2, 2, "bicubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0x2"):
        resize(noise(4, 4), 0, 2)
    with pytest.raises(ValueError, match="bool"):
        resize(np.ones((4, 4), bool), 2, 2)


# ------------------------------------------------------------------------------------ boxes


def test_box_of_a_mask_is_half_open() -> None:
    mask = np.zeros((20, 30), bool)
    mask[3:9, 5:21] = True
    assert mask_box(mask) == (3, 5, 9, 21)
    mask[:] = False
    mask[19, 29] = True
    assert mask_box(mask) == (19, 29, 20, 30)
    with pytest.raises(ValueError, match="no foreground"):
        mask_box(np.zeros((3, 3), bool))


def test_clip_box_keeps_at_least_a_pixel() -> None:
    assert clip_box((-5, 2, 50, 8), 20, 30) == (0, 2, 20, 8)
    assert clip_box((25, 40, 30, 45), 20, 30) == (19, 29, 20, 30)


# ------------------------------------------------------------------------------- placements


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [16, 64, 96])
def test_a_picture_returns_at_its_own_size(height: int, width: int, size: int) -> None:
    placement = Placement.square(height, width, size)
    canvas = placement.apply(noise(height, width, 3), filter="lanczos")
    assert canvas.shape == (size, size, 3)
    back = placement.invert(canvas)
    assert back.shape == (height, width, 3)
    assert back.dtype == np.uint8


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_inverse_is_exact_at_the_pictures_own_scale(height: int, width: int) -> None:
    image = noise(height, width, 3)
    placement = Placement.square(height, width, max(height, width))
    np.testing.assert_array_equal(placement.invert(placement.apply(image)), image)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_the_inverse_is_exact_at_whole_multiples(factor: int) -> None:
    image = noise(13, 20, 3)
    placement = Placement.square(13, 20, 20 * factor)
    np.testing.assert_array_equal(placement.invert(placement.apply(image, filter="nearest")), image)


@pytest.mark.parametrize(("height", "width"), [(90, 140), (141, 93), (100, 161), (512, 300)])
@pytest.mark.parametrize("size", [64, 96, 137])
def test_nothing_moves(height: int, width: int, size: int) -> None:
    """A slope comes back as itself: half a pixel of shift would cost more than the tolerance."""
    image = smooth(height, width)
    placement = Placement.square(height, width, size)
    filter = "area" if size < max(height, width) else "bilinear"
    back = placement.invert(placement.apply(image, filter=filter))
    # The outermost pixels see the canvas pixels nearest to the border only.
    margin = int(np.ceil(2 * max(height, width) / size))
    inner = (slice(margin, -margin), slice(margin, -margin))
    # A shift by one source pixel is 0.7; by half a canvas pixel at least that.
    np.testing.assert_allclose(back[inner], image[inner], atol=0.12)


@pytest.mark.parametrize(("height", "width"), [(100, 161), (161, 100), (100, 289), (33, 500)])
def test_padding_never_bleeds_in(height: int, width: int) -> None:
    placement = Placement.square(height, width, 96)
    canvas = np.full((96, 96), 255, np.uint8)
    top, left, bottom, right = placement.region()
    canvas[int(np.ceil(top - 1e-9)) : int(bottom + 1e-9), int(np.ceil(left - 1e-9)) : int(right + 1e-9)] = 10
    assert (placement.invert(canvas) == 10).all()


def test_the_inverse_takes_canvases_of_any_size() -> None:
    placement = Placement.square(90, 140, 64)
    for size in (17, 64, 200, 1024):
        assert placement.invert(np.full((size, size, 3), 7, np.uint8)).shape == (90, 140, 3)


def test_odd_padding_comes_after() -> None:
    placement = Placement.square(5, 8, 8)
    assert placement.padding == (1, 0, 2, 0)
    canvas = placement.apply(np.zeros((5, 8), np.uint8), fill=255)
    np.testing.assert_array_equal(canvas[:, 0], [255, 0, 0, 0, 0, 0, 255, 255])


def test_subject_holds_the_whole_bird() -> None:
    mask = np.zeros((50, 70), bool)
    mask[10:31, 40:52] = True
    placement = Placement.subject(mask, 21)
    assert placement.box == (10, 40, 31, 52)
    canvas = placement.apply(mask.astype(np.uint8), fill=0, filter="nearest")
    assert canvas.sum() == mask.sum()


@pytest.mark.parametrize("shape", [(60, 1), (1, 60)])
def test_one_pixel_wide_masks_are_masks(shape: tuple[int, int]) -> None:
    mask = np.zeros((80, 90), bool)
    mask[9 : 9 + shape[0], 7 : 7 + shape[1]] = True
    placement = Placement.subject(mask, 32)
    assert placement.crop_size == shape
    assert placement.apply(noise(80, 90, 3), filter="lanczos").shape == (32, 32, 3)
    assert placement.invert(noise(32, 32, 3)).shape == (*shape, 3)


def test_a_few_stray_pixels_mean_the_whole_picture_and_none_is_an_error() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4, 5:14] = True
    assert Placement.subject(mask, 16).box == (0, 0, 20, 30)
    mask[4, 14] = True
    assert Placement.subject(mask, 16).box == (4, 5, 5, 15)
    with pytest.raises(UserError, match="no foreground"):
        Placement.subject(np.zeros((20, 30), bool), 16)


def test_paste_changes_the_box_only() -> None:
    picture = noise(40, 50, 3)
    placement = Placement.crop(40, 50, (5, 10, 25, 42), 64)
    result = placement.paste(np.zeros((64, 64, 3), np.uint8), picture)
    assert (result[5:25, 10:42] == 0).all()
    result[5:25, 10:42] = picture[5:25, 10:42]
    np.testing.assert_array_equal(result, picture)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.data())
def test_a_feathered_seam_is_continuous_and_keeps_what_it_must(feather: int, data: st.DataObject) -> None:
    """White pasted into black: the grey is the share of the new picture."""
    height, width = 40, 50
    top, left = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    bottom, right = data.draw(st.integers(25, height)), data.draw(st.integers(25, width))
    keep = np.zeros((height, width), bool)
    keep[data.draw(st.integers(top, 14)) : 20, data.draw(st.integers(left, 14)) : 20] = True
    placement = Placement.crop(height, width, (top, left, bottom, right), 64)
    found = placement.paste(np.full((64, 64), 1.0), np.zeros((height, width)), feather, keep)
    outside = np.ones((height, width), bool)
    outside[top:bottom, left:right] = False
    assert not found[outside].any()
    np.testing.assert_array_equal(found[keep], 1)
    # Towards the picture's own border nothing fades; elsewhere in equal steps, fewer where there is less room.
    rows, columns = np.flatnonzero(keep.any(axis=1)), np.flatnonzero(keep.any(axis=0))
    room = (rows[0] - top, bottom - 1 - rows[-1], columns[0] - left, right - 1 - columns[-1])
    border = (top == 0, bottom == height, left == 0, right == width)
    middle = (found[:, columns[0]], found[::-1, columns[0]], found[rows[0]], found[rows[0], ::-1])
    start = (top, height - bottom, left, width - right)
    for line, first, space, at_border in zip(middle, start, room, border, strict=True):
        steps = 0 if at_border else min(feather, space)
        ramp = np.minimum(np.arange(1, 8) / (steps + 1), 1)
        np.testing.assert_allclose(line[first : first + 7], ramp, rtol=0, atol=1e-12)


def test_json_round_trip_and_its_errors() -> None:
    placement = Placement.crop(40, 50, (5, 10, 25, 42), 64)
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    with pytest.raises(UserError, match="missing box"):
        Placement.from_json({k: v for k, v in placement.to_json().items() if k != "box"})
    with pytest.raises(UserError, match="not a non-empty box"):
        Placement.from_json(placement.to_json() | {"box": [0, 0, 41, 50]})


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="found a 50x40 picture, expected 40x50"):
        Placement.square(40, 50, 16).apply(noise(50, 40, 3))
    with pytest.raises(ValueError, match="expected a square"):
        Placement.square(40, 50, 16).invert(noise(16, 17, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.data())
def test_any_crop_of_any_picture_on_any_canvas(height: int, width: int, size: int, data: st.DataObject) -> None:
    top = data.draw(st.integers(0, height - 1))
    left = data.draw(st.integers(0, width - 1))
    box = (top, left, data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width)))
    placement = Placement.crop(height, width, box, size)
    canvas = placement.apply(np.full((height, width), 93, np.uint8), fill=93, filter="bilinear")
    assert canvas.shape == (size, size)
    back = placement.invert(canvas)
    assert back.shape == placement.crop_size
    assert (back == 93).all()
