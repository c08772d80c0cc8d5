"""Prompts to what the transformer reads: T5's embeddings of every token and CLIP's one vector.

Both tokenizers pad to a fixed length and neither encoder is given a padding mask, as FLUX was trained: T5's
padding (id 0) takes part in attention and stays among the embeddings; CLIP is padded with its end token.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.pipeline import TextEncoders, Tokenizers
from nabla_jax.errors import UserError
from nabla_jax.models import layers

log = logging.getLogger(__name__)
# Prompts per compiled call.
BATCH = 8

PromptEncoder = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class TextStack:
    """Everything that text passes through."""

    tokenizers: Tokenizers
    encoders: TextEncoders


def load_text_stack(
    folder: str | os.PathLike[str], *, dtype: DTypeLike | None = None, sharding: Any = None
) -> TextStack:
    """Tokenizers and text encoders of a pipeline folder.

    ``dtype`` of the parameters; None means float32 on CPU and bfloat16, the published precision, elsewhere.
    Raises UserError if something is missing, or if a tokenizer knows more tokens than its encoder.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    tokenizers = pipeline.load_tokenizers(folder)
    encoders = pipeline.load_text_encoders(folder, dtype=dtype, sharding=sharding)
    pairs = (("", tokenizers.clip, encoders.clip), ("_2", tokenizers.t5, encoders.t5))
    for suffix, tokenizer, encoder in pairs:
        if len(tokenizer) > encoder.config.vocab_size:
            raise UserError(
                f"{folder}: tokenizer{suffix} knows {len(tokenizer)} tokens, but "
                f"text_encoder{suffix}/config.json: vocab_size is {encoder.config.vocab_size}"
            )
    return TextStack(tokenizers, encoders)


def clip_length(tokenizer: Any, positions: int) -> int:
    """Tokens that CLIP reads: the tokenizer's limit, never more than the encoder's ``positions``."""
    return min(int(tokenizer.model_max_length), positions)


def tokenize(
    tokenizers: Tokenizers, prompts: Sequence[str], length: int, clip_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded and truncated ids, int32: CLIP's [n, clip_tokens] and T5's [n, length].

    Raises UserError for a length below 2 (one token and the end token) or no prompts.
    """
    if length < 2:
        raise UserError(f"text length: found {length}, expected at least 2 tokens")
    if not prompts:
        raise UserError("prompts: found none, expected at least one")
    return _ids(tokenizers.clip, prompts, clip_tokens, "CLIP"), _ids(tokenizers.t5, prompts, length, "T5")


def embed(
    encoders: TextEncoders,
    clip_params: layers.Params,
    t5_params: layers.Params,
    clip_ids: jax.Array,
    t5_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Ids [B, Tc] and [B, T] -> (prompt embeddings [B, T, D], pooled [B, P]), in the parameters' dtype.

    Pure and differentiable in both parameter trees; of ``encoders`` only the graphs are used, so that other
    trees than its own can be trained.
    """
    _, pooled = layers.bind(encoders.clip.graphdef, clip_params)(clip_ids)
    return layers.bind(encoders.t5.graphdef, t5_params)(t5_ids), pooled


def encode_prompts(
    source: str | os.PathLike[str] | TextStack,
    prompts: Sequence[str],
    length: int,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts with both encoders; see ``make_prompt_encoder``.

    Args:
        source: a pipeline folder, or what ``load_text_stack`` made of it.
        prompts: n texts.
        length: T, tokens of T5 (FLUX.1-dev: 512).
        dtype: see ``load_text_stack``; used only where ``source`` is a folder.

    Returns:
        prompt_embeds [n, T, D] and pooled [n, P], both float32.
    """
    stack = source if isinstance(source, TextStack) else load_text_stack(source, dtype=dtype)
    return make_prompt_encoder(stack, length)(prompts)


def make_prompt_encoder(stack: TextStack, length: int) -> PromptEncoder:
    """The function from n texts to prompt_embeds [n, T, D] and pooled [n, P], both float32, T = ``length``.

    The same text goes to CLIP and T5; one longer than its tokenizer's length is cut, with a warning in the log. The
    function holds the encoders, and compiles once.
    """
    encoders = stack.encoders
    limit = clip_length(stack.tokenizers.clip, encoders.clip.config.max_position_embeddings)

    @jax.jit
    def run(clip_params: layers.Params, t5_params: layers.Params, clip_ids: jax.Array, t5_ids: jax.Array) -> Any:
        embeds, pooled = embed(encoders, clip_params, t5_params, clip_ids, t5_ids)
        return embeds.astype(jnp.float32), pooled.astype(jnp.float32)

    def encode(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = tokenize(stack.tokenizers, prompts, length, limit)
        parts = []
        size = min(BATCH, len(prompts))
        for start in range(0, len(prompts), size):
            clip_ids, t5_ids = (_rows(array, start, size) for array in ids)
            parts.append(jax.device_get(run(encoders.clip.params, encoders.t5.params, clip_ids, t5_ids)))
        embeds, pooled = (np.concatenate(column)[: len(prompts)] for column in zip(*parts, strict=True))
        return embeds, pooled

    return encode


def _ids(tokenizer: Any, prompts: Sequence[str], length: int, name: str) -> np.ndarray:
    texts = list(prompts)
    cut = sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids)
    if cut:
        log.warning("%d of %d prompts have more than %d %s tokens and were cut", cut, len(texts), length, name)
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return np.asarray(batch.input_ids, np.int32)


def _rows(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """Rows start..start+size; the last batch is filled up by repetition, so that one program serves all."""
    return array[np.minimum(np.arange(start, start + size), len(array) - 1)]
