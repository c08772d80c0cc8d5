"""A training run that writes down what it saves and what it restores: OUT/saved.npz, OUT/restored.npz.

python -m tests.parallel.kept_state_program OUT --config FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nabla_jax import train
from nabla_jax.checkpoints.run_state import RunState
from nabla_jax.parallel import mesh as meshes


def write_down(path: Path, arrays: Any, position: dict[str, Any]) -> None:
    whole = meshes.to_host(arrays, jax.tree.leaves(arrays)[0].sharding.mesh)
    if jax.process_index() == 0:
        named = {jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(whole)}
        cut = [
            key for key, leaf in jax.tree_util.tree_leaves_with_path(arrays) if not leaf.sharding.is_fully_replicated
        ]
        np.savez(path, position=json.dumps(position, sort_keys=True), cut=len(cut), **named)


def main(out: Path, arguments: list[str]) -> None:
    save, restore = RunState.save, RunState.restore

    def saving(self: RunState, step: int, arrays: Any, position: dict[str, Any]) -> None:
        write_down(out / "saved.npz", arrays, position)
        save(self, step, arrays, position)

    def restoring(self: RunState, step: int, abstract: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        arrays, position = restore(self, step, abstract, shardings)
        write_down(out / "restored.npz", arrays, position)
        return arrays, position

    RunState.save, RunState.restore = saving, restoring  # type: ignore[method-assign]
    train.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
