"""Metrics of networks: the published four against PyTorch, the others against their definitions."""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.metrics import ours
from benchmarks.torch_metrics import TorchMetrics
from nabla_jax import assets
from nabla_jax.config import Metrics
from nabla_jax.errors import UserError
from nabla_jax.metrics import networks as nets
from nabla_jax.metrics import patches, perception, pose, retrieval
from nabla_jax.metrics.birds import masked_bird, masked_pair, patch_shares
from nabla_jax.metrics.references import stretch
from nabla_jax.toybirds.identity import draw_identity
from nabla_jax.toybirds.render import render
from nabla_jax.toybirds.scene import draw_scene

METRICS = Metrics(
    dinov2="asset:toy-dinov2", siglip="asset:toy-siglip", patches="asset:toy-siglip", lpips="asset:toy-lpips",
    batch=4, box=32,
)  # fmt: skip
FOLDERS = {name: assets.resolve(path) for name, path in METRICS.folders.items()}


@functools.cache
def networks() -> nets.Networks:
    found = nets.load_networks(METRICS)
    assert found is not None
    return found


@functools.cache
def shots(count: int = 10):
    """Birds of several canvas shapes with their masks; every second one the individual of the one before."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        canvas = ((48, 48), (48, 39), (37, 48), (45, 48))[number % 4]
        found.append(render(draw_identity(5, 0, number // 2 % 2, number // 2, 0, 1), draw_scene(rng, canvas=canvas)))
    return found


def pairs():
    """(generated, target, mask): another picture stretched into the target's place."""
    return [(stretch(a.rgb, *b.mask.shape), b.rgb, b.mask) for a, b in zip(shots()[1:], shots()[:-1], strict=True)]


def test_the_published_numbers_equal_pytorchs():
    with torch.inference_mode():
        expected = TorchMetrics(**{name: FOLDERS[name] for name in ("dinov2", "siglip", "lpips")})(pairs())
    found = ours(networks(), pairs())
    for name, tolerance in {"lpips": 1e-4, "dinov2": 1e-4, "siglip": 1e-4, "rmse": 1e-3}.items():
        assert np.std(expected[name]) > 10 * tolerance
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_a_batch_does_not_change_what_is_said_of_a_bird():
    birds = [masked_bird(shot.rgb, shot.mask) for shot in shots(6)]
    together = nets.describe(networks(), birds)
    alone = [nets.describe(networks(), [bird])[0] for bird in birds]
    for a, b in zip(together, alone, strict=True):
        assert set(a) == set(b) == set(nets.ALL)
        for name in nets.ALL:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-3 if name == nets.PATCHES else 1e-5)
            np.testing.assert_allclose(np.linalg.norm(a[name].astype(float), axis=-1), 1, rtol=0, atol=1e-3)


def test_a_cut_out_does_not_depend_on_the_pictures_margin():
    shot = shots()[0]
    wider = [np.pad(x, [(7, 0), (0, 9)] + [(0, 0)] * (x.ndim - 2)) for x in (shot.rgb, shot.mask)]
    a, b = masked_bird(shot.rgb, shot.mask), masked_bird(*wider)
    np.testing.assert_array_equal(a.box, b.box)
    np.testing.assert_array_equal(a.inside, b.inside)
    assert a.box.shape[0] == a.box.shape[1] and a.inside.sum() == shot.mask.sum()
    assert a.whole[~shot.mask].max() == 0
    described = nets.describe(networks(), [a, b])
    np.testing.assert_array_equal(described[0]["dinov2_box"], described[1]["dinov2_box"])
    assert not np.allclose(described[0]["siglip"], described[1]["siglip"], atol=1e-3)


def test_an_empty_mask_is_an_error_here_and_left_out_above():
    with pytest.raises(UserError, match="mask is empty"):
        masked_pair(shots()[0].rgb, shots()[0].rgb, np.zeros_like(shots()[0].mask))


def test_the_shares_of_patches():
    rng = np.random.default_rng(0)
    mask = rng.random((24, 16)) < 0.4
    expected = mask.reshape(6, 4, 4, 4).mean((1, 3)).reshape(-1)
    np.testing.assert_allclose(patch_shares(mask, (6, 4)), expected, atol=1e-12)
    # Enlarging every pixel changes no share, also where patches cut pixels.
    fine = mask.repeat(5, 0).repeat(5, 1)
    np.testing.assert_allclose(patch_shares(mask, (5, 7)), patch_shares(fine, (5, 7)), atol=1e-12)
    assert patch_shares(mask, (5, 7)).mean() == pytest.approx(mask.mean())


