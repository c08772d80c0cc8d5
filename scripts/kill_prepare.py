"""Kills ``prepare`` with SIGKILL at ten random moments of its work and compares what a second run makes of each.

    python scripts/kill_prepare.py --config configs/omk_fill.py:toy

The command is started anew for each moment, in a folder of its own. A moment is a time drawn uniformly between the
first file that an undisturbed run writes and its end. Exits with status 1 unless every folder ends byte for byte like
that of the undisturbed run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(config: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nabla_jax.prepare", "--config", config, f"--config.data.prepared={out}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def work_begins(process: subprocess.Popen[bytes], out: Path) -> None:
    while not (out / "settings.json").exists() and process.poll() is None:
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        process = start(options.config, whole)
        work_begins(process, whole)
        begun = time.perf_counter()
        if process.wait():
            sys.exit(f"{options.config}: prepare ended with status {process.returncode}")
        seconds = time.perf_counter() - begun
        expected = contents(whole)
        print(f"undisturbed: {len(expected)} files, {seconds:.1f} s of work", flush=True)
        for number in range(options.moments):
            out = Path(folder) / str(number)
            moment = rng.uniform(0, seconds)
            process = start(options.config, out)
            work_begins(process, out)
            time.sleep(moment)
            os.kill(process.pid, signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            left = len(list(out.glob("shard-*.array_record"))), (out / "manifest.json").exists()
            again = start(options.config, out).wait()
            same = again == 0 and contents(out) == expected
            different += not same
            print(
                f"{number}: {'killed' if killed else 'had ended'} after {moment:.2f} s with {left[0]} shards"
                f"{' and the manifest' if left[1] else ''}; then {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
