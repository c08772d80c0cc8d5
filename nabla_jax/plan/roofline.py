"""The least seconds of a step: arithmetic, memory and collectives, each at what the device can do at most.

What is slowest decides, where the others are hidden behind it; nothing here knows kernels, launches or waiting.
"""

import dataclasses

from nabla_jax.config import Config
from nabla_jax.models import flux
from nabla_jax.plan import flops
from nabla_jax.plan.machines import Device
from nabla_jax.plan.memory import PerDevice, Sizes
from nabla_jax.plan.meshes import MeshShape


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Bytes that each device sends in one step.

    Attributes:
      weights: all-gather of the base's weights that are cut over fsdp, once a pass.
      gradients: all-reduce of the adapters' gradients among the devices that have other samples or tokens.
      tensor: all-reduce of what tensor-parallel linears give.
      sequence: keys and values of the other devices' tokens, and their gradients.
    """

    weights: float = 0.0
    gradients: float = 0.0
    tensor: float = 0.0
    sequence: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.tensor + self.sequence


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one step, by what they are spent on."""

    compute: float
    memory: float
    collectives: float

    @property
    def least(self) -> float:
        """When everything else hides behind the slowest."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def bound(self) -> str:
        """What is slowest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def collectives(
    mesh: MeshShape, *, base_bytes: float, gradient_bytes: float, tokens: float, model: flux.FluxConfig, itemsize: int,
    passes: int, backward: int,
) -> Collectives:  # fmt: skip
    """Bytes that each device sends in one step.

    Args:
      mesh: size of each axis.
      base_bytes: of the whole frozen base; gradient_bytes: of all adapters' gradients.
      tokens: of all streams of all samples of one device's share of the batch.
      model: the transformer.
      itemsize: of an activation.
      passes: through the base: forward, and backward with whatever is computed again; of every part of a batch.
      backward: how many of them there are: gradients are added up among devices after each.
    """
    data, fsdp, tensor, sequence = (mesh[axis] for axis in ("data", "fsdp", "tensor", "sequence"))

    def others(size: int) -> float:
        return (size - 1) / size

    activation = tokens / sequence * model.width * itemsize
    blocks = model.num_layers + model.num_single_layers
    # After attention and after the MLP of a double block, once in a single one; as often in the backward pass.
    reduced = (2 * model.num_layers + model.num_single_layers) * (2 if backward else 1)
    gathers = 3 if backward else 1  # keys and values; again in the backward pass, and their gradients back
    return Collectives(
        weights=passes * base_bytes / tensor * others(fsdp),
        gradients=2 * backward * gradient_bytes * others(data * fsdp * sequence),
        tensor=2 * reduced * activation * others(tensor),
        sequence=gathers * 2 * blocks * activation * sequence * others(sequence) / tensor,
    )


def seconds(device: Device, operations: float, moved: float, sent: float, utilisation: float = 1.0) -> Seconds:
    """Of so many operations, bytes through memory and bytes sent, each of one device.

    ``utilisation``: the part of the peak that matrix products reach.
    """
    return Seconds(operations / (device.peak * utilisation), moved / device.bandwidth, sent / device.link)


def training_step(
    config: Config, model: flux.FluxConfig, work: flops.Training, tokens: int, mesh: MeshShape, held: PerDevice,
    stored: Sizes, device: Device, utilisation: float,
) -> tuple[Seconds, Collectives]:  # fmt: skip
    """One step of ``train.batch`` samples of so many tokens, cut over all axes of the mesh, for one device."""
    parts = mesh["data"] * mesh["fsdp"]
    rows, rounds = -(-config.train.batch // parts), config.train.accumulate
    sent = collectives(
        mesh, base_bytes=stored.base, gradient_bytes=stored.adapters, tokens=rows * tokens, model=model,
        itemsize=2 if config.train.dtype == "bfloat16" else 4, passes=2 * rounds, backward=rounds,
    )  # fmt: skip
    # Weights are read in both passes, what is saved and the state are written and read.
    each = stored.base / mesh["tensor"] + held.gradients + held.activations
    moved = 2 * (held.state + rounds * each)
    operations = rows * work.hardware / (mesh["tensor"] * mesh["sequence"])
    return seconds(device, operations, moved, sent.total, utilisation), sent
