"""FLUX.1-Fill with an adapter on the whole sequence: velocity, gradients, a training step, the sampling loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import api, flow, reposing
from nabla_jax.checkpoints.adapters import load_adapter
from nabla_jax.checkpoints.safetensors_io import load_tree
from nabla_jax.checkpoints.transformers_folder import REDUX
from nabla_jax.conditioning import diptych, omini
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import autoencoder, flux, layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from nabla_jax.models.redux import Redux, ReduxConfig, ReduxEmbedderConfig
from nabla_jax.models.siglip import SiglipVisionConfig
from tests.golden import flux_golden, golden
from tests.golden.test_omini import check_gradients, published

MASKS = ("mask", "depth_as_mask")


@pytest.fixture(scope="module")
def case() -> golden.Case:
    return golden.case("insert_fill")


def load(case: golden.Case):
    """(graphdef, parameters, adapters by name)."""
    graphdef, params = flux_golden.load(case.external_path("weights"), case.config["transformer"])
    adapter, metadata = load_adapter(case.path("lora_default"), params, stacked=flux.STACKED)
    # The published file does not say alpha; the factor it was made with is in the manifest.
    scale = case.config["lora"]["scaling"]
    assert metadata.rank == case.config["lora"]["r"]
    assert scale == case.config["lora"]["lora_alpha"] / case.config["lora"]["r"]
    return graphdef, params, {"default": type(adapter)(adapter.params, scale)}


@pytest.fixture(scope="module")
def model(case):
    return load(case)


def load_vae(config, path):
    """(config, autoencoder) of a golden file."""
    graphdef, abstract = layers.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return config, layers.bind(graphdef, load_tree(path, abstract, dtype=jnp.float32))


def streams(data, grid, name: str | None, mask=None):
    """Text and picture of a set of inputs; ``mask`` [B, N, 256] instead of the stored one."""
    masked = data["src_latents"] if "src_latents" in data else data["src_tokens"]
    stored = data["mask_latents"] if "mask_latents" in data else data["mask_tokens"]
    return diptych.branches(
        data["prompt_embeds"],
        data["pooled"],
        data["x_t"],
        masked,
        (stored if mask is None else mask).astype(np.float32),
        grid,
        data["t"],
        guidance=data["guidance"],
        adapter=name,
    )


def method_of(graphdef, name: str | None = "default") -> reposing.Method:
    """Method insert on the golden transformer."""
    return reposing.Method(graphdef, AutoencoderKLConfig(), name, False, True, name="insert")


def arguments(data, name: str | None = "default", mask=None):
    """(what is shown, text) of a set of inputs for ``reposing.predict``; ``mask`` instead of the stored one."""
    masked = data["src_latents"] if "src_latents" in data else data["src_tokens"]
    stored = data["mask_latents"] if "mask_latents" in data else data["mask_tokens"]
    shown = diptych.Masked(masked, (stored if mask is None else mask).astype(np.float32), name)
    return shown, (data["prompt_embeds"], data["pooled"])


def loss_and_gradients(model, data, grid, x0, x1, mask=None):
    """((loss, velocity), gradients) of the training step under the reference's frequencies."""
    graphdef, params, adapters = model
    method, (shown, text) = method_of(graphdef), arguments(data, mask=mask)

    @jax.jit
    def run(trees):
        def loss(trees):
            return reposing.path_loss(
                method, params, trees, (x0, x1), data["t"], shown, text, data["guidance"], grid
            )  # fmt: skip

        noisy = flow.interpolate(x0, x1, data["t"])
        found = reposing.predict(method, params, trees, noisy, data["t"], shown, text, data["guidance"], grid)
        value, gradients = jax.value_and_grad(loss)(trees)
        return (value, found), gradients

    with flux_golden.reference_frequencies():
        return run(adapters)


def unscaled(model, gradient):
    """Gradients by the names of adapter files."""
    return published(model[1], gradient["default"])


