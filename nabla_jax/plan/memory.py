"""Bytes of a run: exact for everything that is stored, an estimate for what a step needs beside it."""

import dataclasses
import inspect
import math
from typing import Any

import jax
import numpy as np

from nabla_jax import reposing, training
from nabla_jax.checkpoints.run_state import RunState
from nabla_jax.config import Config
from nabla_jax.data.pictures import roles
from nabla_jax.data.records import encode_record
from nabla_jax.models import flux, layers
from nabla_jax.models.quantised import Quantised
from nabla_jax.parallel import rules
from nabla_jax.plan import count, networks
from nabla_jax.plan.meshes import MeshShape
from nabla_jax.plan.networks import Architecture, Networks
from nabla_jax.prepare import kinds


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Exact bytes of what a run holds, wherever it lies, before anything is cut over devices.

    Attributes:
      base, vae, text_encoders, redux: parameters of the frozen networks, each in the dtype it is held in.
      adapters, gradients, optimizer, average: of what is trained; ``average`` is EMA's. ``gradients`` with their sum,
        where a batch is computed in parts.
      frozen_adapter: beneath the trained one.
      checkpoint: one, uncompressed. kept: all that are on disk at a time.
      adapter_files: all that a run exports.
      record: of one picture in ``data.prepared``; 0 where nothing is prepared. prepared: of all.
    """

    base: int
    vae: int
    text_encoders: int
    redux: int
    adapters: int
    gradients: int
    optimizer: int
    average: int
    frozen_adapter: int
    checkpoint: int
    kept_checkpoints: int
    adapter_files: int
    record: int
    prepared: int


def sizes(config: Config, found: Networks, pictures: int) -> Sizes:
    """``pictures``: that are prepared."""
    state, adapters = found.state, layers.tree_bytes(found.state["adapters"])
    checkpoint, record = layers.tree_bytes(state), record_bytes(config, found.architecture)
    kept = inspect.signature(RunState.__init__).parameters["keep"].default
    saves = math.ceil(config.train.steps / config.train.save_every)
    return Sizes(
        base=layers.tree_bytes(found.base),
        vae=layers.tree_bytes(found.vae.params),
        text_encoders=layers.tree_bytes((found.clip, found.t5)),
        redux=layers.tree_bytes(found.redux),
        adapters=adapters,
        gradients=adapters + layers.tree_bytes(summed(config, found)),
        optimizer=layers.tree_bytes(state["optimizer"]),
        average=layers.tree_bytes(state.get("average")),
        frozen_adapter=layers.tree_bytes(found.frozen),
        checkpoint=checkpoint,
        kept_checkpoints=min(kept, saves) * checkpoint,
        adapter_files=saves * adapters,
        record=record,
        prepared=pictures * record,
    )


def record_bytes(config: Config, architecture: Architecture) -> int:
    """Bytes of one picture's records in ``data.prepared``, encoded by the very code that writes them; 0 for none.

    Captions' embeddings, one for each distinct caption, and the features of ``data.vision`` are left out.
    """
    if config.data.mode != "precomputed":
        return 0
    side, condition = networks.latent_side(config, architecture)
    channels, total = 2 * architecture.vae.latent_channels, 0
    meta = {"id": "0" * 36, "class_id": "0000", "caption": 0, "index": 10**5, "made": "0" * 64}
    for role in roles(kinds(config)):
        edge = side if role == "target" else condition
        arrays: dict[str, np.ndarray] = {"moments": np.zeros((channels, edge, edge), np.float16)}
        if role == "target":
            arrays["mask"] = np.zeros((side, side), np.uint8)
        total += len(encode_record({**meta, "role": role}, arrays))
    return total


@dataclasses.dataclass(frozen=True)
class Activations:
    """Estimated bytes of one sample of a training step: an upper bound of what XLA, which fuses, will keep.

    Attributes:
      saved: kept from the forward pass for the backward one, by ``train.remat``.
      block: inside the one block whose backward pass is under way.
      batch: the sample itself.
    """

    saved: int
    block: int
    batch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.saved + self.block + self.batch


def activations(config: Config, found: Networks, remat: flux.Remat, block: int) -> Activations:
    """Traces the loss of one sample with a policy and looks at what its gradient keeps; for ``block`` see
    ``block_bytes``.
    """
    kept = _saved(config, found, remat)
    batch = layers.tree_bytes(networks.batch_shapes(config, found.architecture, 1))
    # Nothing of a block is made again where all is kept, but gradients of the widest of it are there for a while.
    return Activations(kept, block // 4 if remat == "none" else block, batch)


def block_bytes(config: Config, found: Networks) -> int:
    """What one block of the kind that takes more keeps of one sample when it keeps everything."""
    # Models of one and of two such blocks differ by it.
    one, double, single = (_saved(config, _shallow(found, *d), "none") for d in ((1, 1), (2, 1), (1, 2)))
    return max(double, single) - one


def _shallow(found: Networks, double: int, single: int) -> Networks:
    """The same run with fewer blocks of each kind."""
    depths = dict(zip(flux.STACKED, (double, single), strict=True))

    def cut(path: tuple[Any, ...], leaf: Any) -> Any:
        depth = next((depths[key.key] for key in path if getattr(key, "key", None) in depths), None)
        return leaf if depth is None else jax.ShapeDtypeStruct((depth, *leaf.shape[1:]), leaf.dtype)

    trees = {name: getattr(found, name) for name in ("base", "state", "frozen")}
    return dataclasses.replace(found, **{n: jax.tree_util.tree_map_with_path(cut, t) for n, t in trees.items()})


def _saved(config: Config, found: Networks, remat: flux.Remat) -> int:
    method = dataclasses.replace(found.method, remat=remat)
    batch = networks.batch_shapes(config, found.architecture, 1)

    def loss(trees: dict[str, layers.Params], base: layers.Params, frozen: Any, batch: reposing.Batch) -> jax.Array:
        acting = training.composed(trees, config, frozen)
        return reposing.loss(method, acting, base, batch, seed=0, guidance=config.train.guidance)

    return count.saved_bytes(loss, found.state["adapters"], found.base, found.frozen, batch)


def summed(config: Config, found: Networks) -> Any:
    """The sum of a batch's gradients beside those of the part that is under way; empty where there is one part."""
    if config.train.accumulate == 1:
        return {}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), found.state["adapters"])


