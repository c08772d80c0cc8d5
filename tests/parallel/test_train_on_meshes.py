"""The command on eight fake devices in all four axes, and a run that goes on with another mesh."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_jax import runs, train
from tests import fixtures

CUT = {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2}


def train_on_eight(config: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": fixtures.fake_devices(8)}
    words = [sys.executable, "-m", "nabla_jax.train", "--config", str(config)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)


def values_of(run: Path) -> np.ndarray:
    return np.array([[row["loss"], row["grad_norm"]] for row in runs.read_rows(run / "metrics.jsonl")])


def assert_same_training(run: Path, other: Path, step: int) -> None:
    np.testing.assert_allclose(values_of(run), values_of(other), rtol=1e-5)
    here, there = (load_file(runs.RunFolder(r).adapter(step, "fill")) for r in (run, other))
    assert here.keys() == there.keys()
    for name, value in here.items():
        # Prodigy divides by the root of squared gradients: the noise of a tiny one moves its element like a large one.
        assert np.linalg.norm(value - there[name]) <= 1e-4 * np.linalg.norm(there[name]), name


def test_a_run_goes_on_with_another_mesh(tmp_path: Path) -> None:
    def write(name: str, **overrides: Any) -> Path:
        settings = {"train__workdir": str(tmp_path / "run"), **overrides}
        return fixtures.write_config(fixtures.prepared_root(), tmp_path / name, **settings)

    done = train_on_eight(write("eight.py", train__steps=2, train__sample_every=2, **CUT))
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    assert (tmp_path / "run" / "samples" / "step_2.png").is_file()
    train.main(["--config", str(write("one.py"))])
    assert_same_training(tmp_path / "run", fixtures.trained_run(), 4)


def test_diptychs_on_eight_devices(tmp_path: Path) -> None:
    def write(name: str, **overrides: Any) -> Path:
        settings = {"train__workdir": str(tmp_path / name), "train__steps": 2, **overrides}
        values = fixtures.insert_values(fixtures.insert_root(), **settings)
        return fixtures.write_values(values, tmp_path / f"{name}.py")

    done = train_on_eight(write("eight", **CUT))
    assert done.returncode == 0, done.stderr
    train.main(["--config", str(write("one"))])
    assert_same_training(tmp_path / "eight", tmp_path / "one", 2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"mesh__tensor": 8}, "mesh.tensor: found 8, expected a divisor of the 2 heads"),
        ({"mesh__fsdp": 3}, "mesh: found data 0, fsdp 3, tensor 1, sequence 1, expected sizes whose product is the 8"),
        ({"mesh__fsdp": 8}, "train.batch: found 2, expected a multiple of the 8 devices"),
    ],
)
def test_what_does_not_fit_is_told(overrides: dict[str, int], told: str, tmp_path: Path) -> None:
    settings = {"train__workdir": str(tmp_path / "run"), **overrides}
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **settings)
    done = train_on_eight(config)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
