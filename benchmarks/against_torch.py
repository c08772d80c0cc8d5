"""A training step and sampling against PyTorch: ``python -m benchmarks.against_torch --size middle``.

The other side (``torch_side``) runs the same step on diffusers' FLUX modules, with the same weights and inputs. Every
side runs in fresh processes, in turn. Compared are seconds per step and the peak of anonymous memory, beyond that of
the imports and of the process as a whole; a ratio is printed only if, in float32, both sides found the same: every
step's loss and gradient norm, or the drawn latents. Sampling of independent conditions remembers them on our side;
PyTorch, as the published code, computes them in every step.

A stopped benchmark is continued by the same command; ``--again`` measures anew. ``--compile`` adds torch.compile,
``--device cuda`` runs both sides on a GPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks import cases, sides
from benchmarks.cases import Case

OURS, EAGER, COMPILED = "nabla_jax", "torch", "torch.compile"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative difference between the sides."""


Runs = dict[str, list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """The command; the hidden option ``--child`` is one measured process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if options.child:
        child(options)
        return
    path = options.out or sides.default_path(f"against_torch-{options.size}-{options.device}-{options.dtype}")
    names = ("size", "device", "dtype", "batch", "remat", "warm", "steps", "sample_steps")
    if options.again:
        path.unlink(missing_ok=True)
    record = sides.Record(path, {name: getattr(options, name) for name in names})
    ratios: dict[str, Any] = dict(record.content.get("ratios", {}))
    failed = []
    for work in options.works:
        for name in options.cases:
            runs = measure(record, options, argv, work, name)
            for other in list(runs)[1:]:
                key = f"{work}/{name}/{other}"
                difference = disagreement(runs[OURS], runs[other])
                if difference > TOLERANCE[options.dtype]:
                    failed.append(f"{key}: the sides differ by {difference:.1e}")
                    ratios.pop(key, None)
                    continue
                ratios[key] = ratio(runs[OURS], runs[other]) | {"difference": difference}
                print(describe(key, runs[OURS], runs[other], ratios[key]), flush=True)
            record.write(ratios=ratios)
    print(f"recorded in {path}")
    if failed:
        sys.exit("\n".join(["against_torch: no ratio, since both sides must find the same:", *failed]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those not given depend on the size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(cases.SIZES), default="toy")
    parser.add_argument("--cases", nargs="+", choices=cases.NAMES, default=list(cases.NAMES))
    parser.add_argument("--works", nargs="+", choices=("train", "sample"), default=["train", "sample"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--warm", type=int, default=1, help="steps of training before the measured ones")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of training, per process")
    parser.add_argument("--sample-steps", type=int, default=28)
    parser.add_argument("--remat", choices=("none", "full", "save_attention"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--out", type=Path, help="where to record; benchmarks/results by default")
    parser.add_argument("--again", action="store_true", help="measure anew what is recorded")
    parser.add_argument("--child", nargs=4, metavar=("WORK", "CASE", "SIDE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(record: sides.Record, options: argparse.Namespace, argv: Sequence[str], work: str, name: str) -> Runs:
    """Every side's processes for one kind of work of one case, in turn; those on record are not run again."""
    found: Runs = {side: [] for side in (OURS, EAGER, *([COMPILED] if options.compile else []))}
    # Latents are too large for the record.
    folder = Path(tempfile.gettempdir()) / f"nabla_jax-{record.path.stem}"
    folder.mkdir(exist_ok=True)
    for number in range(options.rounds):
        for side, runs in found.items():
            key = f"{work}/{name}/{side}/{number}"
            file = folder / f"{key.replace('/', '-')}.npy"
            values = record.get(key)
            if values is None or (work == "sample" and not file.is_file()):
                values = sides.run("benchmarks.against_torch", [*argv, "--child", work, name, side, str(file)])
                record.put(key, values)
                print(
                    f"{key}: {values['seconds']:.3f} s ({values['least']:.3f} to {values['most']:.3f}), "
                    f"processor {values['processor']:.3f} s, "
                    f"{(values['memory_peak'] - values['memory_before']) / 2**30:.2f} GiB beyond imports at most, "
                    f"{(values['memory_end'] - values['memory_before']) / 2**30:.2f} at the end, first after "
                    f"{values['seconds_to']['ready']:.0f} s",
                    flush=True,
                )
            runs.append(values | {"latents": np.load(file, allow_pickle=False)} if work == "sample" else values)
    return found


def disagreement(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of losses and gradient norms, or of latents by their largest number."""
    worst = 0.0
    for a, b in zip(ours, other, strict=True):
        for name in ("loss", "grad_norm"):
            for x, y in zip(a.get(name, ()), b.get(name, ()), strict=True):
                worst = max(worst, abs(x - y) / abs(y))
        if "latents" in a:
            worst = max(worst, float(np.abs(a["latents"] - b["latents"]).max() / np.abs(b["latents"]).max()))
    return worst


def ratio(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast we are: the median over the rounds and their range; and the ratios of memory."""
    speeds = [b["seconds"] / a["seconds"] for a, b in zip(ours, other, strict=True)]
    memory = [_beyond(a) / _beyond(b) for a, b in zip(ours, other, strict=True)]
    whole = [a["memory_peak"] / max(b["memory_peak"], 1) for a, b in zip(ours, other, strict=True)]
    return {
        "speed": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds),
        "memory": statistics.median(memory), "process": statistics.median(whole),
    }  # fmt: skip


def _beyond(run: dict[str, Any]) -> float:
    """Bytes that the work took at most: of the GPU if there is one, else of the host beyond the imports."""
    return max(run["device_peak"] or run["memory_peak"] - run["memory_before"], 1)


def describe(key: str, ours: list[dict[str, Any]], other: list[dict[str, Any]], found: dict[str, float]) -> str:
    """One line."""
    seconds = [statistics.median(run["seconds"] for run in side) for side in (ours, other)]
    memory = [statistics.median(_beyond(run) for run in side) / 2**30 for side in (ours, other)]
    return (
        f"{key}: {seconds[0]:.3f} s against {seconds[1]:.3f} s, {found['speed']:.2f} times as fast "
        f"({found['slowest']:.2f} to {found['fastest']:.2f}); memory {memory[0]:.2f} against {memory[1]:.2f} GiB, "
        f"{found['memory']:.2f} times, of the whole process {found['process']:.2f} times; "
        f"largest relative difference {found['difference']:.1e}"
    )


# ------------------------------------------------------------------------------------------------------ children


def child(options: argparse.Namespace) -> None:
    """One measured process."""
    work, name, side, file = options.child
    case = Case(cast(cases.Name, name), cases.SIZES[options.size])
    run = run_ours if side == OURS else run_torch
    run(options, case, work, side, Path(file))


def timed(function: Any, warm: int, count: int) -> tuple[list[tuple[float, float]], list[Any]]:
    """Seconds (wall clock, processor) of ``count`` calls after ``warm`` ones, and what all of them returned."""
    seconds, results = [], []
    for _ in range(warm + count):
        start = time.perf_counter(), time.process_time()
        results.append(function())
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        sides.event("step", seconds=seconds[-1])
    return seconds[warm:], results


def report(seconds: list[tuple[float, float]], device_peak: int, **values: Any) -> None:
    """The child's last word."""
    wall, processor = ([each[i] for each in seconds] for i in range(2))
    sides.event(
        "done", seconds=statistics.median(wall), least=min(wall), most=max(wall),
        processor=statistics.median(processor), device_peak=device_peak, **values,
    )  # fmt: skip


def run_ours(options: argparse.Namespace, case: Case, work: str, side: str, file: Path) -> None:
    """nabla_jax's process."""
    import jax

    from benchmarks import jax_side
    from nabla_jax import compiling

    jax.devices()
    sides.event("imported")
    model = jax_side.load(case, options.dtype, options.remat)
    data = jax_side.put(cases.inputs(case, options.batch))
    jax.block_until_ready(model.base)
    sides.event("loaded")
    start = time.perf_counter()
    if work == "train":
        state, step = jax_side.make_step(model)
        compiled: Any = compiling.ahead(step, state, model.base, data)  # as training does
        held = [state]
        del state

        def once() -> dict[str, float]:
            held[0], values = compiled(held[0], model.base, data)
            return {key: float(value) for key, value in values.items()}

        analysis = _sizes(compiled)
        ready = time.perf_counter() - start
        sides.event("ready")
        seconds, results = timed(once, options.warm, options.steps)
        values = {key: [result[key] for result in results] for key in ("loss", "grad_norm")}
    else:
        run = jax_side.make_sampler(model, cache=case.independent)
        arguments = (model.base, model.adapter.params, data)
        levels = cases.levels(options.sample_steps)
        compiled = compiling.ahead(run, *arguments, levels)  # as drawing pictures does
        analysis = _sizes(compiled)
        ready = time.perf_counter() - start
        sides.event("ready")
        seconds, results = timed(lambda: np.asarray(compiled(*arguments, levels)), 0, 1)
        np.save(file, results[-1])
        values = {}
    stats = jax.devices()[0].memory_stats() or {}
    report(seconds, stats.get("peak_bytes_in_use", 0), compile=ready, xla=analysis, **values)


def _sizes(compiled: Any) -> dict[str, int]:
    """What the compiler says of its buffers, in bytes."""
    found = compiled.memory_analysis()
    names = ("argument", "temp", "output", "alias", "generated_code")
    return {name: int(getattr(found, f"{name}_size_in_bytes")) for name in names}


def run_torch(options: argparse.Namespace, case: Case, work: str, side: str, file: Path) -> None:
    """PyTorch's process."""
    import torch

    from benchmarks import torch_side

    sides.event("imported")
    dtype = getattr(torch, options.dtype)
    made = torch_side.Side(case, options.device, dtype, remat=options.remat == "full", compiled=side == COMPILED)
    data = made.put(cases.inputs(case, options.batch))
    sides.event("loaded")
    values: dict[str, Any] = {}
    if work == "train":
        step = made.make_step()
        sides.event("ready")
        seconds, results = timed(lambda: step(data), options.warm, options.steps)
        values = {key: [result[key] for result in results] for key in ("loss", "grad_norm")}
    else:
        # What torch.compile and the first call's set-up take is not the sampler's.
        made.sample(data, cases.levels(options.sample_steps)[:2])
        sides.event("ready")
        levels = cases.levels(options.sample_steps)
        seconds, results = timed(lambda: made.sample(data, levels).cpu().numpy(), 0, 1)
        np.save(file, results[-1])
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    report(seconds, peak, **values)


if __name__ == "__main__":
    main()
