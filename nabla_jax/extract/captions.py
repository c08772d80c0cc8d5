"""Captions of backgrounds by Qwen2.5-VL (Bai et al. 2025), checked for what they must not tell.

The first attempt takes the likeliest words. One that names species or plumage is made again with words drawn at random;
after the last, what must not be said is taken out. transformers' own processor for this model needs torchvision: its
three steps for a single picture are made here.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from nabla_jax.config import Extract
from nabla_jax.errors import UserError
from nabla_jax.extract import checkpoints
from nabla_jax.extract.segmentation import NotFound
from nabla_jax.extract.wording import Wording
from nabla_jax.untrusted import check, read_json

Array = np.ndarray[Any, Any]

IMAGE = "<|image_pad|>"
STRICTER = " Do not name the kind of bird, its colours, its sex or any part of it. Describe the surroundings only."


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption and how it came about.

    Attributes:
      text: one line, at most ``extract.caption_tokens`` tokens.
      attempts: how often the network was asked.
      removed: words for which something was taken out of the last attempt; empty for most.
    """

    text: str
    attempts: int
    removed: tuple[str, ...] = ()


def describe(image: Array, wording: Wording, settings: Extract, seed: int) -> Caption:
    """The caption of a picture, see ``nabla_jax.extract.caption``. Raises NotFound, UserError."""
    text = ""
    for attempt in range(settings.caption_retries + 1):
        prompt = settings.caption_prompt + (STRICTER if attempt else "")
        text = one_line(generate(image, prompt, settings, None if attempt == 0 else (seed + attempt) % 2**63))
        if text and not wording.forbidden(text):
            return Caption(text, attempt + 1)
    removed = tuple(dict.fromkeys(word.lower() for word in wording.forbidden(text)))
    text = wording.without(text)
    if len(text.split()) < 3 or wording.forbidden(text):
        raise NotFound(f"no caption without {', '.join(removed) or 'an empty answer'}")
    return Caption(text, settings.caption_retries + 1, removed)


def one_line(text: str) -> str:
    """An answer as one line that ends with a sentence: a last sentence that the limit cut off is left out."""
    text = " ".join(text.split()).strip("\"' ")
    if not text or text[-1] in ".!?":
        return text
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)", text)]
    return text[: ends[-1]] if ends else text.rstrip(",;: ")


def generate(image: Array, prompt: str, settings: Extract, seed: int | None) -> str:
    """The network's answer to a picture and a prompt; words are drawn at random where a seed is given."""
    folder = checkpoints.find(settings, "captioner")
    import torch

    device = checkpoints.device(settings)
    model = checkpoints.load("Qwen2_5_VLForConditionalGeneration", folder, device)
    tokenizer = _tokenizer(folder)
    inputs = {name: value.to(device) for name, value in prepare(image, prompt, folder).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if seed is not None:
        torch.manual_seed(seed)
        drawn = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=settings.caption_tokens, repetition_penalty=1.0, **drawn)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def prepare(image: Array, prompt: str, folder: Path) -> dict[str, Any]:
    """What the model takes for one picture and a prompt, as torch tensors with a batch of one."""
    import torch
    from PIL import Image

    tokenizer, processor = _tokenizer(folder), _image_processor(folder)
    pictures = processor(images=[Image.fromarray(image)], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if text.count(IMAGE) != 1:
        raise UserError(f"{folder}: the chat template puts {text.count(IMAGE)} pictures into a prompt, expected 1")
    # One token for each square of merged patches.
    count = int(pictures["image_grid_thw"][0].prod()) // processor.merge_size**2
    tokens = tokenizer(text.replace(IMAGE, IMAGE * count), return_tensors="pt")
    ids = tokens["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": tokens["attention_mask"],
        # Which tokens are a picture's: positions are counted in rows and columns there.
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids(IMAGE)).to(torch.int32),
        "pixel_values": pictures["pixel_values"],
        "image_grid_thw": pictures["image_grid_thw"],
    }


class _Template(TypedDict):
    chat_template: str


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    path = folder / "chat_template.json"
    if tokenizer.chat_template is None and path.is_file():
        found = read_json(path)
        check(found, _Template, str(path))
        tokenizer.chat_template = found["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: found no chat template in tokenizer_config.json or chat_template.json")
    return tokenizer


@functools.cache
def _image_processor(folder: Path) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
