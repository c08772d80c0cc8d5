"""Trains an adapter: ``python -m nabla_jax.train --config configs/omk_fill.py``.

Reads from top to bottom: configuration, checks, mesh, input, frozen base, abstract state, restore or
initialise, compiled step, loop. The run folder ``train.workdir`` gets ``config.json``,
``environment.json``, ``metrics.jsonl``, ``checkpoints/``, ``adapters/step_N/NAME.safetensors`` with
``adapters/last``, and ``samples/``. SIGINT and SIGTERM save and stop; the same command continues, bit for
bit as if it had never stopped; a checkpoint that is damaged is set aside for the one before it. A
finished run is left alone. A step that is not finite stops the run, or is skipped (``train.nonfinite``),
and ``nonfinite/`` tells of it, for ``nabla_jax.reproduce``. A step that hangs ends the run (``watch``).
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence

from nabla_jax import config as configs
from nabla_jax import runs, watchdog
from nabla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """The command."""
    config, _ = configs.parse_command(argv, "Trains an adapter on a prepared dataset.")
    configs.check_inputs(config, "train")
    # Imported after the checks: a mistake in the configuration is answered before any framework loads.
    from nabla_jax.parallel import processes

    processes.initialize()
    # Among several processes the first one owns the folder; the others look at what it found.
    opened = runs.open_run(config, _hashes(config)) if processes.is_first() else runs.join_run(config)
    with opened as folder:
        processes.wait_for_all("run opened")
        if not is_finished(config, folder):
            train(config, folder)
        if processes.is_first():
            print(f"{folder.path}: trained for {folder.last_step()} steps: {folder.last_adapter(config.lora.name)}")


def _hashes(config: configs.Config) -> dict[str, str]:
    if not config.lora.frozen:
        return {}
    # It loads jax, which a mistake in the configuration need not wait for.
    from nabla_jax import training

    return training.frozen_sha256(config)


def is_finished(config: configs.Config, folder: runs.RunFolder) -> bool:
    """Whether the adapter of the last step, or of a later one, is there."""
    step = folder.last_step()
    return step is not None and step >= config.train.steps and folder.adapter(step, config.lora.name).is_file()


def train(config: configs.Config, folder: runs.RunFolder) -> None:
    """Trains from the newest checkpoint in ``folder``, or from scratch, to ``train.steps``.

    Raises UserError for inputs that do not fit each other, and Interrupted after a signal.
    """
    import jax

    from nabla_jax import optim, reproduce, training
    from nabla_jax.checkpoints import pipeline
    from nabla_jax.checkpoints.run_state import RunState
    from nabla_jax.parallel import mesh as meshes
    from nabla_jax.parallel import processes, rules

    settings, name, first = config.train, config.lora.name, processes.is_first()

    # ----------------------------------------------------------------------------------------- mesh, checks
    mesh = meshes.make_mesh(dataclasses.asdict(config.mesh))
    meshes.check_batch(settings.batch, mesh, "train.batch", settings.accumulate)
    if first:
        runs.write_environment(folder.environment, {"devices": [str(device) for device in jax.devices()]})
    base_path = configs.resolve_base(config)
    training.check_prepared(config)
    with RunState(folder.checkpoints) as saved:
        begun = saved.latest() is not None
    start_adapter = None if begun else training.load_start(config)
    frozen = training.load_frozen(config)
    base_sha256 = pipeline.folder_hash(base_path / "transformer")

    # ------------------------------------------------------------------------------------------------ input
    # Before the base: text encoders that it needs are freed again before the transformer is read.
    inputs = training.open_input(config, mesh)

    # ------------------------------------------------------------------------------------------ frozen base
    if first:
        print(f"{folder.path}: loading {base_path}", flush=True)
    method, base = training.load_method(config, mesh)

    # --------------------------------------------------------------------------------------- abstract state
    optimizer = optim.make(config.optim, config.lora.dtype, settings.nonfinite)
    frozen = jax.device_put(frozen, rules.shardings(frozen, mesh))
    initial_state = training.state_maker(config, base, optimizer)
    abstract = jax.eval_shape(initial_state, None)
    shardings = rules.shardings(abstract, mesh)

    with (
        contextlib.closing(training.run_batches(inputs, mesh)) as loader,
        RunState(folder.checkpoints) as saved,
        runs.StopSignals() as stop,
        watchdog.Watchdog(config.watch) as watch,
        jax.set_mesh(mesh),
    ):
        # ---------------------------------------------------------------------------- restore or initialise
        saved.check_room(abstract)
        tell = functools.partial(print, flush=True) if first else lambda _: None
        newest = saved.restore_newest(abstract, shardings, tell)
        start = 0
        if newest is not None:
            start, state, position = newest
            state = training.resumed(state, config)
            loader.set_state(position["loader"])
            tell(f"{folder.path}: continuing after step {start}")
        else:
            state = jax.jit(initial_state, out_shardings=shardings)(start_adapter)
        del start_adapter
        metrics = runs.JsonLines(folder.metrics) if first else None
        # Rows beyond the checkpoint are made again; a row that was written only for being a run's last goes
        # when the run is extended.
        extended = start < settings.steps
        if metrics is not None:
            metrics.keep(lambda row: row["step"] <= start and not (extended and row["step"] % settings.log_every))
        sheet = training.SampleSheet(inputs, method, folder.samples, mesh)

        # ------------------------------------------------------------------------------------ compiled step
        train_step = training.make_step(method, optimizer, config, shardings)
        clock, asked = training.StepClock(), training.StopVote(stop, mesh)
        # The newest step, whose values are read only once the following step runs, so that the device never waits.
        pending: training.Made | None = None
        skipped = int(jax.device_get(optim.skipped_steps(state["optimizer"])))

        def write_pending() -> None:
            nonlocal pending, skipped
            if pending is None:
                return
            made, pending = pending, None
            row = training.host_row(made)
            # The values are the same in every process, and so is what follows from them.
            if row["skipped"] > skipped or optim.nonfinite(row):
                skipped = row["skipped"]
                with jax.transfer_guard("allow"):
                    what = reproduce.record(config, folder, inputs, made, row)
                    if settings.nonfinite == "stop" and made.step > 1:
                        saved.save(made.step - 1, training.before(state, made.step), {"loader": made.position})
                if settings.nonfinite == "stop":
                    raise UserError(what)
                if first:
                    bar.write(what, file=sys.stderr)
            if metrics is not None and (made.step % settings.log_every == 0 or made.step >= settings.steps):
                metrics.append(training.written(row, config))
            if first and (stuck := optim.stuck(config.optim, made.step, row.get("d"))):
                bar.write(stuck, file=sys.stderr)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

        def save(step: int) -> None:
            # Metrics first: what a checkpoint continues from must already be on record, and nothing be held in it.
            write_pending()
            saved.save(step, state, {"loader": loader.get_state()})
            adapter = meshes.to_host(training.exported(state, config, frozen)[name], mesh)
            if first:
                training.export(config, folder, adapter, step, base_sha256)

        # --------------------------------------------------------------------------------------------- loop
        with runs.progress(settings.steps, "train", done=start, unit="step", shown=first) as bar:
            for step in range(start + 1, settings.steps + 1):
                where, position = f"{folder.path}: step {step}", loader.get_state()
                with watch.part("waiting for input", where):
                    read = next(loader)  # which may encode pictures, and load what does
                with training.no_hidden_transfers():
                    batch = training.device_batch(read, mesh, inputs.diptychs)
                    clock.data_arrived()
                if step == start + 1:
                    processes.compile_together(train_step, state, base, batch, frozen)
                with training.no_hidden_transfers():
                    with watch.part("the step", where):
                        state, values = train_step(state, base, batch, frozen)
                        write_pending()
                    numbers = reproduce.numbers(read)
                    pending = training.Made(step, values, clock.step(settings.batch), numbers, position)
                    signum = asked.heard()
                bar.update(1)
                last = step == settings.steps
                if signum is not None and not last:
                    save(step)
                    raise runs.Interrupted(
                        signum,
                        f"{folder.path}: saved after step {step} of {settings.steps}; the same command continues",
                    )
                if last or step % settings.save_every == 0:
                    save(step)
                if settings.sample_every and (last or step % settings.sample_every == 0):
                    sheet.draw(base, training.exported(state, config, frozen), step)
                    clock.restart()
        if start >= settings.steps:  # the process that made the last step died before it exported the adapter
            save(start)
        if metrics is not None:
            metrics.close()
    # The first one's exports are there when any process ends.
    processes.wait_for_all("trained")


if __name__ == "__main__":
    runs.run_main(main)
