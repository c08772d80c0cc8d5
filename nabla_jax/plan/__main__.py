"""What a run takes, before anything is loaded or downloaded: ``python -m nabla_jax.plan --config configs/omk_fill.py``.

Prints exact bytes of everything a run stores, an estimate of what each device needs for a training step, operations
by formula, the least seconds of a step, device-hours of the whole run and of the full evaluation, and, where the run
does not fit, the nearest setting that does. Weights are not read: a base that is not there is planned by its published
configuration. For TPUs the real compiler is asked where ``make plan-tpu`` has installed it.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.errors import UserError

if TYPE_CHECKING:
    from nabla_jax.plan.ahead import Compiled
    from nabla_jax.plan.planning import Plan

PICTURES = 23_929
"""Training pictures of NABirds."""


def main(argv: Sequence[str]) -> None:
    """The command."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--topology", default="h200x1", metavar="NAME",
            help="v5e:4x4, v6e:2x4, v5p:2x2x1, h100x8, h200x1, cpu, ... (default: %(default)s)",
        )  # fmt: skip
        parser.add_argument("--mesh", default="", metavar="AXIS=SIZE,...", help="of data, fsdp, tensor and sequence")
        parser.add_argument("--pictures", type=int, default=PICTURES, help="that are prepared (default: %(default)s)")
        parser.add_argument(
            "--utilisation", type=float, default=0.5,
            help="the part of the peak that matrix products reach (default: %(default)s)",
        )  # fmt: skip
        parser.add_argument(
            "--compile", choices=("auto", "yes", "no"), default="auto",
            help="compile the true training step for the topology; auto: for cpu, and for TPUs if there is a compiler",
        )  # fmt: skip
        parser.add_argument("--json", metavar="FILE", help="write everything to a file, too")

    config, options = configs.parse_command(argv, "Says what a run takes before anything is loaded.", arguments)
    if options.pictures < 0:
        raise UserError(f"--pictures: found {options.pictures}, expected 0 or more")
    # A plan is the same wherever it is made, and takes no memory of a device that others use.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported after the checks: a mistake on the command line is answered before any framework loads.
    from nabla_jax.parallel.mesh import fill_sizes
    from nabla_jax.plan import ahead, machines, meshes, planning

    topology = machines.topology(options.topology)
    if options.mesh:
        mesh = meshes.parse_mesh(options.mesh, topology.devices)
    else:
        mesh = fill_sizes(dataclasses.asdict(config.mesh), topology.devices)
    utilisation = planning.check_utilisation(options.utilisation)
    planner = planning.Planner(config, pictures=options.pictures, utilisation=utilisation)
    plan = planner.plan(topology, mesh)
    nearest = None if plan.fits else planner.nearest(plan)
    print(table(config.source, plan, planner.architecture.published, options.pictures))
    print(verdict(plan, nearest), flush=True)
    compiled = None
    wanted = options.compile == "yes" or (options.compile == "auto" and topology.device.kind != "gpu")
    if wanted and options.compile == "auto" and not ahead.can_compile(topology):
        print(f"compiler: there is none for {topology.name} here; make plan-tpu installs it")
    elif wanted:
        if plan.problem:
            raise UserError(f"--compile: {plan.problem}")
        print(f"compiler: compiling the training step for {topology.name}, which takes minutes", flush=True)
        compiled = ahead.compile_step(config, planner.networks, topology, mesh)
        print(compiler_line(compiled))
        if topology.device.kind == "cpu":
            print(f"a training process: about {size(compiled.process)} beyond its imports")
    if options.json:
        runs.write_json(Path(options.json), content(config.source, plan, nearest, compiled))


