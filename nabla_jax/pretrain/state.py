"""A training's arrays in one file, written so that an interruption leaves the previous file in place; the loop."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nabla_jax import runs
from nabla_jax.errors import UserError


def draw_task(rng: np.random.Generator, tasks: Sequence[str], shares: Sequence[float]) -> str:
    """One of ``tasks``, drawn by its share of the sum of ``shares``."""
    return tasks[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]


def save_arrays(path: Path, step: int, tree: Any) -> None:
    """Writes the leaves of a tree and the step they belong to."""
    flat = {f"{i:05d}": np.array(leaf, order="C") for i, leaf in enumerate(jax.tree.leaves(tree))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(flat, temporary, {"step": str(step)})
    temporary.replace(path)


def load_arrays(path: Path, like: Any) -> tuple[int, Any]:
    """Reads what ``save_arrays`` wrote; ``like`` gives structure and shapes.

    Raises:
      UserError: the file belongs to another model.
    """
    with safe_open(path, "numpy") as file:
        step = int(file.metadata()["step"])
    flat = load_file(path)
    leaves, structure = jax.tree.flatten(like)
    found = [flat[name].shape for name in sorted(flat)]
    expected = [np.shape(leaf) for leaf in leaves]
    if found != expected:
        raise UserError(f"{path}: array shapes: found those of another model, expected this config's")
    return step, jax.tree.unflatten(structure, [jnp.asarray(flat[name]) for name in sorted(flat)])


@dataclasses.dataclass
class State:
    """Everything a training continues from; ``ema`` are the averaged parameters, which are the ones kept."""

    step: int
    params: Any
    ema: Any
    optimizer: Any


def muon(
    learning_rate: float, steps: int, warmup: int, decay: float, weight_decay: float, dimensions: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) for some matrices, AdamW for all else; clipped, warmed up, decayed.

    Args:
      learning_rate: after ``warmup`` steps and until the last ``decay`` (a share) of ``steps``.
      steps: number of updates.
      warmup: steps of linear rise.
      decay: share of the steps in which the rate falls linearly to zero.
      weight_decay: of the matrices that Muon updates.
      dimensions: parameters -> the same tree of ``optax.contrib.MuonDimensionNumbers``, None for AdamW's.
    """
    start = int(steps * (1 - decay))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, steps - start),
        ],
        [warmup, start],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=weight_decay,
            adam_b2=0.99,
            adam_weight_decay=0.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


Update = Callable[..., tuple[Any, Any, Any, dict[str, jax.Array]]]


def make_update(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]], tx: optax.GradientTransformation, ema: float
) -> Update:
    """The compiled update: (params, ema, optimizer state, step, *arrays) -> the first three, metrics.

    Args:
      loss: (params, step, *arrays) -> (loss, metrics).
      tx: the optimizer.
      ema: decay of the averaged parameters.
    """

    def update(params: Any, average: Any, state: Any, number: jax.Array, *arrays: jax.Array) -> tuple[Any, ...]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, number, *arrays)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # The average follows closely at first, else early parameters linger in it.
        decay = jnp.minimum(ema, (1 + number) / (10 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, average, state, {"loss": value, **metrics}

    return jax.jit(update, donate_argnums=(0, 1, 2))


def fit(
    params: Any, tx: optax.GradientTransformation, update: Update, draw: Callable[[int], tuple[Any, ...]], *,
    steps: int, name: str, checkpoint: Path, report: Callable[[State, dict[str, float]], None], every: int,
    seconds: float | None = None,
) -> State:  # fmt: skip
    """Trains to ``steps`` (or for ``seconds``), continuing from ``checkpoint`` if it exists.

    Args:
      params: initial parameters; the buffers are given away.
      tx: the optimizer that ``update`` uses.
      update: see ``make_update``.
      draw: the arrays of a step from its number alone, so that a continued run equals an unbroken one.
      steps: number of updates.
      name: what the progress bar says.
      checkpoint: file to continue from and to write every ``every`` steps.
      report: receives the state and {steps_per_second, and the metrics' means} every ``every`` steps.
      every: steps between reports.
      seconds: wall-clock limit; the state is saved when it is reached.

    Raises:
      UserError: the checkpoint belongs to another model.
      Interrupted: a signal asked to stop; the state is saved.
    """
    # Compiled as one: leaf by leaf, small trainings spend their time on compiling zeros.
    state = State(0, params, *jax.jit(lambda p: (jax.tree.map(jnp.copy, p), tx.init(p)))(params))
    if checkpoint.exists():
        step, (params, ema, optimizer) = load_arrays(checkpoint, (state.params, state.ema, state.optimizer))
        state = State(step, params, ema, optimizer)
    gathered: list[dict[str, jax.Array]] = []
    begun = clock = time.monotonic()
    with runs.StopSignals() as stop, runs.progress(steps, name, done=state.step, unit="step") as bar:
        while state.step < steps:
            arrays = draw(state.step)
            state.params, state.ema, state.optimizer, metrics = update(
                state.params, state.ema, state.optimizer, state.step, *arrays
            )
            state.step += 1
            gathered.append(metrics)
            bar.update(1)
            over = stop.signum is not None or (seconds is not None and time.monotonic() - begun > seconds)
            if over or state.step % every == 0 or state.step == steps:
                means = {k: float(np.mean([float(row[k]) for row in gathered])) for k in gathered[0]}
                rate = len(gathered) / (time.monotonic() - clock)
                save_arrays(checkpoint, state.step, (state.params, state.ema, state.optimizer))
                report(state, {"steps_per_second": rate, **means})
                gathered, clock = [], time.monotonic()
            if stop.signum is not None:
                raise runs.Interrupted(stop.signum, f"{checkpoint}: saved after step {state.step}")
            if over:
                break
    return state
