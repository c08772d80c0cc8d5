"""Operations by formula against the trace of the true step, XLA's own count, and arithmetic done by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import condition_cache
from nabla_jax import config as configs
from nabla_jax import reposing, training
from nabla_jax.conditioning import omini
from nabla_jax.models import flux, layers, lora
from nabla_jax.plan import count, flops, networks

DEEP = flux.FluxConfig(
    num_layers=9, num_single_layers=10, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
    pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
"""Deep enough to be scanned: in an unrolled model what nothing reads is never computed."""
OMINI = "configs/omk_fill.py:toy"
CASES = {
    "conditions that see text and noise": (OMINI, {}),
    "independent conditions": (OMINI, {"conditioning.independent_conditions": "true"}),
    "compact conditions": (OMINI, {"conditioning.compact": "3"}),
    "references in the stream": (OMINI, {"conditioning.method": "native"}),
    "a diptych": ("configs/insert_fill.py:toy", {}),
}


def planned(case: str, **overrides: str) -> tuple[configs.Config, networks.Architecture]:
    file, own = CASES[case]
    config = configs.load(file, own | {key.replace("__", "."): value for key, value in overrides.items()})
    architecture = networks.read_architecture(config)
    insert = config.conditioning.method == "insert"
    channels = (architecture.transformer.in_channels, 64 if insert else None)
    model = dataclasses.replace(DEEP, in_channels=channels[0], out_channels=channels[1])
    if insert:
        model = dataclasses.replace(model, joint_attention_dim=architecture.transformer.joint_attention_dim)
    return config, dataclasses.replace(architecture, transformer=model)


def traced(config: configs.Config, found: networks.Networks) -> tuple[float, float]:
    """Operations of the loss and of its gradient, counted in the trace of what training runs."""
    batch = networks.batch_shapes(config, found.architecture, 1)

    def loss(trees: dict[str, layers.Params], base: layers.Params, batch: reposing.Batch) -> jax.Array:
        return reposing.loss(found.method, training.composed(trees, config), base, batch, seed=0, guidance=1.0)

    shapes = (found.state["adapters"], found.base, batch)
    return count.operations(loss, *shapes), count.operations(jax.value_and_grad(loss), *shapes)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient_are_those_of_the_true_step(case: str) -> None:
    config, architecture = planned(case)
    found = networks.make(config, architecture)
    work = flops.forward(architecture.transformer, flops.streams(config, architecture))
    remats: tuple[flux.Remat, ...] = ("full", "save_attention")
    for remat in remats if case == next(iter(CASES)) else remats[:1]:
        method = dataclasses.replace(found.method, remat=remat)
        forward, gradient = traced(config, dataclasses.replace(found, method=method))
        expected = flops.training(work, remat, "xla")
        assert forward == pytest.approx(expected.forward, rel=1e-9)
        # Of the adapters of modulations and ends, each a row or a layer, the formula is a little generous.
        assert gradient == pytest.approx(expected.hardware, rel=0.02)


def test_published_sizes_take_what_arithmetic_by_hand_says() -> None:
    """Width 3,072, 57 blocks: 12.910 GFLOP a token in linears, 700,416 a pair of tokens in attention."""
    model, tera = flux.FluxConfig.kontext(), 1e12
    plain = flops.forward(model, flops.joined(512, 4096, 0))
    assert plain.linear + plain.attention == pytest.approx(74.36 * tera, rel=1e-3)
    group = flops.forward(model, flops.conditioned(512, 4096, (4096, 4096), 16, independent=False))
    assert group.linear + group.attention == pytest.approx(256.50 * tera, rel=1e-4)
    assert group.adapter == pytest.approx(0.72 * tera, rel=0.01)
    assert group.ends < 0.002 * group.total
    alone = flops.forward(model, flops.conditioned(512, 4096, (4096, 4096), 16, independent=True))
    assert alone.linear + alone.attention == pytest.approx(230.06 * tera, rel=1e-4)
    halved = flops.forward(model, flops.conditioned(512, 4096, (1024, 1024), 0, independent=False))
    assert halved.linear == pytest.approx(85.93 * tera, rel=1e-3)
    diptych = flops.forward(flux.FluxConfig.fill(), flops.joined(512 + 729, 8192, 256))
    assert diptych.linear + diptych.attention == pytest.approx(184.10 * tera, rel=1e-4)
    assert diptych.adapter == pytest.approx(12.8 * tera, rel=0.01)
    assert flops.training(group, "none").model == pytest.approx(606.5 * tera, rel=1e-3)
    assert flops.training(group, "none").hardware == pytest.approx(652.1 * tera, rel=1e-3)


def test_linear_in_depth_and_quadratic_in_tokens() -> None:
    def at(depth: int, tokens: int) -> flops.Work:
        model = dataclasses.replace(DEEP, num_layers=depth, num_single_layers=depth)
        return flops.forward(model, flops.conditioned(tokens, tokens, (tokens,), 4, independent=False))

    once, deeper, longer = at(1, 10), at(2, 10), at(1, 20)
    for name in ("linear", "closing", "attention", "closing_attention"):
        assert getattr(deeper, name) == 2 * getattr(once, name) > 0
    assert longer.attention == 4 * once.attention and longer.linear == 2 * once.linear
    assert longer.adapter < 2 * once.adapter < 2 * deeper.adapter  # modulations are one row however many tokens


@functools.cache
def xla(depths: tuple[int, int]) -> tuple[float, flux.FluxConfig, tuple[flops.Stream, ...]]:
    """XLA's count for the gradient of an unrolled model, wide enough for matrix products to be nearly everything."""
    model = dataclasses.replace(
        DEEP, num_layers=depths[0], num_single_layers=depths[1], attention_head_dim=64, num_attention_heads=8,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    graphdef, base = layers.abstract(lambda rngs: flux.Flux(model, rngs=rngs))
    text, side, rank = 40, 8, 4
    adapters = jax.eval_shape(
        lambda: lora.initialize(jax.random.key(0), base, rank=rank, alpha=1.0, stacked=flux.STACKED)
    )
    ids = omini.grid_ids(side, side)

    def run(adapter: lora.Adapter, base: layers.Params, prompt: Any, pooled: Any, tokens: Any) -> jax.Array:
        time = jnp.ones((1,))
        shown = [omini.Condition(tokens, ids, "a"), omini.Condition(tokens, ids, "a")]
        branches = omini.branches(prompt, pooled, tokens, ids, time, guidance=1.0, conditions=shown)
        return layers.bind(graphdef, base)(branches, adapters={"a": adapter}, implementation="xla", scan=False).sum()

    shapes = (
        adapters, base, jax.ShapeDtypeStruct((1, text, 24), jnp.float32), jax.ShapeDtypeStruct((1, 12), jnp.float32),
        jax.ShapeDtypeStruct((1, side**2, 64), jnp.float32),
    )  # fmt: skip
    lowered = jax.jit(jax.grad(run)).lower(*shapes)
    streams = flops.conditioned(text, side**2, (side**2, side**2), rank, independent=False)
    return lowered.cost_analysis()["flops"], model, streams


@pytest.mark.parametrize("deeper", [(2, 1), (1, 2)], ids=["double", "single"])
def test_each_further_block_takes_what_xla_counts(deeper: tuple[int, int]) -> None:
    # Of blocks in the middle of a stack: at its ends there is less to do, for streams that nothing reads any more.
    (counted, model, streams), (further, larger, _) = xla((1, 1)), xla(deeper)
    one, two = (flops.training(flops.forward(m, streams), "none", "xla").hardware for m in (model, larger))
    assert further - counted == pytest.approx(two - one, rel=0.03)


def test_what_is_computed_again() -> None:
    work = flops.forward(flux.FluxConfig.kontext(), flops.conditioned(512, 4096, (4096, 4096), 16, independent=False))
    remats: tuple[flux.Remat, ...] = ("full", "save_attention")
    kernels: tuple[flops.Kernel, ...] = ("flash", "blocked", "xla")
    for remat in remats:
        flash, blocked, kept = (flops.training(work, remat, kernel) for kernel in kernels)
        assert flash.recomputed >= blocked.recomputed >= kept.recomputed > 0.5 * work.attention
        assert flash.model == blocked.model == kept.model
    # A kernel runs again as a whole, or not at all.
    again = flops.training(work, "full").recomputed - flops.training(work, "save_attention").recomputed
    assert again == pytest.approx(work.attention)
    assert flops.training(work, "offload") == flops.training(work, "full")
    assert flops.training(work, "none", "xla").recomputed == 0
    assert flops.training(work, "none").recomputed == 0.5 * work.attention
    assert (
        flops.training(work, "full", "blocked").recomputed
        > flops.training(work, "save_attention", "blocked").recomputed
    )


def test_sampling_with_and_without_remembered_conditions() -> None:
    config, architecture = planned("independent conditions")
    plain, cached = (flops.sampling(config, architecture, cache=cache) for cache in (False, True))
    assert flops.sampling(config, architecture) == cached
    steps = config.sample.steps
    assert plain.total == plain.steps * plain.step and cached.total == cached.once + steps * cached.step
    # What is remembered is computed once instead of at every step; text and noise do the same either way.
    assert cached.step + cached.once == pytest.approx(plain.step, rel=1e-9)
    full = configs.load("configs/omk_fill.py", {"conditioning.independent_conditions": "true"})
    step = flops.sampling(full, networks.read_architecture(full)).step
    assert step == pytest.approx(100.80e12, rel=0.01)
    guided = dataclasses.replace(config, sample=dataclasses.replace(config.sample, image_guidance=2.0))
    assert flops.sampling(guided, architecture).total == 2 * cached.total
    shared = flops.sampling(planned("conditions that see text and noise")[0], architecture)
    assert shared.once == 0 and shared.step > plain.step


def test_the_benchmark_of_the_condition_cache_counts_the_same() -> None:
    model = condition_cache.model(8, 2, 4)
    own, conditions = condition_cache.operations(model, 16, 32, 128)
    # As it was worked out beside the benchmark: 12 D^2 a token, four products of D for each pair of tokens.
    width, noise, text, blocks = model.width, 32 * 32, 128, 6
    pairs = (text + noise) * (text + 3 * noise)
    assert own == pytest.approx(blocks * (24 * (text + noise) * width**2 + 4 * pairs * width), rel=0.02)
    lone = 24 * noise * width**2 + 4 * noise * noise * width
    assert conditions == pytest.approx(2 * blocks * lone, rel=0.05)