@dataclasses.dataclass(frozen=True)
class PerDevice:
    """Bytes that each device holds at the height of a training step; the last two are estimates.

    Attributes:
      base, state, gradients: parts of what is stored, by the mesh.
      others: networks that are held beside the base.
      gathered: whole weights of the blocks under way, where the base is cut over fsdp or quantised; of a quantised base
        that is not computed again all of them, for the backward pass.
      activations: of the samples of this device.
    """

    base: int
    state: int
    gradients: int
    others: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def _whole_bytes(tree: Any, dtype: str) -> int:
    """Bytes of a tree whose quantised weights are made whole in ``dtype``."""

    def whole(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtype) if isinstance(leaf, Quantised) else leaf

    return layers.tree_bytes(jax.tree.map(whole, tree, is_leaf=lambda leaf: isinstance(leaf, Quantised)))


def per_device(config: Config, found: Networks, mesh: MeshShape, each: Activations) -> PerDevice:
    """What one device of a mesh holds when ``train.batch`` is cut over data and fsdp, parameters as the rules say."""
    rows = -(-config.train.batch // (mesh["data"] * mesh["fsdp"]))
    # Of a batch that is computed in parts, those of one part are under way at a time.
    active = -(-rows // config.train.accumulate)
    others = layers.tree_bytes(found.frozen)
    if config.train.sample_every or config.conditioning.method == "insert":
        others += layers.tree_bytes(found.vae.params)
    others += layers.tree_bytes(found.redux)
    blocks = {name: _whole_bytes(found.base[name], config.train.dtype) for name in flux.STACKED}
    depths = {name: jax.tree.leaves(found.base[name])[0].shape[0] for name in flux.STACKED}
    gathered, quantise = 0, config.base.quantise != "none"
    if quantise and config.train.remat == "none":
        gathered = sum(blocks.values()) // mesh["tensor"]
    elif quantise or mesh["fsdp"] > 1:
        # The next block's weights arrive while one is under way.
        gathered = 2 * max(blocks[name] // depths[name] for name in flux.STACKED) // mesh["tensor"]
    # Tensor parallel blocks cut their inside, not the stream between them.
    inside = each.block // (mesh["tensor"] * mesh["sequence"])
    return PerDevice(
        base=rules.device_bytes(found.base, mesh),
        state=rules.device_bytes(found.state, mesh),
        gradients=rules.device_bytes(found.state["adapters"], mesh) + rules.device_bytes(summed(config, found), mesh),
        others=others,
        gathered=gathered,
        activations=active * (each.saved // mesh["sequence"] + inside) + rows * each.batch,
    )
