"""A run on a machine: whether it fits, how long it takes, and the nearest setting that fits when it does not."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

from nabla_jax.config import Config, Train
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers
from nabla_jax.models.partitioning import AXES
from nabla_jax.plan import count, flops, machines, memory, networks, roofline
from nabla_jax.plan.machines import Topology
from nabla_jax.plan.meshes import MeshShape
from nabla_jax.plan.networks import Networks, Shape

EVALUATION = {"nabla": 9_518, "inat-seen": 1_354, "inat-unseen": 792}
"""Pictures of the full evaluation: both directions of every pair."""
REMATS: tuple[flux.Remat, ...] = ("none", "save_attention", "offload", "full")
"""From what keeps the most on the device to what keeps the least."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one sample, or of one picture.

    Attributes:
      training: one sample of a step.
      plain, cached: sampling a picture without and with remembered conditions; ``cached`` is None where they cannot be.
      encoding: the autoencoder's, of all that a picture is drawn from. decoding: of the picture itself.
      tokens: of a sample, all streams together.
    """

    training: flops.Training
    plain: flops.Sampling
    cached: flops.Sampling | None
    encoding: float
    decoding: float
    tokens: int

    @property
    def picture(self) -> float:
        """What ``generate`` computes for one picture; texts are encoded once for all."""
        drawn = self.plain if self.cached is None else self.cached
        return drawn.total + self.encoding + self.decoding


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run on one machine.

    Attributes:
      problem: why training cannot start, whatever it holds; empty if it can.
      room: bytes of a device that programs get.
    """

    config: Config
    topology: Topology
    mesh: MeshShape
    sizes: memory.Sizes
    activations: memory.Activations
    held: memory.PerDevice
    room: float
    problem: str
    work: Work
    seconds: roofline.Seconds
    sent: roofline.Collectives
    utilisation: float

    @property
    def fits(self) -> bool:
        """Whether training can start and its estimated height is below what a device has."""
        return not self.problem and self.held.total <= self.room

    @property
    def training_hours(self) -> float:
        """Device-hours of ``train.steps`` steps."""
        return self.config.train.steps * self.seconds.least * self.topology.devices / 3600

    @property
    def evaluation_hours(self) -> float:
        """Device-hours of the pictures of ``EVALUATION``; each device draws pictures of its own."""
        return sum(EVALUATION.values()) * self.work.picture / self.topology.device.peak / self.utilisation / 3600


