"""The vision networks' preprocessing against transformers' processors in their PIL form, bit for bit."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import BICUBIC, BILINEAR, ImageProcessor, lpips_pixels

# As published with google/siglip-base-patch16-224 and facebook/dinov2-base.
SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
KINDS = {"SiglipImageProcessor": SiglipImageProcessorPil, "BitImageProcessor": BitImageProcessorPil}


def picture(height, width):
    """Smooth and sharp parts, so that filters and borders matter."""
    y, x = np.mgrid[:height, :width]
    smooth = 127 + 120 * np.sin(y / 7 + x / 11)[..., None] * np.array([1, 0.5, -1])
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3))
    return np.where((x > width // 2)[..., None], noise, smooth).astype(np.uint8)


@pytest.mark.parametrize(
    ("content", "preset"),
    [
        (SIGLIP, ImageProcessor.siglip()),
        (SIGLIP | {"size": {"height": 384, "width": 384}, "do_convert_rgb": None}, ImageProcessor.siglip(384)),
        (SIGLIP | {"resample": 2, "size": {"height": 256, "width": 256}}, ImageProcessor.siglip2(256)),
        (DINOV2, ImageProcessor.dinov2()),
        (DINOV2 | {"resample": 2}, dataclasses.replace(ImageProcessor.dinov2(), resample=BILINEAR)),
        (DINOV2 | {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 37}}, None),
        (DINOV2 | {"size": {"height": 30, "width": 41}, "do_center_crop": False}, None),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(150, 230), (301, 199), (256, 256), (40, 31)])
def test_pixels_equal_transformers(content, preset, height, width):
    ours = ImageProcessor.from_json(content)
    assert preset is None or ours == preset
    image = picture(height, width)
    theirs = KINDS[content["image_processor_type"]](**{k: v for k, v in content.items() if not k.startswith("image_p")})
    expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"]
    actual = ours([image])
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


def test_pictures_of_many_sizes_make_one_batch():
    images = [picture(50, 70), picture(90, 40)]
    for processor in (ImageProcessor.siglip(32), ImageProcessor.dinov2()):
        batch = processor(images)
        for image, pixels in zip(images, batch, strict=True):
            np.testing.assert_array_equal(processor([image])[0], pixels)
    with pytest.raises(ValueError, match="expected one for all"):
        ImageProcessor(32)(images)
    with pytest.raises(ValueError, match="expected uint8"):
        ImageProcessor.siglip()([images[0] / 255])


@pytest.mark.parametrize(
    "processor",
    [ImageProcessor.siglip2(384), ImageProcessor.dinov2(), ImageProcessor(64), ImageProcessor((8, 9), (7, 9))],
)
def test_written_settings_mean_the_same_to_transformers(processor):
    content = processor.to_json()
    assert ImageProcessor.from_json(content) == processor
    theirs = KINDS[content.pop("image_processor_type")](**content)
    image = picture(77, 91)
    expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(processor([image]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type: found 'Siglip2ImageProcessor'"),
        ({"do_resize": False}, "do_resize: found False, expected True"),
        ({"resample": 1}, r"resample: found 1, expected 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"size": {"longest_edge": 256}}, "size: found .*expected height and width"),
        ({"size": {"shortest_edge": 0}}, "size: shortest_edge: found 0, expected a positive whole number"),
        ({"size": {"shortest_edge": 223}}, r"crop_size: found \(224, 224\), expected at most"),
        ({"size": {"shortest_edge": 2**64}}, "size: found 18446744073709551616, expected at most 8192 pixels"),
        ({"image_mean": [0.5]}, "image_mean: found .*expected three numbers"),
        ({"image_std": [0.5, 0.5, 10**400]}, "image_std: found .*expected three numbers"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "image_std: found .*expected three numbers"),
        ({"rescale_factor": -1}, "rescale_factor: found -1, expected a positive number"),
    ],
)
def test_other_processors_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor.from_json(DINOV2 | change)


def test_missing_settings_are_refused():
    with pytest.raises(UserError, match="missing keys: resample"):
        ImageProcessor.from_json({k: v for k, v in SIGLIP.items() if k != "resample"})


def test_a_fast_processors_file_means_the_same():
    fast = SIGLIP | {"image_processor_type": "SiglipImageProcessorFast"}
    assert ImageProcessor.from_json(fast) == ImageProcessor.siglip()
    assert ImageProcessor.siglip().resample == BICUBIC


def test_lpips_pixels_span_minus_one_to_one():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
    pixels = lpips_pixels([image, 255 - image])
    assert pixels.shape == (2, 3, 16, 16)
    np.testing.assert_allclose(pixels[0, 1].ravel(), np.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    np.testing.assert_allclose(pixels[0], -pixels[1], rtol=0, atol=1e-6)
    for images in ([image, image[1:]], [image / 255], [image[..., :1]], []):
        with pytest.raises(ValueError, match="expected uint8"):
            lpips_pixels(images)
