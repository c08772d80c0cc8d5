"""Sampling with remembered conditions against running them at every step: ``python -m benchmarks.condition_cache``.

An Om-K adapter with independent conditions on random weights: text, noise, subject and control as in
``configs/omk_fill.py``, at the width and number of tokens that are asked for. One side is ``reposing.sample``, which
remembers; the other calls ``reposing.predict`` with the conditions themselves, one compiled program for each step
(within one program XLA may run but once what is the same at all steps). Whole runs in turn, compiled beforehand. Prints
seconds, their ratio beside that of the floating-point operations, and the largest difference in the latents.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import draws, flow, reposing
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.plan import flops

HEAD = 128
SCHEDULE = {"use_dynamic_shifting": True}
Sampler = Callable[[], jax.Array]


def model(heads: int, double: int, single: int) -> flux.FluxConfig:
    """FLUX.1-Kontext with fewer heads and blocks."""
    return flux.FluxConfig(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=1024,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )


def operations(config: flux.FluxConfig, rank: int, grid: int, text: int) -> tuple[float, float]:
    """Multiplications and additions in one forward pass: those of text and noise, those of conditions."""
    noise = grid * grid
    streams = flops.conditioned(text, noise, (noise, noise), rank, independent=True)
    return flops.forward(config, streams[:2]).total, flops.forward(config, streams[2:], output=-1).total


def adapter(params: layers.Params, rank: int) -> lora.Adapter:
    """An adapter whose contribution is not zero."""
    fresh = lora.initialize(jax.random.key(2), params, rank=rank, alpha=float(rank), stacked=flux.STACKED)
    leaves, structure = jax.tree.flatten(fresh.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return lora.Adapter(jax.tree.unflatten(structure, drawn), fresh.scale)


def inputs(config: flux.FluxConfig, batch: int, grid: int, text: int) -> dict[str, jax.Array]:
    """Normal draws in the shapes of ``reposing.sample``."""
    channels = 2 * AutoencoderKLConfig().latent_channels
    side = flow.path.PATCH * grid
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("subject", "control"), (batch, channels, side, side))
    shapes |= {
        "prompt_embeds": (batch, text, config.joint_attention_dim),
        "pooled": (batch, config.pooled_projection_dim),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    data = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return data | {"sample": jnp.arange(batch, dtype=jnp.uint32)}


def samplers(
    method: reposing.Method,
    params: layers.Params,
    adapters: reposing.Adapters,
    data: reposing.Batch,
    levels: np.ndarray,
) -> dict[str, Sampler]:
    """The two sides, compiled; each gives latents [B, C, h, w]."""
    guidance, seed = 2.5, jnp.uint32(0)
    arguments = (params, adapters, data, jnp.asarray(levels), jnp.float32(guidance), seed)
    remembering = jax.jit(functools.partial(reposing.sample, method)).lower(*arguments).compile()
    height, width = data["control"].shape[-2:]
    grid, text = (height // flow.path.PATCH, width // flow.path.PATCH), (data["prompt_embeds"], data["pooled"])
    channels = flow.path.PATCH**2 * method.vae.latent_channels
    noise = draws.normal(draws.keys(seed, data["sample"], draws.NOISE), (grid[0] * grid[1], channels))
    tokens = reposing.condition_tokens(method, data["subject"], data["control"], seed, data["sample"])

    def step(
        params: layers.Params, state: jax.Array, tokens: tuple[jax.Array, jax.Array], pair: jax.Array
    ) -> jax.Array:
        def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
            time, shown = jnp.full(len(noisy), sigma), method.conditions(*tokens, grid)
            return reposing.predict(method, params, adapters, noisy, time, shown, text, guidance, grid)

        return flow.euler(velocity, state, pair)

    compiled = jax.jit(step).lower(params, noise, tokens, jnp.asarray(levels[:2])).compile()

    def repeating() -> jax.Array:
        state = noise
        for i in range(len(levels) - 1):
            state = compiled(params, state, tokens, jnp.asarray(levels[i : i + 2]))
        return flow.unpack(state, height, width)

    return {"cache": lambda: remembering(*arguments), "no cache": repeating}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8, help=f"of {HEAD} channels each")
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), help="double and single")
    parser.add_argument("--grid", type=int, default=32, help="tokens along one side of a picture")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()

    config = model(options.heads, *options.blocks)
    graphdef, params = layers.initialize(lambda rngs: flux.Flux(config, rngs=rngs), jax.random.key(1))
    method = reposing.Method(graphdef, AutoencoderKLConfig(), "adapter", independent=True, guidance_embeds=True)
    adapters = {"adapter": adapter(params, options.rank)}
    levels = flow.sigmas(SCHEDULE, options.steps, options.grid**2)
    data = inputs(config, options.batch, options.grid, options.text)
    sides = samplers(method, params, adapters, data, levels)

    # Wall clock, processor.
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    results: dict[str, np.ndarray] = {}
    for number in range(options.rounds):
        # Each side is the first one in every other round.
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            results[name] = np.asarray(sides[name]())
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            print(f"round {number + 1}: {name}: {seconds[name][-1][0]:.1f} s", flush=True)

    own, conditions = operations(config, options.rank, options.grid, options.text)
    every = options.batch * options.steps * (own + conditions)
    once = options.batch * (options.steps * own + conditions)
    print(
        f"{options.steps} steps, width {config.width}, {options.text} + 3 x {options.grid**2} tokens, "
        f"{jax.devices()[0].device_kind}"
    )
    for name, work in (("cache", once), ("no cache", every)):
        wall, processor = np.median(seconds[name], axis=0)
        print(f"{name}: {wall:.1f} s, processor {processor:.1f} s, {work / wall / 1e9:.0f} GFLOP/s")
    ratios = np.divide(seconds["no cache"], seconds["cache"])
    wall, processor = np.median(ratios, axis=0)
    print(
        f"times as fast: {wall:.2f} ({ratios[:, 0].min():.2f} to {ratios[:, 0].max():.2f}), in processor time "
        f"{processor:.2f}; by operations {every / once:.2f}"
    )
    difference = np.abs(results["cache"] - results["no cache"]).max()
    print(f"largest difference: {difference:.1e} (latents up to {np.abs(results['cache']).max():.1f})")


if __name__ == "__main__":
    main()
