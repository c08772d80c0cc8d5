"""Steps that are not finite: the run stops or passes over them, tells of them, and makes them again."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import draws, optim, reproduce, runs, train, training
from nabla_jax.checkpoints.run_state import RunState
from nabla_jax.data import loader as loaders
from nabla_jax.errors import UserError
from tests import fixtures
from tests.parallel.test_train_in_processes import finish, start

# A first step so long that the second one overflows.
OVERFLOW = {"optim__name": "adamw", "optim__lr": 1e38, "train__save_every": 100}
# One after which the parameters themselves are infinite.
TOO_FAR = OVERFLOW | {"optim__lr": 3e38, "optim__weight_decay": 1e30}


def arguments(tmp_path: Path, **overrides: Any) -> list[str]:
    settings = {"train__workdir": str(tmp_path / "run"), **OVERFLOW, **overrides}
    return ["--config", str(fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **settings))]


def kept(run: Path) -> set[int]:
    with RunState(run / "checkpoints") as saved:
        return set(saved.steps())


def test_the_run_stops_before_the_step_and_one_command_makes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, told = tmp_path / "run", tmp_path / "run" / "nonfinite" / "step_2.json"
    said = rf"step 2: grad_norm is nan, loss is nan; .*train\.nonfinite=skip\); python -m nabla_jax\.reproduce {told}"
    with pytest.raises(UserError, match=said):
        train.main(arguments(tmp_path))
    assert [row["step"] for row in runs.read_rows(run / "metrics.jsonl")] == [1]
    assert kept(run) == {1}
    # The pairs and keys of the second batch, drawn here without the run.
    prepared = loaders.open_prepared(fixtures.prepared_root() / "prepared")
    batches = loaders.make_loader(prepared, "all_pairs", 2, 42)
    batch = [next(batches) for _ in range(2)][1]
    keys = jax.random.key_data(draws.keys(42, batch["sample"], draws.NOISE)).tolist()
    pairs = json.loads(told.read_text())["pairs"]
    assert [(pair["sample"], pair["subject"], pair["target"], pair["keys"]["noise"]) for pair in pairs] == [
        (
            int(batch["sample"][i]),
            prepared.ids[batch["subject_index"][i]],
            prepared.ids[batch["target_index"][i]],
            keys[i],
        )
        for i in range(2)
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    reproduce.main([str(told)])
    out = capsys.readouterr().out
    assert "steps 2 to 2 again" in out and "step 2: grad_norm nan, loss nan" in out
    assert all(f"sample {pair['sample']}, subject {pair['subject']}" in out for pair in pairs)
    assert {path: path.read_bytes() for path in before} == before
    # The same command stops at the same step; a step that is fine is not taken for it.
    with pytest.raises(UserError, match="step 2: grad_norm is nan, loss is nan"):
        train.main(arguments(tmp_path))
    told.write_text(json.dumps({"step": 1, "found": "loss is nan"}))
    with pytest.raises(UserError, match="found finite numbers, expected loss is nan"):
        reproduce.main([str(told)])


def test_parameters_that_overflow_stop_the_run_at_that_very_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 1: a parameter is nan or infinite"):
        train.main(arguments(tmp_path, **TOO_FAR))
    assert not kept(tmp_path / "run")
    reproduce.main([str(tmp_path / "run" / "nonfinite" / "step_1.json")])


def test_skipped_steps_change_nothing_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One spoilt picture: the steps that show it are as if they had not been, also over a restart."""
    read, run = loaders.Prepared.read, tmp_path / "run"
    batches = loaders.make_loader(fixtures.prepared_root() / "prepared", "all_pairs", 2, 42)
    targets = [next(batches)["target_index"].tolist() for _ in range(6)]
    spoilt = targets[1][0]
    bad = [step for step, batch in enumerate(targets, 1) if spoilt in batch]

    def reading(self: loaders.Prepared, index: int, roles: Any, draw: Any) -> Any:
        found = read(self, index, roles, draw)
        return {k: np.full_like(v, np.nan) if k == "target" and index == spoilt else v for k, v in found.items()}

    monkeypatch.setattr(loaders.Prepared, "read", reading)
    settings = {"optim__name": "prodigy", "optim__lr": 1.0, "train__nonfinite": "skip", "train__ema": 0.5}
    states = []
    for steps in (1, 2, 6):
        train.main(arguments(tmp_path, train__steps=steps, train__save_every=100, **settings))
        states.append((run / "adapters" / f"step_{steps}" / "fill.safetensors").read_bytes()[-2000:])
    assert states[0] == states[1] != states[2]
    rows = runs.read_rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [sum(b <= row["step"] for b in bad) for row in rows]
    assert [row["step"] for row in rows if row["loss"] is None] == bad
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert sorted(path.name for path in (run / "nonfinite").iterdir()) == sorted(f"step_{b}.json" for b in bad)
    reproduce.main([str(run / "nonfinite" / f"step_{bad[-1]}.json")])
    # What was skipped does not stop a run that is to stop from now on, unless it happens again.
    monkeypatch.undo()
    train.main(arguments(tmp_path, train__steps=7, train__save_every=100, **settings | {"train__nonfinite": "stop"}))
    assert runs.read_rows(run / "metrics.jsonl")[-1]["step"] == 7


def test_processes_stop_alike(tmp_path: Path) -> None:
    config = Path(arguments(tmp_path, mesh__fsdp=2)[1])
    ended = finish(start(config, 2, 1))
    assert [status for status, _ in ended] == [2, 2], ended
    assert all("step 2: grad_norm is nan, loss is nan" in error.splitlines()[-1] for _, error in ended)
    assert len(json.loads((tmp_path / "run" / "nonfinite" / "step_2.json").read_text())["pairs"]) == 2
    assert kept(tmp_path / "run") == {1}


def test_an_estimate_that_does_not_grow_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optim, "STUCK_AFTER", 2)
    # Decay pulls the adapter back to where it began, whatever the gradients say.
    train.main(arguments(tmp_path, optim__name="prodigy", optim__lr=1e-9))
    assert capsys.readouterr().err.count("still optim.d0 = 0.001") == 1


def test_what_is_written_is_json() -> None:
    made = training.Made(7, {"loss": jnp.float32(np.nan), "skipped": jnp.int32(3)}, {"seconds": 0.5}, {}, {})
    row = training.host_row(made)
    assert training.written(row, fixtures.config(Path())) == {"step": 7, "loss": None, "seconds": 0.5}
    skip = fixtures.config(Path(), train__nonfinite="skip")
    assert training.written(row, skip) == {"step": 7, "loss": None, "skipped": 3, "seconds": 0.5}
