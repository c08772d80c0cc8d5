"""Training on a tiny random base: continuing, stopping, exporting, and refusing what does not fit."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from nabla_jax import api, optim, reposing, runs, train, training
from nabla_jax import config as configs
from nabla_jax.checkpoints import adapters, pipeline
from nabla_jax.checkpoints.run_state import RunState
from nabla_jax.data.loader import make_loader, open_prepared
from nabla_jax.errors import UserError
from nabla_jax.models import flux, lora
from nabla_jax.parallel import mesh as meshes
from tests import fixtures

VALUES = ("step", "loss", "grad_norm", "d")


def arguments(tmp_path: Path, **overrides: Any) -> list[str]:
    """The command line of a run in ``tmp_path / "run"`` on the shared prepared folder."""
    root = fixtures.prepared_root()
    overrides = {"train__workdir": str(tmp_path / "run"), **overrides}
    return ["--config", str(fixtures.write_config(root, tmp_path / "config.py", **overrides))]


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run measured, without the timings."""
    return [{k: row[k] for k in VALUES} for row in runs.read_rows(run / "metrics.jsonl")]


def adapter_bytes(run: Path, step: int = 4) -> bytes:
    return runs.RunFolder(run).adapter(step, "fill").read_bytes()


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint, read without the program that wrote it knowing the structure."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
    leaves = jax.tree_util.tree_flatten_with_path(restored["arrays"])[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: adapter file, metrics, and the whole state."""
    assert metrics(run) == metrics(other)
    assert adapter_bytes(run) == adapter_bytes(other)
    here, there = arrays(run, 4), arrays(other, 4)
    assert here.keys() == there.keys()
    for name, value in here.items():
        np.testing.assert_array_equal(value, there[name], err_msg=name)
    positions = [(r / "checkpoints" / "4" / "position" / "metadata").read_text() for r in (run, other)]
    assert positions[0] == positions[1]


def at_call(number: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``do`` when the batch of the run's ``number``-th step has just arrived."""
    original, count = training.device_batch, 0

    def patched(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            do()
        return original(*args)

    monkeypatch.setattr(training, "device_batch", patched)


def test_two_steps_and_two_more_are_four(tmp_path: Path) -> None:
    train.main(arguments(tmp_path, train__steps=2))
    assert runs.RunFolder(tmp_path / "run").last_step() == 2
    train.main(arguments(tmp_path))
    assert_same_run(tmp_path / "run", fixtures.trained_run())


def test_pictures_that_are_encoded_when_drawn_give_the_same_run(tmp_path: Path) -> None:
    """Same draws, same losses, same adapter, bit for bit; the prepared folder is not there."""
    train.main(arguments(tmp_path, data__mode="on_the_fly", data__prepared=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    assert_same_run(tmp_path / "run", fixtures.trained_run())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_in_parts_trains_as_the_whole(dtype: str) -> None:
    """The same draws for every pair, the same loss and gradients to rounding, with whatever else changes a sample."""
    root = fixtures.prepared_root()
    mesh = meshes.data_mesh()
    found: dict[int, Any] = {}
    for parts in (1, 4):
        settings = {"train__batch": 4, "train__accumulate": parts, "train__foreground_weight": 3.0, "train__ema": 0.9}
        config = fixtures.config(root, lora__dtype=dtype, **settings)
        method, base = training.load_method(config, mesh)
        fresh = lora.initialize(jax.random.key(0), base, rank=2, alpha=2.0, stacked=flux.STACKED).params
        # B begins at zero: without this, A would have no gradient.
        fresh = jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), fresh)
        # Keeps the gradients that it is given.
        keeps = optax.GradientTransformation(lambda params: params, lambda given, *_: (given, given))
        optimizer = optim.skip_nonfinite(keeps, hold=False)
        state = training.initial_state({"fill": fresh}, optimizer, config)
        batch = training.device_batch(next(make_loader(config.data.prepared, "all_pairs", 4, 7)), mesh)
        after, values = training.make_step(method, optimizer, config)(jax.tree.map(jnp.copy, state), base, batch)
        found[parts] = values, after["optimizer"].inner
    (values, gradients), (others, other) = found.values()
    assert np.isclose(others["loss"], values["loss"], rtol=1e-6)
    # Gradients of a bfloat16 adapter are rounded to eight bits, each part's by itself.
    rtol = 1e-5 if dtype == "float32" else 1e-2
    assert np.isclose(others["grad_norm"], values["grad_norm"], rtol=rtol)
    for here, there in zip(jax.tree.leaves(gradients), jax.tree.leaves(other), strict=True):
        assert here.dtype == there.dtype == jnp.dtype(dtype)
        here, there = np.asarray(here, np.float32), np.asarray(there, np.float32)
        assert np.linalg.norm(here - there) <= rtol * np.linalg.norm(here)


def test_a_run_goes_on_with_a_batch_in_parts(tmp_path: Path) -> None:
    train.main(arguments(tmp_path, train__steps=2))
    train.main(arguments(tmp_path, train__accumulate=2))
    rows, others = (runs.read_rows(run / "metrics.jsonl") for run in (tmp_path / "run", fixtures.trained_run()))
    for row, other in zip(rows, others, strict=True):
        assert np.isclose(row["loss"], other["loss"], rtol=1e-5) and np.isclose(row["d"], other["d"], rtol=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(3, lambda: os.kill(os.getpid(), signum), monkeypatch)
    with pytest.raises(runs.Interrupted, match="after step 3 of 4; the same command continues") as stop:
        train.main(arguments(tmp_path))
    assert stop.value.signum == signum
    monkeypatch.undo()
    train.main(arguments(tmp_path))
    assert_same_run(tmp_path / "run", fixtures.trained_run())


def test_a_death_between_checkpoints_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise SystemError("power cut")

    at_call(4, die, monkeypatch)
    with pytest.raises(SystemError):
        train.main(arguments(tmp_path))
    monkeypatch.undo()
    run = tmp_path / "run"
    # What a dying process may leave: a row beyond the checkpoint, half a row, a checkpoint never finished.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0, "grad_norm": 0.0, "d": 0.0}\n{"step": 4, "lo')
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "4.orbax-checkpoint-tmp-0")
    train.main(arguments(tmp_path))
    assert_same_run(run, fixtures.trained_run())


def test_a_finished_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(fixtures.trained_run(), tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def fail(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", fail)
    train.main(arguments(tmp_path))
    assert {p: p.read_bytes() for p in before} == before


def test_a_process_that_died_before_the_export_exports_on_the_next_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fixtures.trained_run(), run)
    (run / "config.json").unlink()
    shutil.rmtree(run / "adapters" / "step_4")
    (run / "adapters" / "last").write_text("step_2\n")
    train.main(arguments(tmp_path))
    assert_same_run(run, fixtures.trained_run())


def test_the_exported_adapter_is_the_trained_one_under_published_names() -> None:
    run = fixtures.trained_run()
    path = runs.RunFolder(run).adapter(4, "fill")
    tensors = load_file(path)
    linears = {name.rsplit(".lora_", 1)[0] for name in tensors}
    # 12 adapted linears per pair of double and single block, and the picture embedding (see PEFT's rule).
    assert len(linears) == 2 * 6 + 2 * 6 + 1
    assert "transformer.transformer_blocks.1.attn.to_out.0" in linears
    assert "transformer.single_transformer_blocks.0.proj_mlp" in linears
    state = arrays(run, 4)
    stacked = state["['adapters']['fill']['transformer_blocks']['attn']['to_q']['lora_B']"]
    np.testing.assert_array_equal(stacked[1], tensors["transformer.transformer_blocks.1.attn.to_q.lora_B.weight"])
    # In the last block conditions are read through keys and values alone: nothing else of theirs can learn.
    unused = {name for name in linears if not tensors[f"{name}.lora_B.weight"].any()}
    last = "transformer.single_transformer_blocks.1"
    assert unused == {f"{last}.attn.to_q", f"{last}.proj_mlp", f"{last}.proj_out"}
    metadata = adapters.read_metadata(path)
    assert (metadata.rank, metadata.alpha, metadata.size, metadata.step) == (2, 2.0, fixtures.SIZE, 4)
    assert (metadata.prompt, metadata.control, metadata.guidance) == ("A photo of a bird.", "fill", 1.0)
    assert metadata.base_sha256 == pipeline.folder_hash(fixtures.prepared_root() / "base" / "transformer")


def test_the_average_is_exported_when_there_is_one(tmp_path: Path) -> None:
    run, where = tmp_path / "run", "['fill']['transformer_blocks']['attn']['to_q']['lora_B']"
    average: Any = 0.0  # lora_B starts at zero
    for step, decay in ((1, 1 / 10), (2, 2 / 11), (3, 0.25)):
        train.main(arguments(tmp_path, train__steps=step, train__ema=0.25, train__save_every=1))
        state = arrays(run, step)
        average = decay * average + (1 - decay) * state[f"['adapters']{where}"]
        np.testing.assert_allclose(state[f"['average']{where}"], average, rtol=1e-5, atol=1e-9)
        tensors = load_file(runs.RunFolder(run).adapter(step, "fill"))
        exported = tensors["transformer.transformer_blocks.1.attn.to_q.lora_B.weight"]
        np.testing.assert_array_equal(exported, state[f"['average']{where}"][1])
    assert np.abs(average - state[f"['adapters']{where}"]).max() > 0


def test_run_folder_records_configuration_and_environment() -> None:
    run = fixtures.trained_run()
    stored = json.loads((run / "config.json").read_text())
    assert stored["lora"]["rank"] == 2
    assert stored["sample"]["guidance"] == 2.5  # a default, resolved
    assert json.loads((run / "environment.json").read_text())[0]["versions"]["jax"] == jax.__version__
    rows = runs.read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 <= row["data_seconds"] <= row["seconds"] for row in rows)
    assert all(np.isclose(row["samples_per_second"], 2 / row["seconds"], rtol=0.01, atol=0.01) for row in rows)


def test_samples_are_drawn_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    with fixtures.compilations() as compiled:
        before: list[str] = []
        at_call(3, lambda: before.extend(compiled), monkeypatch)
        train.main(arguments(tmp_path, train__sample_every=2))
    # One program each; after the first checkpoint and the first sheet nothing is compiled any more.
    assert [compiled.count(name) for name in ("jit(step)", "jit(first_state)", "jit(draw)")] == [1, 1, 1]
    assert compiled == before
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_2.png", "step_4.png"]
    first, second = (np.asarray(Image.open(sheet)) for sheet in sheets)
    # Rows of subject, control, target, drawn; only the last changes while the adapter learns.
    size = fixtures.SIZE
    assert first.shape == (3 * size, 4 * size, 3)
    np.testing.assert_array_equal(first[:, : 3 * size], second[:, : 3 * size])
    # Drawing pictures takes nothing from training.
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(fixtures.trained_run())
    # The adapter's file draws them again, as the verbs and the Python interface read it.
    config = configs.load(str(tmp_path / "config.py"))
    reposer = api.load(configs.resolve_base(config), tmp_path / "run")
    pairs = make_loader(open_prepared(config.data.prepared), config.train.sampler, 3, config.sample.seed)
    with contextlib.closing(pairs):
        batch = next(pairs)
    shown = {k: batch[k] for k in (*reposer.method.pictures, "prompt_embeds", "pooled")}
    shown["sample"] = batch["sample"].astype(np.uint32)
    drawn = reposer.draw(shown, dataclasses.replace(config.sample, batch=3))
    np.testing.assert_array_equal(second[:, 3 * size :], np.concatenate(list(drawn)))


def test_a_transfer_that_nobody_asked_for_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_an_array_on_the_host(*args: Any) -> dict[str, Any]:
        batch = device_batch(*args)
        return batch | {"mask": np.asarray(batch["mask"])}

    device_batch = training.device_batch
    monkeypatch.setattr(training, "device_batch", with_an_array_on_the_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train.main(arguments(tmp_path, train__foreground_weight=2.0))


def test_loss_is_the_mean_of_its_samples_in_any_order() -> None:
    config = fixtures.config(fixtures.prepared_root())
    mesh = meshes.data_mesh()
    method, base = training.load_method(config, mesh)
    fresh = lora.initialize(jax.random.key(0), base, rank=2, alpha=2.0, stacked=flux.STACKED)
    batch = training.device_batch(next(make_loader(config.data.prepared, "all_pairs", 4, 7)), mesh)
    loss = jax.jit(lambda p, b: reposing.loss(method, {"fill": fresh}, p, b, seed=3, guidance=1.0))

    def rows(*chosen: int) -> float:
        return float(loss(base, {k: v[jnp.asarray(chosen)] for k, v in batch.items()}))

    whole = rows(0, 1, 2, 3)
    assert np.isclose(whole, rows(3, 1, 0, 2), rtol=1e-5)
    assert np.isclose(whole, (rows(0, 1) + rows(2, 3)) / 2, rtol=1e-5)
    assert not np.isclose(rows(0, 1), rows(2, 3), rtol=1e-5)


def test_loss_of_foreground_and_background_make_up_the_whole() -> None:
    config = fixtures.config(fixtures.prepared_root())
    mesh = meshes.data_mesh()
    method, base = training.load_method(config, mesh)
    batch = training.device_batch(next(make_loader(config.data.prepared, "all_pairs", 1, 7)), mesh)
    # Whole tokens only, so that foreground and background share none.
    mask = jnp.round(jnp.repeat(jnp.repeat(batch["mask"][:, ::2, ::2], 2, 1), 2, 2))

    def loss(mask: jax.Array, weight: float) -> float:
        given = {**batch, "mask": mask}
        return float(reposing.loss(method, {}, base, given, seed=3, guidance=1.0, foreground_weight=weight))

    method = dataclasses.replace(method, adapter=None)
    share = float(mask.mean())
    assert 0 < share < 1
    parts = share * loss(mask, 1e7) + (1 - share) * loss(1 - mask, 1e7)
    assert np.isclose(parts, loss(mask, 1.0), rtol=1e-4)
    assert np.isclose(loss(mask, 3.0), loss(mask, 1.0), rtol=0.5) and loss(mask, 3.0) != loss(mask, 1.0)


def test_a_high_time_mean_trains_on_noise_alone() -> None:
    config = fixtures.config(fixtures.prepared_root())
    mesh = meshes.data_mesh()
    method, base = training.load_method(config, mesh)
    method = dataclasses.replace(method, adapter=None)
    batch = training.device_batch(next(make_loader(config.data.prepared, "all_pairs", 2, 7)), mesh)

    def objective(target: jax.Array) -> jax.Array:
        given = {**batch, "target": target}
        return reposing.loss(method, {}, base, given, seed=3, guidance=1.0, time_mean=100.0)

    # At time 1 the model sees noise only: the loss is quadratic in the target, with the curvature of a constant guess.
    step = jnp.ones_like(batch["target"]).at[:, batch["target"].shape[1] // 2 :].set(0)
    values = [float(objective(batch["target"] + k * step)) for k in (-1.0, 0.0, 1.0)]
    assert np.isclose(values[0] - 2 * values[1] + values[2], 2 * method.vae.scaling_factor**2, rtol=1e-3)


def test_batch_must_fit_the_devices() -> None:
    two_devices = types.SimpleNamespace(size=2, shape={"data": 2})
    meshes.check_batch(4, two_devices, "train.batch")
    with pytest.raises(UserError, match=r"train\.batch: found 5, expected a multiple of the 2 devices"):
        meshes.check_batch(5, two_devices, "train.batch")
    cut = types.SimpleNamespace(size=8, shape={"data": 2, "fsdp": 2, "tensor": 2})
    meshes.check_batch(4, cut, "train.batch")
    with pytest.raises(UserError, match=r"found 6, expected a multiple of the 4 parts of the mesh's data and fsdp"):
        meshes.check_batch(6, cut, "train.batch")
    meshes.check_batch(8, cut, "train.batch", 2)
    with pytest.raises(UserError, match=r"found 4, expected a multiple of the 4 parts of .* times train.accumulate 2"):
        meshes.check_batch(4, cut, "train.batch", 2)
    with pytest.raises(UserError, match=r"train\.accumulate: found 3, expected a divisor of train\.batch, 2"):
        fixtures.config(Path("x"), train__accumulate=3)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A copy of the prepared folder that a test may damage."""
    return Path(shutil.copytree(fixtures.prepared_root() / "prepared", tmp_path / "prepared"))


def test_truncated_shard_is_refused_before_training(spoilt: Path, tmp_path: Path) -> None:
    shard = next(spoilt.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{shard.name}: corrupt or truncated shard"):
        train.main(arguments(tmp_path, data__prepared=str(spoilt)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_corrupt_record_names_its_shard(spoilt: Path, tmp_path: Path) -> None:
    shard = next(spoilt.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[4096 : len(data) - 4096 : 512] = bytes(len(range(4096, len(data) - 4096, 512)))
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"{shard.name}: corrupt"):
        train.main(arguments(tmp_path, data__prepared=str(spoilt)))


def test_prepared_folder_of_another_base_is_refused(tmp_path: Path) -> None:
    fixtures.write_base(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="prepared with other settings .*weights of vae"):
        train.main(arguments(tmp_path, base__path=str(tmp_path / "base")))


def test_prepared_folder_of_another_size_or_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"conditioning\.size: 32 there, 64 here"):
        train.main(arguments(tmp_path, conditioning__size=64))
    with pytest.raises(UserError, match=r"conditioning\.prompt"):
        train.main(arguments(tmp_path, conditioning__prompt="A bird.", train__workdir=str(tmp_path / "b")))


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_checkpoint_with_a_wrong_tensor_is_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    base = Path(shutil.copytree(fixtures.prepared_root() / "base", tmp_path / "base"))
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "transformer_blocks.1.attn.to_k.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "transformer_blocks.1.attn.to_z.weight"
        tensors[name] = np.zeros(3, np.float32)
    else:
        tensors[name] = tensors[name][:-1]
    save_file(tensors, file)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        train.main(arguments(tmp_path, base__path=str(base)))


def test_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.main(arguments(tmp_path, train__workdir=str(tmp_path / "file" / "run")))


def test_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures.prepared_root()  # needs a disk with room
    usage = types.SimpleNamespace(total=2**30, used=2**30, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"run/checkpoints: disk too full: a checkpoint needs \d+ MiB, 0 MiB"):
        train.main(arguments(tmp_path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_damaged_checkpoint_names_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(arguments(tmp_path, train__steps=2))
    shutil.rmtree(run / "checkpoints" / "2" / "arrays" / "d")
    with pytest.raises(UserError, match=r"checkpoints/2: cannot be restored"):
        train.main(arguments(tmp_path))
    assert (run / "checkpoints" / "2" / "position").is_dir()


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main(arguments(tmp_path, train__steps=3))
    shutil.rmtree(run / "checkpoints" / "3" / "arrays" / "d")
    left = sorted(path.relative_to(run / "checkpoints" / "3") for path in (run / "checkpoints" / "3").rglob("*"))
    capsys.readouterr()
    train.main(arguments(tmp_path))
    told = [line for line in capsys.readouterr().out.splitlines() if "cannot be restored" in line]
    assert len(told) == 1 and f"kept as {run / 'damaged' / '3'}, continuing from step 2" in told[0]
    assert sorted(path.relative_to(run / "damaged" / "3") for path in (run / "damaged" / "3").rglob("*")) == left
    assert_same_run(run, fixtures.trained_run())


@pytest.mark.parametrize("damage", ["half", "flip"])
def test_no_damage_to_a_file_passes_for_what_was_saved(damage: str, tmp_path: Path) -> None:
    place = meshes.replicated(meshes.data_mesh())
    rng = np.random.default_rng(0)
    trees = {step: {"a": jax.device_put(rng.standard_normal((64, 33), np.float32), place)} for step in (5, 6)}
    trees[6]["b"], trees[5]["b"] = jnp.arange(6, dtype=jnp.bfloat16), jnp.zeros(6, jnp.bfloat16)
    with RunState(tmp_path / "whole") as saved:
        for step, tree in trees.items():
            saved.save(step, tree, {"loader": {"step": step}})
    places = {"a": place, "b": place}
    abstract = jax.eval_shape(lambda: trees[6])
    fallen = []
    newest = tmp_path / "whole" / "6"
    for file in [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]:
        shutil.copytree(tmp_path / "whole", tmp_path / "run" / "checkpoints")
        path = tmp_path / "run" / "checkpoints" / "6" / file
        data = bytearray(path.read_bytes())
        if damage == "flip" and data:
            data[len(data) * 2 // 3] ^= 0x10
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        told: list[str] = []
        with RunState(tmp_path / "run" / "checkpoints") as saved:
            found = saved.restore_newest(abstract, places, told.append)
        assert found is not None
        step, arrays, position = found
        np.testing.assert_array_equal(arrays["a"], trees[step]["a"])
        np.testing.assert_array_equal(arrays["b"], trees[step]["b"])
        assert position == {"loader": {"step": step}}
        assert (tmp_path / "run" / "damaged" / "6" / file).is_file() == (step == 5) == bool(told)
        if step == 5:
            fallen.append(str(file))
        shutil.rmtree(tmp_path / "run")
    assert any("ocdbt.process_0/d/" in file for file in fallen) and any("position" in file for file in fallen)


def test_a_checksum_sees_a_changed_and_an_exchanged_element() -> None:
    from nabla_jax.checkpoints.run_state import checksums

    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    bits = values.view(np.uint32).reshape(-1).astype(object)
    expected = sum(int(bit) * (2 * place + 1) for place, bit in enumerate(bits)) % 2**32
    assert checksums({"a": jnp.asarray(values)}) == {"['a']": expected}
    exchanged = values.copy()
    exchanged[0, 0, 1], exchanged[1, 2, 3] = values[1, 2, 3], values[0, 0, 1]
    assert checksums({"a": jnp.asarray(exchanged)}) != {"['a']": expected}


def test_restored_state_has_the_layout_of_the_mesh(tmp_path: Path) -> None:
    mesh = meshes.data_mesh()
    value = {"a": jax.device_put(jnp.arange(6.0).reshape(2, 3), meshes.replicated(mesh))}
    with RunState(tmp_path / "checkpoints") as saved:
        saved.save(5, value, {"loader": {"n": 1}})
    with RunState(tmp_path / "checkpoints") as saved:
        assert saved.latest() == 5
        restored, position = saved.restore(5, jax.eval_shape(lambda: value), {"a": meshes.replicated(mesh)})
    assert restored["a"].sharding == value["a"].sharding
    np.testing.assert_array_equal(restored["a"], value["a"])
    assert position == {"loader": {"n": 1}}
