import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax.config import Conditioning
from nabla_jax.data import controls
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
