"""Depth and keypoints from the data folder to pictures. The commands in a row: see test_configurations.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import api, generate
from nabla_jax import config as configs
from nabla_jax.checkpoints.adapters import AdapterMetadata
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, pictures, read_dataset, skeleton
from nabla_jax.errors import UserError
from tests.fixtures import SIZE, prepared_root, write_config
from tests.test_api import untuned


@pytest.fixture(params=["depth", "keypoints"])
def control(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Recorder:
    """Stands in for a loaded model; keeps what it is asked to draw."""

    def __init__(self, control: str) -> None:
        self.conditioning = Conditioning(SIZE, control)
        self.jobs: list[api.Job] = []

    def repose_batch(self, jobs: list[api.Job], _: object) -> list[tuple[np.ndarray, Placement]]:
        self.jobs += jobs
        return [(job.target, Placement.square(*job.target.shape[:2], SIZE)) for job in jobs]

    def repose(self, *pictures: np.ndarray, **further: object) -> Image.Image:
        self.further = further
        return Image.fromarray(pictures[1])


def test_benchmarks_and_single_pictures_are_given_the_control(
    control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = prepared_root()
    file = write_config(world, tmp_path / "config.py", conditioning__control=control)
    chosen = configs.load(str(file))
    recorder = Recorder(control)
    (work,) = generate.read_works(chosen, ["nabla"], ["right"], tmp_path, 3)
    generate._maker(recorder, work, chosen)(work.pairs)
    examples = work.dataset.by_id
    for pair, job in zip(work.pairs, recorder.jobs, strict=True):
        view = controls.read_view(examples[pair.target_id], control)
        for name in ("image", "mask", "depth", "keypoints"):
            np.testing.assert_array_equal(getattr(job.target_view, name), getattr(view, name))
        assert (view.depth is None) == (control != "depth")
    monkeypatch.setattr(generate, "_load", lambda *_: recorder)
    target = examples[work.pairs[0].target_id]
    points = tmp_path / "points.txt"
    points.write_text("".join(f"{i} {x} {y} {v}\n" for i, (y, x, v) in enumerate(target.keypoints)))
    one = ["--config", str(file), "--out", str(tmp_path / "one.png")]
    for name in ("subject", "target"):
        one += [f"--{name}", str(target.image), f"--{name}_mask", str(target.mask)]
    with pytest.raises(UserError, match=f"control {control}: missing --target_{control}"):
        generate.main(one)
    given = {"depth": target.depth, "keypoints": points}[control]
    generate.main([*one, f"--target_{control}", str(given)])
    view = controls.read_view(target, control)
    np.testing.assert_array_equal(recorder.further["target_depth"], view.depth)
    np.testing.assert_array_equal(recorder.further["target_keypoints"], view.keypoints)


def test_the_control_is_read(control: str) -> None:
    """Another depth map or pose gives another picture; the subject's own is never asked for."""
    dataset = read_dataset(prepared_root() / "world" / "nabirds")
    example = dataset.examples[0]
    view = controls.read_view(example, control)
    reposer = dataclasses.replace(untuned(), conditioning=Conditioning(SIZE, control, dot=3, line=1, text_length=8))
    pictures = (view.image, view.image, view.mask, view.mask)
    others = {"depth": ("target_depth", [view.depth, 255 - view.depth] if control == "depth" else []),
              "keypoints": ("target_keypoints", [view.keypoints, np.zeros((11, 3), int)])}  # fmt: skip
    name, values = others[control]
    first, second, again = (np.asarray(reposer.repose(*pictures, **{name: value})) for value in (*values, values[0]))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    if control == "depth":
        np.testing.assert_array_equal(first, np.asarray(reposer.repose(*pictures, target_depth=example.depth)))
    with pytest.raises(UserError, match=f"control {control}: the target has no {control}"):
        reposer.repose(*pictures)
    wrong = {"target_depth": view.image[:, :-1, 0], "target_keypoints": np.full((11, 3), 10_000)}[name]
    with pytest.raises(UserError, match=name):
        reposer.repose(*pictures, **{name: wrong})


def test_records_hold_the_control(control: str) -> None:
    """What is encoded is the canvas of the control, made from the files beside the pictures."""
    dataset = read_dataset(prepared_root() / "world" / "nabirds")
    for example in dataset.examples[:5]:
        conditioning = Conditioning(SIZE, control, dot=3, line=1)
        role = f"control_{control}"
        found = pictures.inputs(example, [role], conditioning, 8)[role].transpose(1, 2, 0)
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