class Planner:
    """Plans of one configuration on any machine; its networks are traced once."""

    def __init__(self, config: Config, *, pictures: int, utilisation: float) -> None:
        """Reads configurations alone. Raises UserError for what cannot be planned."""
        self.architecture = networks.read_architecture(config)
        self.networks: Networks = networks.make(config, self.architecture)
        self._config, self._pictures, self._utilisation = config, pictures, utilisation
        self._activations: dict[str, memory.Activations] = {}
        self._block = memory.block_bytes(config, self.networks)
        self._ends = autoencoder_operations(config, self.networks)

    def plan(
        self, topology: Topology, mesh: MeshShape, *, remat: str = "", batch: int = 0, accumulate: int = 0
    ) -> Plan:
        """The configuration on a machine, with another policy, batch or number of its parts if given."""
        train = self._config.train
        train = dataclasses.replace(
            train, remat=remat or train.remat, batch=batch or train.batch, accumulate=accumulate or train.accumulate
        )
        config = dataclasses.replace(self._config, train=train)
        stored = memory.sizes(config, self.networks, self._pictures)
        each = self._activations_of(train.remat)
        held = memory.per_device(config, self.networks, mesh, each)
        work = self._work(config, topology)
        seconds, sent = roofline.training_step(
            config, self.architecture.transformer, work.training, work.tokens, mesh, held, stored, topology.device,
            self._utilisation,
        )  # fmt: skip
        return Plan(
            config, topology, mesh, stored, each, held, topology.device.memory * topology.device.usable,
            _problem(config, mesh), work, seconds, sent, self._utilisation,
        )  # fmt: skip

    def nearest(self, plan: Plan) -> Plan | None:
        """The plan that fits and changes the least of one that does not; None where nothing offered fits.

        Tried in this order: another remat policy, a batch in more parts, fewer samples on a device, more fsdp (and then
        tensor), more devices; only when none of these fits a larger batch, where devices would have no sample.
        """
        for raised in (False, True):
            for topology in (plan.topology, *machines.larger(plan.topology)):
                for mesh in self._meshes(plan, topology):
                    for batch, accumulate in _batches(plan.config.train, mesh, raised):
                        for remat in _remats(plan.config.train.remat):
                            found = self.plan(topology, mesh, remat=remat, batch=batch, accumulate=accumulate)
                            if found.fits:
                                return found
        return None

    def _meshes(self, plan: Plan, topology: Topology) -> Iterator[MeshShape]:
        if topology == plan.topology:
            yield plan.mesh
        heads, sequence = self.architecture.transformer.num_attention_heads, plan.mesh["sequence"]
        for tensor in _divisors(topology.devices // sequence):
            if tensor < plan.mesh["tensor"] or heads % tensor:
                continue
            parts = topology.devices // sequence // tensor
            for fsdp in _divisors(parts):
                if fsdp >= plan.mesh["fsdp"]:
                    yield {"data": parts // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}

    def _activations_of(self, remat: str) -> memory.Activations:
        # What is offloaded lies on the host: the device keeps what it keeps when everything is computed again.
        policy: flux.Remat = "full" if remat == "offload" else cast(flux.Remat, remat)
        if policy not in self._activations:
            self._activations[policy] = memory.activations(self._config, self.networks, policy, self._block)
        return self._activations[policy]

    def _work(self, config: Config, topology: Topology) -> Work:
        streams = flops.streams(config, self.architecture)
        forward = flops.forward(self.architecture.transformer, streams)
        kernel: flops.Kernel = "blocked" if topology.device.kind == "cpu" else "flash"
        cached = None
        if config.conditioning.independent_conditions:
            cached = flops.sampling(config, self.architecture, cache=True)
        return Work(
            flops.training(forward, cast(flux.Remat, config.train.remat), kernel),
            flops.sampling(config, self.architecture, cache=False),
            cached,
            *self._ends,
            sum(stream.tokens for stream in streams),
        )


def autoencoder_operations(config: Config, found: Networks) -> tuple[float, float]:
    """Operations of encoding what one picture is drawn from, and of decoding the picture; counted in the trace."""
    settings, factor = config.conditioning, found.architecture.vae.factor
    graphdef, params = found.vae.graphdef, found.vae.params

    def encode(height: int, width: int) -> float:
        images = Shape((1, 3, height, width), "float32")
        return count.operations(lambda p, x: layers.bind(graphdef, p).encode(x), params, images)

    def decode(height: int, width: int) -> float:
        latents = Shape((1, found.architecture.vae.latent_channels, height // factor, width // factor), "float32")
        return count.operations(lambda p, x: layers.bind(graphdef, p).decode(x), params, latents)

    size, condition = settings.size, settings.condition_size
    if settings.method == "insert":
        return encode(size, 2 * size), decode(size, 2 * size)
    return 2 * encode(condition, condition), decode(size, size)


def changes(plan: Plan, other: Plan) -> list[str]:
    """What is set otherwise in another plan of the same configuration, each as key=value."""
    found = []
    for key in ("remat", "batch", "accumulate"):
        before, after = getattr(plan.config.train, key), getattr(other.config.train, key)
        if before != after:
            found.append(f"train.{key}={after}")
    if plan.topology != other.topology:
        found.append(f"topology={other.topology.name}")
    return found + [f"mesh.{axis}={other.mesh[axis]}" for axis in AXES if plan.mesh[axis] != other.mesh[axis]]


def _problem(config: Config, mesh: MeshShape) -> str:
    parts, rounds = mesh["data"] * mesh["fsdp"], config.train.accumulate
    if config.train.batch % (parts * rounds):
        times = f" times train.accumulate {rounds}" if rounds > 1 else ""
        return f"train.batch: found {config.train.batch}, expected a multiple of data x fsdp = {parts}{times}"
    return ""


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _batches(train: Train, mesh: MeshShape, raised: bool) -> Sequence[tuple[int, int]]:
    """Batches that the mesh divides, and into how many parts; ``raised``: the smallest batch above the given one.

    From ``train.batch`` down: the largest in as many parts as now and in more, then smaller ones in the fewest.
    """
    parts = mesh["data"] * mesh["fsdp"]
    if raised:
        return [(parts, 1)] if parts > train.batch else []
    rows = train.batch // parts
    if not rows:
        return []
    return [(parts * rows, rounds) for rounds in _rounds(rows, train.accumulate)] + [
        (parts * fewer, _rounds(fewer, train.accumulate)[0]) for fewer in range(rows - 1, 0, -1)
    ]


def _rounds(rows: int, least: int) -> list[int]:
    """Into how many parts, ``least`` where possible or more, a device's rows can be cut."""
    return [rounds for rounds in _divisors(rows) if rounds >= least] or [rows]


def _remats(remat: str) -> Sequence[str]:
    """The policy and those that keep less on the device."""
    kept = REMATS[REMATS.index(cast(flux.Remat, remat)) :]
    # Full recomputation takes no host memory, which nobody has planned for.
    return [policy for policy in kept if policy != "offload" or policy == remat]


def check_utilisation(value: float) -> float:
    """Raises UserError for a part of a peak that is none."""
    if not 0 < value <= 1:
        raise UserError(f"--utilisation: found {value:g}, expected above 0 and at most 1")
    return value
