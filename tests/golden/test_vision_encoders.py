"""SigLIP, DINOv2, Redux and their preprocessing against the numbers of the published system."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from nabla_jax.checkpoints.safetensors_io import load_tree
from nabla_jax.checkpoints.transformers_folder import NETWORKS, REDUX
from nabla_jax.metrics.preprocessing import BICUBIC, ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.dinov2 import Dinov2Config
from nabla_jax.models.redux import ReduxEmbedderConfig
from nabla_jax.models.siglip import SiglipVisionConfig
from tests.golden import golden

ATOL = 2e-5


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.case("vision_encoders")


def load(part, config, path):
    """The network as a compiled function, and as a module."""
    graphdef, abstract = layers.abstract(lambda rngs: part.model(config, rngs=rngs))
    params = load_tree(path, abstract, part.table, stacked=part.stacked)
    apply = jax.jit(lambda p, x: layers.bind(graphdef, p)(x))
    return lambda x: apply(params, x), layers.bind(graphdef, params)


def close(actual, expected):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL * scale)


def pictures(case, count):
    """The stored pictures, in order, as many as were processed."""
    names = sorted(case.names("images"))
    assert len(names) >= count
    return [case.tensor("images", name) for name in names[:count]]


def processor(case, kind):
    """The settings stated in the manifest."""
    stated = case.config[f"{kind}_processor"]
    assert stated["resample"] == f"bicubic({BICUBIC})"
    if kind == "dino":
        crop = (stated["crop"], stated["crop"])
        return ImageProcessor(stated["shortest_edge"], crop, mean=tuple(stated["mean"]), std=tuple(stated["std"]))
    return ImageProcessor((stated["size"], stated["size"]), mean=tuple(stated["mean"]), std=tuple(stated["std"]))


def test_the_stated_settings_are_our_defaults(case):
    assert processor(case, "siglip") == ImageProcessor.siglip(case.config["siglip_processor"]["size"])
    dino = processor(case, "dino")
    assert dino == dataclasses.replace(ImageProcessor.dinov2(), size=dino.size, crop=dino.crop)


@pytest.mark.parametrize("kind", ["siglip", "dino"])
def test_pixels_are_equal(case, kind):
    expected = case.tensor(kind, "pixel_u8")
    ours = processor(case, kind)
    images = pictures(case, len(expected))
    np.testing.assert_array_equal(np.stack([ours.resize(x) for x in images]).transpose(0, 3, 1, 2), expected)
    crop = case.tensor(kind, "pixel_values_crop")
    np.testing.assert_array_equal(ours(images)[:, :, : crop.shape[2], : crop.shape[3]], crop)


def test_siglip_features(case):
    config = SiglipVisionConfig.from_json({"model_type": "siglip_vision_model", **case.config["siglip_vision"]})
    siglip, _ = load(NETWORKS["siglip"], config, case.path("weights_siglip_vision"))
    expected = case.tensor("siglip", "image_features")
    features = siglip(processor(case, "siglip")(pictures(case, len(expected))))
    close(features.pooled, expected)
    tokens = case.tensor("siglip", "last_hidden_first8")
    close(features.patches[:, : tokens.shape[1]], tokens)


@pytest.fixture(scope="module")
def dino(case):
    config = Dinov2Config.from_json({"model_type": "dinov2", **case.config["dino"]})
    return load(NETWORKS["dinov2"], config, case.path("weights_dino"))


def test_dino_positions(case, dino):
    expected = case.tensor("dino", "pos_embed_16x16")
    side = math.isqrt(expected.shape[1] - 1)
    close(dino[1].embeddings.positions((side, side)), expected)


def test_dino_features(case, dino):
    expected = case.tensor("dino", "cls")
    features = dino[0](processor(case, "dino")(pictures(case, len(expected))))
    close(features.pooled, expected)
    close(last_hidden(features)[:, : case.tensor("dino", "last_hidden_first8").shape[1]],
          case.tensor("dino", "last_hidden_first8"))  # fmt: skip


def test_dino_features_of_another_shape(case, dino):
    features = dino[0](case.tensor("dino", "nonsquare_pixel_values"))
    close(features.pooled, case.tensor("dino", "nonsquare_cls"))
    close(last_hidden(features), case.tensor("dino", "nonsquare_last_hidden"))


def last_hidden(features):
    """The published order of tokens: class token first."""
    return np.concatenate([np.asarray(features.pooled)[:, None], features.patches], axis=1)


def test_redux_from_picture_to_prompt_tokens(case):
    weights = golden.case("insert_fill")
    for name in ("redux_siglip", "redux_embedder"):
        assert case.external_path(name) == weights.path(f"weights_{name}").resolve()
    config = SiglipVisionConfig.from_json({"model_type": "siglip_vision_model", **case.config["redux_siglip"]})
    pixels = case.tensor("redux", "pixel_values")
    ours = ImageProcessor.siglip(config.image_size)(pictures(case, len(pixels)))
    np.testing.assert_array_equal(ours, pixels)
    tower, _ = load(REDUX["image_encoder"], config, weights.path("weights_redux_siglip"))
    tokens = case.tensor("redux", "image_embeds")
    embedder, _ = load(
        REDUX["image_embedder"],
        ReduxEmbedderConfig(config.hidden_size, tokens.shape[-1]),
        weights.path("weights_redux_embedder"),
    )
    patches = tower(ours).patches
    close(patches, case.tensor("redux", "last_hidden_state"))
    close(embedder(patches), tokens)


def test_redux_pixels_at_the_published_size(case):
    expected = case.tensor("redux", "pixel384_u8")
    ours = np.stack([ImageProcessor.siglip(384).resize(x) for x in pictures(case, len(expected))])
    # One set holds the first columns only.
    np.testing.assert_array_equal(ours.transpose(0, 3, 1, 2)[..., : expected.shape[3]], expected)
