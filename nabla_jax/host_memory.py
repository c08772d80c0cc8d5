"""Memory of a process that no file backs: how much there is, and giving back what nobody uses any more."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def anonymous(process: int | str = "self") -> int:
    """Bytes of a process that lie in memory and that no file backs; 0 where the system does not tell."""
    status = Path("/proc") / str(process) / "status"
    lines = status.read_text().splitlines() if status.is_file() else []
    found = next((line for line in lines if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return 1024 * int(found.split()[1])


def give_back() -> None:
    """Hands freed memory back to the system.

    The C library keeps it in pieces, and arrays that come later do not fit into pieces: what a compiler has freed stays
    beside them. Libraries without such a call give large pieces back by themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def trimmed(function: jax.stages.Wrapped) -> Callable[..., Any]:
    """The same function, which gives back what the compiler has freed before its own arrays come.

    It compiles for each further tree of shapes, dtypes and shardings before it runs for them.
    """
    met = set()

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, tuple(map(jax.typeof, leaves))
        if kind not in met:
            function.lower(*arguments).compile()
            give_back()
            met.add(kind)
        return function(*arguments)

    return call
