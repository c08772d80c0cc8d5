"""The same work for each device on 1, 2, 4 and 8 devices: ``python -m benchmarks.scaling``.

Every size runs in a process that sees so many devices, CPUs that pretend where there are not enough (then they share
the same cores, and seconds say nothing). The batch grows with the devices. Checked: loss and gradient norm are those of
one device with the whole batch; counted: the bytes that the compiled step hands to collectives, beside the bytes of the
gradients, which is what cutting the batch must cost.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, sides
from benchmarks.cases import Case

TOLERANCE = 1e-5
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ALONE = re.compile(r"replica_groups=\{(\{\d+\},?)+\}")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f64": 8}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; the hidden option ``--child`` is one measured process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(cases.SIZES), default="toy")
    parser.add_argument("--case", choices=cases.NAMES, default="om")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share one copy of the frozen base")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to record; benchmarks/results by default")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options)
        return
    path = options.out or sides.default_path(f"scaling-{options.size}-{options.case}")
    names = ("size", "case", "fsdp", "steps")
    record = sides.Record(path, {name: getattr(options, name) for name in names})
    for count in options.devices:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        run = sides.run("benchmarks.scaling", [*argv, "--child", str(count)], {"XLA_FLAGS": flags})
        record.put(str(count), run)
        sent = ", ".join(f"{name} {size / 1e6:.3f} MB" for name, size in run["collectives"].items()) or "no collectives"
        print(
            f"{count} devices: {run['seconds']:.3f} s a step, {sent} (gradients {run['gradients'] / 1e6:.3f} MB), "
            f"difference from one device {run['difference']:.1e}",
            flush=True,
        )
        if run["difference"] > TOLERANCE:
            sys.exit(f"scaling: {count} devices find another loss or gradient than one: {run['difference']:.1e}")
    print(f"recorded in {path}")


def child(options: argparse.Namespace) -> None:
    """One number of devices."""
    import jax
    import numpy as np

    from benchmarks import jax_side
    from nabla_jax.models.partitioning import AXES
    from nabla_jax.parallel import mesh as meshes
    from nabla_jax.parallel import rules

    count = options.child
    sizes = dict.fromkeys(AXES, 1) | {"data": 0, "fsdp": min(options.fsdp, count)}
    mesh = meshes.make_mesh(sizes, jax.devices()[:count])
    sides.event("imported")
    case = Case(options.case, cases.SIZES[options.size])
    model = jax_side.load(case)
    data = cases.inputs(case, count)
    state, step = jax_side.make_step(model)
    jitted: Any = step
    # The first step of the whole batch on one device; a copy, since the step takes its state's place.
    _, expected = jitted(jax.tree.map(lambda x: x.copy(), state), model.base, jax_side.put(data))
    # All else is replicated: adapters are small.
    state = jax.device_put(state, meshes.replicated(mesh))
    base = jax.device_put(model.base, rules.shardings(model.base, mesh))
    placed = meshes.put_batch(data, mesh)
    with jax.set_mesh(mesh):
        compiled = jitted.lower(state, base, placed).compile()
        seconds = []
        for number in range(options.steps):
            start = time.perf_counter()
            state, values = compiled(state, base, placed)
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - start)
            if not number:
                difference = max(abs(float(values[k]) / float(expected[k]) - 1) for k in expected)
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.adapter.params))
    sides.event(
        "done", seconds=float(np.median(seconds)), difference=difference, gradients=gradients,
        collectives=collectives(compiled.as_text()),
    )  # fmt: skip


def collectives(program: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective in one run of a compiled program.

    What stands in a loop's body counts as often as the loop runs; groups of one device send nothing.
    """
    sent: dict[str, list[tuple[str, int]]] = {}  # by computation
    called: dict[str, list[tuple[str, int]]] = {}  # and how often
    entry = name = ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
            continue
        trips = _TRIPS.search(line)
        for inner in _CALLED.findall(line):
            called.setdefault(name, []).append((inner, int(trips[1]) if trips else 1))
        match = _COLLECTIVE.search(line)
        if match is not None and not _ALONE.search(line):
            shapes = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1])
            size = sum(_BYTES[kind] * _count(shape) for kind, shape in shapes)
            sent.setdefault(name, []).append((match[2], size))

    found: dict[str, int] = {}

    def add(computation: str, times: int) -> None:
        for kind, size in sent.get(computation, ()):
            found[kind] = found.get(kind, 0) + times * size
        for inner, count in called.get(computation, ()):
            add(inner, times * count)

    add(entry, 1)
    return found


def _count(shape: str) -> int:
    count = 1
    for length in filter(None, shape.split(",")):
        count *= int(length)
    return count


if __name__ == "__main__":
    main()
