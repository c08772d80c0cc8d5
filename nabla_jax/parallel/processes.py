"""Several processes as one run: joining them, sharing work, waiting for each other."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nabla_jax.errors import UserError

Item = TypeVar("Item")

COORDINATOR, COUNT, INDEX = "NABLA_COORDINATOR", "NABLA_PROCESS_COUNT", "NABLA_PROCESS_INDEX"


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run, before anything else touches a device.

    Reads NABLA_COORDINATOR: unset or empty is a single process; `auto` lets jax ask the cluster (Cloud TPU,
    GKE, SLURM); `host:port` needs NABLA_PROCESS_COUNT and NABLA_PROCESS_INDEX beside it.

    Raises:
        UserError: settings that are incomplete or contradict each other.
    """
    coordinator = environment.get(COORDINATOR, "")
    if not coordinator:
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    count, index = _number(environment, COUNT), _number(environment, INDEX)
    if ":" not in coordinator:
        raise UserError(f"{COORDINATOR}: found {coordinator!r}, expected host:port or auto")
    if not 0 <= index < count:
        raise UserError(f"{INDEX}: found {index}, expected 0 to {count - 1} ({COUNT} is {count})")
    jax.distributed.initialize(coordinator, num_processes=count, process_id=index)


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
