"""Om-S: its configurations differ from Om-K's in the base alone, train on both sizes of it, and generate follows."""

from pathlib import Path

import numpy as np
import pytest

from nabla_jax import config as configs
from nabla_jax import generate, runs, train
from nabla_jax.checkpoints.adapters import read_metadata
from tests import fixtures

CONTROLS = ("fill", "depth", "keypoints")
BASE = {"base.path", "base.obtain", "data.prepared", "lora.name", "train.workdir", "sample.steps", "sample.guidance"}


@pytest.mark.parametrize("size", ["", ":toy"])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_other_base_changes_nothing_else(control: str, size: str) -> None:
    kontext = configs.flatten(configs.to_dict(configs.load(f"configs/omk_{control}.py{size}")))
    config = configs.load(f"configs/oms_{control}.py{size}")
    schnell = configs.flatten(configs.to_dict(config))
    differing = {key for key in kontext.keys() | schnell.keys() if kontext.get(key) != schnell.get(key)}
    # The small bases are shipped: nothing is said of how to obtain them.
    assert differing == BASE - ({"base.obtain"} if size else set()) | {"source"}
    assert (config.lora.name, config.sample.steps, config.conditioning.control) == (f"oms_{control}", 4, control)
    assert config.base.path == ("asset:toy-flux-schnell" if size else "checkpoints/FLUX.1-schnell")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schnell")
    fixtures.write_base(folder / "base", schnell=True)
    fixtures.write_small_world(folder / "world")
    return folder


def arguments(world: Path, config: str, run: Path) -> list[str]:
    """The command line that shrinks the configuration to a few seconds; its base, control and method stay."""
    root = str(world / "world" / "nabirds")
    values = {"data.root": root, "data.mode": "on_the_fly", "train.workdir": run, "train.steps": 2, "train.batch": 2}
    values |= {"train.sample_every": 0, "train.save_every": 2, "lora.rank": 2, "lora.alpha": 2.0}
    values |= {"train.dtype": "float32", "train.remat": "none", "optim.d0": 1e-3, "sample.batch": 2}
    values |= {f"benchmarks.{name}": root for name in configs.load(config).benchmarks}
    if ":toy" not in config:
        values |= {"base.path": world / "base", "conditioning.size": fixtures.SIZE, "conditioning.text_length": 8}
    return ["--config", config, *(f"--config.{key}={value}" for key, value in values.items())]


@pytest.mark.parametrize("control", CONTROLS)
def test_each_trains_on_a_base_of_the_published_structure(control: str, world: Path, tmp_path: Path) -> None:
    train.main(arguments(world, f"configs/oms_{control}.py", tmp_path / "run"))
    rows = list(runs.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows][-1] == 2 and all(np.isfinite(row["loss"]) for row in rows)
    metadata = read_metadata(runs.RunFolder(tmp_path / "run").last_adapter(f"oms_{control}"))
    assert (metadata.control, metadata.sample_steps, metadata.applies_to) == (control, 4, "condition")


def test_the_toy_trains_and_generate_draws_in_four_steps(world: Path, tmp_path: Path) -> None:
    command = arguments(world, "configs/oms_fill.py:toy", tmp_path / "run")
    train.main(command)
    words = ["--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--benchmark", "toy-nabla"]
    generate.main([*command, *words, "--limit", "2", "--subjects", "right"])
    made = list(runs.read_rows(tmp_path / "out" / "toy-nabla" / "right" / "manifest.jsonl"))
    assert [row["steps"] for row in made] == [4, 4]
    assert all((tmp_path / "out" / "toy-nabla" / "right" / row["file"]).is_file() for row in made)
