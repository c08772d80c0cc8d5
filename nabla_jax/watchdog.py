"""Ends a run that hangs: a step, or a wait for input, that takes far longer than those before it.

A pod that waits for a dead disk or a lost device costs as much as one that works, and says nothing. Nothing here
imports jax.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from nabla_jax.config import Watch

# Exit status, timeout(1)'s.
STALLED = 124
# The first times of each kind are not looked at: programs compile in them, and threads start.
WARM_UP = 2
# Seconds after which the interpreter's own timer, which needs no lock of it, ends what this module's thread could not.
_GRACE = 10.0


class Watchdog:
    """Watches the parts of a loop that are named to it; compilation, checkpoints and samples are not.

    A part that takes more than ``factor`` times its median so far, and more than ``seconds``, ends the process with
    status 124 after one line and the stacks of all threads on standard error. Use as a context manager.
    """

    def __init__(self, settings: Watch) -> None:
        self._settings = settings
        self._times: dict[str, deque[float]] = {}
        self._changed = threading.Condition()
        self._watched: tuple[str, float, float] | None = None  # what, since when, until when at most
        self._ended = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._settings.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def limit(self, kind: str) -> float | None:
        """Seconds that the next part of a kind may take; None before its running time is known."""
        times = self._times.get(kind, ())
        if not self._settings.seconds or len(times) <= WARM_UP:
            return None
        return max(self._settings.seconds, self._settings.factor * statistics.median(list(times)[WARM_UP:]))

    @contextlib.contextmanager
    def part(self, kind: str, where: str) -> Iterator[None]:
        """Watches what is done inside: one of many parts of the same ``kind``. ``where`` is told if it hangs."""
        begun, limit = time.monotonic(), self.limit(kind)
        if limit is not None:
            self._set((f"{where}: {kind}", begun, begun + limit))
            faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=_stderr())
        try:
            yield
        finally:
            if limit is not None:
                faulthandler.cancel_dump_traceback_later()
                self._set(None)
        self._times.setdefault(kind, deque(maxlen=WARM_UP + 100)).append(time.monotonic() - begun)

    def _set(self, watched: tuple[str, float, float] | None) -> None:
        with self._changed:
            self._watched = watched
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                watched, now = self._watched, time.monotonic()
                if watched is None:
                    self._changed.wait()
                elif now < watched[2]:
                    self._changed.wait(watched[2] - now)
                else:
                    self._end(watched[0], now - watched[1])
                    return

    def _end(self, what: str, seconds: float) -> None:
        out = _stderr()
        print(
            f"{what} has taken {seconds:.1f} s, more than watch.factor = {self._settings.factor:g} times as long as "
            f"before and watch.seconds = {self._settings.seconds:g}: it hangs; the same command continues",
            file=out, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(file=out, all_threads=True)
        for child in multiprocessing.active_children():
            child.terminate()
        os._exit(STALLED)


def _stderr() -> TextIO:
    # The real one: what stands in for it need not be a file.
    return sys.__stderr__ or sys.stderr
