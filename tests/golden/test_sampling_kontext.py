"""The Euler loop over a Kontext-like model with conditions: the latents after every step."""

import dataclasses

import jax
import numpy as np
import pytest

from nabla_jax import flow
from nabla_jax.checkpoints.adapters import load_adapter
from nabla_jax.conditioning import omini
from nabla_jax.models import flux, layers
from tests.golden import flux_golden, golden

CONDITIONS = ("subject", "spatial")
# variant: (conditions, whether they see only themselves, adapter on text and noise)
VARIANTS = {
    "base": (CONDITIONS, False, None),
    "subject_only": (("subject",), False, None),
    "no_condition": ((), False, None),
    "main_adapter": (CONDITIONS, False, "default"),
    "kv_cache": (CONDITIONS, True, None),
}


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.case("sampling_kontext")


@pytest.fixture(scope="module")
def model(case):
    graphdef, params = flux_golden.load(case.external_path("weights"), case.config["transformer"])
    adapter, _ = load_adapter(case.path("lora_default"), params, stacked=flux.STACKED)
    return graphdef, params, {"default": adapter}


def velocity(case, model, variant: str):
    """(latents, sigma) -> velocity of the case's model and conditions."""
    graphdef, params, adapters = model
    names, independent, adapter = VARIANTS[variant]
    data = case.tensors("inputs")
    conditions = [omini.Condition(data[f"{n}_tokens"], data[f"{n}_ids"], "default") for n in names]

    def run(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        streams = omini.branches(
            data["prompt_embeds"],
            data["pooled_prompt_embeds"],
            latents,
            omini.grid_ids(*case.config["noise_grid"]),
            jax.numpy.full(latents.shape[0], sigma),
            guidance=case.config["guidance_scale"],
            conditions=conditions,
            independent=independent,
            adapter=adapter,
        )
        return layers.bind(graphdef, params)(streams, adapters=adapters)

    return run


def test_image_guidance(case, model) -> None:
    """``unconditional + s (conditional - unconditional)``, the unconditional call unmasked, as published.

    The published code drops the mask there by oversight; that every branch sees every other is handed in as
    visibility. The set does not hold s: it must be the same number at every step.
    """
    graphdef, params, adapters = model
    data, sigmas = case.tensors("inputs"), levels(case)
    conditional = jax.jit(velocity(case, model, "base"))

    @jax.jit
    def unconditional(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        conditions = [omini.Condition(data[f"empty_{n}_tokens"], data[f"{n}_ids"], "default") for n in CONDITIONS]
        streams = omini.branches(
            data["prompt_embeds"],
            data["pooled_prompt_embeds"],
            latents,
            omini.grid_ids(*case.config["noise_grid"]),
            jax.numpy.full(latents.shape[0], sigma),
            guidance=case.config["guidance_scale"],
            conditions=conditions,
        )
        streams = [dataclasses.replace(stream, sees=None) for stream in streams]
        return layers.bind(graphdef, params)(streams, adapters=adapters)

    state, scales = data["latents"], []
    with flux_golden.reference_frequencies():
        for i in range(case.config["steps"]):
            following = case.tensor("image_guidance", f"step{i}")
            published = (following - state) / (sigmas[i + 1] - sigmas[i])
            without = np.asarray(unconditional(state, sigmas[i]))
            difference = np.asarray(conditional(state, sigmas[i])) - without
            scales.append(float((difference * (published - without)).sum() / (difference**2).sum()))
            np.testing.assert_allclose(without + scales[0] * difference, published, rtol=0, atol=2e-4)
            state = following
    np.testing.assert_allclose(scales, scales[0], rtol=1e-4)
    assert scales[0] > 1
    effect = np.abs(state - case.tensor("base", f"step{case.config['steps'] - 1}")).max()
    np.testing.assert_allclose(effect, case.scalar("image_guidance.vs_base"), rtol=1e-4)


def levels(case) -> np.ndarray:
    rows, columns = case.config["noise_grid"]
    return flow.sigmas(case.config["scheduler"], case.config["steps"], rows * columns)


def test_schedule_and_positions(case) -> None:
    data = case.tensors("inputs")
    np.testing.assert_allclose(levels(case), data["sigmas"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(levels(case)[:-1] * 1000, data["timesteps"], rtol=0, atol=1e-4)
    subject = omini.grid_ids(*case.config["subject_grid"], index=1)
    np.testing.assert_array_equal(subject, data["subject_ids"])
    np.testing.assert_array_equal(omini.grid_ids(*case.config["noise_grid"]), data["spatial_ids"])
    assert (case.config["height"], case.config["width"]) == tuple(16 * n for n in case.config["noise_grid"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step(case, model, variant: str) -> None:
    latents, sigmas = case.tensor("inputs", "latents"), levels(case)
    # Latents reach 4 to 5; every step adds the rounding of its velocity.
    tight, loose = 2 * flux_golden.TIGHT, 2 * flux_golden.atol(case.config["guidance_scale"])
    with flux_golden.reference_frequencies():
        step = jax.jit(lambda x, pair: flow.euler(velocity(case, model, variant), x, pair))
        state = latents
        for i in range(case.config["steps"]):
            state = step(state, sigmas[i : i + 2])
            expected = case.tensor(variant, f"step{i}")
            np.testing.assert_allclose(state, expected, rtol=0, atol=tight, err_msg=f"step {i}")
    if f"{variant}.vs_base" in case.manifest["scalars"]:
        effect = np.abs(np.asarray(state) - case.tensor("base", f"step{case.config['steps'] - 1}")).max()
        np.testing.assert_allclose(effect, case.scalar(f"{variant}.vs_base"), rtol=1e-3)
    # The production loop, all steps in one program and nothing injected.
    final = jax.jit(lambda x: flow.euler(velocity(case, model, variant), x, sigmas))(latents)
    np.testing.assert_allclose(final, expected, rtol=0, atol=loose)
