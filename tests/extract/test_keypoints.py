"""Keypoints for photos that nobody annotated: found by the embedded head, written beside them, read back, drawn."""

import atexit
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import config as configs
from nabla_jax import extract, generate
from nabla_jax.checkpoints import transformers_folder
from nabla_jax.config import Extract
from nabla_jax.data import controls, keypoint_file, read_dataset, skeleton
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.extract import parts, work
from nabla_jax.extract.work import Folder, Shard
from nabla_jax.keypoints.crops import bird_box
from nabla_jax.metrics.pose import keypoint_error
from nabla_jax.toybirds import Oracle
from nabla_jax.toybirds.render import render
from tests.extract.test_generate import Recorder
from tests.fixtures import config, write_small_world

SETTINGS = Extract(keypoints="asset:toy-keypoints", dinov2="asset:toy-dinov2")


@functools.cache
def world() -> Path:
    """Tests must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="nabla_jax_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_small_world(folder / "world", seed=4, images=96)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An iNaturalist folder of few rows, without a keypoint."""
    root = Path(shutil.copytree(world() / "inat" / "na", tmp_path / "inat"))
    lines = (root / "final_pairs.csv").read_text().splitlines(keepends=True)
    (root / "final_pairs.csv").write_text("".join(lines[:9]))
    return root


def truth(root: Path, example: Example) -> np.ndarray:
    """[11, 3] (row, column, visible) by the world's own geometry."""
    oracle = Oracle(root)
    x, y, visible = render(oracle.identity(example.id), oracle.scene(example.id)).keypoints.astype(float).T
    return np.stack([y - 0.5, x - 0.5, visible], axis=1)


def test_an_inaturalist_folder_gets_keypoints_that_are_right(photos: Path) -> None:
    examples = read_dataset(photos).examples
    assert len(examples) == 16 and all(e.keypoints is None for e in examples)
    with pytest.raises(UserError, match="has no keypoints; 16 of 16 .* python -m nabla_jax.extract makes them"):
        controls.require(examples, "keypoints")
    counts = work.extract(Folder.open(photos), "keypoints", SETTINGS)
    assert counts == {"kept": 0, "made": 16, "failed": 0}
    examples = read_dataset(photos).examples
    errors = []
    for example in examples:
        assert example.keypoints.shape == (11, 3) and set(np.unique(example.keypoints[:, 2])) <= {0, 1}
        box = bird_box(example)
        errors.append(keypoint_error(example.keypoints, truth(photos, example), max(box[2] - box[0], box[3] - box[1])))
        image, mask = controls.read_pair(example.image, example.mask)
        found = extract.keypoints(image, mask, SETTINGS)
        seen = example.keypoints[:, 2] == 1
        np.testing.assert_array_equal(found[:, 2] == 1, seen)
        np.testing.assert_array_equal(found[seen], example.keypoints[seen])
    # Hidden parts are written as 0 0 0, so those that are wrongly thought hidden count as misses.
    assert np.mean([error.rate for error in errors]) > 0.8
    sidecar = json.loads((photos / "extraction" / "keypoints.json").read_text())
    assert set(sidecar["checkpoints"]) == {"keypoints", "dinov2"} and "torch" not in sidecar["environment"]
    row = work._rows(photos / "extraction", "keypoints")[0]
    assert set(row) == {"id", "box", "keypoints", "visible"} and len(row["visible"]) == 11


def test_what_was_there_stays_and_shards_make_the_same_file(photos: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(photos, tmp_path / "whole"))
    first = read_dataset(photos).examples[0].id
    own = {first: [[1, 2, 1]] + [[0, 0, 0]] * 10}
    for root in (photos, whole):
        keypoint_file.write(root / "keypoints.json", own)
    assert work.extract(Folder.open(whole), "keypoints", SETTINGS) == {"kept": 1, "made": 15, "failed": 0}
    for i in (1, 0, 1):
        work.extract(Folder.open(photos), "keypoints", SETTINGS, Shard(i, 2))
    text = (photos / "keypoints.json").read_text()
    assert text == (whole / "keypoints.json").read_text()
    assert keypoint_file.read(photos / "keypoints.json")[first] == own[first]
    # Another head: refused, or on demand made again, but for what is the user's.
    head = Path(shutil.copytree(parts.checkpoints.find(SETTINGS, "keypoints"), tmp_path / "head"))
    settings = dataclasses.replace(SETTINGS, keypoints=str(head))
    assert work.extract(Folder.open(whole), "keypoints", settings) == {"kept": 16, "made": 0, "failed": 0}
    (head / "config.json").write_text((head / "config.json").read_text() + "\n")
    parts.checkpoints.identity.cache_clear()
    with pytest.raises(UserError, match="keypoints were made with other settings .checkpoint keypoints: "):
        work.extract(Folder.open(whole), "keypoints", settings)
    assert work.extract(Folder.open(whole), "keypoints", settings, overwrite=True)["made"] == 15
    assert keypoint_file.read(whole / "keypoints.json") == keypoint_file.read(photos / "keypoints.json")