def size(count: float) -> str:
    """Bytes for people, in the units of memory."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def operations(count: float) -> str:
    """Operations for people."""
    for unit in ("M", "G"):
        if count < 1e9 * (1000 if unit == "G" else 1):
            return f"{count / (1e6 if unit == 'M' else 1e9):,.2f} {unit}FLOP"
    return f"{count / 1e12:,.2f} TFLOP"


def table(source: str, plan: "Plan", published: Sequence[str], pictures: int) -> str:
    """Everything about one plan, in lines."""
    from nabla_jax.plan.meshes import mesh_text

    stored, held, work, config = plan.sizes, plan.held, plan.work, plan.config
    device, training, batch = plan.topology.device, work.training, batch_text(config.train)
    rows: list[tuple[str, list[tuple[str, str]]]] = [
        ("parameters", [
            (f"frozen base, {base_format(config)}", size(stored.base)),
            ("autoencoder, float32", size(stored.vae)),
            ("text encoders, bfloat16 (not held while training)", size(stored.text_encoders)),
            *([(f"Redux and SigLIP, {config.train.dtype}", size(stored.redux))] if stored.redux else []),
            (f"adapters, {config.lora.dtype}", size(stored.adapters)),
            ("gradients", size(stored.gradients)),
            (f"optimizer state, {config.optim.name}", size(stored.optimizer)),
            *([("running average", size(stored.average))] if stored.average else []),
            *([("frozen adapter", size(stored.frozen_adapter))] if stored.frozen_adapter else []),
        ]),
        ("on disk", [
            ("a checkpoint, uncompressed", size(stored.checkpoint)),
            ("checkpoints that are kept", size(stored.kept_checkpoints)),
            (f"adapter files of {config.train.steps:,} steps", size(stored.adapter_files)),
            *([(f"prepared records of {pictures:,} pictures", size(stored.prepared))] if stored.record else []),
        ]),
        (f"each of {plan.topology.devices} {device.name}, mesh {mesh_text(plan.mesh)}, batch {batch}", [
            ("base", size(held.base)),
            ("adapters, optimizer, average", size(held.state)),
            ("gradients", size(held.gradients)),
            ("other networks", size(held.others)),
            ("whole weights of blocks (estimate)", size(held.gathered)),
            (f"activations, remat {config.train.remat} (estimate)", size(held.activations)),
            ("together (estimate)", f"{size(held.total)} of {size(plan.room)}"),
        ]),
        ("one sample", [
            ("tokens", f"{work.tokens:,}"),
            ("training, model", operations(training.model)),
            ("training, computed again", operations(training.recomputed)),
            (f"sampling, {work.plain.steps} steps", operations(work.plain.total)),
            *([("sampling with remembered conditions", operations(work.cached.total))] if work.cached else []),
            ("autoencoder, encode and decode", operations(work.encoding + work.decoding)),
        ]),
        (f"least time at {plan.utilisation:.0%} of {device.peak / 1e12:,.1f} TFLOP/s", [
            ("arithmetic of a step", f"{plan.seconds.compute:,.3f} s"),
            ("memory", f"{plan.seconds.memory:,.3f} s"),
            (f"collectives, {size(plan.sent.total)}", f"{plan.seconds.collectives:,.3f} s"),
            (f"a step, bound by {plan.seconds.bound}", f"{plan.seconds.least:,.3f} s"),
            (f"training, {config.train.steps:,} steps", f"{plan.training_hours:,.1f} device-hours"),
            ("the full evaluation's pictures", f"{plan.evaluation_hours:,.1f} device-hours"),
        ]),
    ]  # fmt: skip
    lines = [source]
    lines += [f"{folder}: not there, planned by its published configuration" for folder in published]
    for title, entries in rows:
        lines += ["", title, *(f"  {name:<52}{value:>24}" for name, value in entries)]
    return "\n".join(lines) + "\n"


def batch_text(train: "configs.Train") -> str:
    """``16``, or ``16 in 4 parts``."""
    return f"{train.batch} in {train.accumulate} parts" if train.accumulate > 1 else str(train.batch)


def base_format(config: configs.Config) -> str:
    """What the numbers of the frozen base are kept in."""
    quantise = config.base.quantise
    return config.train.dtype if quantise == "none" else f"{config.train.dtype}, blocks {quantise}"


def verdict(plan: "Plan", nearest: "Plan | None") -> str:
    """Whether it fits, and what would."""
    from nabla_jax.plan import planning

    if plan.fits:
        return f"fits: about {size(plan.held.total)} of {size(plan.room)} on each device"
    reasons = [plan.problem] if plan.problem else []
    if plan.held.total > plan.room:
        reasons.append(f"about {size(plan.held.total)} of {size(plan.room)} on each device")
    why = "; ".join(reasons)
    if nearest is None:
        return f"does not fit: {why}; nor does anything that is offered"
    return f"does not fit: {why}\nfits with: {' '.join(planning.changes(plan, nearest))}"


def compiler_line(compiled: "Compiled") -> str:
    """What the compiler said."""
    took = f"({compiled.seconds:.0f} s)"
    if not compiled.fits:
        return f"compiler: refused {took}: {compiled.message}"
    peak = f", peak {size(compiled.peak)}" if compiled.peak else ""
    return (
        f"compiler: accepted {took}: each device {size(compiled.arguments)} of arguments and "
        f"{size(compiled.temporaries)} of temporaries{peak}"
    )


def content(source: str, plan: "Plan", nearest: "Plan | None", compiled: "Compiled | None") -> dict[str, Any]:
    """Everything about a plan as plain values, in bytes, operations, seconds and device-hours."""
    from nabla_jax.plan import planning

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(dataclasses.asdict(value)))

    return {
        "config": source,
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "mesh": dict(plan.mesh),
        "train": plain(plan.config.train),
        "sizes": plain(plan.sizes),
        "activations": plain(plan.activations),
        "per_device": plain(plan.held) | {"total": plan.held.total, "room": plan.room},
        "fits": plan.fits,
        "problem": plan.problem,
        "work": plain(plan.work) | {"model": plan.work.training.model, "hardware": plan.work.training.hardware},
        "seconds": plain(plan.seconds) | {"least": plan.seconds.least, "bound": plan.seconds.bound},
        "collective_bytes": plain(plan.sent),
        "utilisation": plan.utilisation,
        "device_hours": {"training": plan.training_hours, "evaluation": plan.evaluation_hours},
        "nearest": planning.changes(plan, nearest) if nearest else None,
        "compiled": plain(compiled) | {"process": compiled.process} if compiled else None,
    }


if __name__ == "__main__":
    runs.run_main(main)
