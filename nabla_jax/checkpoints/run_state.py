"""The state of a training run (Orbax): a continued run equals an uninterrupted one bit for bit."""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nabla_jax.errors import UserError
from nabla_jax.parallel import processes
from nabla_jax.runs import writing

# The checksums' name beside what the caller keeps.
_SUMS = "checksums"
# Orbax reads the time of day: a clock that is set right while it saves would be taken for a save that hangs. The run's
# watchdog tells those.
_PATIENCE = 30 * 24 * 3600
_ADVICE = "; delete this folder to continue from the checkpoint before it"


class RunState:
    """Asynchronous checkpoints of a tree of arrays and a JSON object (the loader's position), by step.

    A checkpoint appears under its step only when it is complete, so a killed process leaves the previous
    one. Use as a context manager, or call ``close``: it waits for the save in flight.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        _tell_errors_once()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE, create_directories_asynchronously=False),
        )  # fmt: skip
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The complete steps, in order."""
        return sorted(self._manager.all_steps())

    def check_room(self, arrays: Any) -> None:
        """Raises UserError unless the disk has room for another checkpoint of ``arrays`` (or their shapes)."""
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self._folder).free
        # An adapter file is written beside each checkpoint, and Orbax writes a little more than the arrays.
        if free < 1.5 * needed + 2**20:
            raise UserError(
                f"{self._folder}: disk too full: a checkpoint needs {1.5 * needed / 2**20 + 1:.0f} MiB, "
                f"{free / 2**20:.0f} MiB are free; make room and run the same command again"
            )

    def save(self, step: int, arrays: Any, position: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied and may be donated.

        A checksum of every array and of ``position`` is kept with it: ``restore`` compares them.

        Raises UserError when the disk has no room for it.
        """
        if step in self._manager.all_steps():
            return
        self.check_room(arrays)
        kept = {**position, _SUMS: _all_sums(arrays, position)}
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(kept))
        with self._unwritten():
            self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The arrays (shaped like ``abstract``, laid out by a tree of ``shardings``) and the JSON object of a step.

        Raises UserError naming the folder when it does not fit or cannot be read.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
        path = self._folder / str(step)
        try:
            restored = self._manager.restore(step, args=args)
            arrays, position = restored["arrays"], dict(restored["position"])
        except Exception as error:
            # Orbax raises nothing more special for an array whose file is cut short.
            if type(error) is not Exception and not isinstance(error, ValueError | KeyError | TypeError | OSError):
                raise
            # Tensorstore adds pages of its settings.
            first = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0] or type(error).__name__
            raise UserError(f"{path}: cannot be restored ({first[:300]}){_ADVICE}") from error
        # Absent from checkpoints that are older than checksums.
        kept = position.pop(_SUMS, None)
        if kept is not None and (found := _all_sums(arrays, position)) != kept:
            differing = [name for name in found if found[name] != kept.get(name)] or sorted(kept.keys() - found.keys())
            raise UserError(f"{path}: cannot be restored ({differing[0]} is not what was saved){_ADVICE}")
        return arrays, position

    def restore_newest(
        self, abstract: Any, shardings: Any, tell: Callable[[str], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step that can be restored, with what ``restore`` returns for it; None where there is no step.

        Damaged ones after it are moved to ``damaged/`` beside this folder, which ``tell`` is told of. All processes
        must call it, and all go back where one cannot read. Raises UserError when not a single one can be restored.
        """
        mistakes: dict[int, str] = {}
        for step in reversed(self.steps()):
            mistake, restored = "", None
            try:
                restored = self.restore(step, abstract, shardings)
            except UserError as error:
                mistake = str(error)
            mistakes[step] = next((m.decode() for m in processes.gather(mistake.encode()) if m), "")
            if restored is not None and not mistakes[step]:
                del mistakes[step]
                self._set_aside(mistakes, step, tell)
                return step, *restored
        if mistakes:
            raise UserError(next(iter(mistakes.values())))
        return None

    def _set_aside(self, mistakes: Mapping[int, str], step: int, tell: Callable[[str], None]) -> None:
        for damaged, mistake in mistakes.items():
            folder = self._folder.parent / "damaged"
            names = (f"{damaged}-{n}" if n else str(damaged) for n in itertools.count())
            kept = next(folder / name for name in names if not (folder / name).exists())
            if processes.is_first():
                with writing(kept):
                    folder.mkdir(exist_ok=True)
                    (self._folder / str(damaged)).rename(kept)
            tell(f"{mistake.removesuffix(_ADVICE)}; kept as {kept}, continuing from step {step}")
        if mistakes:
            processes.wait_for_all("damaged checkpoints set aside")
            self._manager.reload()

    def wait(self) -> None:
        """Blocks until the save in flight is on disk."""
        with self._unwritten():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager."""
        with self._unwritten():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _unwritten(self) -> Iterator[None]:
        """What cannot be written is an OSError that names this folder."""
        try:
            yield
        except OSError as error:
            # Orbax's own have no number.
            if error.filename or error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(self._folder)) from error
        except ValueError as error:
            # TensorStore's: the system's number is in its text.
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(self._folder)) from error

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@functools.cache
def _tell_errors_once() -> None:
    """Keeps what Orbax raises from being printed before, at length, by its threads.

    It logs an error with its traceback in every thread that it passes through, until it comes out of ``save`` or
    ``wait``; writes that are still going on then find their event loop closed, which nobody can mend.
    """
    hook = sys.unraisablehook

    def others(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in f"{record.pathname} {record.getMessage()}")

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(others)

    def without_closed_loops(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = without_closed_loops


def latest_step(folder: Path) -> int | None:
    """The newest complete step, from the folder's names alone (without Orbax or jax)."""
    steps = [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def _all_sums(arrays: Any, position: Mapping[str, Any]) -> dict[str, int]:
    return checksums(arrays) | {"position": zlib.crc32(json.dumps(position, sort_keys=True).encode())}


def checksums(arrays: Any) -> dict[str, int]:
    """Name in a tree -> a number below 2**32 that any single changed element of the array changes.

    The sum of the elements' bits, each times an odd weight of its own: whole numbers, so that it does not depend on how
    devices or processes share the array. All processes must call it.
    """
    named = jax.tree_util.tree_leaves_with_path(arrays)
    leaves = [leaf for _, leaf in named]
    if jax.process_count() > 1:
        processes.compile_together(_checksums, leaves)
    sums = jax.device_get(_checksums(leaves))
    return {jax.tree_util.keystr(path): int(total) for (path, _), total in zip(named, sums, strict=True)}


# One program: several that are under way at a time exchange in another order in every process, and wait for ever.
@jax.jit
def _checksums(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(array: jax.Array) -> jax.Array:
    width = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    place, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
