"""The embedded base: another library draws the same pictures from it, it is whole and small, and sees new birds."""

import functools
import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from nabla_jax import assets, flow, toybirds
from nabla_jax.checkpoints import pipeline
from nabla_jax.conditioning import omini
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.text import encode_prompts, load_text_stack
from nabla_jax.flow.path import pack, unpack
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import sample_latents, unscale

FOLDER = assets.resolve("asset:toy-flux-kontext")
SIZE = 48
STEPS = 4
TEXT_LENGTH = 16
PROMPTS = ["A photo of a bird.", "a bird facing left with blue head, yellow belly, green wings"]
LIMIT = 6_000_000
# Both sides compute in float32 and agree to a few 1e-6; a few hundred times that is still far below one grey level.
MEAN, MAX = 0.05 / 255, 0.3 / 255
# A world that neither pre-training nor a benchmark draws from.
NEW_WORLD = 123
NEW_BIRDS = 24


@pytest.fixture(scope="module")
def published() -> diffusers.FluxKontextPipeline:
    pipe = diffusers.FluxKontextPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def transformer() -> pipeline.Component:
    return pipeline.load_transformer(FOLDER)


@pytest.fixture(scope="module")
def vae() -> pipeline.Component:
    return pipeline.load_vae(FOLDER)


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    return encode_prompts(load_text_stack(FOLDER), PROMPTS, TEXT_LENGTH)


