"""Pixel errors: against plain numpy, scikit-image on whole pictures, torch's area pooling, and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.metrics import structural_similarity

from nabla_jax.errors import UserError
from nabla_jax.images import read_mask, read_rgb, resize, write_image
from nabla_jax.metrics import pixels


def picture(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    noise = rng.integers(-9, 10, (height, width, 3))
    return np.clip(np.kron(base, np.ones((8, 8, 1))) + noise, 0, 255).astype(np.uint8)


def ellipse(height=40, width=56):
    y, x = np.mgrid[:height, :width]
    return ((y - height / 2) / (height / 3)) ** 2 + ((x - width / 2) / (width / 4)) ** 2 < 1


def test_rmse_is_the_root_mean_square_over_mask_pixels_and_channels():
    a, b, mask = picture(0), picture(1), ellipse()
    expected = np.sqrt(((a.astype(float) - b.astype(float))[mask] ** 2).mean())
    assert pixels.masked_rmse(a, b, mask) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stored", [np.bool_, np.uint8, np.float32])
def test_mask_may_be_stored_as_bool_ones_or_bytes(stored):
    a, b, mask = picture(0), picture(1), ellipse()
    expected = pixels.masked_rmse(a, b, mask)
    assert pixels.masked_rmse(a, b, mask.astype(stored)) == expected
    assert pixels.masked_rmse(a, b, mask.astype(np.uint8) * 255) == expected


def test_pixels_outside_the_mask_do_not_count():
    a, b, mask = picture(0), picture(1), ellipse()
    changed = np.where(mask[..., None], b, 255 - b)
    assert pixels.masked_rmse(a, b, mask) == pixels.masked_rmse(a, changed, mask)


def test_an_empty_mask_has_no_error():
    a, b = picture(0), picture(1)
    empty = np.zeros(a.shape[:2], bool)
    assert pixels.masked_rmse(a, b, empty) is None
    assert pixels.masked_ssim(a, b, empty) is None


@given(hnp.arrays(np.uint8, (12, 13, 3)), hnp.arrays(np.uint8, (12, 13, 3)), hnp.arrays(bool, (12, 13)))
@settings(max_examples=50, deadline=None)
def test_rmse_is_a_distance_in_0_255(a, b, mask):
    value = pixels.masked_rmse(a, b, mask)
    if not mask.any():
        assert value is None
        return
    assert 0 <= value <= 255
    assert value == pixels.masked_rmse(b, a, mask)
    assert pixels.masked_rmse(a, a, mask) == 0


def test_ssim_is_the_full_map_averaged_inside_the_mask():
    a, b = picture(0), picture(1)
    mask = np.zeros(a.shape[:2], bool)
    mask[3:9, 30:39] = True
    _, full = structural_similarity(
        b,
        a,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert pixels.masked_ssim(a, b, mask) == pytest.approx(full[mask].mean(), abs=1e-12)
    assert pixels.masked_ssim(a, a, mask) == pytest.approx(1.0)


def test_ssim_falls_as_noise_grows():
    a, mask = picture(0), ellipse()
    noise = np.random.default_rng(3).standard_normal(a.shape)
    values = [pixels.masked_ssim(np.clip(a + s * noise, 0, 255).astype(np.uint8), a, mask) for s in (0, 8, 25, 80)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.8


def test_ssim_of_a_picture_below_its_window_is_refused():
    a = picture(0)[:8]
    with pytest.raises(UserError, match="8x56.*11x11"):
        pixels.masked_ssim(a, a, np.ones(a.shape[:2], bool))


def test_target_and_mask_are_brought_to_the_generated_size():
    big, mask = picture(0, 80, 112), ellipse(80, 112)
    small = resize(big, 40, 56, "area")
    assert pixels.masked_rmse(small, big, mask) == 0
    assert pixels.masked_rmse(np.full_like(small, 7), big, mask) == pytest.approx(
        np.sqrt(((small.astype(float) - 7)[mask[::2, ::2]] ** 2).mean())
    )


@pytest.mark.parametrize("size", [(20, 28), (17, 23), (40, 9), (1, 1)])
def test_area_resize_keeps_the_mean_and_equals_average_pooling(size):
    image = picture(4).astype(np.float64)
    small = resize(image, *size, "area")
    assert small.mean() == pytest.approx(image.mean(), rel=1e-9)
    factors = np.lcm(40, size[0]), np.lcm(56, size[1])
    fine = torch.tensor(np.kron(image, np.ones((factors[0] // 40, factors[1] // 56, 1)))).permute(2, 0, 1)
    pooled = torch.nn.functional.avg_pool2d(fine, (factors[0] // size[0], factors[1] // size[1]))
    np.testing.assert_allclose(small, pooled.permute(1, 2, 0).numpy(), atol=1e-9)


@pytest.mark.parametrize("size", [(20, 28), (61, 90), (33, 80)])
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_bilinear_and_nearest_resize_equal_torch(size, method):
    image = picture(5).astype(np.float64)
    grid = torch.tensor(image).permute(2, 0, 1)[None]
    options = {"align_corners": False} if method == "bilinear" else {}
    expected = torch.nn.functional.interpolate(grid, size, mode=method, **options)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resize(image, *size, method), expected, atol=1e-9)


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(["area", "bilinear", "nearest"]),
    st.integers(0, 255),
)
@settings(max_examples=60, deadline=None)
def test_a_flat_picture_stays_flat(height, width, method, value):
    flat = np.full((11, 14, 3), value, np.uint8)
    assert np.array_equal(resize(flat, height, width, method), np.full((height, width, 3), value, np.uint8))


def test_enlarging_by_whole_factors_with_area_repeats_pixels():
    image = picture(6, 8, 16)
    assert np.array_equal(resize(image, 24, 64, "area"), image.repeat(3, 0).repeat(4, 1))


def test_reading_back_what_was_written(tmp_path):
    image, mask = picture(7), ellipse()
    write_image(image, tmp_path / "a" / "picture.png")
    write_image(mask.astype(np.uint8) * 255, tmp_path / "mask.png")
    assert np.array_equal(read_rgb(tmp_path / "a" / "picture.png"), image)
    assert np.array_equal(read_mask(tmp_path / "mask.png", image.shape[:2]), mask)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["picture.png"]


def test_bad_files_give_one_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    write_image(picture(8), tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name, words in [
        ("none.png", "no such"),
        ("broken.png", "not a readable"),
        ("short.png", "truncated or damaged"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            read_rgb(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="40x56.*expected 40x57"):
        read_mask(tmp_path / "whole.png", (40, 57))


def test_exif_orientation_is_applied(tmp_path):
    from PIL import Image

    image = Image.fromarray(picture(9))
    exif = image.getexif()
    exif[0x0112] = 6  # stored turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "turned.png"), np.rot90(picture(9), -1))
