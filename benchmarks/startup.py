"""From the start of ``train`` to its first step: ``python -m benchmarks.startup``.

Makes a world and encodes it, unless ``--folder`` has them from the last time, then starts ``python -m nabla_jax.train``
on it, with an empty compilation cache and with the one that this filled, ``--rounds`` times in turn. Measured from the
start of the process to the first line of ``metrics.jsonl``, which is written when the second step has been started;
beside it how long the next steps took, and the process as a whole, which ends with a checkpoint and an adapter's file.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import sides

GOALS = {"cold": 30.0, "warm": 12.0}
STEPS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/omk_fill.py:toy")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the world here and use it again")
    parser.add_argument("--out", type=Path, help="where to record; benchmarks/results by default")
    parser.add_argument("overrides", nargs="*", help="further --config.KEY=VALUE of all commands, after --")
    options = parser.parse_args(argv)
    path = options.out or sides.default_path("startup")
    record = sides.Record(path, {"config": options.config, "rounds": options.rounds, "overrides": options.overrides})
    with tempfile.TemporaryDirectory() as temporary:
        config = prepare(options.folder or Path(temporary), options.config, options.overrides)
        for number in range(options.rounds):
            cache = Path(temporary) / f"cache-{number}"
            for kind in GOALS:
                run = start(config, Path(temporary) / f"run-{number}-{kind}", cache)
                record.put(f"{kind}/{number}", run)
                print(
                    f"{kind} {number}: {run['first']:.1f} s to the first step, {run['whole']:.1f} s in all", flush=True
                )
    for kind, goal in GOALS.items():
        first = statistics.median(record.content["runs"][f"{kind}/{n}"]["first"] for n in range(options.rounds))
        print(f"{kind}: {first:.1f} s (goal: at most {goal:.0f}): {'met' if first <= goal else 'MISSED'}")
    print(f"recorded in {path}")


def prepare(folder: Path, config: str, overrides: Sequence[str]) -> list[str]:
    """Writes and encodes a world where there is none; the options that the commands share."""
    world, prepared = folder / "world", folder / "prepared"
    shared = ["--config", config, f"--config.data.root={world / 'nabirds'}", f"--config.data.prepared={prepared}"]
    shared += overrides
    if not world.is_dir():
        _command("nabla_jax.toybirds", "--out", str(world))
    _command("nabla_jax.prepare", *shared)
    return shared


def _command(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"startup: {module} ended with {done.returncode}: {done.stderr[-2000:]}")


def start(config: Sequence[str], workdir: Path, cache: Path) -> dict[str, Any]:
    """Seconds from the start of a training run to its first metrics, and to its end."""
    shutil.rmtree(workdir, ignore_errors=True)
    arguments = [
        *config, f"--config.train.workdir={workdir}", f"--config.train.steps={STEPS}", "--config.train.log_every=1",
        "--config.train.sample_every=0",
    ]  # fmt: skip
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "nabla_jax.train", *arguments],
            stdout=subprocess.DEVNULL, stderr=errors, env=environment, text=True,
        )  # fmt: skip
        metrics, first = workdir / "metrics.jsonl", 0.0
        while process.poll() is None:
            if not first and metrics.is_file() and metrics.stat().st_size:
                first = time.monotonic() - begun
            time.sleep(0.02)
        if process.returncode or not first:
            errors.seek(0)
            raise SystemExit(f"startup: train ended with {process.returncode}: {errors.read()[-2000:]}")
    programs = sum(1 for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    return {"first": first, "whole": time.monotonic() - begun, "programs": programs}


if __name__ == "__main__":
    main()
