"""The command on a small world: it learns, goes on after an interruption, and is refused what does not fit."""

import atexit
import dataclasses
import functools
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nabla_jax import assets, runs
from nabla_jax.checkpoints import transformers_folder
from nabla_jax.data import keypoint_file
from nabla_jax.errors import UserError
from nabla_jax.keypoints import __main__ as command
from nabla_jax.keypoints import crops, training
from nabla_jax.keypoints.__main__ import HeadSizes, KeypointsConfig
from nabla_jax.metrics.networks import load_detector
from nabla_jax.models import layers
from nabla_jax.models.keypoint_head import KeypointHead
from tests.fixtures import write_small_world

DINOV2 = "asset:toy-dinov2"
STEPS = 48


@functools.cache
def world() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nabla_jax_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_small_world(folder / "world", seed=3, images=96)


def config(folder: Path, **changes: Any) -> KeypointsConfig:
    how = training.Settings(
        STEPS, 24, 6e-3, warmup=5, decay=0.5, ema=0.9, validate=24, every=24, threads=2,
        variation=crops.Variation(scale=1.1, shift=0.05, soft=0.0),
    )  # fmt: skip
    how = dataclasses.replace(how, **{k: v for k, v in changes.items() if hasattr(how, k)})
    sizes = HeadSizes(64, hidden_size=48, fine_size=24, num_blocks=1)
    rest = {k: v for k, v in changes.items() if not hasattr(how, k)}
    values = {
        "output": str(folder / "head"), "folder": str(folder / "run"), "dinov2": DINOV2, "head": sizes,
        "root": str(world() / "nabirds"), "source": "keypoints.py",
    }  # fmt: skip
    return KeypointsConfig(training=how, **(values | rest))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keypoints")
    return folder, command.make(config(folder))


def test_a_short_training_finds_far_more_than_an_untrained_head(trained, tmp_path):
    folder, found = trained
    untrained = command.make(config(tmp_path, steps=1, learning_rate=1e-9))
    assert untrained["pck"] < 0.15 and found["pck"] > untrained["pck"] + 0.3
    assert found["distance"] < 0.7 * untrained["distance"] and found["visibility"] > 0.6
    rows = runs.read_rows(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [24, 48] and rows[1]["heat"] < rows[0]["heat"]
    assert runs.read_json(folder / "run" / "validation.json") == found
    text = command.table(found)
    assert f"{found['pck']:.3f}" in text and "left eye" in text


def test_the_folder_is_read_back_and_belongs_to_one_dinov2(trained, tmp_path):
    folder, found = trained
    config_, head = command.check(config(folder))
    detector = load_detector(folder / "head", assets.resolve(DINOV2), batch=8)
    assert detector.config == head
    examples = command._annotated(config_, "test")
    again = training.measure(detector, examples, [crops.bird_box(e) for e in examples], head.parts, 8)
    assert again["pictures"] == found["pictures"] and again["pck"] == pytest.approx(found["pck"], abs=0.01)
    assert again["distance"] == pytest.approx(found["distance"], rel=1e-3)
    other = Path(shutil.copytree(assets.resolve(DINOV2), tmp_path / "dinov2"))
    assert transformers_folder.weights_sha256(other) == head.dinov2_sha256  # wherever it lies
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="keypoint head of another DINOv2: trained on weights with sha256"):
        load_detector(folder / "head", other)
    # The command gives what it has, without a step.
    assert command.make(config(folder)) == found


def test_an_interrupted_training_ends_with_the_same_head(trained, tmp_path, monkeypatch):
    folder, found = trained
    real = training.Batches.draw

    def draw(self: training.Batches, step: int) -> tuple[Any, ...]:
        if step == 29:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Batches, "draw", draw)
        with pytest.raises(runs.Interrupted, match="saved after step 30"):
            command.make(config(tmp_path))
    assert not (tmp_path / "head").exists()
    assert command.make(config(tmp_path)) == found
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "head" / name).read_bytes() == (folder / "head" / name).read_bytes()


def test_what_does_not_fit_is_told_before_training(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(UserError, match="begun with other settings .training.batch: 24 there, 8 here"):
        command.make(config(folder, batch=8))
    for changes, message in (
        (
            {"root": str(tmp_path / "none"), "obtain": "ask"},
            "root: found nothing at .*, expected a dataset folder: ask",
        ),
        ({"dinov2": str(tmp_path)}, "dinov2: found no .*config.json, expected a DINOv2"),
        ({"dinov2": "asset:toy-siglip"}, "model_type: found"),
        ({"root": str(world() / "inat" / "na")}, "found no picture of split train"),
        ({"head": HeadSizes(60)}, "keypoints.py: head: image_size: found 60, expected a multiple of 8"),
    ):
        with pytest.raises(UserError, match=message):
            command.make(config(tmp_path, **changes))
    for name, value in (("steps", 0), ("ema", 1.0)):
        with pytest.raises(UserError, match=f"training.{name}: found {value}"):
            config(tmp_path, **{name: value})
    file = tmp_path / "keypoints.py"
    file.write_text(f"def get_config(arg):\n    return {json.dumps({'output': 'a', 'batsh': 1})}\n")
    with pytest.raises(UserError, match="unknown key batsh"):
        command.main(["--config", str(file)])


def test_what_a_head_found_is_no_annotation(tmp_path):
    root = Path(shutil.copytree(world() / "nabirds", tmp_path / "nabirds"))
    dataset, _ = command.check(config(tmp_path, root=str(root)))
    examples = command._annotated(dataset, "train")
    path = root / "parts" / "part_locs.txt"
    lost = {e.id for e in examples[:5]}
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.split()[0] not in lost]
    path.write_text("".join(kept))
    found = {e.id: keypoint_file.to_rows(e.keypoints + 1) for e in dataset.examples}
    keypoint_file.write(root / "keypoints.json", found)
    dataset, _ = command.check(config(tmp_path, root=str(root)))
    assert all(dataset.by_id[id].keypoints is not None for id in lost)
    assert [e.id for e in command._annotated(dataset, "train")] == [e.id for e in examples[5:]]


def test_parts_that_a_crop_leaves_out_do_not_count(trained):
    """A point outside the crop changes neither loss nor gradient; a hidden part's place does not either."""
    folder, _ = trained
    detector = load_detector(folder / "head", assets.resolve(DINOV2))
    graphdef, params = layers.initialize(lambda rngs: KeypointHead(detector.config, rngs=rngs), jax.random.key(0))
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 64, 96)).astype(np.float32)
    pixels = rng.normal(size=(2, 3, 64, 64)).astype(np.float32)
    points = rng.random((2, 11, 2)).astype(np.float32)
    visible, counted = np.ones((2, 11), bool), np.ones((2, 11), bool)
    visible[0, 3], counted[1, 4] = False, False
    settings = config(folder).training
    loss = jax.jit(lambda points: training.loss(graphdef, settings, params, patches, pixels, points, visible, counted))
    before = loss(points)[0]
    for place in ((0, 3), (1, 4)):
        moved = points.copy()
        moved[place] += 0.3
        assert loss(moved)[0] == before
    moved = points.copy()
    moved[0, 4] += 0.3
    assert abs(float(loss(moved)[0] - before)) > 1e-4
