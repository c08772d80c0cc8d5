"""Training a small autoencoder: it learns, continues exactly, and writes what torch reads."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoderKL

from nabla_jax.checkpoints import pipeline
from nabla_jax.errors import UserError
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.pretrain import autoencoder as ae

CONFIG = AutoencoderKLConfig(
    block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16
)
SETTINGS = ae.Settings(steps=60, batch=8, learning_rate=5e-3, warmup=5, ema=0.9, flat=0.0)


def blobs(count: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Discs of one colour on grounds of another, with the discs' masks."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(5, 11, (count, 2, 1, 1)), rng.uniform(3, 5, (count, 1, 1))
    masks = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    return np.where(masks[..., None], [230, 90, 20], [40, 120, 200]).astype(np.uint8), masks


def run(settings: ae.Settings, checkpoint: Path, every: int = 20) -> tuple[ae.State, list[dict[str, float]]]:
    pictures, masks = blobs(64)
    reports: list[dict[str, float]] = []
    _, state = ae.train(
        CONFIG,
        settings,
        pictures,
        masks,
        held_out=blobs(8),
        checkpoint=checkpoint,
        report=reports.append,
        every=every,
    )
    return state, reports


def test_learns_and_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, reports = run(SETTINGS, tmp_path / "whole.safetensors")
    assert [r["step"] for r in reports] == [20, 40, 60]
    held_out, masks = blobs(8)
    untrained, _ = ae.reconstruct(*ae.initialize(CONFIG, SETTINGS.seed), held_out)
    assert reports[-1]["psnr"] > ae.psnr(held_out, untrained) + 6
    assert reports[-1]["psnr_bird"] > ae.psnr(held_out, untrained, masks) + 6

    class Stopped(Exception):
        pass

    def stop(_: dict[str, float]) -> None:
        raise Stopped

    pictures, masks = blobs(64)
    part = tmp_path / "part.safetensors"
    with pytest.raises(Stopped):
        ae.train(CONFIG, SETTINGS, pictures, masks, held_out=blobs(8), checkpoint=part, report=stop, every=20)
    drawn: list[int] = []
    draw = ae.draw_batch
    monkeypatch.setattr(ae, "draw_batch", lambda p, m, step, s: drawn.append(step) or draw(p, m, step, s))
    continued, _ = run(SETTINGS, part)
    assert drawn == list(range(20, 60))
    jax.tree.map(np.testing.assert_array_equal, continued.ema, whole.ema)
    jax.tree.map(np.testing.assert_array_equal, continued.params, whole.params)

    with pytest.raises(UserError, match="found those of another model"):
        other = replace(CONFIG, block_out_channels=(8, 16))
        ae.train(other, SETTINGS, pictures, masks, held_out=blobs(8), checkpoint=part, report=stop)


def test_saved_folder_is_read_by_torch(tmp_path: Path) -> None:
    graphdef, params = ae.initialize(CONFIG, 0)
    pictures, _ = blobs(40)
    decoded, latents = ae.reconstruct(graphdef, params, pictures)
    config = ae.with_measured_scale(CONFIG, latents)
    pipeline.save_part(tmp_path, "vae", config, params)
    model = TorchAutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    assert (model.config.scaling_factor, model.config.shift_factor) == (
        config.scaling_factor,
        config.shift_factor,
    )
    scaled = (latents - config.shift_factor) * config.scaling_factor
    assert abs(scaled.mean()) < 1e-3 and abs(scaled.std() - 1) < 1e-3
    with torch.no_grad():
        images = model.decode(torch.from_numpy(latents)).sample.numpy().transpose(0, 2, 3, 1)
    expected = np.clip(np.round((images + 1) * 127.5), 0, 255)
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_initial_residual_branches_are_silent() -> None:
    _, params = ae.initialize(CONFIG, 0)
    resnet = params["decoder"]["mid_block"]["resnets"]["0"]
    assert not np.any(resnet["conv2"]["weight"]) and np.any(resnet["conv1"]["weight"])
    out = params["encoder"]["conv_out"]
    np.testing.assert_array_equal(out["bias"][4:], -6.0)
    assert not np.any(out["weight"][4:]) and np.any(out["weight"][:4])


def test_loss_weighs_the_bird() -> None:
    """A wrong pixel inside the mask costs ``bird_weight`` times one outside."""
    graphdef, params = ae.initialize(CONFIG, 0)
    params = jax.tree.map(jnp.zeros_like, params)  # decodes to zero everywhere, latents exactly the noise
    masks = np.zeros((1, 16, 16), np.float32)
    masks[:, :8] = 1
    settings = replace(SETTINGS, bird_weight=3.0, l1=0.0, kl=0.0)

    def cost(top: float, bottom: float) -> float:
        images = np.empty((1, 3, 16, 16), np.float32)
        images[:, :, :8], images[:, :, 8:] = top, bottom
        return float(ae.loss(graphdef, params, images, masks, jax.random.key(0), settings)[0])

    np.testing.assert_allclose(cost(0.5, 0), 3 * cost(0, 0.5), rtol=1e-6)
    np.testing.assert_allclose(cost(0.5, 0.5), 0.25, rtol=1e-6)  # the weights average to one


def test_kl_of_the_unit_normal_is_zero() -> None:
    graphdef, params = ae.initialize(CONFIG, 0)
    images = jnp.zeros((1, 3, 16, 16))
    masks = jnp.ones((1, 16, 16))
    zero = jax.tree.map(jnp.zeros_like, params)
    assert float(ae.loss(graphdef, zero, images, masks, jax.random.key(0), SETTINGS)[1]["kl"]) == 0
    shifted = {**zero, "encoder": {**zero["encoder"], "conv_out": dict(zero["encoder"]["conv_out"])}}
    shifted["encoder"]["conv_out"]["bias"] = jnp.array([2.0] * 4 + [1.0] * 4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(2.0, float(np.exp(0.5))), torch.distributions.Normal(0.0, 1.0)
    )
    found = ae.loss(graphdef, shifted, images, masks, jax.random.key(0), SETTINGS)[1]["kl"]
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_batches_depend_on_seed_and_step_and_keep_masks_aligned() -> None:
    pictures, masks = blobs(30)
    settings = replace(SETTINGS, batch=64, flat=1.0)
    images, birds = ae.draw_batch(pictures, masks, 7, settings)
    again, _ = ae.draw_batch(pictures, masks, 7, settings)
    other, _ = ae.draw_batch(pictures, masks, 8, settings)
    np.testing.assert_array_equal(images, again)
    assert np.any(images != other)
    for image, bird in zip(images, birds, strict=True):
        # Disc and ground have one colour each, so each side of the mask must stay uniform after every change.
        assert np.ptp(image[bird], axis=0).max() == 0
        assert np.ptp(image[~bird], axis=0).max() == 0
    np.testing.assert_array_equal(blobs(30)[0], pictures)


def test_psnr() -> None:
    a = np.full((1, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[:, :2] = 110
    weights = np.zeros((1, 4, 4))
    weights[:, :2] = 1
    np.testing.assert_allclose(ae.psnr(a, b, weights), 20 * np.log10(255 / 10))
    np.testing.assert_allclose(ae.psnr(a, b), 20 * np.log10(255 / np.sqrt(50)))
