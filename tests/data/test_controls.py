import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax.conditioning.geometry import Placement
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, skeleton
from nabla_jax.errors import UserError
from tests.data.folders import picture


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_pictures_are_turned_upright_once(tmp_path: Path) -> None:
    image = picture(295, 1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored rows are the columns of the scene
    path = save(tmp_path / "a.png", image, exif=exif)
    np.testing.assert_array_equal(controls.read_image(path), np.rot90(image, -1))
    assert controls.picture_size(path) == np.rot90(image, -1).shape[:2]
    plain = save(tmp_path / "b.png", image)
    assert controls.picture_size(plain) == image.shape[:2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (9, 5), (255, 255, 255)).convert(mode).save(path)
    image = controls.read_image(path)
    assert image.shape == (5, 9, 3) and image.dtype == np.uint8 and (image > 250).all()


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        whole = save(tmp_path / f"whole.{suffix}", noise).read_bytes()
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"cut\.{suffix}: truncated or damaged"):
            controls.read_image(path)
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"text\.jpg: not a picture"):
        controls.read_image(tmp_path / "text.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.jpg: not a picture"):
        controls.read_image(tmp_path / "empty.jpg")
    with pytest.raises(UserError, match="no such picture"):
        controls.read_image(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="not a readable picture"):
        controls.read_image(tmp_path)
    with pytest.raises(UserError, match="more than 8 bits"):
        controls.read_image(save(tmp_path / "deep.png", np.full((4, 4), 40000, np.uint16)))


@pytest.mark.parametrize("side", [9_000, 20_000, 60_000])
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    for read in (controls.read_image, controls.picture_size):
        with pytest.raises(UserError, match=r"bomb\.png"):
            read(path)


def test_masks(tmp_path: Path) -> None:
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    path = save(tmp_path / "m.png", levels)
    np.testing.assert_array_equal(controls.read_mask(path, 1, 4), [[False, False, True, True]])
    with pytest.raises(UserError, match=r"m\.png: mask is 1x4 \(height x width\), expected 4x1"):
        controls.read_mask(path, 4, 1)
    with pytest.raises(UserError, match=r"e\.png: mask is empty"):
        controls.read_mask(save(tmp_path / "e.png", np.full((3, 3), 127, np.uint8)), 3, 3)


def test_fill_cuts_the_silhouette_out_and_nothing_else() -> None:
    image, mask = picture(295, 1)
    filled = controls.CONTROLS["fill"].draw(controls.View(image, mask), Conditioning(96))
    assert (filled[mask] == 0).all()
    np.testing.assert_array_equal(filled[~mask], image[~mask])