def test_foreground_patches():
    np.testing.assert_array_equal(patches.foreground_patches(np.array([0.0, 0.5, 1.0, 0.4])), [0, 1, 1, 0])
    np.testing.assert_array_equal(patches.foreground_patches(np.array([0.0, 0.2, 0.1, 0.2])), [0, 1, 0, 1])


def test_patch_matching_by_hand():
    e = np.eye(4, dtype=np.float16)
    generated, subject = e[[0, 1, 1]], e[[1, 2]]
    found = patches.match(generated, subject)
    assert found == (pytest.approx(2 / 3), 0.5)  # two of three patches are found; one of the subject's two is
    assert patches.match(subject, generated) == (found.recall, found.precision)
    assert patches.match(subject, subject[::-1]) == (1, 1)  # wherever they are


def test_keypoint_error_by_hand():
    """Mean over the parts that the target shows; a tenth of the side still counts as found."""
    target = np.array([[10, 10, 1], [20, 5, 1], [0, 0, 0], [7, 7, 1]])
    generated = np.array([[10, 10, 0.1], [20, 9, 0.9], [99, 99, 0.9], [10, 3, 0.0]])
    found = pose.keypoint_error(generated, target, 40)
    assert found.distance == pytest.approx((0 + 4 + 5) / 3 / 40) and found.rate == pytest.approx(2 / 3)
    assert pose.keypoint_error(target, target, 40) == pose.PoseError(0.0, 1.0)
    assert pose.keypoint_error(generated, np.zeros((4, 3)), 40) is None


def test_retrieval_counts_ties_against_the_picture():
    query = np.array([1.0, 0.0])
    near, far = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[0.0, 1.0]])
    assert retrieval.rank(query, {1: near, 2: far, 3: far}, 1) == 1
    assert retrieval.rank(query, {1: far, 2: near, 3: far}, 1) == 3
    assert retrieval.members(["a", "b", "c"], "a", "c") == ["b"]
    assert retrieval.members(["a", "c"], "a", "c") == ["a"]


def test_mask_iou():
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    assert pose.mask_iou(mask, mask) == 1
    assert pose.mask_iou(np.roll(mask, 2, 1), mask) == pytest.approx(8 / 24)
    assert pose.mask_iou(mask.repeat(3, 0).repeat(3, 1), mask) == 1
    assert pose.mask_iou(~mask & mask, mask) == 0
    assert pose.mask_iou(mask, ~mask & mask) is None


def real(path: Path, made: list[list[str]], ids=("a", "b", "c", "d", "e"), **changes):
    """Descriptions of the first shots by letter, empty for 'c'; `made` collects what was read."""

    def read(id):
        made[-1].append(id)
        shot = shots()["abcde".index(id)]
        return shot.rgb, shot.mask & (id != "c")

    made.append([])
    judge = dataclasses.replace(networks(), **changes)
    return perception.describe_real(judge, list(ids), nets.ALL, read, lambda id: f"file {id}", path)


def test_descriptions_of_real_pictures_are_kept_continued_and_made_anew_for_other_networks(tmp_path):
    made: list[list[str]] = []
    first = real(tmp_path, made)
    assert set(first) == set("abde") and made[-1] == list("abcde")
    again = real(tmp_path, made)
    assert made[-1] == []
    for id, description in first.items():
        assert set(description) == set(nets.ALL)
        for name, value in description.items():
            np.testing.assert_array_equal(value, again[id][name])
    # Of an interrupted run the whole batches are there.
    stored = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_size)
    assert len(stored) == 2
    stored[0].unlink()
    real(tmp_path, made)
    assert made[-1] == ["e"]
    real(tmp_path, made, fingerprint="other weights")
    assert made[-1] == list("abcde")
    stored[1].write_bytes(stored[1].read_bytes()[:100])
    with pytest.raises(UserError, match="damaged cache file"):
        real(tmp_path, made)


def test_the_networks_fingerprint_follows_weights_and_settings(tmp_path):
    before = nets.fingerprint(METRICS)
    assert nets.fingerprint(dataclasses.replace(METRICS, batch=9, obtain="x")) == before
    assert nets.fingerprint(dataclasses.replace(METRICS, box=64)) != before
    shutil.copytree(FOLDERS["lpips"], tmp_path / "lpips")
    moved = dataclasses.replace(METRICS, lpips=str(tmp_path / "lpips"))
    assert nets.fingerprint(moved) == before
    weights = tmp_path / "lpips" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert nets.fingerprint(moved) != before


def test_a_network_that_is_not_named_is_left_out():
    found = nets.load_networks(Metrics(siglip="asset:toy-siglip", batch=4))
    assert found is not None and found.names == ("siglip", "siglip_box")
    assert nets.load_networks(Metrics()) is None
