"""The benchmarks of whole machines, at the smallest size and through the same path."""

import json
from pathlib import Path

import pytest

from benchmarks import cases, gpu, jax_side
from benchmarks.cases import Case


def test_the_table_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    options = ["--size", "tiny", "--dtype", "float32", "--repeats", "1", "--sample-steps", "2", "--out", str(path)]
    gpu.main([*options, "--jobs", "om-28-cached"])
    gpu.main([*options, "--jobs", "om-28-cached", "insert-train-4", "--profile", str(tmp_path / "profile")])
    runs = json.loads(path.read_text())["runs"]
    assert runs.keys() == {"ceiling", "om-28-cached", "insert-train-4"} and runs["ceiling"]["rate"] > 0
    case = Case("insert", cases.SIZES["tiny"])
    training = jax_side.training_operations(case, "full", "blocked")
    found = runs["insert-train-4"]
    assert (found["model"], found["hardware"]) == (4 * training.model, 4 * training.hardware)
    assert runs["om-28-cached"]["model"] == runs["om-28-cached"]["hardware"] > 0 < found["seconds"]
    # The finished case was not run again: it left no trace.
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["insert-train-4"]
    out = capsys.readouterr().out
    assert out.count("om-28-cached: ") == 2 and out.count("MFU") == 3 and "MISSED" not in out


def test_remembered_conditions_save_what_the_formulas_say() -> None:
    """By hand: 24 D^2 L a token and 4 D L for each pair of a query and its key; 230.1 and 100.8 TFLOP a step."""
    case, steps = Case("om-independent", cases.SIZES["full"]), 28
    every = jax_side.sampling_operations(case, steps, cache=False)
    once = jax_side.sampling_operations(case, steps, cache=True)
    assert every / steps == pytest.approx(230.06e12, rel=0.01)
    assert (once - every / steps) / (steps - 1) == pytest.approx(100.8e12, rel=0.02)
