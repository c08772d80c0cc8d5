"""Two conditions beside the noise, on Kontext- and schnell-like models: velocity, loss, gradients, a training step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import flow
from nabla_jax.checkpoints.adapters import load_adapter
from nabla_jax.checkpoints.safetensors_io import flatten, load_tree
from nabla_jax.conditioning import omini
from nabla_jax.models import autoencoder, flux, layers
from nabla_jax.models.lora import Adapter, linears, module_names
from tests.golden import flux_golden, golden

# The least that float32 and float64 gradients of the reference differ by, relative to the adapter's largest entry. We
# are given four times what they differ by: two float32 computations of different order each have that error.
GRADIENT_NOISE = 5e-7


@pytest.fixture(scope="module", params=["omini_kontext", "omini_schnell"])
def case(request) -> golden.Case:
    return golden.case(request.param)


def is_kontext(case: golden.Case) -> bool:
    return case.name == "omini_kontext"


def guidance(case: golden.Case) -> float | None:
    """Training's guidance scale; None on a model without guidance embedding."""
    return 1.0 if case.config["transformer"]["guidance_embeds"] else None


@pytest.fixture(scope="module")
def model(case):
    return flux_golden.load(case.external_path("weights"), case.config["transformer"])


@pytest.fixture(scope="module")
def adapters(case, model) -> dict[str, Adapter]:
    _, params = model
    names = sorted({name for v in case.config["variants"].values() for name in v["lora_names"]})
    return {n: load_adapter(case.path(f"lora_{n}"), params, stacked=flux.STACKED)[0] for n in names}


def conditions(data: dict[str, Any], used: list[str | None]) -> list[omini.Condition]:
    """Subject and spatial control; ``used``: adapter per branch."""
    return [omini.Condition(data[f"cond{i}_tokens"], data[f"cond{i}_ids"], used[2 + i]) for i in range(2)]


def branches(
    case: golden.Case, data: dict[str, Any], used: list[str | None], *, independent: bool = False
) -> list[flux.Branch]:
    """The four branches of a set of inputs; ``used``: adapter per branch."""
    return omini.branches(
        data["prompt_embeds"],
        data["pooled_prompt_embeds"],
        data["x_t"],
        data["img_ids"],
        data["t"],
        guidance=guidance(case),
        conditions=conditions(data, used),
        independent=independent,
        adapter=used[1],
    )


def mask(streams: list[flux.Branch]) -> np.ndarray:
    """[branches, branches]: whose keys each branch sees."""
    out = np.zeros((len(streams),) * 2, np.uint8)
    for row, stream in enumerate(streams):
        out[row, list(range(len(streams)) if stream.sees is None else stream.sees)] = 1
    return out


def loss_and_gradients(case, model, adapters, data, used, independent, remat="none"):
    """((loss, velocity), gradients by adapter) under the reference's frequencies."""
    graphdef, params = model
    chosen = {name: adapters[name] for name in used if name}

    @jax.jit
    def run(trees: dict[str, Adapter]):
        def loss(trees: dict[str, Adapter]):
            found = layers.bind(graphdef, params)(
                branches(case, data, used, independent=independent), adapters=trees, remat=remat
            )
            return flow.velocity_loss(found, data["x0"], data["x1"]), found

        return jax.value_and_grad(loss, has_aux=True)(trees)

    with flux_golden.reference_frequencies():
        return run(chosen)


def published(params: layers.Params, gradient: Adapter) -> dict[str, np.ndarray]:
    """A tree of the adapter's form under the names of adapter files."""
    out: dict[str, np.ndarray] = {}
    flat = flatten(gradient.params)
    for path, shape in linears(params, flux.STACKED):
        for matrix in ("lora_A", "lora_B"):
            leaf = flat.get(".".join((*path, matrix)))
            names = module_names(path, shape, flux.STACKED)
            rows = [] if leaf is None else leaf if path[0] in flux.STACKED else [leaf]
            for name, row in zip(names, rows, strict=False):
                out[f"transformer.{name}.{matrix}.weight"] = np.asarray(row)
    return out


def gradient_noise(case: golden.Case, name: str) -> float:
    """What the set says of the reference's own rounding; 0 where it does not."""
    return float(case.manifest["scalars"].get(name, {"value": 0})["value"])


