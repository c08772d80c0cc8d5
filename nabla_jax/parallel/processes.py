"""Several processes as one run: joining them, sharing work, waiting for each other."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nabla_jax import compiling
from nabla_jax.errors import UserError

Item = TypeVar("Item")

COORDINATOR, COUNT, INDEX = "NABLA_COORDINATOR", "NABLA_PROCESS_COUNT", "NABLA_PROCESS_INDEX"
TIMEOUT = "NABLA_PROCESS_TIMEOUT"
# Seconds after which the others end when one is not heard of. Signs of life come from a thread of their own, so that
# long work does not silence a process; less than half a minute mistakes a pause of the machine for a death.
DEFAULT_TIMEOUT = 100
# Seconds that a failing first process leaves the others for messages of their own: jax ends them when it is gone.
LINGER = 3.0
_JOINED = threading.Event()


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run, before anything else touches a device.

    Reads NABLA_COORDINATOR: unset or empty is a single process; `auto` lets jax ask the cluster (Cloud TPU,
    GKE, SLURM); `host:port` needs NABLA_PROCESS_COUNT and NABLA_PROCESS_INDEX beside it.

    Waiting for another process has an end: where one is not heard of for NABLA_PROCESS_TIMEOUT seconds (100), jax ends
    the others with SIGABRT and a message that names it. Signals keep the meaning they had before.

    One that never comes does the same after jax's five minutes.

    Raises:
        UserError: settings that are incomplete or contradict each other, no cluster for `auto`, a port in use.
    """
    coordinator = environment.get(COORDINATOR, "")
    if not coordinator:
        return
    timeout = _number(environment, TIMEOUT) if environment.get(TIMEOUT) else DEFAULT_TIMEOUT
    if not timeout:
        raise UserError(f"{TIMEOUT}: found 0, expected seconds, at least 1")
    count = index = None
    if coordinator != "auto":
        count, index = _number(environment, COUNT), _number(environment, INDEX)
        port = coordinator.rpartition(":")[2]
        if ":" not in coordinator or not port.isdecimal():
            raise UserError(f"{COORDINATOR}: found {coordinator!r}, expected host:port or auto")
        if not 0 <= index < count:
            raise UserError(f"{INDEX}: found {index}, expected 0 to {count - 1} ({COUNT} is {count})")
        if index == 0:
            _check_free(int(port), coordinator)
    # jax takes SIGTERM over to tell of preemptions and ignores it otherwise: a process could not be stopped any more.
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            None if count is None else coordinator,
            count,
            index,
            heartbeat_timeout_seconds=timeout,
            # The end may be as short: `finish` lets all come there together.
            shutdown_timeout_seconds=timeout,
        )
    except ValueError as error:
        raise UserError(f"{COORDINATOR}: found {coordinator!r}, which jax cannot join ({error})") from error
    signal.signal(signal.SIGTERM, terminate or signal.SIG_DFL)
    # Looks for the devices, for which all processes must come together: none may fail before it has.
    jax.process_count()
    _JOINED.set()
    _leave_after_errors()


def _check_free(port: int, coordinator: str) -> None:
    # jaxlib crashes where it cannot listen.
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{COORDINATOR}: found {coordinator!r}, where this process cannot listen ({error})") from error


def _leave_after_errors() -> None:
    show = sys.excepthook

    def show_and_leave(*error: Any) -> None:
        show(*error)
        leave(1)

    sys.excepthook = show_and_leave


def finish() -> None:
    """Returns when every process is at its end, so that none waits for another while it shuts down.

    The first process writes tables and reports alone, for longer than a shutdown may last.
    """
    if _JOINED.is_set() and jax.process_count() > 1:
        wait_for_all("finish")


def leave(status: int) -> None:
    """Ends this process at once where it is one of several; returns where it is alone.

    For a process that failed: the others cannot go on, and an orderly exit would wait for them, and then end with
    SIGABRT in place of ``status``.
    """
    if not _JOINED.is_set() or jax.process_count() == 1:
        return
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if is_first():
        time.sleep(LINGER)
    os._exit(status)


def is_first() -> bool:
    """Whether this process writes what all share (logs, manifests, exports)."""
    return jax.process_index() == 0


def part() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return jax.process_index(), jax.process_count()


def own_share(items: Sequence[Item], index: int | None = None, count: int | None = None) -> Sequence[Item]:
    """Every `count`-th item from `index` on; by default this process's share.

    The shares of all processes are disjoint, hold every item, and differ by at most one in length.
    """
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    return items[index::count]


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name; at once in a single process."""
    multihost_utils.sync_global_devices(name)


def compile_together(function: jax.stages.Wrapped, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments in every process, before any of them runs it; all must call it.

    The first exchange between CPUs gives the others half a minute to come, and compilation may take them longer. What
    the compiler has freed is given back before the function's own arrays come.
    """
    compiling.ahead(function, *arguments)
    if jax.process_count() > 1:
        wait_for_all("compiled")


def gather(data: bytes) -> list[bytes]:
    """What every process gave, in their order, in every process; all must call it."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}: found {text!r}, expected a number, because {COORDINATOR} is set")
    return int(text)
