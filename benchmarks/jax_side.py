"""nabla_jax's side of the benchmarks: the loss, sampler and optimizer of the verbs, their inputs given."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cases
from benchmarks.cases import ADAPTER, Case
from nabla_jax import compiling, flow, optim, reposing
from nabla_jax.checkpoints.safetensors_io import flatten, unflatten
from nabla_jax.conditioning import diptych
from nabla_jax.config import Optim
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.plan import flops

Data = Mapping[str, jax.Array]
State = dict[str, Any]
METHODS: dict[str, reposing.Name] = {"plain": "native", "om": "omini", "om-independent": "omini", "insert": "insert"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A case's transformer with its adapter; ``method.dtype`` is that of matrix products and of the frozen weights."""

    case: Case
    method: reposing.Method
    base: layers.Params
    adapter: lora.Adapter


def load(case: Case, dtype: str = "float32", remat: flux.Remat = "full") -> Model:
    """Builds a case from ``cases.weight``, leaf by leaf."""
    config = flux.FluxConfig.from_json(case.transformer)
    graphdef, shapes = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs, dtype=jnp.dtype(dtype)))
    base = unflatten({name: _leaf(name, leaf.shape, leaf.dtype) for name, leaf in flatten(shapes).items()})
    method = reposing.Method(
        graphdef, AutoencoderKLConfig(latent_channels=case.size.channels // 4), ADAPTER, independent=case.independent,
        guidance_embeds=True, dtype=dtype, remat=remat, name=METHODS[case.name],
    )  # fmt: skip
    return Model(case, method, base, _adapter(case, shapes))


def _leaf(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    kind, _, rest = name.partition(".")
    if kind not in flux.STACKED:
        return jnp.asarray(cases.weight(name, shape, dtype))
    stacked = np.empty(shape, dtype)
    for i in range(shape[0]):
        stacked[i] = cases.weight(f"{kind}.{i}.{rest}", shape[1:], dtype)
    return jnp.asarray(stacked)


def _adapter(case: Case, shapes: layers.Params) -> lora.Adapter:
    flat: dict[str, np.ndarray] = {}
    for path, shape in lora.targets(shapes, lora.FLUX_TARGETS, flux.STACKED).items():
        names = lora.module_names(path, shape, flux.STACKED)
        drawn = cases.matrices(dict.fromkeys(names, (shape[-2], shape[-1])), case.rank)
        for part in ("lora_A", "lora_B"):
            rows = [drawn[f"{name}.{part}"] for name in names]
            flat[".".join((*path, part))] = np.stack(rows) if path[0] in flux.STACKED else rows[0]
    return lora.Adapter(unflatten({name: jnp.asarray(value) for name, value in flat.items()}), 1.0)


def put(data: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Inputs on the device."""
    return {name: jnp.asarray(value) for name, value in data.items()}


def shown(method: reposing.Method, case: Case, data: Data) -> reposing.Shown:
    """What the model is shown beside noise and text."""
    if case.name == "insert":
        return diptych.Masked(data["masked"], data["mask"], method.adapter)
    if case.name == "plain":
        return ()
    return method.conditions(data["condition_0"], data["condition_1"], case.grid)


def make_step(model: Model) -> tuple[State, jax.stages.Wrapped]:
    """The state before the first step, and the step (state, base, data) -> (state, values); the state is donated.

    What ``training.make_step`` compiles, but for the draws: data, noise and time are given.
    """
    case, method = model.case, model.method
    # A learning rate that both frameworks apply alike: Prodigy's is of the order of rounding in the first steps.
    optimizer = optim.make(Optim(name="adamw", lr=cases.LEARNING_RATE, clip=cases.CLIP, weight_decay=0.0))

    def objective(trees: layers.Params, base: layers.Params, data: Data) -> jax.Array:
        return reposing.path_loss(
            method, base, {ADAPTER: lora.Adapter(trees, model.adapter.scale)}, (data["x0"], data["x1"]), data["time"],
            shown(method, case, data), (data["prompt"], data["pooled"]), 1.0, case.grid,
        )  # fmt: skip

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiling.options())
    def step(state: State, base: layers.Params, data: Data) -> tuple[State, dict[str, jax.Array]]:
        loss, gradients = jax.value_and_grad(objective)(state["adapter"], base, data)
        updates, following = optimizer.update(gradients, state["optimizer"], state["adapter"])
        values = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return {"adapter": optax.apply_updates(state["adapter"], updates), "optimizer": following}, values

    return {"adapter": model.adapter.params, "optimizer": optimizer.init(model.adapter.params)}, step


def make_sampler(model: Model, *, cache: bool) -> jax.stages.Wrapped:
    """(base, adapter, data, levels) -> the drawn tokens [B, N, C]: what ``reposing.sample`` runs, its start given.

    ``cache`` remembers the keys and values of independent conditions. Plain FLUX has no adapter here.
    """
    case = model.case
    adapted = None if case.name == "plain" else ADAPTER
    method = dataclasses.replace(model.method, adapter=adapted, remat="none")

    def run(base: layers.Params, adapter: layers.Params, data: Data, levels: Any) -> jax.Array:
        adapters = {ADAPTER: lora.Adapter(adapter, model.adapter.scale)} if adapted else {}
        pictures: Any = shown(method, case, data)
        if cache:
            pictures = reposing.remember(method, base, adapters, pictures, data["pooled"])

        def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
            time, text = jnp.full(len(noisy), sigma), (data["prompt"], data["pooled"])
            return reposing.predict(
                method, base, adapters, noisy, time, pictures, text, cases.GUIDANCE, case.grid
            )  # fmt: skip

        return flow.euler(velocity, data["x1"], levels)

    return jax.jit(run, compiler_options=compiling.options())


def streams(case: Case, *, adapted: bool = True) -> tuple[flops.Stream, ...]:
    """The case's token streams, for ``plan.flops``."""
    tokens = case.grid[0] * case.grid[1]
    if case.conditions:
        each = (tokens,) * case.conditions
        return flops.conditioned(case.text, tokens, each, case.rank, independent=case.independent)
    return flops.joined(case.text, tokens, case.rank if adapted else 0)


def training_operations(case: Case, remat: flux.Remat, kernel: flops.Kernel) -> flops.Training:
    """Floating-point operations of one sample of a training step."""
    config = flux.FluxConfig.from_json(case.transformer)
    return flops.training(flops.forward(config, streams(case)), remat, kernel)


def sampling_operations(case: Case, steps: int, *, cache: bool) -> float:
    """Floating-point operations of one picture."""
    config = flux.FluxConfig.from_json(case.transformer)
    found = streams(case, adapted=case.name != "plain")
    if not cache:
        return steps * flops.forward(config, found).total
    own, remembered = found[:2], found[2:]
    return steps * flops.forward(config, own).total + flops.forward(config, remembered, output=-1).total
