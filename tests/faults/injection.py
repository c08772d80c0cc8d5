"""Processes that are forked from a warm one, the faults that are put into them, and what became of them."""

import contextlib
import ctypes
import errno
import itertools
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import runs

PATIENCE = 240.0  # seconds after which a process counts as hung
_CAPABILITIES, _DAC_OVERRIDE = 0x20080522, 1  # of linux/capability.h: the version, and writing whatever the mode says
Fault = Callable[[], None]  # done in the forked process, before its work


def fork(work: Callable[[], None], log: Path, faults: Sequence[Fault] = ()) -> int:
    """The number of a process that does ``work`` as a verb would; its output goes to ``log``.

    This process must have a single thread: of all others a fork keeps only the locks.
    """
    assert len(os.listdir("/proc/self/task")) == 1
    if pid := os.fork():
        return pid
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for fault in faults:
            fault()
        runs.run_main(lambda _: work(), [])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        # Nothing may go up from here: what called this belongs to the other process, as do the folders that it removes.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, until: Callable[[], bool] = lambda: False, patience: float = PATIENCE) -> int | None:
    """The exit status of a process, negative after a signal; None where it runs on and ``until`` came true.

    Raises TimeoutError, after its death, for one that hangs.
    """
    end = time.monotonic() + patience
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} hung for {patience:.0f} s")
        time.sleep(0.005)


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    """Sends a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def count_renames(path: Path) -> Fault:
    """Keeps the number of renames so far in ``path``."""

    def fault() -> None:
        def counted(number: int) -> None:
            path.write_text(str(number))

        _at_renames(counted, _nothing)

    return fault


def die_at_rename(number: int, *, after: bool) -> Fault:
    """SIGKILL between a temporary file, or checkpoint, and its name: before or after the rename of this number."""

    def die(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _at_renames(*((_nothing, die) if after else (die, _nothing)))


def _nothing(_: int) -> None:
    pass


def _at_renames(before: Callable[[int], None], after: Callable[[int], None]) -> None:
    numbers = itertools.count(1)

    def patch(name: str) -> None:
        original = getattr(os, name)

        def patched(source: Any, *rest: Any, **named: Any) -> Any:
            number = next(numbers)
            before(number)
            result = original(source, *rest, **named)
            after(number)
            return result

        setattr(os, name, patched)

    patch("rename")
    patch("replace")


def limit_files(size: int) -> Fault:
    """No file grows beyond ``size`` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_disk(number: int) -> Fault:
    """From the ``number``-th fsync on there is no room."""

    def fault() -> None:
        count, original = 0, os.fsync

        def full(file: Any) -> None:
            nonlocal count
            count += 1
            if count >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(file)

        os.fsync = full

    return fault


def drop_rights() -> None:
    """Whoever this process runs as, the modes of files concern it from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << _DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0


def jump_clock(seed: int) -> Fault:
    """The time of day leaps by up to three days, back and forth."""

    def fault() -> None:
        original, rng, offset = time.time, random.Random(seed), 0.0

        def leaping() -> float:
            nonlocal offset
            if rng.random() < 0.2:
                offset = rng.uniform(-3, 3) * 86400
            return original() + offset

        time.time = leaping

    return fault


def damage(folder: Path, rng: random.Random) -> str:
    """Cuts short, spoils or removes a file of the newest checkpoint in ``folder``; says what it did."""
    steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    files = sorted(p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size)
    path, how = rng.choice(files), rng.choice(("cut", "spoilt", "removed"))
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "spoilt":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.unlink()
    return f"{path.relative_to(folder)} {how}"
