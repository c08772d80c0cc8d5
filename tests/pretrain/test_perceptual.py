"""Fitting LPIPS: distortions, judgements, and weights that put them in order."""

import numpy as np
import pytest
from scipy import stats

from nabla_jax.errors import UserError
from nabla_jax.models.lpips import LpipsConfig
from nabla_jax.pretrain import perceptual
from nabla_jax.pretrain.pictures import Families

SMALL = LpipsConfig((4, 4, 6, 6, 6))


def families(n: int = 6, side: int = 16) -> Families:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (n, 3, 2, side // 4, side // 4, 3), np.uint8)
    masks = np.zeros((n, 2, side, side), bool)
    masks[:, :, 3:13, 2:14] = True
    return Families(coarse.repeat(4, -2).repeat(4, -3), masks, np.full((n, 2, 2), side))


@pytest.mark.parametrize("kind", perceptual.KINDS)
def test_distortions_grow_with_their_strength(kind: str) -> None:
    some = families()
    picture, other = some.pictures[0, :2, 0]
    strengths = np.linspace(0, 1, 6)
    changed = [perceptual.distort(np.random.default_rng(0), picture, kind, s, other) for s in strengths]
    assert all(c.dtype == np.uint8 and c.shape == picture.shape for c in changed)
    errors = [np.abs(c.astype(int) - picture).mean() for c in changed]
    assert errors[0] <= 2 and errors[-1] > 10  # conversion to hues and back costs a grey level
    assert stats.spearmanr(strengths, errors).statistic > 0.9
    if kind == "coat":
        np.testing.assert_array_equal(changed[-1], other)


def test_unknown_distortions_are_told() -> None:
    with pytest.raises(UserError, match="distortion: found 'smear', expected blur"):
        perceptual.distort(np.random.default_rng(0), np.zeros((8, 8, 3), np.uint8), "smear", 0.5)


def test_judgements_are_of_masked_pictures_and_repeat() -> None:
    some = families()
    drawn = perceptual.draw_judgements(some, 20, 7)
    for first, again in zip(drawn, perceptual.draw_judgements(some, 20, 7), strict=True):
        np.testing.assert_array_equal(first, again)
        assert first.shape == (20, 16, 16, 3) and not first[:, ~some.masks[0, 0]].any()
    picture, mild, strong = (x.astype(int) for x in drawn)
    assert (np.abs(strong - picture).mean((1, 2, 3)) > np.abs(mild - picture).mean((1, 2, 3))).mean() > 0.85


def test_fitted_weights_trust_the_channels_that_know() -> None:
    """Two channels follow the strength, one is noise, one runs against it, and one is always zero."""
    rng = np.random.default_rng(0)
    weak, scale = rng.uniform(0.1, 1, 2000), rng.uniform(0.5, 2, 2000)
    strong = weak + rng.uniform(0.05, 1, 2000)

    def channels(strength: np.ndarray) -> np.ndarray:
        noisy = rng.uniform(0.5, 1.5, (2, 2000))
        rows = (strength * noisy[0], 10 * strength * scale, 5 * noisy[1], 2 / strength, 0 * strength)
        return np.stack(rows, 1).astype(np.float32)

    a, b, unrelated = channels(weak), channels(strong), channels(rng.uniform(2, 3, 2000))
    weights, right = perceptual.fit_weights(a, b, unrelated, perceptual.Judgements(prior=1e-4))
    assert (weights >= 0).all() and np.isfinite(weights).all()
    assert right > 0.98 > np.mean(b.sum(1) > a.sum(1)) - 0.5
    shares = weights * unrelated.mean(0)
    assert shares[1] > 3 * max(shares[2], shares[3], shares[4])
    assert (unrelated @ weights).mean() == pytest.approx(1, rel=1e-4)


def test_fitting_puts_non_negative_weights_into_every_level() -> None:
    graphdef, params = perceptual.initialize(SMALL, 16, 8, seed=0)
    how = perceptual.Judgements(count=40, steps=50)
    fitted, order = perceptual.fit_judgements(graphdef, params["lpips"], families(), 2, how)
    for level, channels in enumerate(SMALL.channels):
        weight = np.asarray(fitted[f"lin{level}"]["model"]["1"]["weight"])
        assert weight.shape == (1, channels, 1, 1) and (weight >= 0).all() and weight.std() > 0
    assert fitted["features"] is params["lpips"]["features"]
    assert order["fitted"] > 0.85
    # Equal pictures stay at distance 0, whatever was fitted.
    picture = families().pictures[:, 0, 0]
    measure = perceptual.compile_differences(graphdef)
    same = perceptual.channel_differences(measure, fitted, picture, picture, "same")
    assert same.shape == (6, sum(SMALL.channels)) and np.abs(same).max() < 1e-10


def test_features_train_from_the_last_level() -> None:
    graphdef, params = perceptual.initialize(SMALL, 32, 8, seed=0)
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 3, 32, 32)).astype(np.float32)
    vectors = perceptual.features(graphdef)(params, pixels)
    assert vectors.shape == (5, 8)
    # Without norms, 13 layers must neither die out nor blow up.
    assert 0.1 < float(np.std(vectors)) < 10
