"""The short form of ``make faults``: a few faults of every kind, in every verb."""

import subprocess
import sys
from pathlib import Path


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *words], cwd=Path(__file__).resolve().parents[2],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_faults_of_many_kinds_lose_double_and_hang_nothing() -> None:
    lines = run("--count", "15").splitlines()
    assert lines[-1] == "faults: 15, lost: 0, doubled: 0, hung: 0"
    assert {line.split(" in ")[1].split(":")[0] for line in lines[:15]} == {
        "train", "prepare", "generate", "evaluate", "fetch",
    }  # fmt: skip