@functools.cache
def new_birds() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, H, W, 3] and masks bool [N, H, W] of individuals that nothing was trained on."""
    views = [view for index in range(NEW_BIRDS) for view in toybirds.fresh_pair(NEW_WORLD, index, SIZE)]
    squares = [Placement.square(*v.mask.shape, SIZE) for v in views]
    pictures = [square.apply(v.rgb, 255, "nearest") for square, v in zip(squares, views, strict=True)]
    masks = [square.apply(v.mask, False, "nearest") for square, v in zip(squares, views, strict=True)]
    return np.stack(pictures), np.stack(masks)


def to_input(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def to_unit(decoded: jax.Array) -> np.ndarray:
    """[B, 3, H, W] nominally in [-1, 1] -> [B, H, W, 3] in [0, 1]."""
    return np.clip(np.asarray(decoded).transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)


def draw(
    transformer: pipeline.Component,
    vae: pipeline.Component,
    text: tuple[np.ndarray, np.ndarray],
    noise: np.ndarray,
    guidance: float,
    reference: np.ndarray | None,
) -> np.ndarray:
    """FLUX.1-Kontext's own sampling from the package's parts: one picture [H, W, 3] in [0, 1] per prompt."""
    batch, tokens, _ = noise.shape
    schedule = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    side = SIZE // vae.config.factor
    grid = (side // flow.path.PATCH, side // flow.path.PATCH)
    assert tokens == grid[0] * grid[1]

    @jax.jit
    def run(params: layers.Params, vae_params: layers.Params, noise: jax.Array, levels: jax.Array) -> jax.Array:
        autoencoder = layers.bind(vae.graphdef, vae_params)
        references = []
        if reference is not None:
            moments = autoencoder.encode(jnp.asarray(to_input(reference[None])))
            mode = sample_latents(moments, jnp.zeros((1, vae.config.latent_channels, side, side)), vae.config)
            references = [(jnp.repeat(pack(mode), batch, axis=0), omini.grid_ids(*grid, index=1))]

        def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
            branches = omini.native(
                *map(jnp.asarray, text),
                latents,
                omini.grid_ids(*grid),
                jnp.full((batch,), sigma),
                guidance=guidance,
                references=references,
            )
            return layers.bind(transformer.graphdef, params)(branches)[:, :tokens]

        latents = unpack(flow.euler(velocity, noise, levels), side, side)
        return autoencoder.decode(unscale(latents, vae.config))

    levels = jnp.asarray(flow.sigmas(schedule, STEPS, tokens))
    return to_unit(run(transformer.params, vae.params, jnp.asarray(noise), levels))


# ------------------------------------------------------------------------------------------ the same pictures


def test_prompts_are_read_alike(published, text) -> None:
    with torch.no_grad():
        embeds, pooled, _ = published.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=TEXT_LENGTH)
    np.testing.assert_allclose(text[0], embeds.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(text[1], pooled.numpy(), rtol=0, atol=1e-4)
    # Both prompts reach the model as different texts.
    assert np.abs(text[0][0] - text[0][1]).max() > 0.1 and np.abs(text[1][0] - text[1][1]).max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("shown", ["reference", "nothing"])
def test_diffusers_draws_the_same_pictures(published, transformer, vae, text, guidance: float, shown: str) -> None:
    reference = new_birds()[0][0] if shown == "reference" else None
    tokens = (SIZE // vae.config.factor // flow.path.PATCH) ** 2
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), tokens, transformer.config.in_channels))
    noise = noise.astype(np.float32)
    with torch.no_grad():
        expected = published(
            image=None if reference is None else Image.fromarray(reference),
            prompt=PROMPTS,
            height=SIZE,
            width=SIZE,
            max_area=SIZE * SIZE,
            _auto_resize=False,
            latents=torch.from_numpy(noise),
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            max_sequence_length=TEXT_LENGTH,
            output_type="np",
        ).images
    found = draw(transformer, vae, text, noise, guidance, reference)
    assert found.shape == expected.shape == (len(PROMPTS), SIZE, SIZE, 3)
    difference = np.abs(found - expected)
    assert difference.mean() < MEAN
    assert difference.max() < MAX


def test_guidance_prompt_and_reference_all_reach_the_picture(transformer, vae, text) -> None:
    """Without this, agreement could mean that both sides ignore an input."""
    tokens = (SIZE // vae.config.factor // flow.path.PATCH) ** 2
    one = np.random.default_rng(0).standard_normal((1, tokens, transformer.config.in_channels)).astype(np.float32)
    noise = np.repeat(one, len(PROMPTS), axis=0)
    reference = new_birds()[0][0]
    plain = draw(transformer, vae, text, noise, 1.0, reference)
    changed = {
        "prompt": plain[::-1],
        "guidance": draw(transformer, vae, text, noise, 4.0, reference),
        "reference": draw(transformer, vae, text, noise, 1.0, None),
    }
    effects = {name: float(np.abs(other - plain).max()) for name, other in changed.items()}
    # More than the agreement with diffusers is allowed to be off.
    assert min(effects.values()) > 3 * MAX, effects


# --------------------------------------------------------------------------------------------- whole and small


def test_the_folder_is_complete_and_every_weight_fits() -> None:
    pipeline.check_folder(FOLDER)
    for name in pipeline.PARTS:
        part = pipeline.load_part(FOLDER, name)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(part.params)), name
    tokenizers = pipeline.load_tokenizers(FOLDER)
    for tokenizer in (tokenizers.clip, tokenizers.t5):
        ids = tokenizer(PROMPTS[1]).input_ids
        assert tokenizer.unk_token_id not in ids[:-1]


def test_the_folder_is_small() -> None:
    sizes = {p.relative_to(FOLDER): p.stat().st_size for p in Path(FOLDER).rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= LIMIT, sizes


# ----------------------------------------------------------------------------------------------------- quality


def test_the_autoencoder_keeps_birds_of_another_world(vae) -> None:
    """PSNR inside the silhouettes; the squared error is averaged over all birds before the logarithm."""
    pictures, masks = new_birds()

    @jax.jit
    def pass_through(params: layers.Params, images: jax.Array) -> jax.Array:
        autoencoder = layers.bind(vae.graphdef, params)
        return autoencoder.decode(jnp.split(autoencoder.encode(images), 2, axis=1)[0])

    decoded = to_unit(pass_through(vae.params, jnp.asarray(to_input(pictures))))
    error = (np.rint(decoded * 255) - pictures)[masks]
    psnr = 10 * np.log10(255**2 / np.mean(error**2))
    assert psnr >= 27, f"{psnr:.2f} dB"
