"""How long-running programs are compiled."""

import os
from collections.abc import Callable
from typing import Any

import jax

from nabla_jax import host_memory

_LEVEL = "xla_backend_optimization_level"


def options(shardings: Any = None) -> dict[str, Any] | None:
    """Compiler options, for ``jax.jit``, of a program whose arrays lie as the tree ``shardings`` says.

    Without shardings they lie on the default backend. On CPUs the first of LLVM's levels compiles a training step in
    two thirds of the time, and the step is as fast: its time goes into libraries of matrix products. A level in
    ``XLA_FLAGS`` stays.
    """
    leaves = jax.tree.leaves(shardings)
    platform = next(iter(leaves[0].device_set)).platform if leaves else jax.default_backend()
    return {_LEVEL: 1} if platform == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "") else None


def ahead(function: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """Compiles for these arguments, and gives back what the compiler has freed before the program's own arrays come."""
    compiled = function.lower(*arguments).compile()
    host_memory.give_back()
    return compiled


def trimmed(function: jax.stages.Wrapped) -> Callable[..., Any]:
    """The same function, compiled ``ahead`` for each further tree of shapes, dtypes and shardings that it meets."""
    met = set()

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, tuple(map(jax.typeof, leaves))
        if kind not in met:
            ahead(function, *arguments)
            met.add(kind)
        return function(*arguments)

    return call
