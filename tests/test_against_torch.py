"""The benchmarks against PyTorch: both sides compute the same, and nothing is said of sides that do not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import against_torch, cases, jax_side, torch_side
from benchmarks.cases import Case

STEPS = 3


def both(name: cases.Name) -> tuple[jax_side.Model, torch_side.Side, dict[str, np.ndarray]]:
    case = Case(name, cases.SIZES["tiny"])
    side = torch_side.Side(case, "cpu", torch.float32, remat=True, compiled=False)
    return jax_side.load(case), side, cases.inputs(case, 2)


@pytest.mark.parametrize("name", cases.NAMES)
def test_a_training_step_is_the_same(name: cases.Name) -> None:
    """Losses and gradient norms of two steps: the second one's are those of the updated adapter."""
    model, side, data = both(name)
    state, step = jax_side.make_step(model)
    theirs = side.make_step()
    for _ in range(2):
        state, values = step(state, model.base, jax_side.put(data))
        for key, value in theirs(side.put(data)).items():
            assert float(values[key]) == pytest.approx(value, rel=2e-5)


@pytest.mark.parametrize("name", cases.NAMES)
def test_sampling_is_the_same(name: cases.Name) -> None:
    model, side, data = both(name)
    levels = cases.levels(STEPS)
    expected = side.sample(side.put(data), levels).numpy()
    for cache in (False, True) if name == "om-independent" else (False,):
        run = jax_side.make_sampler(model, cache=cache)
        found = run(model.base, model.adapter.params, jax_side.put(data), levels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(expected - data["x1"]).max() > 0.1


def test_fresh_processes_are_compared_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    options = ["--size", "tiny", "--cases", "om-independent", "--rounds", "1", "--steps", "1", "--sample-steps", "2"]
    against_torch.main([*options, "--out", str(path)])
    record = json.loads(path.read_text())
    assert record["ratios"].keys() == {"train/om-independent/torch", "sample/om-independent/torch"}
    for found in record["ratios"].values():
        assert found["difference"] < 1e-5 and found["speed"] > 0 and found["memory"] > 0
    assert all(run["memory_peak"] > run["memory_before"] > 0 for run in record["runs"].values())
    assert record["machine"]["versions"].keys() >= {"jax", "torch", "diffusers"} and record["machine"]["commit"]
    # The same command measures nothing anew.
    capsys.readouterr()
    against_torch.main([*options, "--out", str(path)])
    assert json.loads(path.read_text())["runs"] == record["runs"]
    assert capsys.readouterr().out.count("times as fast") == 2


def test_no_ratio_for_sides_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: Any) -> against_torch.Runs:
        run = {"seconds": 1.0, "device_peak": 1, "grad_norm": [1.0, 1.0]}
        return {"nabla_jax": [run | {"loss": [2.0, 2.001]}], "torch": [run | {"loss": [2.0, 2.0]}]}

    monkeypatch.setattr(against_torch, "measure", measure)
    path = tmp_path / "record.json"
    with pytest.raises(SystemExit, match=r"train/om/torch: the sides differ by 5\.0e-04"):
        against_torch.main(["--cases", "om", "--works", "train", "--out", str(path)])
    assert "times as fast" not in capsys.readouterr().out
    assert json.loads(path.read_text())["ratios"] == {}
