"""The plain transformer: FLUX.1 schnell-, Kontext- and Fill-like models of tiny width."""

import jax
import numpy as np
import pytest

from nabla_jax.models import flux, layers
from nabla_jax.models.flux import Branch
from tests.golden import flux_golden, golden

VARIANTS = ("schnell", "kontext", "fill")


def inputs(case: golden.Case, variant: str) -> tuple[list[Branch], np.ndarray | None]:
    data = {name: case.tensor(variant, name) for name in case.names(variant) if not name.startswith("mid.")}
    guidance = data.get("guidance")
    time, pooled = data["timestep"], data["pooled_projections"]
    shared = {"time": time, "guidance": guidance, "pooled": pooled}
    text = Branch(data["encoder_hidden_states"], data["txt_ids"], kind="text", **shared)
    return [text, Branch(data["hidden_states"], data["img_ids"], **shared)], guidance


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    case = golden.case("flux_base")
    variant = request.param
    return case, variant, *flux_golden.load(case.path(f"weights_{variant}"), case.config[variant])


def forward(graphdef, params, branches: list[Branch], scan: bool) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: layers.bind(graphdef, p)(branches, scan=scan))(params))


def test_output(model) -> None:
    case, variant, graphdef, params = model
    branches, guidance = inputs(case, variant)
    found = forward(graphdef, params, branches, scan=True)
    np.testing.assert_allclose(found, case.tensor(variant, "output"), rtol=0, atol=flux_golden.atol(guidance))


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_output_with_reference_frequencies(model, scan: bool) -> None:
    case, variant, graphdef, params = model
    branches, _ = inputs(case, variant)
    with flux_golden.reference_frequencies():
        found = forward(graphdef, params, branches, scan)
    np.testing.assert_allclose(found, case.tensor(variant, "output"), rtol=0, atol=flux_golden.TIGHT)


def test_sinusoids(model) -> None:
    case, variant, *_ = model
    data = case.tensors(variant)
    for name, value in (("timestep_proj", data["timestep"]), ("guidance_proj", data.get("guidance"))):
        if value is None:
            assert name not in data
            continue
        largest = 1000 * float(np.max(value))
        # One unit in the last place of the largest argument, for the argument and for the frequency each.
        ours = np.asarray(flux.sinusoid(value))
        np.testing.assert_allclose(ours, data[name], rtol=0, atol=2 * np.spacing(np.float32(largest)) + 1e-6)
        with flux_golden.reference_frequencies():
            np.testing.assert_allclose(flux.sinusoid(value), data[name], rtol=0, atol=2e-6)


def test_frequencies() -> None:
    (expected,) = golden.case("flux_base").tensors("sinusoid_freqs").values()
    ours = flux.sinusoid_frequencies()
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1.2e-7, atol=0)  # one unit in the last place


def test_intermediates(model) -> None:
    case, variant, graphdef, params = model
    expected = case.tensors(variant, "mid.")
    if not expected:
        return  # sets made for acceptance hold inputs and outputs only
    branches, _ = inputs(case, variant)
    with flux_golden.reference_frequencies(), flux_golden.traced() as trace:
        layers.bind(graphdef, params)(branches, scan=False)
    found = {"temb": trace.temb[1], "ctx_embed": trace.embed[0], "x_embed": trace.embed[1]}
    # Each angle serves a pair of channels; the reference stores it for both.
    found["rope_cos"] = np.repeat(np.concatenate(trace.cos), 2, axis=-1)
    found["rope_sin"] = np.repeat(np.concatenate(trace.sin), 2, axis=-1)
    for kind, blocks in (("double", trace.double), ("single", trace.single)):
        for i, hidden in enumerate(blocks):
            found[f"{kind}{i}.text"], found[f"{kind}{i}.image"] = hidden
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=0, atol=flux_golden.TIGHT * scale, err_msg=name)
