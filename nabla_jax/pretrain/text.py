"""Small tokenizers and text encoders in the published layout, for a closed vocabulary.

A caption's words become one token each. Words outside the vocabulary are spelled in single characters, so
that any prompt can be tokenized and none turns into the end-of-text token.
"""

import base64
import dataclasses
import json
import os
import re
import string
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_jax.checkpoints.pipeline import Component, TextEncoders, save_part, write_json
from nabla_jax.checkpoints.safetensors_io import flatten, unflatten
from nabla_jax.models import layers
from nabla_jax.models.clip import CLIPText, CLIPTextConfig
from nabla_jax.models.t5 import T5Config, T5Encoder

CLIP_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# SentencePiece's mark of a word's beginning.
METASPACE = "\u2581"
# How CLIP cuts text before pairing characters: contractions, words, single digits, runs of other signs.
_CLIP_SPLIT = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")


def write_tokenizers(folder: str | os.PathLike[str], words: Sequence[str]) -> None:
    """Writes ``tokenizer/`` (CLIP) and ``tokenizer_2/`` (T5) that know ``words``, ignoring their case.

    The same words in another order give other ids: keep the order with the trained encoders.
    """
    known = list(dict.fromkeys(word.lower() for word in words))
    _write_clip_tokenizer(Path(folder) / "tokenizer", known)
    _write_t5_tokenizer(Path(folder) / "tokenizer_2", known)


def write_text_encoders(folder: str | os.PathLike[str], key: jax.Array) -> TextEncoders:
    """Draws small text encoders for the tokenizers in ``folder`` and saves them beside these.

    CLIP: width 64, one layer, 2 heads; T5: width 64, one layer, 4 heads of 16, feed-forward 128. float32.
    """
    encoders = make_text_encoders(folder, key)
    save_text_encoders(folder, encoders)
    return encoders


def make_text_encoders(folder: str | os.PathLike[str], key: jax.Array) -> TextEncoders:
    """The encoders of ``write_text_encoders``, not saved, for the tokenizers in ``folder``."""
    vocabulary = json.loads((Path(folder) / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    pieces = json.loads((Path(folder) / "tokenizer_2" / "tokenizer.json").read_text(encoding="utf-8"))
    clip_config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
    )
    t5_config = T5Config(
        vocab_size=len(pieces["model"]["vocab"]), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4
    )
    clip_key, t5_key = jax.random.split(key)
    clip_graph, clip_params = layers.initialize(lambda rngs: CLIPText(clip_config, rngs=rngs), clip_key)
    t5_graph, t5_params = layers.initialize(lambda rngs: T5Encoder(t5_config, rngs=rngs), t5_key)
    return TextEncoders(
        clip=Component(clip_config, clip_graph, _scale(clip_params, r".*_embedding\.weight", 0.02)),
        # T5 does not divide its scores by the root of the head width: its queries start that much smaller.
        t5=Component(t5_config, t5_graph, _scale(t5_params, r".*\.q\.weight", t5_config.d_kv**-0.5)),
    )


def with_params(encoders: TextEncoders, params: layers.Params) -> TextEncoders:
    """The encoders with other parameters: {"clip", "t5"}."""
    clip, t5 = (dataclasses.replace(getattr(encoders, name), params=params[name]) for name in ("clip", "t5"))
    return TextEncoders(clip=clip, t5=t5)


def save_text_encoders(folder: str | os.PathLike[str], encoders: TextEncoders, dtype: Any = jnp.float32) -> None:
    """Writes ``text_encoder/`` and ``text_encoder_2/`` with parameters in ``dtype``."""
    save_part(folder, "text_encoder", encoders.clip.config, encoders.clip.params, dtype=dtype)
    save_part(folder, "text_encoder_2", encoders.t5.config, encoders.t5.params, dtype=dtype)


def _scale(params: layers.Params, pattern: str, factor: float) -> layers.Params:
    return unflatten({k: v * factor if re.fullmatch(pattern, k) else v for k, v in flatten(params).items()})


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level BPE (Radford et al. 2019).

    Printable Latin-1 characters stand for themselves, the others for code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merge_rules(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges under which byte-pair encoding turns every word into one token ending in ``</w>``.

    A word that the rules so far leave in pieces gets a rule for its first two pieces, until one remains.
    Later rules rank below earlier ones, so they never change how an earlier word is merged.
    """
    rules: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = apply_merges(word, rules)
        while len(pieces) > 1:
            rules[pieces[0], pieces[1]] = len(rules)
            pieces = apply_merges(word, rules)
    return list(rules)


def apply_merges(word: str, rules: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word (Sennrich et al. 2016): always merges the pair of lowest rank first."""
    symbols = byte_symbols()
    characters = [symbols[byte] for byte in word.encode()]
    pieces = [*characters[:-1], characters[-1] + END_OF_WORD]
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in rules]
        if not pairs:
            return pieces
        best = min(pairs, key=rules.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            # A piece that was just merged has become longer than the rule's left side and cannot match again.
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged


def _write_clip_tokenizer(folder: Path, words: Sequence[str]) -> None:
    parts = list(dict.fromkeys(part for word in words for part in _CLIP_SPLIT.findall(word)))
    rules = merge_rules(parts)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
    tokens += [left + right for left, right in rules]
    # The end-of-text token has the largest id, which is how encoders with the legacy config find it.
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in rules)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_LENGTH,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    )


def _write_t5_tokenizer(folder: Path, words: Sequence[str]) -> None:
    # Unigram takes the split of highest total score: one whole word always beats its spelling.
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(METASPACE + word, -1.0) for word in words]
    characters = [
        METASPACE,
        *(c for c in string.printable if c.isprintable() and not (c.isspace() or c.isupper())),
    ]
    known = {piece for piece, _ in pieces}
    pieces += [(character, -10.0) for character in characters if character not in known]
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    metaspace = {"type": "Metaspace", "replacement": METASPACE, "prepend_scheme": "always", "split": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": ids[token], "content": token, **added} for token in special.values()],
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": lower_case_map()},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                ],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                ],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [ids["</s>"]], "tokens": ["</s>"]}},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": ids["<unk>"], "vocab": pieces, "byte_fallback": False},
        },
    )
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512},
    )


def lower_case_map() -> str:
    """SentencePiece's normalisation table (base64) that turns A..Z into a..z.

    A plain lower-casing step would be dropped by transformers 5, which keeps only this table of a T5
    tokenizer. It is a double-array trie of 32-bit units followed by the replacements, each ended by a zero
    byte. A unit holds its label (bits 0-7), whether a key ends there (bit 8) and the offset (bits 10-30)
    that, XORed with the unit's position and the next character, leads to the next unit; a leaf (bit 31) holds
    where the replacement begins.
    """
    size = 256
    units = [0] * (2 * size)
    units[0] = size << 10  # the root: a character's unit lies at size ^ character
    for i, character in enumerate(string.ascii_uppercase.encode()):
        # From position size ^ character, the offset size leads to the leaf at position character.
        units[size ^ character] = size << 10 | 1 << 8 | character
        units[character] = 1 << 31 | 2 * i
    trie = struct.pack(f"<{len(units)}I", *units)
    replacements = b"".join(letter.encode() + b"\0" for letter in string.ascii_lowercase)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + replacements).decode()
