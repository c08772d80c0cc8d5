"""The benchmarks of whole machines, at the smallest size and through the same path."""

import contextlib
import json
import textwrap
from pathlib import Path

import pytest

from benchmarks import cases, checkpoint_stall, gpu, jax_side, loader, scaling, startup
from benchmarks.cases import Case
from nabla_jax import config as configs
from nabla_jax.data.loader import make_loader, open_prepared
from nabla_jax.models import layers
from nabla_jax.plan import networks
from tests import fixtures


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


def test_bytes_of_collectives_are_read_from_the_program() -> None:
    program = """
    %body (p: f32[4]) -> f32[4] {
      %a = f32[4,2]{1,0} all-reduce(%x), channel_id=1
    }

    ENTRY %main (p: f32[4]) -> f32[4] {
      %b = (f32[3]{0}, bf16[]) all-reduce(%x, %y), channel_id=2, to_apply=%add
      %c = f32[8]{0} add(%a, %all-reduce.3)
      %e = f32[9]{0} all-reduce(%x), channel_id=3, replica_groups={{0},{1}}, to_apply=%add
      %f = f32[5]{0} all-reduce(%x), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
      %g = f32[4] while(%x), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
      ROOT %d = s32[2,5]{1,0} all-gather-start(%x), dimensions={0}
    }
    """
    program = textwrap.dedent(program)
    assert scaling.collectives(program) == {"all-reduce": 12 + 2 + 20 + 3 * 32, "all-gather": 40}


def test_more_devices_find_the_same(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    scaling.main(["--size", "tiny", "--devices", "2", "--steps", "1", "--out", str(path)])
    run = json.loads(path.read_text())["runs"]["2"]
    assert run["difference"] < 1e-5
    # Each matrix of the adapter is added up over the devices, and little else.
    assert 1 <= run["collectives"]["all-reduce"] / run["gradients"] < 1.1


def test_the_start_of_training_is_measured(tmp_path: Path) -> None:
    """On a run of the tests' own: its folder, its base."""
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py")
    found = [startup.start(["--config", str(config)], tmp_path / kind, tmp_path / "cache") for kind in ("cold", "warm")]
    assert all(0 < run["first"] <= run["whole"] for run in found)
    # The second one compiles nothing that the first one has not compiled.
    assert found[0]["programs"] == found[1]["programs"] > 0


def test_the_loader_is_measured_on_a_folder_that_it_reads(tmp_path: Path) -> None:
    loader.write_folder(tmp_path, 20, 64)
    with contextlib.closing(make_loader(open_prepared(tmp_path), "all_pairs", 2, loader.SEED, threads=0)) as batches:
        assert next(batches)["target"].shape == (2, 32, 8, 8)
        waited = loader.waiting(batches, 1, 3, 0.0)
    assert len(waited) == 3 and min(waited) > 0


def test_what_a_checkpoint_holds_up(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    checkpoint_stall.main(["--config", "configs/omk_fill.py:toy", "--rounds", "2", "--out", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 2 and all(0 < run["stall"] < run["whole"] for run in runs.values())
    # Beside the adapters and their average, Prodigy's four trees like them, and a few numbers.
    config = configs.load("configs/omk_fill.py:toy")
    adapters = networks.make(config, networks.read_architecture(config)).state["adapters"]
    (size,) = {run["bytes"] for run in runs.values()}
    assert config.train.ema and size == pytest.approx(6 * layers.tree_bytes(adapters), rel=1e-3)
