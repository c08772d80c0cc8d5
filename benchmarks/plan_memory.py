"""The memory that ``plan`` foretells against that of training: ``python -m benchmarks.plan_memory``.

A FLUX on random weights, wide enough for arrays to be most of what there is, and a world of birds; both in a folder
that is deleted again. ``python -m nabla_jax.plan --topology cpu`` is asked in a process of its own; then
``nabla_jax.train`` runs in another one, once with an empty compilation cache and once with what the first left there.
Its anonymous memory is looked at every 10 ms. Prints what was foretold, the highest that was found beyond the value
after imports, and their ratio, and adds them to ``benchmarks/results/plan_memory.json``.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nabla_jax import host_memory, runs

RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
MIB = 2**20
STEPS = 2


def write_base(folder: Path, heads: int) -> None:
    """The embedded base with another transformer: 2 + 4 blocks of ``heads`` heads, on random weights."""
    import jax
    import numpy as np

    from nabla_jax import assets
    from nabla_jax.checkpoints import pipeline
    from nabla_jax.models import flux, layers

    source = assets.resolve("asset:toy-flux-kontext")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("transformer"))
    small = pipeline.transformer_config(source)
    config = dataclasses.replace(
        small, num_layers=2, num_single_layers=4, num_attention_heads=heads, attention_head_dim=128,
        axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    _, shapes = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs))
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    pipeline.save_part(folder, "transformer", config, params)


def watched_training(arguments: Sequence[str], cache: Path) -> tuple[int, int]:
    """Anonymous bytes of a fresh process that trains: after its imports, and the most that it had."""
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--train", *arguments]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        imported = int(process.stdout.readline())
        highest = 0
        while process.poll() is None:
            highest = max(highest, host_memory.anonymous(process.pid))
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"training ended with status {process.returncode}")
    return imported, highest


def train(arguments: Sequence[str]) -> None:
    """Trains in this process after everything is imported, and says how much memory that took."""
    import jax
    import optax
    import orbax.checkpoint

    from nabla_jax import train, training
    from nabla_jax.checkpoints import run_state

    jax.devices()
    assert all((optax, orbax.checkpoint, training, run_state))
    print(host_memory.anonymous(), flush=True)
    sys.stdout = sys.stderr
    train.main(arguments)


def verb(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"nabla_jax.{name}", *arguments], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, heads: int, size: int, batch: int, remat: str) -> dict[str, Any]:
    """One record; ``folder`` is empty."""
    write_base(folder / "base", heads)
    verb("toybirds", "--out", str(folder / "world"), "--size", str(size), "--images", "80", "--orders", "1")
    settings = {
        "base.path": folder / "base",
        "data.root": folder / "world" / "nabirds",
        "data.prepared": folder / "prepared",
        "conditioning.size": size,
        "train.batch": batch,
        "train.remat": remat,
        "train.steps": STEPS,
        "train.sample_every": 0,
    }
    config = ["--config", "configs/omk_fill.py:toy", *(f"--config.{key}={value}" for key, value in settings.items())]
    verb("prepare", *config)
    verb("plan", *config, "--topology", "cpu", "--compile", "yes", "--json", str(folder / "plan.json"))
    plan = runs.read_json(folder / "plan.json")
    found = {}
    for state in ("cold", "warm"):
        workdir = f"--config.train.workdir={folder / state}"
        imported, highest = watched_training([*config, workdir], folder / "cache")
        found[state] = {"imported": imported, "highest": highest, "beyond_imports": highest - imported}
    return {
        "case": {"heads": heads, "size": size, "batch": batch, "remat": remat},
        "planned": plan["compiled"],
        "estimated": plan["per_device"],
        "measured": found,
        "ratio": {state: plan["compiled"]["process"] / one["beyond_imports"] for state, one in found.items()},
        "environment": runs.environment() | {"command": ["benchmarks/plan_memory.py", *sys.argv[1:]]},
    }


def main() -> None:
    """Measures one size and prints it."""
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4, help="of 128")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels; 8 make a token")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--remat", default="none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = measure(Path(folder), options.heads, options.size, options.batch, options.remat)
    runs.write_json(RESULTS, [*(runs.read_json(RESULTS) if RESULTS.is_file() else []), made])
    print(json.dumps(made["case"]))
    for state, found in made["measured"].items():
        print(
            f"{state}: planned {made['planned']['process'] / MIB:,.0f} MiB, measured "
            f"{found['beyond_imports'] / MIB:,.0f} MiB, ratio {made['ratio'][state]:.3f}"
        )


if __name__ == "__main__":
    main()
