"""What the real TPU compiler says of the paper's run: ``.venv-tpu/bin/python -m benchmarks.plan_tpu``.

Needs ``make plan-tpu`` and no TPU. Each case is one ``python -m nabla_jax.plan`` in a process of its own, which
compiles the true training step at full size; what it finds is added to ``benchmarks/results/plan_tpu.json``. Cases that
are recorded there are not run again. Prints all records as a table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nabla_jax import runs

RESULTS = Path(__file__).parent / "results" / "plan_tpu.json"
GIB = 2**30
FLAGS = "--xla_jf_critical_path_scheduler=false"
"""Orders instructions in a simpler way, after every buffer has its place: the step would be slower, no larger."""


class Case(NamedTuple):
    """A machine, and how the run is laid on it."""

    topology: str
    mesh: str
    batch: int
    attention: str = "splash"
    config: str = "configs/omk_keypoints.py"


CASES = tuple(
    Case(topology, mesh, batch, attention)
    for attention in ("splash", "chunked")
    for topology, mesh, batch in (
        ("v5e:2x4", "fsdp=8", 8),
        ("v6e:2x4", "fsdp=8", 8),
        ("v5p:2x2x1", "fsdp=4", 4),
        ("v5e:4x4", "fsdp=16", 16),
    )
)


def measure(case: Case) -> dict[str, Any]:
    """One record: the case, the plan's and the compiler's bytes of a device, and what it was made with."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [
            sys.executable, "-m", "nabla_jax.plan", "--config", case.config, "--topology", case.topology,
            "--mesh", case.mesh, f"--config.train.batch={case.batch}",
            f"--config.base.attention={case.attention}", "--compile", "yes", "--json", str(file),
        ]  # fmt: skip
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": FLAGS}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return record(case, runs.read_json(file))


def record(case: Case, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a plan as ``python -m nabla_jax.plan --json`` writes it."""
    return {
        "case": case._asdict(),
        "planned": plan["per_device"],
        "fits": plan["fits"],
        "compiled": plan["compiled"],
        "seconds_of_a_step": plan["seconds"]["least"],
        "environment": runs.environment()
        | {"command": ["benchmarks/plan_tpu.py", *sys.argv[1:]], "machine": machine(), "LIBTPU_INIT_ARGS": FLAGS},
    }


def machine() -> str:
    """The processor that compiled."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(models)} x {models[0].partition(':')[2].strip()}"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """All records in Markdown; GiB of one device."""
    rows = [
        "| topology | mesh | batch | attention | planned | arguments | temporaries | peak | room | fits | compiled in |"
    ]
    rows.append("|" + "---|" * 11)
    for one in records:
        case, compiled, planned = one["case"], one["compiled"], one["planned"]
        found = [compiled[key] / GIB for key in ("arguments", "temporaries", "peak")]
        sizes = [f"{value:.2f}" if compiled["fits"] else "" for value in found]
        cells = [
            case["topology"], case["mesh"], str(case["batch"]), case["attention"],
            f"{planned['total'] / GIB:.2f}", *sizes,
            f"{planned['room'] / GIB:.2f}", "yes" if compiled["fits"] else "no", f"{compiled['seconds']:.0f} s",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Runs what is missing, case by case, and prints everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="topologies, separated by commas (default: all)")
    parser.add_argument("--attention", default="", help="kernels, separated by commas (default: all)")
    parser.add_argument("--again", action="store_true", help="run cases that are recorded, too, and replace them")
    options = parser.parse_args()
    wanted = [
        case for case in CASES
        if case.topology in (options.only or case.topology).split(",")
        and case.attention in (options.attention or case.attention).split(",")
    ]  # fmt: skip
    records = runs.read_json(RESULTS) if RESULTS.is_file() else []
    for case in wanted:
        same = [one for one in records if one["case"] == case._asdict()]
        if same and not options.again:
            continue
        made = measure(case)
        records = [one for one in records if one not in same] + [made]
        runs.write_json(RESULTS, records)
        print(json.dumps(made["compiled"]), flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
