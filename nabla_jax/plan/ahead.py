"""The true training step compiled for devices that are not here, and how much memory each would need.

libtpu holds the real TPU compiler and needs no TPU: it refuses programs that do not fit. Nothing is allocated.
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from nabla_jax import host_memory, training
from nabla_jax.config import Config
from nabla_jax.errors import UserError
from nabla_jax.models import attention
from nabla_jax.models.partitioning import AXES
from nabla_jax.parallel import rules
from nabla_jax.parallel.mesh import batched, make_mesh
from nabla_jax.plan import networks
from nabla_jax.plan.machines import Topology
from nabla_jax.plan.meshes import MeshShape
from nabla_jax.plan.networks import Networks

RUNNING = 0.05
"""What a step that runs on processors allocates beside its temporaries, as a part of them: with 1.1, 2.7 and 6.3 GiB of
temporaries 11, 8 and 5 % were measured."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device.

    Attributes:
      fits: whether it accepted the program; what it said is ``message``, empty if it did.
      arguments, temporaries, results: bytes; results that take the place of arguments are not counted.
      peak: as the compiler gives it, 0 where it does not.
      program: that this process holds beyond before, for the traced and the compiled step: on processors their memory
        is the arrays', too. 0 where the system does not tell.
      seconds: that lowering and compiling took.
    """

    fits: bool
    message: str
    arguments: int = 0
    temporaries: int = 0
    results: int = 0
    peak: int = 0
    program: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Arguments, temporaries and results together."""
        return self.arguments + self.temporaries + self.results

    @property
    def process(self) -> int:
        """What a training process on processors takes beyond its imports."""
        return self.total + self.program + round(RUNNING * self.temporaries)


def can_compile(topology: Topology) -> bool:
    """Whether the compiler for a topology is installed; there is none for GPUs that are not here."""
    if topology.device.kind == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    return topology.device.kind == "cpu"


def compile_step(config: Config, found: Networks, topology: Topology, shape: MeshShape) -> Compiled:
    """Lowers and compiles ``training.make_step`` for a topology.

    Raises UserError where the compiler is not installed or does not know the topology.
    """
    mesh = _mesh(topology, shape)
    batch = networks.batch_shapes(config, found.architecture, config.train.batch)
    state = rules.shardings(found.state, mesh)
    arguments = [
        _placed(found.state, state),
        _placed(found.base, rules.shardings(found.base, mesh)),
        _placed(batch, jax.tree.map(lambda _: batched(mesh), batch)),
        _placed(found.frozen, rules.shardings(found.frozen, mesh)),
    ]
    method = found.method
    if topology.device.kind == "tpu":
        kernel = attention.ahead(config.base.attention, found.architecture.transformer.attention_head_dim)
        method = dataclasses.replace(method, attention=kernel)
    step: Any = training.make_step(method, found.optimizer, config, state)
    # Before, too: what was freed earlier and goes back now would hide what the step takes.
    host_memory.give_back()
    start, before = time.perf_counter(), host_memory.anonymous()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            # What the compiler refuses for want of memory is an answer; all else is a bug.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = next(line for line in str(error).splitlines() if line.strip())
            return Compiled(False, message, seconds=time.perf_counter() - start)
    used = compiled.memory_analysis()
    # As training does before its first step, see ``processes.compile_together``.
    host_memory.give_back()
    return Compiled(
        True, "", used.argument_size_in_bytes, used.temp_size_in_bytes,
        used.output_size_in_bytes - used.alias_size_in_bytes, int(getattr(used, "peak_memory_in_bytes", 0)),
        max(host_memory.anonymous() - before, 0), time.perf_counter() - start,
    )  # fmt: skip


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _mesh(topology: Topology, shape: MeshShape) -> Mesh:
    if topology.device.kind == "cpu":
        return make_mesh(shape, jax.devices("cpu")[: math.prod(shape.values())])
    if not can_compile(topology):
        how = "make plan-tpu installs it" if topology.device.kind == "tpu" else "GPUs have none without one"
        raise UserError(f"--compile: {topology.name}: found no compiler for {topology.device.kind}s here: {how}")
    from jax.experimental import topologies

    # Without it libtpu asks a metadata server that only Cloud TPU machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        described = topologies.get_topology_desc(topology.name, "tpu")
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--topology: {topology.name}: the compiler does not know it: {first}") from error
    sizes = tuple(shape[axis] for axis in AXES)
    return Mesh(np.array(described.devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
