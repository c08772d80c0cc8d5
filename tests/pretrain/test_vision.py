"""Training small vision networks: the objectives against torch, exact continuation, and that identity is learned."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.pretrain import metric_networks, vision
from nabla_jax.pretrain.pictures import Families

SIDE = 16
PROCESSOR = ImageProcessor.siglip(SIDE)
SETTINGS = vision.Settings(steps=40, families=4, learning_rate=5e-3, objective="softmax", warmup=5, ema=0.9)


def coloured(n: int) -> Families:
    """Discs on grounds: siblings differ in blue alone, red and green are another in every picture."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE]
    centre = rng.uniform(6, 10, (n, 2, 2, 1, 1))
    masks = (y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2 < 25
    birds, grounds = rng.integers(1, 256, (n, 3, 2, 1, 1, 3)), rng.integers(0, 256, (n, 1, 2, 1, 1, 3))
    birds[..., 2] = rng.permuted(np.tile([20, 130, 240], (n, 1)), axis=1)[:, :, None, None, None]
    pictures = np.where(masks[:, None, ..., None], birds, grounds).astype(np.uint8)
    return Families(pictures, masks, np.full((n, 2, 2), SIDE))


def mean_colour(params: dict[str, jax.Array], pixels: jax.Array) -> jax.Array:
    """A network of one matrix on the mean of what is not black."""
    bird = (pixels > -1).any(1, keepdims=True)
    mean = jnp.sum(pixels * bird, (2, 3)) / jnp.maximum(jnp.sum(bird, (2, 3)), 1)
    return jnp.tanh(mean @ params["w"])


def start() -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(0), (3, 8))}


def run(settings: vision.Settings, checkpoint: Path, report=lambda row: None) -> dict[str, jax.Array]:
    return vision.train(
        mean_colour, start(), coloured(40), PROCESSOR, settings,
        name="test", checkpoint=checkpoint, report=report, every=20, held_out=12,
    )  # fmt: skip


def unit(n: int) -> np.ndarray:
    vectors = np.random.default_rng(n).standard_normal((n, 5)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_softmax_is_cross_entropy_over_the_other_pictures() -> None:
    vectors, individuals = unit(12), np.array([0, 0, 1, 1, 2, 3, 2, 3, 4, 5, 5, 4])
    found = vision.softmax_loss(jnp.asarray(vectors), jnp.asarray(individuals), 0.2)
    logits = torch.from_numpy(vectors @ vectors.T / 0.2).fill_diagonal_(-torch.inf)
    partner = [next(j for j in range(12) if j != i and individuals[i] == individuals[j]) for i in range(12)]
    np.testing.assert_allclose(found, torch.nn.functional.cross_entropy(logits, torch.tensor(partner)), rtol=1e-5)


def test_sigmoid_judges_every_pair_on_its_own() -> None:
    vectors, individuals = unit(10), np.repeat(np.arange(5), 2)
    found = vision.sigmoid_loss(jnp.asarray(vectors), jnp.asarray(individuals), jnp.log(7.0), jnp.float32(-3.0))
    logits = torch.from_numpy(7 * vectors @ vectors.T - 3)
    same = torch.from_numpy((individuals[:, None] == individuals).astype(np.float32))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, same, reduction="none")
    np.testing.assert_allclose(found, losses.fill_diagonal_(0).sum() / 10, rtol=1e-5)


@pytest.mark.parametrize("objective", vision.OBJECTIVES)
def test_learns_who_is_who(tmp_path: Path, objective: str) -> None:
    settings = vision.Settings(steps=80, families=8, learning_rate=0.03, objective=objective, warmup=5, ema=0.9)
    rows: list[dict[str, float]] = []
    params = run(settings, tmp_path / "state.safetensors", rows.append)
    families = coloured(40)
    before, after = (
        vision.measure(jax.jit(mean_colour), p, PROCESSOR, families, slice(28, None)) for p in (start(), params)
    )
    assert [row["step"] for row in rows] == [20, 40, 60, 80] and rows[-1]["auc"] == pytest.approx(after)
    assert after > 0.9 and rows[-1]["loss"] < rows[0]["loss"]
    assert before < 0.8


def test_a_continued_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole = run(SETTINGS, tmp_path / "whole.safetensors")

    class Stopped(Exception):
        pass

    def stop(_: dict[str, float]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(SETTINGS, tmp_path / "part.safetensors", stop)
    rows: list[dict[str, float]] = []
    continued = run(SETTINGS, tmp_path / "part.safetensors", rows.append)
    assert [row["step"] for row in rows] == [40]
    np.testing.assert_array_equal(continued["w"], whole["w"])


def test_too_few_families_and_unknown_objectives_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 40 families of 2 views, expected at least 41"):
        vision.train(
            mean_colour, start(), coloured(40), PROCESSOR, SETTINGS,
            name="test", checkpoint=tmp_path / "x", report=print, held_out=37,
        )  # fmt: skip
    with pytest.raises(UserError, match="objective: found 'hinge', expected softmax or sigmoid"):
        vision.Settings(steps=1, families=1, learning_rate=1.0, objective="hinge")


def test_frames_keep_the_bird_and_black_ground() -> None:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[4:12, 5:11] = 200
    rng = np.random.default_rng(0)
    framed = [vision.frame(rng, picture, (12, SIDE)) for _ in range(64)]
    assert all((f.sum() == picture.sum()) for f in framed)
    assert {12, SIDE} <= {len(f) for f in framed} and any(f.shape[1] > SIDE for f in framed)


def test_processors_are_the_published_ones_at_another_size() -> None:
    from nabla_jax.models.dinov2 import Dinov2Config
    from nabla_jax.models.siglip import SiglipVisionConfig

    dinov2 = metric_networks.processor_of(Dinov2Config(image_size=64, patch_size=8))
    siglip = metric_networks.processor_of(SiglipVisionConfig(image_size=64, patch_size=8))
    assert (dinov2.mean, dinov2.std) == (ImageProcessor.dinov2().mean, ImageProcessor.dinov2().std)
    assert siglip == ImageProcessor.siglip(64)
    for processor in (dinov2, siglip):
        assert processor([np.zeros((48, 40, 3), np.uint8)]).shape == (1, 3, 64, 64)
        assert ImageProcessor.from_json(processor.to_json()) == processor
