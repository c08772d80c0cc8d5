"""Depth Anything at a very small size, grey levels, and the command for clips."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from nabla_jax import extract
from nabla_jax.errors import UserError
from nabla_jax.extract import depths
from tests.extract.checkpoints import depth_anything, settings

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_a_still() -> None:
    """The model by hand: 56 pixels high in multiples of 14, bicubic, ImageNet's mean; back to the picture's size."""
    found = depths.estimate(IMAGE, settings("depth_anything"))
    model = transformers.DepthAnythingForDepthEstimation.from_pretrained(depth_anything())
    from PIL import Image

    # 50 x 70 to 56 x 84: the nearest multiples of 14 at one scale.
    pixels = np.asarray(Image.fromarray(IMAGE).resize((84, 56), Image.Resampling.BICUBIC)) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        raw = model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()).predicted_depth
        theirs = torch.nn.functional.interpolate(raw[None], (50, 70), mode="bicubic")[0, 0].numpy()
    assert found.shape == (50, 70)
    # The random head gives very small numbers; what counts is the map's own range.
    span = theirs.max() - theirs.min()
    np.testing.assert_allclose(found / span, theirs / span, rtol=0, atol=1e-3)
    grey = extract.depth(IMAGE, settings("depth_anything"))
    assert grey.dtype == np.uint8 and (grey.min(), grey.max()) == (0, 255)
    assert np.corrcoef(grey.ravel(), theirs.ravel())[0, 1] > 0.999


def test_grey_levels() -> None:
    depth = np.linspace(-3, 7, 11).reshape(1, 11)
    np.testing.assert_array_equal(depths.to_grey(depth), np.floor(np.arange(11) * 25.5 + 0.5)[None])
    np.testing.assert_array_equal(depths.to_grey(depth, (-3, 17)), np.floor(np.arange(11) * 12.75 + 0.5)[None])
    np.testing.assert_array_equal(depths.to_grey(np.full((2, 3), 5.0)), np.zeros((2, 3)))
    with pytest.raises(UserError, match="not finite"):
        depths.to_grey(np.array([[np.nan]]))


SCRIPT = """
import pathlib, sys, numpy as np
from PIL import Image
frames, output = sys.argv[1:]
means = [np.asarray(Image.open(f)).mean() for f in sorted(pathlib.Path(frames).iterdir())]
np.savez(pathlib.Path(output, "clip_depths.npz"), {name}=np.stack([np.full((4, 6), m) for m in means[:{count}]]))
{last}
"""


def command(folder: Path, name: str = "depths", count: int = 9, last: str = "") -> str:
    path = folder / "depth.py"
    path.write_text(SCRIPT.format(name=name, count=count, last=last))
    return f"{sys.executable} {path} {{frames}} {{output}}"


def test_the_frames_of_a_clip_share_one_scale(tmp_path: Path) -> None:
    frames = [np.full((10 + i, 12, 3), 20 + 30 * i, np.uint8) for i in range(3)]
    found = depths.of_clip(frames, settings(clip_depth=command(tmp_path)))
    assert [depth.shape for depth in found] == [(10, 12), (11, 12), (12, 12)]
    for depth, grey in zip(found, (0, 128, 255), strict=True):
        np.testing.assert_array_equal(depth, np.full(depth.shape, grey))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "found no array 'depths'"),
        ({"count": 2}, r"depths has shape \(2, 4, 6\), expected \[3, height, width\]"),
        ({"last": "sys.exit('out of memory')"}, "ended with status 1: out of memory"),
        ({"last": "next(pathlib.Path(output).iterdir()).unlink()"}, "found 0 .npz files"),
    ],
)
def test_a_command_that_goes_wrong(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    frames = [np.zeros((4, 4, 3), np.uint8)] * 3
    with pytest.raises(UserError, match=message):
        depths.of_clip(frames, settings(clip_depth=command(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("run {frames}", "expected {frames} and {output} in it"),
        ("run {frames} {output} {x}", "no command template"),
        ("no-such-program {frames} {output}", "no-such-program: cannot be run"),
    ],
)
def test_templates(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        depths.of_clip([np.zeros((4, 4, 3), np.uint8)], settings(clip_depth=template))
