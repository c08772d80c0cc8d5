"""The embedded keypoint head on worlds that nothing was trained on, against the places that their geometry gives."""

import functools

import numpy as np
import pytest

from benchmarks import keypoints as bench
from nabla_jax import assets
from nabla_jax import config as configs
from nabla_jax.data.skeleton import PARTS
from nabla_jax.keypoints.__main__ import KeypointsConfig
from nabla_jax.keypoints.crops import mirror_order
from nabla_jax.metrics.networks import Detector, load_detector

FOLDER = assets.resolve("asset:toy-keypoints")


@functools.cache
def detector() -> Detector:
    return load_detector(FOLDER, assets.resolve("asset:toy-dinov2"), batch=16)


@functools.cache
def world(seed: int) -> tuple[list[bench.Shot], list[bench.Shot]]:
    return bench.draw_world(seed, limit=40)


def test_the_folder_is_small_and_of_its_recipe():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1e6
    recipe = configs.load_as(KeypointsConfig, "configs/keypoints.py:toy")
    found = detector().config
    assert {k: getattr(found, k) for k in vars(recipe.head)} == vars(recipe.head)
    assert f"{recipe.training.steps} steps of {recipe.training.batch} crops" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("seed", [0, 7461])
def test_true_keypoints_are_found(seed):
    found = bench.accuracy(detector(), [*world(seed)[0], *world(seed)[1]])
    assert found.pck > 0.93 and found.distance < 0.05 and found.visibility > 0.85
    # No part is given up: left and right ones are told apart.
    assert min(found.parts.values()) > 0.75


def test_a_mirrored_bird_has_mirrored_keypoints():
    """Facing the other way, its left eye is where the right one was: no fixed side of the picture is 'left'."""
    shots = world(0)[0]
    found = detector()([shot.picture for shot in shots], [shot.box for shot in shots])
    turned = [np.ascontiguousarray(shot.picture[:, ::-1]) for shot in shots]
    boxes = [(b[0], s.mask.shape[1] - b[3], b[2], s.mask.shape[1] - b[1]) for s in shots for b in [s.box]]
    back = detector()(turned, boxes)[:, mirror_order(PARTS)]
    back[..., 1] = np.array([shot.mask.shape[1] - 1 for shot in shots])[:, None] - back[..., 1]
    seen = np.stack([shot.keypoints[:, 2] != 0 for shot in shots])
    apart = np.linalg.norm(found[..., :2] - back[..., :2], axis=-1) / np.array([s.side for s in shots])[:, None]
    assert np.median(apart[seen]) < 0.03 and (apart[seen] < 0.1).mean() > 0.9


def test_keypoint_distance_tells_right_poses_from_wrong_ones():
    found = bench.errors(detector(), *world(0))
    distance = {name: np.array([error.distance for error in values]) for name, values in found.items()}
    rate = {name: np.mean([error.rate for error in values]) for name, values in found.items()}
    assert distance["target"].mean() < 0.05 and rate["target"] > 0.9
    assert 0.12 < distance["shifted"].mean() < 0.25
    for name in ("shifted", "mirrored", "same individual"):
        assert (distance[name] > distance["target"]).mean() > 0.9 and rate[name] < 0.7
