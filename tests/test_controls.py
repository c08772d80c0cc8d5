"""Depth and keypoints from the data folder to pictures, through the commands, on the embedded world."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import api, generate, prepare, train
from nabla_jax import config as configs
from nabla_jax.checkpoints.adapters import AdapterMetadata
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, read_dataset, skeleton
from nabla_jax.errors import UserError
from tests.fixtures import SIZE, prepared_root, write_config


@pytest.fixture(params=["depth", "keypoints"])
def control(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_prepare_train_generate(control: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but the control is set."""
    world = prepared_root()
    folders = {"data__prepared": str(tmp_path / "prepared"), "train__workdir": str(tmp_path / "run")}
    changes = {"conditioning__control": control, **folders, "train__steps": 1, "train__save_every": 1}
    file = write_config(world, tmp_path / "config.py", **changes)
    prepare.main(["--config", str(file)])
    train.main(["--config", str(file)])
    out = tmp_path / "pictures"
    arguments = ["--config", str(file), "--adapter", str(tmp_path / "run")]
    generate.main([*arguments, "--out", str(out), "--limit", "2", "--subjects", "right"])
    rows = [json.loads(line) for line in (out / "nabla" / "right" / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    # The picture of a pair is the one that Python makes from what is in the folder.
    dataset = read_dataset(world / "world" / "nabirds")
    subject, target = (dataset.by_id[rows[0][name]] for name in ("subject_used", "target_id"))
    keypoints = tmp_path / "points.txt"
    keypoints.write_text("".join(f"{i} {x} {y} {v}\n" for i, (y, x, v) in enumerate(target.keypoints)))
    given = {"depth": target.depth, "keypoints": keypoints}[control]
    reposer = api.load(world / "base", tmp_path / "run", dtype="float32")
    assert reposer.conditioning.control == control
    jobs = []
    for row in rows:
        a, b = (dataset.by_id[row[name]] for name in ("subject_used", "target_id"))
        view = controls.read_view(b, control)
        subject_view = controls.read_view(a, "fill")
        jobs.append(
            api.Job(f"nabla/{row['pair']}", subject_view.image, subject_view.mask, view.image, view.mask, view.depth,
                    view.keypoints)
        )  # fmt: skip
    sample = configs.load(str(file)).sample
    again = reposer.repose_batch(jobs, sample)
    for row, (picture, placement) in zip(rows, again, strict=True):
        stored = np.asarray(Image.open(out / "nabla" / "right" / row["file"]))
        assert np.abs(stored.astype(int) - picture).max() <= 1
        assert placement.to_json() == row["placement"]
    # Another depth map or pose is another picture: the control is read.
    view = jobs[0].target_view
    changed = {"depth": {"target_depth": 255 - view.depth} if control == "depth" else {},
               "keypoints": {"target_keypoints": np.zeros((11, 3), int)}}[control]  # fmt: skip
    other, _ = reposer.repose_batch([dataclasses.replace(jobs[0], **changed)], sample)[0]
    assert np.abs(other.astype(int) - again[0][0]).max() > 0
    one = [*arguments, "--out", str(tmp_path / "one.png")]
    for name, example in (("subject", subject), ("target", target)):
        one += [f"--{name}", str(example.image), f"--{name}_mask", str(example.mask)]
    with pytest.raises(UserError, match=f"control {control}: missing --target_{control}"):
        generate.main(one)
    generate.main([*one, f"--target_{control}", str(given)])
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == view.image.shape
    with pytest.raises(UserError, match=f"control {control}: the target has no {control}"):
        reposer.repose(subject.image, target.image, subject.mask, target.mask)


def test_records_hold_the_control(control: str) -> None:
    """What is encoded is the canvas of the control, made from the files beside the pictures."""
    dataset = read_dataset(prepared_root() / "world" / "nabirds")
    for example in dataset.examples[:5]:
        conditioning = Conditioning(SIZE, control, dot=3, line=1)
        found = prepare.inputs(example, conditioning, 8)["control"].transpose(1, 2, 0)
        image = controls.read_image(example.image)
        height, width = image.shape[:2]
        drawn = (
            np.repeat(np.asarray(Image.open(example.depth))[:, :, None], 3, 2)
            if control == "depth"
            else skeleton.draw(example.keypoints, height, width, dot=3, line=1)
        )
        side = max(height, width)
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = drawn
        rows = np.arange(SIZE) * side // SIZE
        np.testing.assert_array_equal(found, square[rows][:, rows])
        assert found.any()


def test_an_adapter_remembers_how_keypoints_were_drawn(tmp_path: Path) -> None:
    trained = AdapterMetadata(2, 2.0, control="keypoints", size=SIZE, caption="fixed", prompt="A photo of a bird.",
                              text_length=8, skeleton="sparse", dot=5, line=3)  # fmt: skip
    same = Conditioning(SIZE, "keypoints", "sparse", 5, 3, text_length=8)
    api.check_adapter(tmp_path, trained, tmp_path, "", same)
    with pytest.raises(UserError, match="trained with skeleton 'sparse', the configuration asks for 'dense'"):
        api.check_adapter(
            tmp_path, trained, tmp_path, "", Conditioning(SIZE, "keypoints", "dense", 5, 3, text_length=8)
        )
    with pytest.raises(UserError, match="trained with dot 5, the configuration asks for 15"):
        api.check_adapter(tmp_path, trained, tmp_path, "", Conditioning(SIZE, "keypoints", "sparse", text_length=8))
    fill = dataclasses.replace(trained, control="fill")
    api.check_adapter(tmp_path, fill, tmp_path, "", Conditioning(SIZE, text_length=8))