def test_canvases_agree_on_where_things_are() -> None:
    """Target and control share one placement: away from the bird they show the same picture."""
    image, mask = picture(295, 1)
    target, control = (
        controls.target_canvas(image, 96),
        controls.control_canvas(controls.View(image, mask), Conditioning(96)),
    )
    assert target.placement == control.placement
    top, left, bottom, right = (round(v) for v in target.placement.region())
    for canvas in (target, control):
        outside = np.ones((96, 96), bool)
        # Three lobes of the Lanczos window, in canvas pixels.
        outside[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = False
        assert outside.any() and (canvas.pixels[outside] == 255).all()
    coverage = controls.latent_mask(mask, 96, 1)
    away = coverage == 0
    away[:] &= np.abs(np.mgrid[:96, :96][0] - 48) > 40
    difference = np.abs(target.pixels.astype(int) - control.pixels)[away]
    assert np.median(difference) <= 3
    # Bilinear enlargement mixes in the border, at the outermost foreground pixel only.
    assert (control.pixels[coverage == 255] == 0).mean() > 0.85


def test_subject_canvas_keeps_the_background_of_its_box() -> None:
    image, mask = picture(817, 0)
    canvas = controls.subject_canvas(image, mask, 64)
    top, left, bottom, right = canvas.placement.box
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert not mask[top:bottom, left:right].all()
    back = canvas.placement.invert(canvas.pixels).astype(int)
    assert np.abs(back - image[top:bottom, left:right])[1:-1, 1:-1].mean() < 6


def test_latent_mask_is_coverage_of_the_padded_square() -> None:
    mask = np.zeros((32, 64), bool)
    mask[8:24, 0:16] = True
    np.testing.assert_array_equal(controls.latent_mask(mask, 64, 8)[:, 0], [0, 0, 0, 255, 255, 0, 0, 0])
    mask[8, 0:16] = False
    assert controls.latent_mask(mask, 64, 8)[3, 0] == round(255 * 7 / 8)
    total = controls.latent_mask(mask, 64, 8).astype(float).sum() / 255 * 64
    assert total == pytest.approx(mask.sum(), abs=1)


def test_unknown_control() -> None:
    with pytest.raises(UserError, match=r"conditioning.control: found 'edges', expected one of fill"):
        controls.control_canvas(controls.View(*picture(295, 1)), Conditioning(64, "edges"))


def view(depth: np.ndarray | None = None, keypoints: np.ndarray | None = None) -> controls.View:
    return controls.View(*picture(295, 1), depth, keypoints)


def test_a_control_without_what_it_is_made_of() -> None:
    for kind in ("depth", "keypoints"):
        with pytest.raises(UserError, match=f"control {kind}: the target has no {kind}"):
            controls.control_canvas(view(), Conditioning(64, kind))


def test_every_control_lies_where_the_target_lies() -> None:
    height, width = picture(295, 1)[0].shape[:2]
    keypoints = np.zeros((11, 3), int)
    whole = view(np.full((height, width), 200, np.uint8), keypoints)
    for kind, control in controls.CONTROLS.items():
        canvas = controls.control_canvas(whole, Conditioning(96, kind))
        assert canvas.placement == controls.target_canvas(whole.image, 96).placement
        assert (canvas.pixels[0] == control.fill).all()
    depth = controls.control_canvas(whole, Conditioning(96, "depth")).pixels
    assert set(np.unique(depth)) == {0, 200}  # nothing between the map and the padding


def test_depth_maps_that_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "d.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(UserError, match=r"d\.png: depth map is 4x5 \(height x width\), expected 5x4"):
        controls.read_depth(path, 5, 4)
    with pytest.raises(UserError, match=r"e\.png: found I;16 pixels of more than 8 bits, expected an 8-bit depth map"):
        controls.read_depth(save(tmp_path / "e.png", np.zeros((4, 5), np.uint16)), 4, 5)


def test_skeletons_leave_hidden_parts_out() -> None:
    keypoints = np.zeros((11, 3), int)
    keypoints[skeleton.PARTS.index("crown")] = 5, 6, 1
    keypoints[skeleton.PARTS.index("bill")] = 30, 40, 1
    keypoints[skeleton.PARTS.index("tail")] = 10, 70, 0
    picture_of = skeleton.draw(keypoints, 60, 80, "dense", dot=5, line=3)
    dots, lines = skeleton.husl_palette(11), skeleton.husl_palette(25)
    colours = {tuple(int(v) for v in colour) for colour in np.unique(picture_of.reshape(-1, 3), axis=0)}
    assert colours == {(0, 0, 0), dots[0], dots[1], lines[skeleton.DENSE.index(("crown", "bill"))]}
    assert tuple(picture_of[5, 6]) == dots[1] and tuple(picture_of[30, 40]) == dots[0]
    assert tuple(picture_of[17, 23]) == lines[0]
    assert not skeleton.draw(keypoints, 60, 80, "dots", 5, 3)[17, 23].any()
    with pytest.raises(UserError, match="conditioning.skeleton: found 'bones'"):
        skeleton.draw(keypoints, 60, 80, "bones")
    with pytest.raises(UserError, match="keypoints: found shape"):
        skeleton.draw(keypoints[:5], 60, 80)


@pytest.mark.parametrize("count", [1, 10, 11, 25])
def test_palette_is_of_one_lightness(count: int) -> None:
    """L* of CIE 1976 by scikit-image, which knows nothing of HUSL."""
    from skimage.color import rgb2lab

    colours = np.array(skeleton.husl_palette(count), np.float64)[None] / 255
    lightness = rgb2lab(colours)[0, :, 0]
    assert np.abs(lightness - 0.65 * 99).max() < 1
    assert len(set(skeleton.husl_palette(count))) == count


def test_keypoints_that_do_not_fit() -> None:
    keypoints = np.zeros((11, 3), int)
    keypoints[3] = 20, 90, 1
    controls.check_keypoints(keypoints, 60, 90, "x")
    controls.check_keypoints(keypoints, 60, 82, "x")  # a click beside the border
    with pytest.raises(UserError, match=r"x: keypoint at row 20, column 90 lies outside its picture of 90x60"):
        controls.check_keypoints(keypoints, 90, 60, "x")
    keypoints[3, 2] = 0
    controls.check_keypoints(keypoints, 90, 60, "x")
    with pytest.raises(UserError, match="x: found 4 keypoints, expected 11"):
        controls.check_keypoints(keypoints[:4], 90, 60, "x")


def test_keypoints_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    lines = [f"{part} {10 + part} {20 + part} {part % 2}" for part in reversed(range(11))]
    path.write_text("\n".join(lines) + "\n")
    expected = [[20 + part, 10 + part, part % 2] for part in range(11)]
    np.testing.assert_array_equal(controls.read_keypoints(path, 40, 40), expected)
    for change, message in {
        "0 1": ":11: found '0 1', expected part x y visible",
        "1 2 3 1": ":11: part 1, expected each of 0 to 10 once",
        "11 2 3 1": ":11: part 11, expected each",
        "": "found 10 parts, expected 11",
    }.items():
        path.write_text("\n".join([*lines[:-1], change]) + "\n")
        with pytest.raises(UserError, match=f"points.txt{message}" if message[0] == ":" else message):
            controls.read_keypoints(path, 40, 40)
    with pytest.raises(UserError, match="cannot be read"):
        controls.read_keypoints(tmp_path / "none.txt", 40, 40)


@pytest.mark.parametrize("place", [(0, 0), (77, 301), (511, 511)])
def test_a_bird_smaller_than_a_pixel_is_still_repainted(place: tuple[int, int]):
    mask = np.zeros((512, 512), bool)
    mask[place] = True
    found = controls.repaint_canvas(mask, Placement.square(512, 512, 48))
    assert list(zip(*np.nonzero(found), strict=True)) == [tuple(at * 48 // 512 for at in place)]
