"""The state of a training run (Orbax): a continued run equals an uninterrupted one bit for bit."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from nabla_jax.errors import UserError


class RunState:
    """Asynchronous checkpoints of a tree of arrays and a JSON object (the loader's position), by step.

    A checkpoint appears under its step only when it is complete, so a killed process leaves the previous
    one. Use as a context manager, or call ``close``: it waits for the save in flight.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

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

        Raises UserError when the disk has no room for it.
        """
        if step in self._manager.all_steps():
            return
        self.check_room(arrays)
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The arrays (shaped like ``abstract``, laid out by a tree of ``shardings``) and the JSON object of a step.

        Raises UserError naming the folder when it does not fit or cannot be read.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self._folder / str(step)}: cannot be restored ({first}); delete this "
                "folder to continue from the checkpoint before it"
            ) from error
        return restored["arrays"], restored["position"]

    def wait(self) -> None:
        """Blocks until the save in flight is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def latest_step(folder: Path) -> int | None:
    """The newest complete step, from the folder's names alone (without Orbax or jax)."""
    steps = [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)
