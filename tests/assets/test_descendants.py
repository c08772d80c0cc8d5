"""The embedded bases that descend from toy-flux-kontext: diffusers draws the same pictures, and all are small."""

import json
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_fill
from PIL import Image

from nabla_jax import assets, flow, toybirds
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.transformers_folder import load_redux
from nabla_jax.conditioning import diptych, omini
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.text import encode_prompts
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import sample_latents, unscale

KONTEXT, SCHNELL, FILL, REDUX = (
    assets.resolve(f"asset:toy-flux-{name}") for name in ("kontext", "schnell", "fill", "redux")
)
SIZE, STEPS, TEXT_LENGTH = 48, 4, 16
PROMPTS = ["A photo of a bird.", "a bird facing left with blue head, yellow belly, green wings"]
LIMIT = 6_000_000
# As for toy-flux-kontext: both sides compute in float32.
MEAN, MAX = 0.05 / 255, 0.3 / 255
# A world that neither pre-training nor a benchmark draws from.
NEW_WORLD = 123


def views() -> list[tuple[np.ndarray, np.ndarray]]:
    """Picture uint8 [H, W, 3] and mask bool [H, W] of two views of a new bird."""
    squares = [(Placement.square(*v.mask.shape, SIZE), v) for v in toybirds.fresh_pair(NEW_WORLD, 0, SIZE)]
    return [(s.apply(v.rgb, 255, "nearest"), s.apply(v.mask, False, "nearest")) for s, v in squares]


def opened(kind: Any, folder: Path) -> Any:
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(folder: Path, vae: pipeline.Component, noise: np.ndarray, grid: tuple[int, int], velocity: Any) -> np.ndarray:
    """Euler's method from ``noise`` [B, N, C] with the folder's schedule: pictures [B, H, W, 3] in [0, 1]."""
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    levels = jnp.asarray(flow.sigmas(schedule, STEPS, noise.shape[1]))

    @jax.jit
    def run(noise: jax.Array) -> jax.Array:
        latents = flow.unpack(flow.euler(velocity, noise, levels), 2 * grid[0], 2 * grid[1])
        return layers.bind(vae.graphdef, vae.params).decode(unscale(latents, vae.config))

    return np.clip(np.asarray(run(jnp.asarray(noise))).transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.std() > 0.02
    difference = np.abs(found - expected)
    assert difference.mean() < MEAN and difference.max() < MAX


def test_diffusers_draws_the_same_pictures_with_schnell() -> None:
    transformer, vae = pipeline.load_transformer(SCHNELL), pipeline.load_vae(SCHNELL)
    assert not transformer.config.guidance_embeds and not pipeline.is_kontext(SCHNELL)
    grid = (SIZE // 8, SIZE // 8)
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), grid[0] * grid[1], 64)).astype(np.float32)
    with torch.no_grad():
        expected = opened(diffusers.FluxPipeline, SCHNELL)(
            prompt=PROMPTS, height=SIZE, width=SIZE, latents=torch.from_numpy(noise), guidance_scale=0.0,
            num_inference_steps=STEPS, max_sequence_length=TEXT_LENGTH, output_type="np",
        ).images  # fmt: skip
    text = [jnp.asarray(array) for array in encode_prompts(SCHNELL, PROMPTS, TEXT_LENGTH)]

    def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        time = jnp.full((len(PROMPTS),), sigma)
        branches = omini.branches(*text, noisy, omini.grid_ids(*grid), time, guidance=None)
        return layers.bind(transformer.graphdef, transformer.params)(branches)

    found = drawn(SCHNELL, vae, noise, grid, velocity)
    assert_same(found, expected)
    assert np.abs(found[0] - found[1]).max() > 3 * MAX


def test_schnell_is_sampled_in_evenly_spaced_steps() -> None:
    schedule = json.loads((SCHNELL / "scheduler" / "scheduler_config.json").read_text())
    np.testing.assert_array_equal(flow.sigmas(schedule, 4, 4096), [1, 0.75, 0.5, 0.25, 0])


