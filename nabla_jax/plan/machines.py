"""What a device can do at most, and how many of them a topology has.

Sources. TPUs: Google's system architecture pages (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e): bfloat16 peak, HBM
and its bandwidth per chip; half of the bidirectional inter-chip bandwidth per chip is what leaves it. H100, H200 and
A100: NVIDIA's data sheets of the SXM modules: dense bfloat16 peak, HBM, half of NVLink's bidirectional bandwidth. A
processor core: two matrix products of 3,200 tokens at 8 x 128 in float32 were measured at 267 GFLOP/s on two cores.
Peaks are never reached: an H200 was measured at 790 TFLOP/s and 4.3 TB/s in matrix products and copies alone.
"""

import dataclasses
import os
import re
from typing import Literal

from nabla_jax.errors import UserError

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      name: as in a topology's name.
      peak: operations per second of bfloat16 matrix products (a processor: float32).
      memory: bytes, and the part of them that programs get.
      bandwidth: bytes per second between memory and arithmetic.
      link: bytes per second that leave a device for the others of its topology.
      kind: what jax calls the platform.
    """

    name: str
    peak: float
    memory: float
    usable: float
    bandwidth: float
    link: float
    kind: Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind that are linked to each other."""

    name: str
    device: Device
    devices: int


# A TPU program gets all but a quarter of a GiB: a v5e refuses those above 15.75 GiB. On GPUs the run-time libraries
# take some, and jax's allocator is given nine tenths.
_DEVICES = {
    "v4": Device("v4", 275e12, 32 * GIB, 31.75 / 32, 1228e9, 150e9, "tpu"),
    "v5e": Device("v5e", 197e12, 16 * GIB, 15.75 / 16, 819e9, 200e9, "tpu"),
    "v5p": Device("v5p", 459e12, 95 * GIB, 94.75 / 95, 2765e9, 600e9, "tpu"),
    "v6e": Device("v6e", 918e12, 32 * GIB, 31.25 / 32, 1638e9, 400e9, "tpu"),
    "a100": Device("a100", 312e12, 80 * GB, 0.9, 2039e9, 300e9, "gpu"),
    "h100": Device("h100", 989e12, 80 * GB, 0.9, 3350e9, 450e9, "gpu"),
    "h200": Device("h200", 989e12, 141 * GB, 0.9, 4800e9, 450e9, "gpu"),
}

SIZES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "a100": ("1", "2", "4", "8"),
    "h100": ("1", "2", "4", "8"),
    "h200": ("1", "2", "4", "8"),
}
"""Topologies of each device that are offered, from small to large; a plan that does not fit looks for a larger one."""

_FORM = re.compile(r"(?P<tpu>v\d+[a-z]*):(?P<grid>\d+(x\d+)*)|(?P<gpu>[a-z]+\d+)(x(?P<count>\d+))?")


def topology(name: str) -> Topology:
    """``v5e:4x4``, ``h100x8`` or ``cpu``. Raises UserError for a name that is none."""
    if name == "cpu":
        return Topology(name, _processor(), 1)
    form = _FORM.fullmatch(name)
    device = _DEVICES.get((form["tpu"] or form["gpu"]) if form else "")
    if form is None or device is None or (device.kind == "tpu") != (form["tpu"] is not None):
        known = ", ".join(kind + (":2x4" if device.kind == "tpu" else "x8") for kind, device in _DEVICES.items())
        raise UserError(f"--topology: found {name!r}, expected cpu or a device and how many: {known}")
    count = 1
    for side in (form["grid"] or form["count"] or "1").split("x"):
        count *= int(side)
    if not count:
        raise UserError(f"--topology: found {name!r}, expected at least one device")
    return Topology(name, device, count)


def larger(found: Topology) -> tuple[Topology, ...]:
    """The offered topologies of the same device with more of them, from small to large."""
    kind = found.device.name
    separator = ":" if found.device.kind == "tpu" else "x"
    offered = [topology(f"{kind}{separator}{size}") for size in SIZES.get(kind, ())]
    return tuple(sorted((one for one in offered if one.devices > found.devices), key=lambda one: one.devices))


def _processor() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", 133e9 * cores, memory, 0.9, 20e9, 10e9, "cpu")