def test_the_command_and_a_benchmark_of_skeletons_need_no_torch(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    values = configs.to_dict(config(tmp_path, conditioning__control="keypoints"))
    values["extract"] |= {"keypoints": "asset:toy-keypoints", "dinov2": "asset:toy-dinov2"}
    values["benchmarks"] = {"inat": str(photos)}
    file.write_text(f"def get_config(arg=''):\n    return {values!r}\n")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from nabla_jax.extract.__main__ import main\n"
        f"main(['--config', {str(file)!r}, '--root', {str(photos)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{photos}: masks: none is missing" in done.stdout and "keypoints: 16 made" in done.stdout
    chosen = configs.load(str(file))
    (work_,) = generate.read_works(chosen, ["inat"], ["right"], tmp_path / "out", 4)
    for pair in work_.pairs:
        view = controls.read_view(work_.dataset.by_id[pair.target_id], "keypoints")
        canvas = controls.control_canvas(view, chosen.conditioning)
        drawn = skeleton.draw(view.keypoints, *view.image.shape[:2], "dense", 15, 10)
        assert canvas.pixels.any() and drawn.any()


def test_one_picture_without_keypoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = read_dataset(world() / "nabirds").examples[0]
    image, mask = controls.read_pair(example.image, example.mask)
    recorder = Recorder()
    monkeypatch.setattr(generate, "_load", lambda *_: recorder)
    monkeypatch.setattr(configs, "check_inputs", lambda *_: None)
    chosen = config(tmp_path, conditioning__control="keypoints")
    argv = ["--config", "x", "--out", str(tmp_path / "out.png")]
    for name in ("subject", "target"):
        argv += [f"--{name}", str(example.image), f"--{name}_mask", str(example.mask)]
    monkeypatch.setattr(configs, "load", lambda *_: chosen)
    with pytest.raises(UserError, match="control keypoints: missing --target_keypoints"):
        generate.main(argv)
    monkeypatch.setattr(configs, "load", lambda *_: dataclasses.replace(chosen, extract=SETTINGS))
    generate.main(argv)
    np.testing.assert_array_equal(recorder.further["target_keypoints"], extract.keypoints(image, mask, SETTINGS))
    assert Image.open(tmp_path / "out.png").size == (image.shape[1], image.shape[0])


def test_what_cannot_be_used_is_told(photos: Path, tmp_path: Path) -> None:
    nothing = dataclasses.replace(SETTINGS, keypoints=str(tmp_path / "none"))
    with pytest.raises(UserError, match="extract.keypoints: found no .* `python -m nabla_jax.keypoints .* makes one"):
        work.extract(Folder.open(photos), "keypoints", nothing)
    with pytest.raises(UserError, match="the mask is empty"):
        extract.keypoints(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool), SETTINGS)
    # A head of another bird's parts.
    found = transformers_folder.load_keypoint_head(
        parts.checkpoints.find(SETTINGS, "keypoints"), parts.checkpoints.find(SETTINGS, "dinov2")
    )
    other = dataclasses.replace(found.config, parts=tuple(f"part {i}" for i in range(11)))
    transformers_folder.save_network(tmp_path / "other", "keypoints", other, found.params)
    with pytest.raises(UserError, match="head of part 0, part 1, .*, expected bill, crown"):
        extract.keypoints(
            np.zeros((9, 9, 3), np.uint8),
            (1, 1, 8, 8),
            dataclasses.replace(SETTINGS, keypoints=str(tmp_path / "other")),
        )
    # A photo without a mask has no place to look in: it is listed, the others are made.
    Path(read_dataset(photos).examples[0].mask).unlink()
    assert work.extract(Folder.open(photos), "keypoints", SETTINGS) == {"kept": 0, "made": 15, "failed": 1}
    assert any(
        "has neither box nor mask" in row.get("reason", "") for row in work._rows(photos / "extraction", "keypoints")
    )