def test_diffusers_repaints_the_same_diptych_with_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, vae, redux = pipeline.load_transformer(FILL), pipeline.load_vae(FILL), load_redux(REDUX)
    (reference, _), (target, bird) = views()
    both = np.concatenate([reference, target], axis=1)
    hole = np.concatenate([np.zeros_like(bird), bird], axis=1)
    processor = ImageProcessor.from_json(REDUX / "feature_extractor" / "preprocessor_config.json")
    tokens = layers.bind(redux.graphdef, redux.params)(jnp.asarray(processor([reference])))
    prompt, pooled = diptych.prompt(tokens, TEXT_LENGTH, transformer.config.pooled_projection_dim)
    grid = (SIZE // 8, 2 * SIZE // 8)
    noise = np.random.default_rng(0).standard_normal((1, grid[0] * grid[1], 64)).astype(np.float32)
    # The pipeline draws the masked picture's latents; a mean is the same for everybody.
    monkeypatch.setattr(pipeline_flux_fill, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    with torch.no_grad():
        expected = opened(diffusers.FluxFillPipeline, FILL)(
            image=Image.fromarray(both), mask_image=Image.fromarray(np.where(hole, np.uint8(255), np.uint8(0))),
            prompt_embeds=torch.tensor(np.asarray(prompt)), pooled_prompt_embeds=torch.tensor(np.asarray(pooled)),
            height=SIZE, width=2 * SIZE, latents=torch.from_numpy(noise), guidance_scale=30.0,
            num_inference_steps=STEPS, output_type="np",
        ).images  # fmt: skip
    picture = jnp.asarray(both[None].transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1))
    masked = diptych.hide(picture, jnp.asarray(hole[None], jnp.float32))
    moments = layers.bind(vae.graphdef, vae.params).encode(masked)
    latents = flow.pack(sample_latents(moments, jnp.zeros((1, 16, SIZE // 4, SIZE // 2)), vae.config))
    mask = diptych.fold_mask(jnp.asarray(hole[None], jnp.float32), vae.config.factor)

    def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        branches = diptych.branches(prompt, pooled, noisy, latents, mask, grid, jnp.full((1,), sigma), guidance=30.0)
        return layers.bind(transformer.graphdef, transformer.params)(branches)

    assert_same(drawn(FILL, vae, noise, grid, velocity), expected)


def test_diffusers_makes_the_same_prompt_tokens_with_redux() -> None:
    prior = opened(diffusers.FluxPriorReduxPipeline, REDUX)
    redux = load_redux(REDUX)
    picture = views()[0][0]
    with torch.no_grad():
        features = prior.encode_image(Image.fromarray(picture), "cpu", 1)
        expected = prior.image_embedder(features).image_embeds.numpy()
    processor = ImageProcessor.from_json(REDUX / "feature_extractor" / "preprocessor_config.json")
    found = np.asarray(layers.bind(redux.graphdef, redux.params)(jnp.asarray(processor([picture]))))
    assert found.shape[-1] == pipeline.transformer_config(FILL).joint_attention_dim
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert found.std() > 0.05


@pytest.mark.parametrize("folder", [SCHNELL, FILL], ids=lambda folder: folder.name)
def test_the_folders_are_whole_and_take_over_the_autoencoder(folder: Path) -> None:
    pipeline.check_folder(folder)
    for name in pipeline.PARTS:
        part = pipeline.load_part(folder, name)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(part.params)), name
    for part in ("vae", "tokenizer", "tokenizer_2"):
        ours, theirs = ({p.name: p.read_bytes() for p in (f / part).iterdir()} for f in (folder, KONTEXT))
        assert ours == theirs


@pytest.mark.parametrize("folder", [SCHNELL, FILL, REDUX], ids=lambda folder: folder.name)
def test_the_folders_are_small(folder: Path) -> None:
    sizes = {p.relative_to(folder): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert sum(sizes.values()) < LIMIT, sizes
