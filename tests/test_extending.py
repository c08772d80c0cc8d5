"""docs/extending.md as it stands: its files are written and its commands run, at a tiny size."""

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.checkpoints import adapters
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, read_dataset
from nabla_jax.errors import UserError
from tests import fixtures, walks
from tests.walks import ROOT

PAGE = ROOT / "docs" / "extending.md"
PACKAGE = "bird_outlines"


def smaller(module: str) -> list[str]:
    """Options for the random base of the tests in place of the embedded one, and for few steps."""
    if module == "nabla_jax.generate":
        return ["--subjects", "right", "--config.sample.steps=1", "--config.sample.batch=2", *smaller("")]
    values = {
        "base.path": fixtures.prepared_root() / "base",
        "conditioning.size": fixtures.SIZE,
        "conditioning.text_length": 8,
        "lora.rank": 2,
        "train.steps": 1,
        "train.batch": 2,
        "train.sample_every": 0,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def install(folder: Path, project: str) -> None:
    """What pip does with ``pip install -e .`` as far as imports and entry points go, without a build."""
    about = tomllib.loads(project)["project"]
    info = folder / f"{about['name']}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    groups = about["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))


def write_birds(root: Path) -> None:
    """Five photos of each of two classes of the small world, as the page's reader has them."""
    world = read_dataset(fixtures.prepared_root() / "world" / "nabirds")
    for folder in ("Grey_Gull", "Reed_Wren_(Male)"):
        (root / "images" / folder).mkdir(parents=True)
        (root / "masks" / folder).mkdir(parents=True)
    for number, example in enumerate(world.examples[:10]):
        folder = ("Grey_Gull", "Reed_Wren_(Male)")[number % 2]
        Image.open(example.image).convert("RGB").save(root / "images" / folder / f"{number}.jpg")
        assert example.mask is not None
        shutil.copy(example.mask, root / "masks" / folder / f"{number}.png")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after all that the page says was done."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    write_birds(folder / "data" / "mine")
    for block in walks.blocks(PAGE):
        if block.file:
            (folder / block.file).parent.mkdir(exist_ok=True)
            (folder / block.file).write_text(block.text)
            continue
        assert block.language == ""
        for command in walks.commands(block.text):
            program, *words = command.split()
            if command == "pip install -e .":
                install(folder, (folder / "pyproject.toml").read_text())
                continue
            assert program == "python"
            sized = words[0] == "-m" and "--config" in words
            walks.run([sys.executable, *words, *(smaller(words[1]) if sized else [])], folder, folder)
    return folder


@pytest.fixture
def installed(walked: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(walked))
    controls._installed_control.cache_clear()
    yield
    controls._installed_control.cache_clear()
    sys.modules.pop(PACKAGE, None)


def test_the_dataset_is_what_was_listed(walked: Path) -> None:
    dataset = read_dataset(walked / "data" / "mine")
    assert {example.class_name for example in dataset.examples} == {"Grey Gull", "Reed Wren (Male)"}
    assert [len(dataset.of_split(split)) for split in ("train", "test")] == [6, 4]
    assert all(example.mask is not None for example in dataset.examples)


def test_the_control_reaches_records_metadata_and_pictures(walked: Path, installed: None) -> None:
    prepared = runs.read_json(walked / "prepared" / "mine-outline" / "manifest.json")
    assert prepared["roles"] == ["target", "subject", "control_outline"]
    run = runs.RunFolder(walked / "runs" / "mine-outline")
    assert adapters.read_metadata(run.adapter(1, "omk_fill")).control == "outline"
    made = runs.read_rows(walked / "pictures" / "mine-outline" / "mine" / "right" / "manifest.jsonl")
    assert len(made) == 4

    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    drawn = controls.find_control("outline").draw(controls.View(np.zeros((40, 40, 3), np.uint8), mask), None)
    assert (drawn[:, :, 0] == 255).sum() == 4 * 19  # the border of a square of 20
    assert (drawn[~mask] == 0).all() and (drawn[11:29, 11:29] == 0).all()


def test_an_unknown_control_is_told_with_those_that_are_there(installed: None, tmp_path: Path) -> None:
    assert list(configs.known_controls()) == ["fill", "depth", "keypoints", "outline"]
    with pytest.raises(UserError, match="found 'edges', expected one of fill, depth, keypoints, outline"):
        controls.find_control("edges")
    with pytest.raises(UserError, match="conditioning.control: found 'edges', expected one of .*outline"):
        fixtures.config(tmp_path, conditioning__control="edges")
    with pytest.raises(UserError, match=r"data.controls: found 'edges', expected some of .*outline"):
        fixtures.config(tmp_path, data__controls=("fill", "edges"))
    assert fixtures.config(tmp_path, conditioning__control="outline").conditioning.control == "outline"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fill", "numpy:array", "numpy:array is called 'fill', which is built in"),
        ("other", "numpy:pi", "'other' of nabla_jax.controls is numpy:pi, found a float, expected a .*Control"),
    ],
)
def test_entry_points_that_are_no_controls(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = f'entry-points."nabla_jax.controls" = {{{name} = "{value}"}}'
    install(tmp_path, f'[project]\nname = "wrong"\nversion = "1"\n{points}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=message):
        controls.find_control("other")


@pytest.mark.parametrize("drawn", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((4, 8, 3), np.uint8)])
def test_a_drawing_of_another_kind_than_the_picture(drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(controls.CONTROLS, "drawn", controls.Control(lambda *_: drawn, 0, "nearest"))
    view = controls.View(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool))
    with pytest.raises(UserError, match=r"control drawn: drew .*expected uint8 \(8, 8, 3\)"):
        controls.control_canvas(view, Conditioning(16, "drawn"))
    right = controls.Control(lambda view, _: view.image, 7, "nearest")
    monkeypatch.setitem(controls.CONTROLS, "drawn", right)
    canvas = controls.control_canvas(view, Conditioning(16, "drawn"))
    assert canvas.placement == Placement.square(8, 8, 16) and (canvas.pixels == 0).all()
