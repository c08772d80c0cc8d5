"""Seconds per training step of an Om-K adapter on random weights: ``python -m benchmarks.train_step``.

Text, noise, subject and control as in ``configs/omk_fill.py``; one compiled step of Prodigy. Prints compile time, the
median step and its spread, and samples per second.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax import flow, optim
from nabla_jax.conditioning import omini
from nabla_jax.models import flux, layers, lora

EMBEDDED = flux.FluxConfig(
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)


def inputs(config: flux.FluxConfig, batch: int, grid: int, text: int) -> dict[str, jax.Array]:
    """Normal draws in the shapes of a batch."""
    tokens = (batch, grid * grid, config.in_channels)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x0", "x1", "subject", "control"), tokens)
    shapes |= {"prompt": (batch, text, config.joint_attention_dim), "pooled": (batch, config.pooled_projection_dim)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    data = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return data | {"time": jnp.linspace(0.1, 0.9, batch)}


def loss(
    graphdef: Any, grid: int, adapter: lora.Adapter, params: layers.Params, data: dict[str, jax.Array]
) -> jax.Array:
    """The velocity loss with two conditions that carry the adapter."""
    conditions = [
        omini.Condition(data["subject"], omini.grid_ids(grid, grid, index=1), "adapter"),
        omini.Condition(data["control"], omini.grid_ids(grid, grid), "adapter"),
    ]
    noisy = flow.interpolate(data["x0"], data["x1"], data["time"])
    branches = omini.branches(
        data["prompt"],
        data["pooled"],
        noisy,
        omini.grid_ids(grid, grid),
        data["time"],
        guidance=1.0,
        conditions=conditions,
    )
    velocity = layers.bind(graphdef, params)(branches, adapters={"adapter": adapter})
    return flow.velocity_loss(velocity, data["x0"], data["x1"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--grid", type=int, default=6, help="tokens along one side of a picture")
    parser.add_argument("--text", type=int, default=16, help="text tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    options = parser.parse_args()

    graphdef, params = layers.initialize(lambda rngs: flux.Flux(EMBEDDED, rngs=rngs), jax.random.key(1))
    adapter = lora.initialize(
        jax.random.key(2), params, rank=options.rank, alpha=float(options.rank), stacked=flux.STACKED
    )
    optimizer = optax.chain(optim.clip_by_global_norm(1.0), optim.prodigy(1.0))
    objective = functools.partial(loss, graphdef, options.grid)

    @jax.jit
    def step(
        adapter: lora.Adapter, state: Any, params: layers.Params, data: Any
    ) -> tuple[lora.Adapter, Any, jax.Array]:
        value, gradient = jax.value_and_grad(objective)(adapter, params, data)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    data = inputs(EMBEDDED, options.batch, options.grid, options.text)
    state = optimizer.init(adapter)
    start = time.perf_counter()
    compiled = step.lower(adapter, state, params, data).compile()
    print(f"compile {time.perf_counter() - start:.1f} s on {jax.devices()[0].device_kind}")
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        adapter, state, value = compiled(adapter, state, params, data)
        value.block_until_ready()
        seconds.append(time.perf_counter() - start)
    low, median, high = np.percentile(seconds[1:], [10, 50, 90])
    print(
        f"step {1e3 * median:.1f} ms (10 % {1e3 * low:.1f}, 90 % {1e3 * high:.1f}), "
        f"{options.batch / median:.1f} samples/s at batch {options.batch}"
    )


if __name__ == "__main__":
    main()
