"""Prompt encoding against diffusers' own pipeline on the same folder."""

import json
import logging
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nabla_jax.conditioning import text
from nabla_jax.errors import UserError
from tests.checkpoints.pipeline_folder import write_pipeline

PROMPTS = [
    "A photo of a bird.",
    "a photo of a bird with red cap, white belly on a branch",
    "",
    "A quetzal with wing-bars, photographed on 3 branches of a white birch in the red light of evening",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    write_pipeline(path)
    return path


@pytest.fixture(scope="module")
def stack(folder):
    return text.load_text_stack(folder)


@pytest.mark.parametrize("eos", ["correct", "legacy"])
@pytest.mark.parametrize("length", [16, 40])
def test_embeddings_equal_those_of_diffusers(folder, tmp_path, length, eos):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if eos == "legacy":
        config = json.loads((copy / "text_encoder" / "config.json").read_text())
        (copy / "text_encoder" / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    reference = diffusers.FluxKontextPipeline.from_pretrained(copy, local_files_only=True)
    assert reference.tokenizer_max_length == 16
    with torch.no_grad():
        embeds, pooled, _ = reference.encode_prompt(PROMPTS, max_sequence_length=length)
    actual_embeds, actual_pooled = text.encode_prompts(copy, PROMPTS, length)
    assert actual_embeds.shape == (4, length, 64)
    assert actual_embeds.dtype == actual_pooled.dtype == np.float32
    np.testing.assert_allclose(actual_embeds, embeds.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual_pooled, pooled.numpy(), rtol=0, atol=1e-5)


def test_a_prompt_s_embeddings_do_not_depend_on_its_neighbours(stack):
    many = [PROMPTS[i % 4] for i in range(text.BATCH + 3)]
    embeds, pooled = text.encode_prompts(stack, many, 12)
    assert embeds.shape == (text.BATCH + 3, 12, 64)
    for i in range(4):
        alone = text.encode_prompts(stack, [PROMPTS[i]], 12)
        np.testing.assert_allclose(embeds[i::4], np.repeat(alone[0], len(embeds[i::4]), 0), atol=1e-5)
        np.testing.assert_allclose(pooled[i::4], np.repeat(alone[1], len(pooled[i::4]), 0), atol=1e-5)


def test_different_prompts_differ(stack):
    embeds, pooled = text.encode_prompts(stack, ["a red bird", "a white bird"], 12)
    assert np.abs(embeds[0] - embeds[1]).max() > 0.1
    assert np.abs(pooled[0] - pooled[1]).max() > 1e-3


def test_padding_rules(stack):
    clip_ids, t5_ids = text.tokenize(stack.tokenizers, ["a red bird"], 9, 16)
    eos = stack.encoders.clip.config.eos_token_id
    assert clip_ids.shape == (1, 16)
    assert (clip_ids[0, 4:] == eos).all()
    assert clip_ids.max() == eos
    assert t5_ids.shape == (1, 9)
    assert t5_ids[0, 3:].tolist() == [1, 0, 0, 0, 0, 0]
    cut_clip, cut_t5 = text.tokenize(stack.tokenizers, [PROMPTS[3]], 5, 16)
    assert cut_clip[0, -1] == eos
    assert cut_t5[0, -1] == 1


def test_a_cut_prompt_is_said(stack, caplog):
    with caplog.at_level(logging.WARNING, logger=text.__name__):
        text.tokenize(stack.tokenizers, PROMPTS, 100, 16)
    assert caplog.messages == ["1 of 4 prompts have more than 16 CLIP tokens and were cut"]


def test_embed_has_gradients_in_both_encoders(stack):
    ids = text.tokenize(stack.tokenizers, ["a red bird"], 8, 16)

    @jax.jit
    def loss(clip_params, t5_params):
        embeds, pooled = text.embed(stack.encoders, clip_params, t5_params, *ids)
        return jnp.sum(embeds**3) + jnp.sum(pooled**3)

    grads = jax.grad(loss, argnums=(0, 1))(stack.encoders.clip.params, stack.encoders.t5.params)
    for tree in grads:
        norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(tree)]
        assert np.isfinite(norms).all()
        # Softmax ignores a shift common to all keys, so CLIP's key biases alone may have no gradient.
        assert sum(norm < 1e-6 for norm in norms) <= stack.encoders.clip.config.num_hidden_layers


def test_mistakes_are_named(folder, stack, tmp_path):
    with pytest.raises(UserError, match="text length: found 1"):
        text.encode_prompts(stack, PROMPTS, 1)
    with pytest.raises(UserError, match="prompts: found none"):
        text.encode_prompts(stack, [], 8)
    copy = shutil.copytree(folder, tmp_path / "copy")
    vocabulary = json.loads((copy / "tokenizer" / "vocab.json").read_text())
    vocabulary["extra</w>"] = len(vocabulary)
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    size = stack.encoders.clip.config.vocab_size
    with pytest.raises(UserError, match=f"tokenizer knows {size + 1} tokens, but text_encoder/config.json"):
        text.load_text_stack(copy)


def test_encoding_needs_neither_torch_nor_diffusers(folder):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['diffusers'] = None\n"
        "from nabla_jax.conditioning.text import encode_prompts\n"
        f"print(encode_prompts({str(folder)!r}, ['a bird'], 8)[0].shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(1, 8, 64)"
