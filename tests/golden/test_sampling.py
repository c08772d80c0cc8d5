"""The Euler loop over Kontext- and schnell-like models with conditions: the latents after every step."""

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
    "position_scale": (CONDITIONS, False, None),
}


@pytest.fixture(scope="module", params=["sampling_kontext", "sampling_schnell"])
def case(request) -> golden.Case:
    return golden.case(request.param)


def guidance(case: golden.Case) -> float | None:
    """None on a model without guidance embedding, whatever the configuration says."""
    return case.config["guidance_scale"] if case.config["transformer"]["guidance_embeds"] else None


@pytest.fixture(scope="module")
def model(case):
    graphdef, params = flux_golden.load(case.external_path("weights"), case.config["transformer"])
    adapter, _ = load_adapter(case.path("lora_default"), params, stacked=flux.STACKED)
    return graphdef, params, {"default": adapter}


def conditions_of(case: golden.Case, variant: str, prefix: str = "") -> list[omini.Condition]:
    """The variant's pictures; ``prefix`` "empty_" for the black ones."""
    data = case.tensors("inputs")
    ids = {name: data[f"{name}_ids"] for name in CONDITIONS}
    if variant == "position_scale":
        ids["spatial"] = case.tensor("position_scale_ids", "ids")
    return [omini.Condition(data[f"{prefix}{n}_tokens"], ids[n], "default") for n in VARIANTS[variant][0]]


def velocity(case, model, variant: str, *, memory: bool = False):
    """(latents, sigma) -> velocity of the case's model and conditions, each step anew or from what is remembered."""
    graphdef, params, adapters = model
    _, independent, adapter = VARIANTS[variant]
    data = case.tensors("inputs")
    conditions = conditions_of(case, variant)
    remembered = None
    if memory:
        alone = omini.alone(conditions, data["pooled_prompt_embeds"], guidance_embeds=guidance(case) is not None)
        remembered = jax.jit(lambda: layers.bind(graphdef, params).remember(alone, adapters=adapters))()
        conditions = []

    def run(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        streams = omini.branches(
            data["prompt_embeds"],
            data["pooled_prompt_embeds"],
            latents,
            omini.grid_ids(*case.config["noise_grid"]),
            jax.numpy.full(latents.shape[0], sigma),
            guidance=guidance(case),
            conditions=conditions,
            independent=independent,
            adapter=adapter,
        )
        return layers.bind(graphdef, params)(streams, adapters=adapters, memory=remembered)

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
        conditions = conditions_of(case, "base", "empty_")
        streams = omini.branches(
            data["prompt_embeds"],
            data["pooled_prompt_embeds"],
            latents,
            omini.grid_ids(*case.config["noise_grid"]),
            jax.numpy.full(latents.shape[0], sigma),
            guidance=guidance(case),
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
            guided = omini.image_guided(without + difference, without, scales[0])
            np.testing.assert_allclose(guided, published, rtol=0, atol=2e-4)
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
    subject = omini.subject_ids(*case.config["subject_grid"], kontext=case.name == "sampling_kontext")
    np.testing.assert_array_equal(subject, data["subject_ids"])
    np.testing.assert_array_equal(omini.grid_ids(*case.config["noise_grid"]), data["spatial_ids"])
    assert (case.config["height"], case.config["width"]) == tuple(16 * n for n in case.config["noise_grid"])


def test_scaled_positions(case) -> None:
    """A condition at half the resolution: offset first, then scaled to the centres of the squares it covers."""
    if "position_scale_ids" not in case.files:
        assert case.name == "sampling_kontext"  # its published code has no scaled positions
        return
    expected = case.tensor("position_scale_ids", "ids")
    # The set holds the positions alone: two tokens give scale and offset, the others must follow.
    scale = float(expected[1, 2] - expected[0, 2])
    assert scale > 1
    row, column = (expected[0, 1:] - (scale - 1) / 2) / scale
    found = omini.grid_ids(*case.config["noise_grid"], offset=(row, column), scale=scale)
    np.testing.assert_array_equal(found, expected)


def variants(case) -> list[str]:
    return [name for name in VARIANTS if name in case.files]


def test_every_stored_variant_is_covered(case) -> None:
    stored = {name for name in case.files if any(tensor.startswith("step") for tensor in case.names(name))}
    assert stored == {*variants(case), "image_guidance"}
    assert set(VARIANTS) - {"position_scale"} <= stored


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step(case, model, variant: str) -> None:
    if variant not in variants(case):
        return  # see test_every_stored_variant_is_covered
    latents, sigmas = case.tensor("inputs", "latents"), levels(case)
    # Latents reach 4 to 5; every step adds the rounding of its velocity.
    tight, loose = 2 * flux_golden.TIGHT, 2 * flux_golden.atol(guidance(case))
    with flux_golden.reference_frequencies():
        paths = [velocity(case, model, variant)]
        if VARIANTS[variant][1]:
            paths.append(velocity(case, model, variant, memory=True))
        for path in paths:
            step = jax.jit(lambda x, pair, path=path: flow.euler(path, x, pair))
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
