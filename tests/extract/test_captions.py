"""Qwen2.5-VL at a very small size; what captions must not say."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from nabla_jax import extract
from nabla_jax.errors import UserError
from nabla_jax.extract import captions
from nabla_jax.extract.segmentation import NotFound
from nabla_jax.extract.wording import Wording
from tests.extract.checkpoints import captioner, settings

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
NAMES = ("Birds", "Ducks, Geese, and Swans", "Perching Birds", "Blue-winged Teal (Male)", "Dark-eyed Junco (Oregon)",
         "American Crow")  # fmt: skip


def test_what_the_model_is_given() -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    inputs = captions.prepare(image, "Where is it?", captioner())
    tokenizer = transformers.AutoTokenizer.from_pretrained(captioner())
    frames, rows, columns = inputs["image_grid_thw"][0].tolist()
    # Two by two patches of 14 pixels make a token; 50 x 80 is nearest to 56 x 84.
    assert (frames, rows * 14, columns * 14) == (1, 56, 84)
    assert inputs["pixel_values"].shape == (rows * columns, 3 * 2 * 14 * 14)
    text = tokenizer.decode(inputs["input_ids"][0])
    expected = f"<|im_start|>user\n<|vision_start|>{captions.IMAGE * (rows * columns // 4)}<|vision_end|>Where is it?"
    assert text == f"{expected}<|im_end|>\n<|im_start|>assistant\n"
    image_token = tokenizer.convert_tokens_to_ids(captions.IMAGE)
    assert ((inputs["input_ids"] == image_token) == (inputs["mm_token_type_ids"] == 1)).all()
    # The first patch holds the picture's corner, twice: a still is two equal frames.
    patch = inputs["pixel_values"][0].reshape(3, 2, 14, 14).numpy()
    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(captioner())
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    start = int((inputs["input_ids"][0] == image_token).nonzero()[0])
    shown = positions[:, 0, start : start + 6].numpy() - start
    np.testing.assert_array_equal(shown, [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])


def test_answers() -> None:
    """The likeliest words whatever the folder's own settings; other words by seed; never more than the limit."""
    chosen = settings("captioner")
    first = captions.generate(IMAGE, "Where?", chosen, None)
    assert captions.generate(IMAGE, "Where?", chosen, None) == first
    drawn = [captions.generate(IMAGE, "Where?", chosen, seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(captioner())
    inputs = captions.prepare(IMAGE, "Where?", captioner())
    step = model(**inputs).logits[0, -1].argmax()
    tokenizer = transformers.AutoTokenizer.from_pretrained(captioner())
    assert captions.generate(IMAGE, "Where?", settings("captioner", caption_tokens=1), None) == tokenizer.decode(step)
    short = tokenizer(first)["input_ids"]
    assert len(short) <= 3 * chosen.caption_tokens


def answers(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[tuple[str, int | None]]:
    """Puts texts in the place of the network; returns what it is asked, with which seed."""
    asked: list[tuple[str, int | None]] = []

    def generate(image: np.ndarray, prompt: str, _: object, seed: int | None) -> str:
        asked.append((prompt, seed))
        return texts[len(asked) - 1]

    monkeypatch.setattr(captions, "generate", generate)
    return asked


def test_a_caption_that_tells_the_bird_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(
        monkeypatch, "A teal on a pond.", "A bird with long tail.", " A bird on a pond \n with reeds. And a"
    )
    found = extract.caption(IMAGE, NAMES, settings(), seed=10)
    assert found == captions.Caption("A bird on a pond with reeds.", 3)
    prompt = settings().caption_prompt
    assert asked == [(prompt, None), (prompt + captions.STRICTER, 11), (prompt + captions.STRICTER, 12)]


def test_what_remains_is_taken_out_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "An American Crow stands on a post, its black wings spread, in a snowy field."
    answers(monkeypatch, text, text)
    found = extract.caption(IMAGE, NAMES, settings(caption_retries=1))
    assert found == captions.Caption("A bird stands on a post, in a snowy field.", 2, ("american crow", "wings"))
    answers(monkeypatch, "A male junco.")
    with pytest.raises(NotFound, match="no caption without junco, male"):
        extract.caption(IMAGE, NAMES, settings(caption_retries=0))
    answers(monkeypatch, " ")
    with pytest.raises(NotFound, match="no caption without an empty answer"):
        extract.caption(IMAGE, NAMES, settings(caption_retries=0))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("On a pond.", "On a pond."),
        (' "On a\n pond. By the"', "On a pond."),
        ("On a pond by the", "On a pond by the"),
        ("", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert captions.one_line(text) == line


@pytest.mark.parametrize(
    "text",
    [
        "A bird on a branch with green leaves and a blue sky behind.",
        "A bird perches in a snowy field, brown grass in front.",
        "A photo of a bird on a branch, green background.",
        "The bird is on a lawn in a dark forest.",
        "A bird on a wooden post by the sea; grey rocks.",
    ],
)
def test_backgrounds_may_be_told_in_colour(text: str) -> None:
    assert Wording(NAMES).forbidden(text) == []
    assert Wording(NAMES).without(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Blue Winged Teal on water.", ["Blue Winged Teal"]),
        ("Two crows on a fence.", ["crows"]),
        ("A goose or a swan.", ["swan"]),
        ("A small brown bird on a log.", ["brown"]),
        ("A blue and white bird on a log.", ["blue and white"]),
        ("The bird is mostly yellow.", ["bird is mostly yellow"]),
        ("A red-capped visitor.", ["red-capped"]),
        ("A bird with bright plumage and a long bill.", ["plumage", "bill"]),
        ("A juvenile on sand.", ["juvenile"]),
    ],
)
def test_birds_may_not_be_told(text: str, words: list[str]) -> None:
    assert Wording(NAMES).forbidden(text) == words


def test_taking_out_leaves_nothing_forbidden() -> None:
    wording = Wording(NAMES)
    cases = {
        "A Dark-eyed Junco on snow.": "A bird on snow.",
        "An American Crow, black wings folded, on a wire.": "A bird, on a wire.",
        "A small blue and white bird on a log. It has a yellow bill.": "A small bird on a log.",
        "Male plumage.": "",
    }
    for text, expected in cases.items():
        assert wording.without(text) == expected
        assert wording.forbidden(wording.without(text)) == []


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extract.captioner: found no .*hf download Qwen/Qwen2.5-VL-7B-Instruct"):
        extract.caption(IMAGE, NAMES, settings())
    tokenizer = transformers.AutoTokenizer.from_pretrained(captioner())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="found no chat template"):
        captions._tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "x"}')
    assert captions._tokenizer(tmp_path).chat_template == "x"
