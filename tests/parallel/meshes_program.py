"""Three training steps on every mesh that is named; prints losses, parameters' digests and bytes of each device.

python -m tests.parallel.meshes_program 1,1,1,1 2,2,2,1 1,2,2,2,2 ...

A fifth number is train.accumulate.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import config as configs
from nabla_jax import optim, reposing, training
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.models.partitioning import AXES
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import rules
from tests import fixtures

CONFIG = flux.FluxConfig(
    num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
    pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), in_channels=16, guidance_embeds=True,
)  # fmt: skip
BATCH, TEXT, SIDE = 8, 5, 6  # 5 and 9 tokens: no size of an axis divides them
STEPS = 3


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    moments = {n: rng.normal(size=(BATCH, 8, SIDE, SIDE)).astype(np.float32) for n in ("target", "subject", "control")}
    return moments | {
        "prompt_embeds": rng.normal(size=(BATCH, TEXT, CONFIG.joint_attention_dim)).astype(np.float32),
        "pooled": rng.normal(size=(BATCH, CONFIG.pooled_projection_dim)).astype(np.float32),
        "mask": rng.random((BATCH, SIDE, SIDE), np.float32),
        "sample": np.arange(BATCH, dtype=np.uint32),
    }


def run(sizes: Sequence[int]) -> dict[str, object]:
    *sizes, accumulate = sizes if len(sizes) > len(AXES) else (*sizes, 1)
    config = configs.load("configs/omk_fill.py:toy", {"train.ema": "0.9", "train.accumulate": str(accumulate)})
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = meshes.make_mesh(dict(zip(AXES, sizes, strict=True)), devices)
    graphdef, shapes = layers.abstract(lambda rngs: flux.Flux(CONFIG, rngs=rngs))
    values = fixtures.random_params(lambda rngs: flux.Flux(CONFIG, rngs=rngs), np.random.default_rng(0))
    base = jax.device_put(values, rules.shardings(shapes, mesh))
    method = reposing.Method(graphdef, AutoencoderKLConfig(latent_channels=4), "fill", False, True)
    method = dataclasses.replace(method, remat="full")
    optimizer = optim.make(config.optim, "float32")

    def initial() -> training.State:
        fresh = lora.initialize(jax.random.key(0), shapes, rank=4, alpha=4.0, stacked=flux.STACKED).params
        # B begins at zero: without this, A would have no gradient.
        fresh = jax.tree.map(
            lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), fresh
        )
        return training.initial_state({"fill": fresh}, optimizer, config)

    shardings = rules.shardings(jax.eval_shape(initial), mesh)
    losses, norms = [], []
    with jax.set_mesh(mesh):
        state = jax.jit(initial, out_shardings=shardings)()
        step = training.make_step(method, optimizer, config, shardings)
        with fixtures.compilations() as compiled:
            for _ in range(STEPS):
                with training.no_hidden_transfers():
                    state, found = step(state, base, meshes.put_batch(batch(), mesh))
                losses.append(float(found["loss"]))
                norms.append(float(found["grad_norm"]))
    kept = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, shardings)
    return {
        "losses": losses,
        "norms": norms,
        "adapters": float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(state["adapters"]))),
        "kept": all(jax.tree.leaves(kept)),
        "compiled": compiled,
        "bytes": {"base": bytes_of(base), "state": bytes_of(state)},
        "said": {part: rules.device_bytes(tree, mesh.shape) for part, tree in (("base", base), ("state", state))},
    }


def bytes_of(tree: object) -> int:
    """What the device with most of it holds."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


if __name__ == "__main__":
    for spec in sys.argv[1:]:
        print(spec, json.dumps(run(tuple(int(n) for n in spec.split(",")))), flush=True)
