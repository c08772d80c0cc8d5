"""Makes one step of a training run again: ``python -m nabla_jax.reproduce RUN/nonfinite/step_7.json``.

Training describes every step whose loss, gradients or new parameters were not finite in such a file: its pairs and
their keys. This continues from the newest checkpoint before the step up to the step, as training did, and tells what
became of it and the loss of each of its pairs. It needs the run folder alone and changes nothing in it.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax import config as configs
from nabla_jax import draws, runs
from nabla_jax.errors import UserError

if TYPE_CHECKING:
    from nabla_jax import training

# What is told of a batch's rows, and the draws of a step that is made on the device.
_NUMBERS = ("sample", "subject_index", "target_index")
_DRAWS = {
    "target_latent": draws.TARGET_LATENT,
    "noise": draws.NOISE,
    "time": draws.TIME,
    "subject_latent": draws.SUBJECT_LATENT,
    "control_latent": draws.CONTROL_LATENT,
    "masked_latent": draws.MASKED_LATENT,
}


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Makes one step of a training run again.", allow_abbrev=False)
    parser.add_argument("step", type=Path, metavar="RUN/nonfinite/step_N.json", help="what training wrote of the step")
    path = parser.parse_args(argv).step
    told = runs.read_json(path)
    if not isinstance(told, dict) or not isinstance(told.get("step"), int) or "found" not in told:
        raise UserError(f"{path}: found no step, expected a file that training wrote")
    folder = runs.RunFolder(path.parent.parent)
    values = runs.read_json(folder.config)
    values.pop("sha256", None)
    config = configs.from_dict(values, str(folder.config))
    configs.check_inputs(config, "train")
    with runs.lock(folder.lock, str(folder.path)):
        found = _again(config, folder, told["step"])
    if found != told["found"]:
        raise UserError(f"{path}: found {found or 'finite numbers'}, expected {told['found']}, as it was told")


def numbers(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """Sample, subject and target numbers of a loader's batch."""
    return {name: [int(number) for number in batch[name]] for name in _NUMBERS}


def record(
    config: configs.Config,
    folder: runs.RunFolder,
    inputs: "training.Input",
    made: "training.Made",
    row: Mapping[str, Any],
) -> str:
    """Writes ``folder.nonfinite(step)`` and returns one line about it; all processes must call it."""
    from nabla_jax.parallel import processes

    given = [json.loads(part) for part in processes.gather(json.dumps(made.numbers).encode())]
    # Processes that share the parts of a model hold the same rows.
    rows = sorted({tuple(pair) for part in given for pair in zip(*(part[name] for name in _NUMBERS), strict=True)})
    path, found = folder.nonfinite(made.step), _found(row)
    # In all processes: under the run's mesh a computation belongs to all its devices.
    keys = _keys(config.train.seed, [sample for sample, *_ in rows])
    if processes.is_first():
        ids = inputs.source.ids
        pairs = [
            {"sample": sample, "subject": ids[subject], "target": ids[target], "keys": keys[i]}
            for i, (sample, subject, target) in enumerate(rows)
        ]
        runs.write_json(path, {"step": made.step, "found": found, "seed": config.train.seed, "pairs": pairs})
    advice = (
        "try a lower optim.lr or optim.clip, or train.nonfinite=skip"
        if config.train.nonfinite == "stop"
        else f"the step changes nothing, {row['skipped']} so far"
    )
    return (
        f"step {made.step}: {found}; expected finite numbers ({advice}); python -m nabla_jax.reproduce {path} makes it "
        "again"
    )


def _found(row: Mapping[str, Any]) -> str:
    from nabla_jax import optim

    return optim.nonfinite({k: v for k, v in row.items() if isinstance(v, float)}) or "a parameter is nan or infinite"


def _keys(seed: int, samples: Sequence[int]) -> list[dict[str, list[int]]]:
    import jax

    rows = np.asarray(samples, np.uint64).astype(np.uint32)
    data = {name: np.asarray(jax.random.key_data(draws.keys(seed, rows, n))).tolist() for name, n in _DRAWS.items()}
    return [{name: keys[i] for name, keys in data.items()} for i in range(len(rows))]


def _again(config: configs.Config, folder: runs.RunFolder, step: int) -> str:
    """Trains from the newest checkpoint before ``step`` through it; says what was not finite and prints it all."""
    import jax

    from nabla_jax import optim, training
    from nabla_jax.checkpoints.run_state import RunState
    from nabla_jax.parallel import mesh as meshes
    from nabla_jax.parallel import rules

    mesh = meshes.make_mesh(dataclasses.asdict(config.mesh))
    meshes.check_batch(config.train.batch, mesh, "train.batch", config.train.accumulate)
    training.check_prepared(config)
    frozen = training.load_frozen(config)
    frozen = jax.device_put(frozen, rules.shardings(frozen, mesh))
    inputs = training.open_input(config, mesh)
    method, base = training.load_method(config, mesh)
    optimizer = optim.make(config.optim, config.lora.dtype, config.train.nonfinite)
    initial_state = training.state_maker(config, base, optimizer)
    abstract = jax.eval_shape(initial_state, None)
    shardings = rules.shardings(abstract, mesh)
    with (
        contextlib.closing(training.run_batches(inputs, mesh)) as loader,
        RunState(folder.checkpoints) as saved,
        jax.set_mesh(mesh),
    ):
        start = max((number for number in saved.steps() if number < step), default=0)
        if start:
            state, position = saved.restore(start, abstract, shardings)
            state = training.resumed(state, config)
            loader.set_state(position["loader"])
        else:
            state = jax.jit(initial_state, out_shardings=shardings)(training.load_start(config))
        train_step = training.make_step(method, optimizer, config, shardings)
        print(f"{folder.path}: steps {start + 1} to {step} again", flush=True)
        for number in range(start + 1, step + 1):
            read = next(loader)
            batch = training.device_batch(read, mesh, inputs.diptychs)
            if number == step:
                # The step takes the state away.
                adapters = jax.tree.map(lambda x: x.copy(), state["adapters"])
                skipped = int(optim.skipped_steps(state["optimizer"]))
            state, values = train_step(state, base, batch, frozen)
        loss = jax.jit(training.objective(method, config))
        for i, (sample, subject, target) in enumerate(zip(*numbers(read).values(), strict=True)):
            # One pair in every row: the mean loss is its own.
            alone = {name: np.repeat(rows[i : i + 1], len(rows), 0) for name, rows in read.items()}
            own = float(loss(adapters, base, training.device_batch(alone, mesh, inputs.diptychs), frozen))
            ids = inputs.source.ids
            print(f"step {step}: sample {sample}, subject {ids[subject]}, target {ids[target]}: loss {own}")
        row = training.host_row(training.Made(step, values, {}, {}, {}))
    found = _found(row) if row["skipped"] > skipped or optim.nonfinite(row) else ""
    print(f"step {step}: {', '.join(f'{name} {value}' for name, value in row.items() if name != 'step')}")
    return found


if __name__ == "__main__":
    runs.run_main(main)
