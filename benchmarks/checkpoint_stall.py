"""How long a checkpoint holds up training: ``python -m benchmarks.checkpoint_stall``.

Saves the state of a configuration's run (adapters, optimizer, step; by default of Om-K at the paper's size), filled
with random numbers, as training does: the step may go on when ``save`` returns, and the rest is written behind it.
Prints, for each of ``--rounds`` saves, the seconds until then and until everything is on disk. The first save also
compiles the checksums.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import sides
from nabla_jax import config as configs
from nabla_jax.checkpoints.run_state import RunState
from nabla_jax.models import layers
from nabla_jax.plan import networks


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/omk_fill.py")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="where to record; benchmarks/results by default")
    options = parser.parse_args(argv)
    config = configs.load(options.config)
    shapes = networks.make(config, networks.read_architecture(config)).state
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: jax.device_put((100 * rng.random(s.shape, np.float32)).astype(s.dtype)), shapes)
    jax.block_until_ready(state)
    size = layers.tree_bytes(state)
    record = sides.Record(options.out or sides.default_path("checkpoint_stall"), {"config": options.config})
    stalls = []
    with tempfile.TemporaryDirectory() as folder, RunState(Path(folder)) as saved:
        for number in range(1, options.rounds + 1):
            start = time.perf_counter()
            saved.save(number, state, {"step": number})
            stall = time.perf_counter() - start
            saved.wait()
            whole = time.perf_counter() - start
            record.put(f"save/{number}", {"bytes": size, "stall": stall, "whole": whole})
            stalls.append(stall)
            print(
                f"save {number}, {size / 2**20:,.0f} MiB: {stall:.2f} s until training goes on, {whole:.2f} s to disk"
            )
    later = statistics.median(stalls[1:] or stalls)
    print(f"later saves hold up training for {later:.2f} s (median), {size / later / 2**30:.2f} GiB/s")
    print(f"recorded in {record.path}")


if __name__ == "__main__":
    main()
