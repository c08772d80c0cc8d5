"""T5 and CLIP against the numbers of the published system, weights read by the production loader."""

import re

import jax
import numpy as np
import pytest

from nabla_jax.checkpoints.safetensors_io import load_tree
from nabla_jax.conditioning import omini
from nabla_jax.models import clip, layers, t5
from tests.golden import golden

CASE = golden.case("text_encoders")
ATOL = 2e-5


@pytest.fixture(scope="module")
def t5_encoder():
    config = t5.T5Config.from_json(CASE.config["t5"])
    graphdef, abstract = layers.abstract(lambda rngs: t5.T5Encoder(config, rngs=rngs))
    params = load_tree(CASE.path("weights_t5"), abstract, t5.TABLE)
    return layers.bind(graphdef, params), jax.jit(lambda *x: layers.bind(graphdef, params)(*x))


@pytest.fixture(scope="module")
def clip_params():
    config = clip_config(clip.LEGACY_EOS)
    _, abstract = layers.abstract(lambda rngs: clip.CLIPText(config, rngs=rngs))
    return load_tree(CASE.path("weights_clip"), abstract, clip.TABLE)


def clip_config(eos):
    return clip.CLIPTextConfig.from_json(CASE.config["clip"] | {"eos_token_id": eos})


def clip_apply(params, eos, ids):
    graphdef, _ = layers.abstract(lambda rngs: clip.CLIPText(clip_config(eos), rngs=rngs))
    return jax.jit(lambda p, x: layers.bind(graphdef, p)(x))(params, ids)


def ids(name):
    return CASE.tensor("outputs", name).astype(np.int32)


def check(actual, name):
    np.testing.assert_allclose(actual, CASE.tensor("outputs", name), rtol=0, atol=ATOL)


def test_t5_without_a_mask_as_flux_uses_it(t5_encoder):
    check(t5_encoder[1](ids("t5_ids")), "prompt_embeds")


def test_t5_with_padding_masked(t5_encoder):
    check(t5_encoder[1](ids("t5_ids"), ids("t5_ids") != 0), "t5_masked")


def test_t5_beyond_the_maximal_relative_distance(t5_encoder):
    check(t5_encoder[1](ids("t5_long_ids")), "t5_long")


def test_t5_relative_position_bias(t5_encoder):
    expected = CASE.tensor("outputs", "t5_long_bias")
    bias = t5_encoder[0].position_bias(expected.shape[-1])[:, :, : expected.shape[2]]
    np.testing.assert_array_equal(bias, expected)


def test_t5_buckets():
    expected = CASE.tensor("outputs", "t5_buckets")
    reach = len(expected) // 2
    config = t5.T5Config.from_json(CASE.config["t5"])
    buckets = t5.relative_buckets(
        np.arange(-reach, reach + 1),
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    np.testing.assert_array_equal(buckets, expected)


def test_clip_hidden_and_pooled_with_the_legacy_id(clip_params):
    hidden, pooled = clip_apply(clip_params, clip.LEGACY_EOS, ids("clip_ids"))
    check(hidden, "clip_last_hidden")
    check(pooled, "clip_pooled")


def test_clip_pooled_for_every_stored_padding_and_end_of_text_rule(clip_params):
    names = [name for name in CASE.names("outputs") if name.startswith("clip_pooled")]
    assert len(names) >= 2
    for name in names:
        match = re.fullmatch(r"clip_pooled(_pad\d+)?(?:_eos(\d+))?", name)
        assert match, name
        eos = int(match[2]) if match[2] else clip.LEGACY_EOS
        check(clip_apply(clip_params, eos, ids(f"clip_ids{match[1] or ''}"))[1], name)


def test_text_has_no_position():
    expected = CASE.tensor("outputs", "text_ids")
    prompt = CASE.tensor("outputs", "prompt_embeds")
    noise = np.zeros((len(prompt), 4, 8), np.float32)
    time = np.ones(len(prompt), np.float32)
    text, _ = omini.branches(prompt, prompt[:, 0], noise, omini.grid_ids(2, 2), time, guidance=None)
    np.testing.assert_array_equal(text.ids, expected)
