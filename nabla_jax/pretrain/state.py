"""A training's arrays in one file, written so that an interruption leaves the previous file in place."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nabla_jax.errors import UserError


def save_arrays(path: Path, step: int, tree: Any) -> None:
    """Writes the leaves of a tree and the step they belong to."""
    flat = {f"{i:05d}": np.array(leaf, order="C") for i, leaf in enumerate(jax.tree.leaves(tree))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(flat, temporary, {"step": str(step)})
    temporary.replace(path)


def load_arrays(path: Path, like: Any) -> tuple[int, Any]:
    """Reads what ``save_arrays`` wrote; ``like`` gives structure and shapes.

    Raises:
      UserError: the file belongs to another model.
    """
    with safe_open(path, "numpy") as file:
        step = int(file.metadata()["step"])
    flat = load_file(path)
    leaves, structure = jax.tree.flatten(like)
    found = [flat[name].shape for name in sorted(flat)]
    expected = [np.shape(leaf) for leaf in leaves]
    if found != expected:
        raise UserError(f"{path}: array shapes: found those of another model, expected this config's")
    return step, jax.tree.unflatten(structure, [jnp.asarray(flat[name]) for name in sorted(flat)])
