"""The keypoint head's pieces against closed forms and torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nabla_jax.errors import UserError
from nabla_jax.models import keypoint_head as heads
from nabla_jax.models import layers
from nabla_jax.models.keypoint_head import Block, KeypointHead, KeypointHeadConfig

SMALL = KeypointHeadConfig(
    parts=("bill", "left eye", "right eye"), feature_size=12, patch_size=8, dinov2_sha256="0" * 64, image_size=32,
    hidden_size=16, fine_size=8, num_blocks=1, upsample=4,
)  # fmt: skip


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.31, 0.62), (0.77, 0.4)])
def test_soft_argmax_is_the_mean_of_a_normal_distribution(place):
    """A heatmap of log densities gives the density's mean, far below the width of a cell."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in (24, 20))
    spread = 0.06
    logits = -((rows[:, None] - place[0]) ** 2 + (columns[None] - place[1]) ** 2) / (2 * spread**2)
    found = heads.soft_argmax(jnp.asarray(logits[None, None] + 7.0))
    assert found.shape == (1, 1, 2)
    np.testing.assert_allclose(found[0, 0], place, atol=1e-3)


def test_soft_argmax_of_peaks_and_of_nothing():
    logits = np.full((4, 5, 8), -100.0)
    logits[0, 2, 6] = 0
    logits[1, 1, 1] = logits[1, 3, 5] = 0
    logits[2, 0, 0], logits[2, 0, 7] = np.log(0.75), np.log(0.25)
    logits[3] = 3.0
    expected = [(0.5, 6.5 / 8), (0.5, 3.5 / 8), (0.1, 0.75 / 16 + 0.25 * 15 / 16), (0.5, 0.5)]
    np.testing.assert_allclose(heads.soft_argmax(jnp.asarray(logits)), expected, atol=1e-6)


def test_unfolding_is_torchs_pixel_shuffle():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 7 * 4)).astype(np.float32)
    # torch numbers the channels of a cell last, here they are first.
    reordered = x.reshape(2, 3, 5, 4, 7).transpose(0, 4, 3, 1, 2).reshape(2, 28, 3, 5)
    expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(reordered), 2).numpy()
    np.testing.assert_array_equal(heads.unfold(jnp.asarray(x), 2).transpose(0, 3, 1, 2), expected)


def test_a_block_is_torchs_depthwise_convolution_norm_and_perceptron():
    graphdef, params = layers.initialize(lambda rngs: Block(6, rngs=rngs, dtype=jnp.float32), jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(2, 5, 4, 6)).astype(np.float32)
    p = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), params)
    t = torch.from_numpy(x)
    y = torch.conv2d(t.permute(0, 3, 1, 2), p["conv"].permute(2, 0, 1)[:, None], padding=1, groups=6).permute(
        0, 2, 3, 1
    )
    y = torch.nn.functional.layer_norm(y, (6,), p["norm"]["weight"], p["norm"]["bias"])
    y = torch.nn.functional.gelu(y @ p["mlp"]["fc1"]["weight"].T + p["mlp"]["fc1"]["bias"])
    expected = t + y @ p["mlp"]["fc2"]["weight"].T + p["mlp"]["fc2"]["bias"]
    np.testing.assert_allclose(layers.bind(graphdef, params)(jnp.asarray(x)), expected, atol=2e-6)


def test_positions_are_those_of_the_heatmaps_and_depend_on_pixels_and_features():
    graphdef, params = layers.initialize(lambda rngs: KeypointHead(SMALL, rngs=rngs), jax.random.key(0))
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(2, 16, 12)), jnp.float32)
    pixels = jnp.asarray(rng.normal(size=(2, 3, 32, 32)), jnp.float32)
    head = layers.bind(graphdef, params)
    found = head(patches, pixels)
    assert found.heatmaps.shape == (2, 3, 16, 16) and found.visible.shape == (2, 3)
    np.testing.assert_allclose(found.positions, heads.soft_argmax(found.heatmaps), atol=1e-6)
    for other in (head(patches + 1, pixels), head(patches, -pixels)):
        assert np.abs(other.heatmaps - found.heatmaps).max() > 1e-3
    # One picture's keypoints do not depend on the others of its batch.
    np.testing.assert_allclose(head(patches[1:], pixels[1:]).heatmaps, found.heatmaps[1:], atol=1e-5)


def test_the_configuration_is_written_read_and_checked(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_json()))
    assert KeypointHeadConfig.from_json(path) == SMALL
    for changes, message in (
        ({"model_type": "dinov2"}, "model_type: found 'dinov2', expected 'keypoint_head'"),
        ({"parts": "bill"}, "parts: found 'bill', expected a list of names"),
        ({"image_size": 30}, "image_size: found 30, expected a multiple of 8"),
        ({"upsample": 3}, "patch_size: found 8, expected a multiple of 3"),
        ({"margin": 0.5}, "margin: found 0.5, expected a number of at least 1"),
        ({"num_blocks": 0}, "num_blocks: found 0, expected a positive whole number"),
    ):
        path.write_text(json.dumps(SMALL.to_json() | changes))
        with pytest.raises(UserError, match=f"config.json: {message}"):
            KeypointHeadConfig.from_json(path)
    path.write_text(json.dumps({k: v for k, v in SMALL.to_json().items() if k != "dinov2_sha256"}))
    with pytest.raises(UserError, match="missing keys: dinov2_sha256"):
        KeypointHeadConfig.from_json(path)


def test_the_published_size_of_dinov2_base_fits():
    """448 pixels of DINOv2-base: 32 x 32 patches, 64 x 64 cells; 3 million parameters beside 86 million."""
    config = dataclasses.replace(
        SMALL, feature_size=768, patch_size=14, image_size=448, hidden_size=256, fine_size=64, num_blocks=3, upsample=2
    )
    graphdef, params = layers.abstract(lambda rngs: KeypointHead(config, rngs=rngs))
    patches, pixels = jax.ShapeDtypeStruct((2, 1024, 768), jnp.float32), jax.ShapeDtypeStruct((2, 3, 448, 448), "f4")
    found = jax.eval_shape(lambda p, *x: layers.bind(graphdef, p)(*x), params, patches, pixels)
    assert found.heatmaps.shape == (2, 3, 64, 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 3e6
