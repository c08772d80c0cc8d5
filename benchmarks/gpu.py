"""The table of targets on an accelerator, in one command: ``make bench-gpu`` or ``python -m benchmarks.gpu``.

FLUX.1 of 12 billion random weights in bfloat16 at 1024 pixels: the plain forward pass, training steps of Om-K and of
the diptych, and whole pictures, with conditions in every step and remembered. Each case has a process of its own and is
recorded when it ends, so that a stopped benchmark is continued by the same command. Seconds are medians after one
warm-up call. Operations are those of ``plan.flops``; MFU counts what learning takes, HFU what is computed again, too;
both are parts of the rate of a large matrix product measured in the same run. ``--profile FOLDER`` traces one call of
each case. Sizes below ``full`` go the same way within seconds, on CPUs as well.

How the numbers compare with PyTorch's: ``python -m benchmarks.against_torch --size shallow --device cuda --dtype
bfloat16 --compile``.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import cases, sides
from benchmarks.cases import Case

CEILING = "ceiling"


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the table.

    Attributes:
      case: what is run.
      steps: of the sampler.
      cache: whether conditions are remembered.
      target: seconds at full size on an H200 (60 % of 790 TFLOP/s); 0 where none is set.
    """

    work: Literal["forward", "train", "sample"]
    case: cases.Name
    batch: int = 1
    steps: int = 1
    cache: bool = False
    target: float = 0.0


JOBS = {
    "forward": Job("forward", "plain", target=0.157),
    "om-train-1": Job("train", "om"),
    "om-train-5": Job("train", "om", batch=5, target=9.6),
    "insert-train-4": Job("train", "insert", batch=4, target=5.9),
    "plain-28": Job("sample", "plain", steps=28, target=4.4),
    "om-28": Job("sample", "om", steps=28, target=15.1),
    "om-28-cached": Job("sample", "om-independent", steps=28, cache=True, target=6.2),
    "insert-50": Job("sample", "insert", steps=50, target=19.4),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; the hidden option ``--child`` is one measured process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if options.child:
        child(options)
        return
    path = options.out or sides.default_path(f"gpu-{options.size}-{options.dtype}")
    names = ("size", "dtype", "remat", "repeats", "sample_steps")
    if options.again:
        path.unlink(missing_ok=True)
    record = sides.Record(path, {name: getattr(options, name) for name in names})
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    failed = {}
    for name in (CEILING, *options.jobs):
        if record.get(name) is None:
            try:
                record.put(name, sides.run("benchmarks.gpu", [*argv, "--child", name], memory))
            except RuntimeError as error:
                # One that does not fit must not keep the others from being measured.
                failed[name] = str(error)
                print(f"{name}: failed", flush=True)
                continue
        print(line(name, record.content["runs"], options), flush=True)
    print(f"recorded in {path}")
    if failed:
        sys.exit("\n".join(f"gpu: {name}: {message}" for name, message in failed.items()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(cases.SIZES), default="full")
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--remat", choices=("none", "full", "save_attention"), default="full")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each case")
    parser.add_argument("--sample-steps", type=int, help="of every sampler, instead of the table's")
    parser.add_argument("--profile", type=Path, help="trace one call of each case into this folder")
    parser.add_argument("--out", type=Path, help="where to record; benchmarks/results by default")
    parser.add_argument("--again", action="store_true", help="measure anew what is recorded")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def line(name: str, runs: dict[str, Any], options: argparse.Namespace) -> str:
    """What was measured, beside the target."""
    run = runs[name]
    if name == CEILING:
        return f"{CEILING}: {run['rate'] / 1e12:.2f} TFLOP/s, {run['bandwidth'] / 1e9:.0f} GB/s on {run['device']}"
    rate = runs[CEILING]["rate"]
    target = JOBS[name].target if options.size == "full" and options.dtype == "bfloat16" else 0.0
    goal = f"; target {target} s {'met' if run['seconds'] <= target else 'MISSED'}" if target else ""
    return (
        f"{name}: {run['seconds']:.3f} s ({run['least']:.3f} to {run['most']:.3f}), "
        f"compiled in {run['compile']:.0f} s, "
        f"MFU {100 * run['model'] / run['seconds'] / rate:.0f} %, "
        f"HFU {100 * run['hardware'] / run['seconds'] / rate:.0f} %, "
        f"{run['device_peak'] / 2**30:.1f} GiB on the device{goal}"
    )


# ------------------------------------------------------------------------------------------------------ children


def child(options: argparse.Namespace) -> None:
    """One measured process."""
    import jax

    jax.devices()
    sides.event("imported")
    if options.child == CEILING:
        ceiling(options)
    else:
        measure(options, JOBS[options.child])


def ceiling(options: argparse.Namespace) -> None:
    """Operations a second of a matrix product, and bytes a second of a copy."""
    import jax
    import jax.numpy as jnp

    accelerated = jax.default_backend() != "cpu"
    side, length = (8192, 2**30) if accelerated else (1024, 2**24)
    x = jnp.ones((side, side), options.dtype)
    product = _seconds(jax.jit(lambda a, b: a @ b), (x, x), 10)
    values = jnp.ones(length, jnp.bfloat16)
    copy = _seconds(jax.jit(lambda a: -a), (values,), 10)
    sides.event(
        "done", rate=2 * side**3 / min(product), bandwidth=2 * values.nbytes / min(copy),
        device=jax.devices()[0].device_kind,
    )  # fmt: skip


def _seconds(function: Any, arguments: tuple[Any, ...], count: int) -> list[float]:
    """Seconds of ``count`` calls, after one that is not counted."""
    import jax

    found = []
    for _ in range(count + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return found[1:]


def measure(options: argparse.Namespace, job: Job) -> None:
    """One line of the table."""
    import jax

    from benchmarks import jax_side

    case = Case(job.case, cases.SIZES[options.size])
    model = jax_side.load(case, options.dtype, options.remat)
    data = jax_side.put(cases.inputs(case, job.batch))
    start = time.perf_counter()
    call: Any
    if job.work == "train":
        state, step = jax_side.make_step(model)
        compiled: Any = step.lower(state, model.base, data).compile()
        held = [state]
        del state

        def train() -> Any:
            held[0], values = compiled(held[0], model.base, data)
            return values

        call = train
        kernel: Any = "flash" if jax.default_backend() == "gpu" else "blocked"
        training = jax_side.training_operations(case, options.remat, kernel)
        operations = (training.model, training.hardware)
    else:
        steps = options.sample_steps or job.steps if job.work == "sample" else 1
        run = jax_side.make_sampler(model, cache=job.cache)
        arguments = (model.base, model.adapter.params, data, cases.levels(steps))
        call = functools.partial(run.lower(*arguments).compile(), *arguments)
        operations = (jax_side.sampling_operations(case, steps, cache=job.cache),) * 2
    spent = time.perf_counter() - start
    sides.event("ready")
    seconds = _seconds(call, (), options.repeats)
    if options.profile:
        with jax.profiler.trace(options.profile / options.child):
            jax.block_until_ready(call())
    stats = jax.devices()[0].memory_stats() or {}
    sides.event(
        "done", seconds=statistics.median(seconds), least=min(seconds), most=max(seconds), compile=spent,
        model=job.batch * operations[0], hardware=job.batch * operations[1],
        device_peak=stats.get("peak_bytes_in_use", 0),
    )  # fmt: skip


if __name__ == "__main__":
    main()
