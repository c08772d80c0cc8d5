"""Every target's own caption as the prompt, from the data folder to pictures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_jax import api, generate, train
from nabla_jax import prepare as prepare_module
from nabla_jax.checkpoints.adapters import read_metadata
from nabla_jax.conditioning.text import encode_prompts, load_text_stack, make_prompt_encoder
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.loader import TEXT, make_loader, open_prepared
from nabla_jax.errors import UserError
from tests.data.folders import write_nabirds
from tests.fixtures import prepared_root, write_config
from tests.stand_ins import config_for, encoders
from tests.test_api import untuned


def caption_of(root: Path, number: int) -> str:
    """What the tests say of a picture: four captions in all, one of them with letters beyond ASCII."""
    return ["a pond", "a tūī's hedge", "snow", "a branch in the rain"][number % 4]


@pytest.fixture
def described(tmp_path: Path) -> Path:
    root = write_nabirds(tmp_path / "nabirds")
    ids = [example.id for example in read_dataset(root).examples]
    (root / "captions.json").write_text(json.dumps({id: caption_of(root, i) for i, id in enumerate(ids)}))
    return root


@pytest.mark.parametrize("group", [1, 3, 64])
def test_one_row_for_each_distinct_caption(
    described: Path, tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "CAPTIONS_PER_CALL", group)
    asked: list[list[str]] = []
    stand_in = encoders()

    def prompts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        asked.append(texts)
        return stand_in.prompts(texts)

    config = config_for(described, tmp_path / "out", caption="background")
    folder = prepare_module.prepare(config, dataclasses.replace(stand_in, prompts=prompts))
    said = [text for texts in asked for text in texts]
    examples = {example.id: example for example in read_dataset(described).of_split("train")}
    assert sorted(said) == sorted({example.caption for example in examples.values()})
    assert max(map(len, asked)) <= group
    embeds, pooled = stand_in.prompts(said)
    stored = load_file(folder / TEXT)  # the published reader of the format
    np.testing.assert_array_equal(stored["prompt_embeds"], embeds)
    np.testing.assert_array_equal(stored["pooled"], pooled)
    prepared = open_prepared(folder)
    captions = [examples[id].caption for id in prepared.manifest["ids"]]
    assert [said[row] for row in prepared.captions] == captions
    # A batch has the target's.
    batch = next(make_loader(prepared, "image_uniform", 16, seed=0))
    rows = [said.index(captions[position]) for position in batch["target_index"]]
    np.testing.assert_array_equal(batch["prompt_embeds"], embeds[rows])
    np.testing.assert_array_equal(batch["pooled"], pooled[rows])
    assert len(set(rows)) > 1


def test_pictures_without_a_caption_are_named(described: Path, tmp_path: Path) -> None:
    path = described / "captions.json"
    captions = json.loads(path.read_text())
    first, second = sorted(example.id for example in read_dataset(described).of_split("train"))[:2]
    path.write_text(json.dumps({id: " " if id == second else c for id, c in captions.items() if id != first}))
    config = config_for(described, tmp_path / "out", caption="background")
    with pytest.raises(UserError, match="has no caption; 2 of 8 pictures have none, expected captions.json"):
        prepare_module.prepare(config, encoders())


def test_prepare_train_generate(tmp_path: Path) -> None:
    world = prepared_root()
    folders = {"data__prepared": str(tmp_path / "prepared"), "train__workdir": str(tmp_path / "run")}
    changes = {"conditioning__caption": "background", **folders, "train__steps": 1, "train__save_every": 1}
    file = write_config(world, tmp_path / "config.py", **changes)
    prepare_module.main(["--config", str(file)])
    assert open_prepared(tmp_path / "prepared").manifest["counts"]["captions"] > 1
    train.main(["--config", str(file)])
    adapter = api.find_adapter(tmp_path / "run")
    assert read_metadata(adapter).caption == "background"
    arguments = ["--config", str(file), "--adapter", str(tmp_path / "run")]
    generate.main([*arguments, "--out", str(tmp_path / "pictures"), "--limit", "3", "--subjects", "right"])
    rows = [json.loads(x) for x in (tmp_path / "pictures/nabla/right/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    # What the command drew is what its target's caption asks for, alone in a batch or not.
    reposer = api.load(world / "base", adapter)
    examples = read_dataset(world / "world" / "nabirds").by_id
    subject, target = (controls.read_view(examples[rows[0][name]]) for name in ("subject_used", "target_id"))
    assert examples[rows[0]["target_id"]].caption
    made = controls.read_image(tmp_path / "pictures/nabla/right" / rows[0]["file"]).astype(int)
    job = api.Job(f"nabla/{rows[0]['pair']}", subject.image, subject.mask, target.image, target.mask)
    sample = reposer.sample_settings(rows[0]["seed"], rows[0]["steps"], rows[0]["guidance"])
    sample = dataclasses.replace(sample, batch=reposer.mesh.size)

    def draw(caption: str | None) -> np.ndarray:
        (picture, _), *_ = reposer.repose_batch([dataclasses.replace(job, target_caption=caption)], sample)
        return picture.astype(int)

    assert np.abs(draw(examples[rows[0]["target_id"]].caption) - made).max() <= 1
    assert np.abs(draw("an entirely different place") - made).max() > 1
    with pytest.raises(UserError, match="caption background: the target has no caption"):
        draw(None)


def test_a_single_picture_needs_its_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = prepared_root()
    file = write_config(world, tmp_path / "config.py", conditioning__caption="background")
    example = read_dataset(world / "world" / "nabirds").examples[0]
    arguments = ["--config", str(file), "--out", str(tmp_path / "one.png")]
    for name in ("subject", "target"):
        arguments += [f"--{name}", str(example.image), f"--{name}_mask", str(example.mask)]
    with pytest.raises(UserError, match="caption background: missing --target_caption"):
        generate.main(arguments)
    base = untuned()
    encode = make_prompt_encoder(load_text_stack(world / "base"), base.conditioning.text_length)
    conditioning = dataclasses.replace(base.conditioning, caption="background")
    reposer = dataclasses.replace(base, conditioning=conditioning, text=encode)
    monkeypatch.setattr(generate, "_load", lambda *_: reposer)
    generate.main([*arguments, "--target_caption", "a pond"])
    one = dataclasses.replace(base, text=encode_prompts(world / "base", ["a pond"], base.conditioning.text_length))
    expected = one.repose(example.image, example.image, example.mask, example.mask)
    np.testing.assert_array_equal(controls.read_image(tmp_path / "one.png"), np.asarray(expected))
