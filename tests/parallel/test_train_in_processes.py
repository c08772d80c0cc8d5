"""One run of several processes: the numbers of one process, one folder, a stop in all of them at one step."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nabla_jax import runs, train
from nabla_jax.parallel import processes
from tests import fixtures
from tests.parallel.test_train_on_meshes import assert_same_training

ROOT = Path(__file__).resolve().parents[2]


def start(config: Path, count: int, devices: int, *program: str) -> list[subprocess.Popen[str]]:
    address = fixtures.free_address()
    common = os.environ | {"XLA_FLAGS": fixtures.fake_devices(devices), processes.COORDINATOR: address}
    words = [sys.executable, "-m", *(program or ("nabla_jax.train",)), "--config", str(config)]
    return [
        subprocess.Popen(
            words, env={**common, processes.COUNT: str(count), processes.INDEX: str(i)}, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    errors = [process.communicate(timeout=600)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    # Parts of the batch in different processes; heads cut across processes, which then hold the same samples.
    [(2, 2, {"mesh__fsdp": 2, "mesh__tensor": 2}), (4, 1, {"mesh__tensor": 2, "mesh__sequence": 2})],
)
def test_several_processes_train_as_one(count: int, devices: int, mesh: dict[str, int], tmp_path: Path) -> None:
    def write(name: str, **overrides: Any) -> Path:
        settings = {"train__workdir": str(tmp_path / "run"), **overrides}
        return fixtures.write_config(fixtures.prepared_root(), tmp_path / name, **settings)

    for status, error in finish(start(write("many.py", train__steps=2, train__sample_every=2, **mesh), count, devices)):
        assert status == 0, error
    assert len(runs.read_rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run" / "samples" / "step_2.png").is_file()
    train.main(["--config", str(write("one.py"))])
    assert_same_training(tmp_path / "run", fixtures.trained_run(), 4)


def test_what_four_processes_saved_is_what_one_restores(tmp_path: Path) -> None:
    """Adapters, optimizer and the data's position of 4 x 2 devices, on 1 x 8 otherwise cut and on 1 x 1."""

    def keep(name: str, count: int, devices: int, **overrides: Any) -> dict[str, np.ndarray]:
        out = tmp_path / name
        if count == 1:
            shutil.copytree(tmp_path / "four", out)
        out.mkdir(exist_ok=True)
        settings = {"train__workdir": str(out / "run"), "train__steps": 2 if count > 1 else 3, **overrides}
        config = fixtures.write_config(fixtures.prepared_root(), tmp_path / f"{name}.py", **settings)
        program = ("tests.parallel.kept_state_program", str(out))
        for status, error in finish(start(config, count, devices, *program)):
            assert status == 0, error
        with np.load(out / ("restored.npz" if count == 1 else "saved.npz")) as kept:
            return dict(kept)

    saved = keep("four", 4, 2, mesh__fsdp=2, mesh__tensor=2, mesh__sequence=2)
    eight = keep("eight", 1, 8, mesh__fsdp=2, mesh__sequence=4)
    one = keep("one", 1, 1)
    assert saved.pop("cut") > 0 and eight.pop("cut") > 0 and one.pop("cut") == 0
    assert len(saved) > 10
    for restored in (eight, one):
        assert restored.keys() == saved.keys()
        for name, value in saved.items():
            np.testing.assert_array_equal(restored[name], value, err_msg=name)


def test_two_processes_continue_bit_for_bit_also_with_other_workers(tmp_path: Path) -> None:
    """Two steps and two more are four; the second half is read by worker processes, the first by threads."""
    runs_of = {"whole": ((4, 0),), "halves": ((2, 0), (4, 1))}
    for name, parts in runs_of.items():
        for steps, workers in parts:
            settings = {
                "train__workdir": str(tmp_path / name), "train__steps": steps, "data__workers": workers,
                "mesh__fsdp": 2,
            }  # fmt: skip
            config = fixtures.write_config(fixtures.prepared_root(), tmp_path / f"{name}_{steps}.py", **settings)
            for status, error in finish(start(config, 2, 1)):
                assert status == 0, error
    whole, halves = (runs.RunFolder(tmp_path / name) for name in runs_of)
    assert halves.adapter(4, "fill").read_bytes() == whole.adapter(4, "fill").read_bytes()
    times = ("seconds", "data_seconds", "samples_per_second")
    measured = [
        [{k: v for k, v in row.items() if k not in times} for row in runs.read_rows(folder.metrics)]
        for folder in (whole, halves)
    ]
    assert [row["step"] for row in measured[0]] == [1, 2, 3, 4] and measured[0] == measured[1]


def test_a_signal_to_one_stops_all_at_one_step(tmp_path: Path) -> None:
    settings = {"train__workdir": str(tmp_path / "run"), "train__steps": 100_000, "mesh__fsdp": 2}
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **settings)
    started = start(config, 2, 1)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.2)
    started[1].send_signal(signal.SIGTERM)
    ended = finish(started)
    assert [status for status, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    folder = runs.RunFolder(tmp_path / "run")
    rows = runs.read_rows(log)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert folder.last_step() == len(rows)
    assert all(f"saved after step {len(rows)} of 100000" in error for _, error in ended)
