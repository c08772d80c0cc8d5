"""Checkpoints that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: a limit of files is the process's.
PROGRAM = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from nabla_jax import runs
from nabla_jax.checkpoints.run_state import RunState

def main(argv):
    with RunState(Path(argv[0])) as saved:
        rows = jax.random.normal(jax.random.key(0), (20, 100, 100))
        jax.block_until_ready(rows)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(argv[1]), resource.RLIM_INFINITY))
        saved.save(1, {str(i): row for i, row in enumerate(rows)}, {})
        saved.wait()

runs.run_main(main)
"""


@pytest.mark.parametrize("size", [1, 8_000, 60_000])
def test_what_cannot_be_written_is_one_line(size: int, tmp_path: Path) -> None:
    """Whichever of Orbax's files it is, and whichever of its threads."""
    # The cache of compiled programs would be cut short as well.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), str(size)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: cannot be written: File too large\n"
