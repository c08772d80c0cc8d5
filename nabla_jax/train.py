"""Trains an adapter: ``python -m nabla_jax.train --config configs/omk_fill.py``.

Reads from top to bottom: configuration, checks, mesh, input, frozen base, abstract state, restore or
initialise, compiled step, loop. The run folder ``train.workdir`` gets ``config.json``,
``environment.json``, ``metrics.jsonl``, ``checkpoints/``, ``adapters/step_N/NAME.safetensors`` with
``adapters/last``, and ``samples/``. SIGINT and SIGTERM save and stop; the same command continues, bit for
bit as if it had never stopped. A finished run is left alone.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

from nabla_jax import config as configs
from nabla_jax import runs


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

    from nabla_jax import draws, optim, training
    from nabla_jax.checkpoints import pipeline
    from nabla_jax.checkpoints.run_state import RunState
    from nabla_jax.models import flux, layers, lora
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
    optimizer = optim.make(config.optim, config.lora.dtype)
    frozen = jax.device_put(frozen, rules.shardings(frozen, mesh))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)

    def initial_state(start: layers.Params | None) -> training.State:
        if start is None:
            key = draws.key(settings.seed, draws.ADAPTER_INIT)
            rank, alpha = config.lora.rank, config.lora.alpha
            start = lora.initialize(key, shapes, rank=rank, alpha=alpha, stacked=flux.STACKED).params
        return training.initial_state({name: start}, optimizer, config)

    abstract = jax.eval_shape(initial_state, None)
    shardings = rules.shardings(abstract, mesh)

    with (
        contextlib.closing(training.run_batches(inputs, mesh)) as loader,
        RunState(folder.checkpoints) as saved,
        runs.StopSignals() as stop,
        jax.set_mesh(mesh),
    ):
        # ---------------------------------------------------------------------------- restore or initialise
        saved.check_room(abstract)
        start = saved.latest() or 0
        if start:
            state, position = saved.restore(start, abstract, shardings)
            loader.set_state(position["loader"])
            if first:
                print(f"{folder.path}: continuing after step {start}", flush=True)
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
        # The values of the newest step: read only once the following step runs, so that the device never
        # waits.
        pending: tuple[int, training.Values, dict[str, float]] | None = None

        def write_pending() -> None:
            nonlocal pending
            if pending is None:
                return
            row = training.host_row(*pending)
            pending = None
            if metrics is not None and (row["step"] % settings.log_every == 0 or row["step"] >= settings.steps):
                metrics.append(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

        def save(step: int) -> None:
            # Metrics first: what a checkpoint continues from must already be on record, and be finite.
            write_pending()
            saved.save(step, state, {"loader": loader.get_state()})
            adapter = meshes.to_host(training.exported(state, config, frozen)[name], mesh)
            if first:
                training.export(config, folder, adapter, step, base_sha256)

        # --------------------------------------------------------------------------------------------- loop
        with runs.progress(settings.steps, "train", done=start, unit="step", shown=first) as bar:
            for step in range(start + 1, settings.steps + 1):
                with training.no_hidden_transfers():
                    batch = training.device_batch(next(loader), mesh, inputs.diptychs)
                    clock.data_arrived()
                if step == start + 1:
                    processes.compile_together(train_step, state, base, batch, frozen)
                with training.no_hidden_transfers():
                    state, values = train_step(state, base, batch, frozen)
                    write_pending()
                    pending = (step, values, clock.step(settings.batch))
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