def check_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], noise: float = 0.0) -> None:
    """``noise``: the reference's own, where the set says it."""
    assert found.keys() == expected.keys()
    floor = 4 * max(noise, GRADIENT_NOISE) * max(float(np.abs(g).max()) for g in expected.values())
    for name, value in expected.items():
        # The floor belongs to the whole adapter; the second term lets no small tensor hide below it.
        allowed = min(floor, 2e-4 * float(np.abs(value).max()) + floor / 10)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)


def settings(case: golden.Case, variant: str) -> tuple[list[str | None], bool]:
    config = case.config["variants"][variant]
    return config["adapters_used"], config["independent_condition"]


def test_ids_and_times(case) -> None:
    """Which position, time and guidance each branch gets."""
    data = case.tensors("inputs")
    rows, columns = case.config["noise_grid"]
    subject, spatial = case.config["subject_grid"], case.config["spatial_grid"]
    np.testing.assert_array_equal(omini.grid_ids(rows, columns), data["img_ids"])
    np.testing.assert_array_equal(omini.grid_ids(*subject), data["cond0_ids_raw"])
    np.testing.assert_array_equal(omini.subject_ids(*subject, kontext=is_kontext(case)), data["cond0_ids"])
    np.testing.assert_array_equal(omini.grid_ids(*spatial), data["cond1_ids_raw"])
    np.testing.assert_array_equal(omini.grid_ids(*spatial), data["cond1_ids"])
    # The batch carries the offset of schnell's subject; Kontext ignores it and its subject differs by the index alone.
    np.testing.assert_array_equal(data["position_delta_0"], [[0, -subject[1]]] * case.config["B"])
    np.testing.assert_array_equal(data["position_delta_1"], np.zeros_like(data["position_delta_1"]))
    streams = branches(case, data, [None] * 4)
    np.testing.assert_array_equal(streams[0].ids, data["txt_ids"])
    for i, stream in enumerate(streams):
        np.testing.assert_array_equal(stream.time, data[f"timestep_branch{i}"])
        if guidance(case) is None:
            assert stream.guidance is None
            assert f"guidance_branch{i}" not in data
        else:
            np.testing.assert_array_equal(stream.guidance, data[f"guidance_branch{i}"])
    np.testing.assert_allclose(flow.interpolate(data["x0"], data["x1"], data["t"]), data["x_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["base", "independent", "two_adapters"])
def test_variant(case, model, adapters, variant: str) -> None:
    used, independent = settings(case, variant)
    data = case.tensors("inputs")
    (loss, found), gradients = loss_and_gradients(case, model, adapters, data, used, independent)
    np.testing.assert_array_equal(
        mask(branches(case, data, used, independent=independent)), case.tensor(variant, "group_mask")
    )
    np.testing.assert_allclose(found, case.tensor(variant, "output"), rtol=0, atol=flux_golden.TIGHT)
    np.testing.assert_allclose(loss, case.tensor(variant, "loss"), rtol=3e-6)
    np.testing.assert_allclose(loss, case.scalar(f"{variant}.loss"), rtol=3e-6)
    for name, gradient in gradients.items():
        grads = published(model[1], gradient)
        noise = gradient_noise(case, f"{variant}.grad_noise_floor_rel.{name}")
        check_gradients(grads, case.tensors(f"grads_{variant}_{name}"), noise)
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        np.testing.assert_allclose(norm, case.scalar(f"{variant}.grad_norm.{name}"), rtol=1e-5)


def test_rematerialised_gradients(case, model, adapters) -> None:
    used, independent = settings(case, "base")
    _, gradients = loss_and_gradients(case, model, adapters, case.tensors("inputs"), used, independent, remat="full")
    noise = gradient_noise(case, "base.grad_noise_floor_rel.default")
    check_gradients(published(model[1], gradients["default"]), case.tensors("grads_base_default"), noise)


def test_own_frequencies(case, model, adapters) -> None:
    """The production path, nothing injected."""
    graphdef, params = model
    used, _ = settings(case, "base")
    streams = branches(case, case.tensors("inputs"), used)
    found = jax.jit(lambda a: layers.bind(graphdef, params)(streams, adapters=a))({"default": adapters["default"]})
    np.testing.assert_allclose(found, case.tensor("base", "output"), rtol=0, atol=flux_golden.ATOL[1.0])


def forward(model, streams, adapters) -> np.ndarray:
    graphdef, params = model
    with flux_golden.reference_frequencies():
        return np.asarray(jax.jit(lambda a: layers.bind(graphdef, params)(streams, adapters=a))(adapters))


def test_no_lora(case, model) -> None:
    found = forward(model, branches(case, case.tensors("inputs"), [None] * 4), {})
    np.testing.assert_allclose(found, case.tensor("no_lora", "output"), rtol=0, atol=flux_golden.TIGHT)
    effect = np.abs(found - case.tensor("base", "output")).max()
    np.testing.assert_allclose(effect, case.scalar("lora_effect"), rtol=1e-4)


def test_lora_on_all_branches(case, model, adapters) -> None:
    found = forward(model, branches(case, case.tensors("inputs"), ["default"] * 4), adapters)
    np.testing.assert_allclose(found, case.tensor("lora_all_branches", "output"), rtol=0, atol=flux_golden.TIGHT)


def test_alpha_other_than_rank(case, model, adapters) -> None:
    """The published code ignores alpha: with a factor of 1 the numbers agree, with alpha / r they do not."""
    used, independent = settings(case, "alpha_ne_r")
    config = case.config["variants"]["alpha_ne_r"]
    data = case.tensors("inputs")
    np.testing.assert_array_equal(
        mask(branches(case, data, used, independent=independent)), case.tensor("alpha_ne_r", "group_mask")
    )

    def run(scale: float):
        scaled = {"default": dataclasses.replace(adapters["default"], scale=scale)}
        (loss, found), gradients = loss_and_gradients(case, model, scaled, data, used, independent)
        return loss, found, published(model[1], gradients["default"])

    loss, found, gradients = run(1.0)
    np.testing.assert_allclose(found, case.tensor("alpha_ne_r", "output"), rtol=0, atol=flux_golden.TIGHT)
    np.testing.assert_allclose(loss, case.tensor("alpha_ne_r", "loss"), rtol=3e-6)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    np.testing.assert_allclose(norm, case.scalar("alpha_ne_r.grad_norm.default"), rtol=1e-5)
    respected = run(config["alpha"] / case.config["lora"]["r"])[1]
    assert np.abs(respected - case.tensor("alpha_ne_r", "output")).max() > 0.01


def test_intermediates(case, model, adapters) -> None:
    expected = case.tensors("base", "mid.")
    if not expected:
        return  # sets made for acceptance hold inputs and outputs only
    graphdef, params = model
    streams = branches(case, case.tensors("inputs"), settings(case, "base")[0])
    with flux_golden.reference_frequencies(), flux_golden.traced() as trace:
        layers.bind(graphdef, params)(streams, adapters=adapters, scan=False)
    found = {}
    for branch in range(len(streams)):
        found[f"temb.branch{branch}"] = trace.temb[branch]
        found[f"embed.branch{branch}"] = trace.embed[branch]
        for kind, blocks in (("double", trace.double), ("single", trace.single)):
            found |= {f"{kind}{i}.branch{branch}": hidden[branch] for i, hidden in enumerate(blocks)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=0, atol=flux_golden.TIGHT * scale, err_msg=name)


def test_conditions_that_see_only_themselves_can_be_cached(case, model, adapters) -> None:
    """Keys and values of independent conditions, and the second step that reuses them."""
    graphdef, params = model
    data = case.tensors("inputs")
    used, _ = settings(case, "independent")
    first = branches(case, data, used, independent=True)
    expected = case.tensors("kv_cache")
    with flux_golden.reference_frequencies():
        found = jax.jit(lambda a: layers.bind(graphdef, params)(first, adapters=a))(adapters)
    np.testing.assert_allclose(found, expected["output_write"], rtol=0, atol=flux_golden.TIGHT)
    # Keys and values of the conditions by themselves, as the reference stores them.
    alone = omini.alone(
        conditions(data, used), data["pooled_prompt_embeds"], guidance_embeds=guidance(case) is not None
    )
    with flux_golden.reference_frequencies():
        memory = jax.jit(lambda a: layers.bind(graphdef, params).remember(alone, adapters=a))(adapters)
    cache = {}
    for i, (double, single) in enumerate(zip(memory.double, memory.single, strict=True)):
        for kind, first_blocks, last_blocks in zip(("k", "v"), double, single, strict=True):
            blocks = np.concatenate([first_blocks, last_blocks]).swapaxes(2, 3)
            cache |= {f"cache.attn{block}.cond{i}.{kind}": value for block, value in enumerate(blocks)}
    assert cache.keys() == {name for name in expected if name.startswith("cache.")}
    for name, value in cache.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=flux_golden.TIGHT, err_msg=name)
    # The second step: everything again, and with what is remembered.
    later = {**data, "x_t": expected["x_t2"], "t": expected["t2"]}
    full = forward(model, branches(case, later, used, independent=True), adapters)
    with flux_golden.reference_frequencies():
        short = branches(case, later, used)[:2]
        read = jax.jit(lambda m: layers.bind(graphdef, params)(short, adapters=adapters, memory=m))(memory)
    for name in ("output_read", "output_full2"):
        np.testing.assert_allclose(full, expected[name], rtol=0, atol=flux_golden.TIGHT)
        np.testing.assert_allclose(read, expected[name], rtol=0, atol=flux_golden.TIGHT)


# -------------------------------------------------------------------------- from pictures to the loss


@functools.cache
def encoder(case_name: str) -> Any:
    path = golden.case(case_name).external_path("train_step.vae_weights")
    config = autoencoder.AutoencoderKLConfig.from_json(golden.case("vae").config["vae"])
    graphdef, abstract = layers.abstract(lambda rngs: autoencoder.AutoencoderKL(config, rngs=rngs))
    model = layers.bind(graphdef, load_tree(path, abstract, dtype=jnp.float32))

    @jax.jit
    def tokens(image: jax.Array, eps: jax.Array) -> jax.Array:
        moments = model.encode(image.astype(jnp.float32) / 255 * 2 - 1)
        return flow.pack(autoencoder.sample_latents(moments, eps, config))

    return tokens


def test_training_step(case, model, adapters) -> None:
    data = case.tensors("train_step")
    encode = encoder(case.name)
    x0 = encode(data["image_u8"], data["vae_eps_image"])
    pictures = [encode(data[f"condition_{i}_u8"], data[f"vae_eps_cond{i}"]) for i in range(2)]
    for found, name in ((x0, "x_0"), (pictures[0], "cond0_tokens"), (pictures[1], "cond1_tokens")):
        np.testing.assert_allclose(found, data[name], rtol=0, atol=1e-5, err_msg=name)
    time = jax.nn.sigmoid(data["t_logit"])
    np.testing.assert_allclose(time, data["t"], rtol=0, atol=1e-7)
    x_t = flow.interpolate(x0, data["x_1"], time)
    np.testing.assert_allclose(x_t, data["x_t"], rtol=0, atol=1e-5)
    rows, columns = (n // 16 for n in data["image_u8"].shape[-2:])
    grid = omini.grid_ids(rows, columns)
    ids = [grid, omini.subject_ids(rows, columns, kontext=is_kontext(case)), grid]
    for found, name in zip(ids, ("img_ids", "cond0_ids", "cond1_ids"), strict=True):
        np.testing.assert_array_equal(found, data[name])
    np.testing.assert_array_equal(data["position_delta_0"], [[0, -columns]] * len(x0))
    assert not data["txt_ids"].any()
    assert data["txt_ids"].shape == (data["prompt_embeds"].shape[1], 3)
    ours = {
        "prompt_embeds": data["prompt_embeds"],
        "pooled_prompt_embeds": data["pooled_prompt_embeds"],
        "x0": x0,
        "x1": data["x_1"],
        "x_t": x_t,
        "t": time,
        "img_ids": ids[0],
        "cond0_ids": ids[1],
        "cond1_ids": ids[2],
        "cond0_tokens": pictures[0],
        "cond1_tokens": pictures[1],
    }
    used = [None, None, "default", "default"]
    (loss, prediction), gradients = loss_and_gradients(case, model, adapters, ours, used, False)
    # Rounding of the autoencoder (5e-6) passes through the transformer on top of its own.
    np.testing.assert_allclose(prediction, data["pred"], rtol=0, atol=2 * flux_golden.TIGHT)
    np.testing.assert_allclose(loss, data["loss"], rtol=1e-5)
    np.testing.assert_allclose(loss, case.scalar("train_step.loss"), rtol=1e-5)
    noise = gradient_noise(case, "base.grad_noise_floor_rel.default")
    check_gradients(published(model[1], gradients["default"]), case.tensors("grads_train_step"), noise)