def test_forward(case, model) -> None:
    data = case.tensors("forward")
    np.testing.assert_allclose(flow.interpolate(data["x0"], data["x1"], data["t"]), data["x_t"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(omini.grid_ids(*case.config["grid"]), data["img_ids"])
    embeds, pooled = diptych.prompt(data["redux_tokens"], case.config["T_zero_text"], data["pooled"].shape[-1])
    np.testing.assert_array_equal(embeds, data["prompt_embeds"])
    np.testing.assert_array_equal(pooled, np.zeros_like(data["pooled"]))
    branches = streams(data, case.config["grid"], "default")
    np.testing.assert_array_equal(branches[0].ids, data["txt_ids"])
    (loss, found), gradient = loss_and_gradients(model, data, case.config["grid"], data["x0"], data["x1"])
    np.testing.assert_allclose(found, data["output"], rtol=0, atol=flux_golden.TIGHT)
    np.testing.assert_allclose(loss, data["loss"], rtol=3e-6)
    np.testing.assert_allclose(loss, case.scalar("loss"), rtol=3e-6)
    grads = unscaled(model, gradient)
    check_gradients(grads, case.tensors("grads_forward"))
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    np.testing.assert_allclose(norm, case.scalar("grad_norm"), rtol=1e-5)


def test_without_the_adapter_and_with_own_frequencies(case, model) -> None:
    graphdef, params, adapters = model
    data = case.tensors("forward")
    for name, stored in ((None, "output_no_lora"), ("default", "output")):
        method, (shown, text) = method_of(graphdef, name), arguments(data, name)
        found = jax.jit(
            lambda a, m=method, s=shown, t=text: reposing.predict(
                m, params, a, data["x_t"], data["t"], s, t, data["guidance"], case.config["grid"]
            )
        )(adapters)
        tolerance = flux_golden.atol(data["guidance"])
        np.testing.assert_allclose(found, data[stored], rtol=0, atol=tolerance)


@pytest.mark.parametrize("source", MASKS)
def test_training_step(case, model, source: str) -> None:
    """The step from the latents on; the mask is the one that is handed in, be it a silhouette or a depth map."""
    shared = {
        name: case.tensor("train_step_mask", name)
        for name in ("x_0", "x_1", "x_t", "t", "t_logit", "src_tokens", "prompt_embeds", "pooled", "guidance")
    }
    own = {name: case.tensor(f"train_step_{source}", name) for name in ("mask_u8", "mask_tokens", "pred", "loss")}
    time = jax.nn.sigmoid(shared["t_logit"])
    np.testing.assert_allclose(time, shared["t"], rtol=0, atol=1e-7)
    x_t = flow.interpolate(shared["x_0"], shared["x_1"], shared["t"])
    np.testing.assert_allclose(x_t, shared["x_t"], rtol=0, atol=1e-6)
    mask = diptych.fold_mask(jnp.asarray(own["mask_u8"][:, 0], jnp.float32) / 255)
    np.testing.assert_array_equal(mask, own["mask_tokens"])
    grid = tuple(n // 16 for n in own["mask_u8"].shape[-2:])
    inputs = {**shared, "mask_tokens": own["mask_tokens"]}
    branches = streams(inputs, grid, "default", mask)
    np.testing.assert_array_equal(branches[0].ids, case.tensor("train_step_mask", "txt_ids"))
    np.testing.assert_array_equal(branches[1].ids, case.tensor("train_step_mask", "img_ids"))
    (loss, found), gradient = loss_and_gradients(model, inputs, grid, shared["x_0"], shared["x_1"], mask)
    np.testing.assert_allclose(found, own["pred"], rtol=0, atol=flux_golden.TIGHT)
    np.testing.assert_allclose(loss, own["loss"], rtol=3e-6)
    np.testing.assert_allclose(loss, case.scalar(f"train_step_{source}.loss"), rtol=3e-6)
    check_gradients(unscaled(model, gradient), case.tensors(f"grads_train_step_{source}"))


def latent_tokens(model, pictures, noise):
    """Pictures [B, 3, H, W] in [-1, 1], encoded in tiles as published, as tokens."""
    config, encoder = model
    moments = jax.jit(encoder.encode, static_argnames="tiled")(pictures, tiled=True)
    return flow.pack(autoencoder.sample_latents(moments, noise, config))


@pytest.fixture(scope="module")
def training_vae(case):
    config = AutoencoderKLConfig.from_json(golden.case("vae").config["vae"])
    return load_vae(config, case.external_path("train_step.vae_weights"))


def test_training_step_from_pixels_to_latents(case, training_vae) -> None:
    """The diptych and its source with the black hole of the published training, encoded in overlapping tiles."""
    data = {name: case.tensor("train_step_mask", name) for name in ("result_u8", "src_u8", "mask_u8", "ref_u8")}
    result, source = (jnp.asarray(data[name], jnp.float32) / 127.5 - 1 for name in ("result_u8", "src_u8"))
    mask = jnp.asarray(data["mask_u8"][:, 0], jnp.float32) / 255
    width = data["ref_u8"].shape[-1]
    reference = jnp.asarray(data["ref_u8"], jnp.float32) / 127.5 - 1
    whole, masked, folded = diptych.pictures(reference, result[..., width:], mask[..., width:], hole=-1.0)
    np.testing.assert_array_equal(masked, source)
    np.testing.assert_array_equal(whole, result)
    np.testing.assert_array_equal(folded, mask)
    assert result.shape[-1] > training_vae[0].sample_size  # or nothing would be in tiles
    for pictures, noise, expected in ((result, "vae_eps_result", "x_0"), (source, "vae_eps_src", "src_tokens")):
        found = latent_tokens(training_vae, pictures, case.tensor("train_step_mask", noise))
        np.testing.assert_allclose(found, case.tensor("train_step_mask", expected), rtol=0, atol=1e-5)


def test_training_step_from_the_reference_to_the_prompt(case) -> None:
    reference = np.moveaxis(case.tensor("train_step_mask", "ref_u8"), 1, -1)
    tower = SiglipVisionConfig.from_json({"model_type": "siglip_vision_model", **case.config["redux_siglip"]})
    pixels = ImageProcessor.siglip(tower.image_size)(list(reference))
    np.testing.assert_array_equal(pixels, case.tensor("train_step_mask", "redux_pixel_values"))
    config = ReduxConfig(tower, ReduxEmbedderConfig(**case.config["redux_embedder"]))
    graphdef, abstract = layers.abstract(lambda rngs: Redux(config, rngs=rngs))
    params = {
        part: load_tree(
            case.path(f"weights_redux_{file}"), abstract[part], REDUX[part].table, stacked=REDUX[part].stacked
        )
        for part, file in (("image_encoder", "siglip"), ("image_embedder", "embedder"))
    }
    tokens = jax.jit(lambda p, x: layers.bind(graphdef, p)(x))(params, pixels)
    expected = case.tensor("train_step_mask", "prompt_embeds")
    pooled = case.tensor("train_step_mask", "pooled")
    embeds, zeros = diptych.prompt(tokens, expected.shape[1] - tokens.shape[1], pooled.shape[-1])
    np.testing.assert_allclose(embeds, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(zeros, pooled)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="module")
def sampling() -> golden.Case:
    return golden.case("sampling_fill")


@pytest.fixture(scope="module")
def vae(sampling):
    return load_vae(AutoencoderKLConfig.from_json(golden.case("vae").config["vae"]), sampling.external_path("vae"))


def test_masked_picture_and_mask(sampling, vae) -> None:
    """Grey where the mask hides the picture, its latents beside the folded mask."""
    config, model = vae
    data = sampling.tensors("fill")
    picture = np.moveaxis(data["image"], -1, 1).astype(np.float32) / 255 * 2 - 1
    mask = data["mask"][..., 0].astype(np.float32) / 255
    moments = jax.jit(model.encode)(diptych.hide(picture, mask))
    tokens = flow.pack(autoencoder.sample_latents(moments, data["vae_eps"], config))
    found = np.concatenate([tokens, diptych.fold_mask(mask)], axis=-1)
    np.testing.assert_allclose(found, data["masked_image_and_mask_latents"], rtol=0, atol=1e-5)


def test_every_step(sampling, vae) -> None:
    graphdef, params, adapters = load(sampling)
    config, autoencoder_model = vae
    data = sampling.tensors("fill")
    height, width = sampling.config["height"], sampling.config["width"]
    grid = (height // 16, width // 16)
    sigmas = flow.sigmas(sampling.config["scheduler"], sampling.config["steps"], grid[0] * grid[1])
    np.testing.assert_allclose(sigmas, data["sigmas"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(sigmas[:-1] * 1000, data["timesteps"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(omini.grid_ids(*grid), data["img_ids"])
    masked, mask = np.split(data["masked_image_and_mask_latents"], [64], axis=-1)
    batch = data["latents"].shape[0]

    def branches(latents: jax.Array, sigma: jax.Array) -> list[flux.Branch]:
        time = jnp.full(batch, sigma)
        guidance = sampling.config["guidance_scale"]
        return diptych.branches(
            data["prompt_embeds"], data["pooled"], latents, masked, mask, grid, time, guidance=guidance,
            adapter="default",
        )  # fmt: skip

    method, shown = method_of(graphdef), diptych.Masked(masked, mask, "default")

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        text, scale = (data["prompt_embeds"], data["pooled"]), sampling.config["guidance_scale"]
        time = jnp.full(batch, sigma)
        return reposing.predict(method, params, adapters, latents, time, shown, text, scale, grid)

    text, picture = branches(data["latents"], sigmas[0])
    np.testing.assert_array_equal(text.ids, data["txt_ids"])
    np.testing.assert_array_equal(picture.time, data["first_timestep_in"])
    np.testing.assert_array_equal(picture.guidance, data["guidance_in"])
    state = data["latents"]
    with flux_golden.reference_frequencies():
        step = jax.jit(lambda x, pair: flow.euler(velocity, x, pair))
        for i in range(sampling.config["steps"]):
            state = step(state, sigmas[i : i + 2])
            np.testing.assert_allclose(state, data[f"step{i}"], rtol=0, atol=2 * flux_golden.TIGHT, err_msg=f"step {i}")
    # The production loop with our own frequencies; then the picture.
    final = jax.jit(lambda x: flow.euler(velocity, x, sigmas))(data["latents"])
    loose = 2 * flux_golden.atol(sampling.config["guidance_scale"])
    np.testing.assert_allclose(final, data[f"step{sampling.config['steps'] - 1}"], rtol=0, atol=loose)
    latents = flow.unpack(state, height // 8, width // 8)
    decoded = jax.jit(autoencoder_model.decode)(autoencoder.unscale(latents, config))
    np.testing.assert_allclose(decoded, data["decoded"], rtol=0, atol=5e-5)
    grey = api.to_pixels(decoded).astype(int)
    assert np.abs(grey - data["decoded_uint8"]).max() <= 1
    assert (grey != data["decoded_uint8"]).mean() < 1e-3
