"""Memory of a process that no file backs: how much there is, and giving back what nobody uses any more."""

import ctypes
from pathlib import Path


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
