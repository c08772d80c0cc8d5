"""The small tokenizers, against transformers, the tokenizers library and a plain reading of their rules."""

import json

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from nabla_jax.pretrain import text

WORDS = ("A", "a", "photo", "of", "bird", "birds", "at", "cat", "that", "red-crowned", "left", "3", "wing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    text.write_tokenizers(path, WORDS)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def t5(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)


def test_every_known_word_is_one_token(clip, t5):
    for word in WORDS:
        parts = word.split("-")
        assert clip.tokenize(word) == [p + "</w>" for p in "-".join(parts).lower().replace("-", " - ").split()]
        assert t5.tokenize(word) == ["\u2581" + word.lower()]


def test_case_is_ignored_and_punctuation_kept_apart(clip, t5):
    for tokenizer in (clip, t5):
        assert tokenizer("A BIRD, Red-Crowned.").input_ids == tokenizer("a bird, red-crowned.").input_ids
    assert clip.tokenize("bird.") == ["bird</w>", ".</w>"]
    assert t5.tokenize("bird.") == ["\u2581bird", "."]


def test_special_ids(clip, t5):
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert clip.eos_token_id == clip.pad_token_id == len(clip) - 1
    assert clip.bos_token_id == len(clip) - 2
    assert clip.model_max_length == 16
    assert clip("").input_ids == [clip.bos_token_id, clip.eos_token_id]
    assert t5("").input_ids == [1]


@given(st.text(max_size=30))
def test_no_text_contains_clip_s_end_token_by_accident(clip, prompt):
    if "<|endoftext|>" in prompt.lower() or "<|startoftext|>" in prompt.lower():
        return
    ids = clip(prompt, verbose=False).input_ids
    assert ids.count(clip.eos_token_id) == 1
    assert ids[-1] == clip.eos_token_id


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_t5_spells_printable_text_and_reads_the_same_without_transformers(folder, t5, prompt):
    ids = t5(prompt, verbose=False).input_ids
    special = any(token in prompt for token in ("<pad>", "</s>", "<unk>"))
    assert special or t5.unk_token_id not in ids
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    assert plain.encode(prompt).ids == ids


@given(st.lists(st.text("abcde", min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
def test_merges_give_one_token_per_word_in_the_tokenizers_library(words):
    rules = text.merge_rules(words)
    symbols = text.byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in rules)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = tokenizers.models.BPE(vocabulary, rules, end_of_word_suffix="</w>")
    for word in words:
        assert [token.value for token in model.tokenize(word)] == [word + "</w>"]


def test_byte_symbols_are_those_of_the_tokenizers_library():
    assert sorted(text.byte_symbols()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in map(chr, range(1, 0x180)):
        expected = split.pre_tokenize_str(character)[0][0]
        assert "".join(text.byte_symbols()[b] for b in character.encode()) == expected


def test_encoders_fit_their_tokenizers_and_follow_the_key(folder, clip, t5, tmp_path):
    text.write_tokenizers(tmp_path, WORDS)
    encoders = text.write_text_encoders(tmp_path, jax.random.key(3))
    assert encoders.clip.config.vocab_size == len(clip)
    assert encoders.t5.config.vocab_size == len(t5)
    assert encoders.clip.config.eos_token_id == clip.eos_token_id
    for name, architecture in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == [architecture]
    same, other = (text.make_text_encoders(tmp_path, jax.random.key(k)) for k in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, encoders.t5.params, same.t5.params)
    first = encoders.clip.params["text_model"]["embeddings"]["token_embedding"]["weight"]
    assert np.abs(first - other.clip.params["text_model"]["embeddings"]["token_embedding"]["weight"]).max() > 0
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("name", "kind"), [("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")])
def test_transformers_reads_the_encoders_without_a_missing_or_unknown_tensor(folder, tmp_path, name, kind):
    text.write_tokenizers(tmp_path, WORDS)
    text.write_text_encoders(tmp_path, jax.random.key(0))
    _, report = getattr(transformers, kind).from_pretrained(tmp_path / name, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
