"""The renderer: geometry against a brute-force ray caster; picture, mask, depth and keypoints agree."""

import dataclasses
import math
import re

import numpy as np
import pytest
import scipy.ndimage

from nabla_jax.errors import UserError
from nabla_jax.toybirds import CAPTION_WORDS, caption, fresh_disguise, fresh_pair, fresh_scenes
from nabla_jax.toybirds.captions import FIXED_CAPTION, background_caption, long_caption
from nabla_jax.toybirds.identity import PLUMAGES, draw_identity, fresh_identity
from nabla_jax.toybirds.render import KEYPOINTS, PARTS, place, render
from nabla_jax.toybirds.rng import generator
from nabla_jax.toybirds.scene import draw_scene, mirrored


def rmse(a, b, mask):
    return float(np.sqrt(((a.astype(float) - b.astype(float))[mask] ** 2).mean()))


def some_scene(index, size=64, **options):
    return draw_scene(generator(77, index), size, **options)


@pytest.mark.parametrize("pose", ["photo", "free"])
def test_part_map_and_depth_equal_a_brute_force_ray_caster(pose):
    bird, scene = fresh_identity(1, 2), some_scene(3, 40, pose=pose, canvas=(40, 33))
    shot = render(bird, scene, antialias=1)
    centres, axes, scale, (ox, oy) = place(bird.shape, scene)
    parts, near = np.zeros((40, 33), int), np.full((40, 33), -np.inf)
    for row in range(40):
        for column in range(33):
            start = np.array([(column + 0.5 - ox) / scale, (oy - row - 0.5) / scale, 0.0])
            for k in range(len(centres)):
                m = np.linalg.inv(axes[k])
                u, w = m @ (start - centres[k]), m @ np.array([0.0, 0.0, 1.0])
                roots = np.roots([w @ w, 2 * u @ w, u @ u - 1])
                if np.isreal(roots).all() and roots.real.max() > near[row, column]:
                    parts[row, column], near[row, column] = k + 1, roots.real.max()
    agree = parts == shot.parts
    assert agree.mean() > 0.998  # rays that graze a silhouette may round either way
    both = agree & (parts > 0)
    np.testing.assert_allclose(shot.depth[both], np.clip(0.65 + 0.25 * near[both], 0.3, 1.0), atol=2e-3)


def test_mask_depth_and_parts_cover_the_same_pixels_and_the_bird_fills_the_canvas():
    for index in range(12):
        shot = fresh_pair(4, index)[0]
        assert shot.rgb.dtype == np.uint8 and max(shot.rgb.shape) == 48 and shot.rgb.shape[2] == 3
        np.testing.assert_array_equal(shot.mask, shot.parts > 0)
        np.testing.assert_array_equal(shot.mask, shot.depth > 0)
        assert shot.parts.max() < len(PARTS)
        rows, columns = np.nonzero(shot.mask)
        x, y, w, h = shot.box
        assert abs(columns.min() - x) < 2.5 and abs(columns.max() + 1 - x - w) < 2.5
        assert abs(rows.min() - y) < 2.5 and abs(rows.max() + 1 - y - h) < 2.5
        height, width = shot.mask.shape
        assert 0.72 <= max(w / width, h / height) <= 0.95
        assert shot.mask.mean() > 0.15


def test_the_picture_changes_only_inside_the_mask_when_another_bird_of_the_same_shape_takes_the_place():
    a, scene = fresh_identity(1, 0), some_scene(1)
    b = dataclasses.replace(fresh_identity(1, 1), shape=a.shape)
    one, two = render(a, scene), render(b, scene)
    np.testing.assert_array_equal(one.mask, two.mask)
    grown = np.zeros_like(one.mask)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            grown |= np.roll(one.mask, (dy, dx), (0, 1))
    np.testing.assert_array_equal(one.rgb[~grown], two.rgb[~grown])
    assert rmse(one.rgb, two.rgb, one.mask) > 20


def test_visible_keypoints_lie_on_their_part_and_hidden_sides_stay_hidden():
    seen = np.zeros(len(KEYPOINTS))
    for index in range(40):
        for shot in fresh_pair(5, index, size=64):
            assert shot.keypoints.shape == (11, 3)
            for name, (x, y, visible) in zip(KEYPOINTS, shot.keypoints, strict=True):
                if not visible:
                    continue
                part = PARTS[shot.parts[int(y), int(x)]]
                expected = {
                    "crown": "head",
                    "belly": "body",
                    "breast": "body",
                    "back": "body",
                    "nape": "head",
                }
                family = {"body": {"body", "rear", "neck"}, "head": {"head", "neck", "body"}}
                owner = expected.get(name, name)
                assert part in family.get(owner, {owner}), (name, part)
            seen += shot.keypoints[:, 2]
    frequency = dict(zip(KEYPOINTS, seen / 80, strict=True))
    assert min(frequency.values()) > 0.2 and frequency["bill"] > 0.8
    assert frequency["left wing"] < 0.8 and frequency["right wing"] < 0.8


@pytest.mark.parametrize("facing, near_eye", [("right", "right eye"), ("left", "left eye")])
def test_a_profile_shows_the_near_eye_and_wing_alone_and_the_bill_points_where_it_faces(facing, near_eye):
    scene = some_scene(9, 96, pose_range=0.0, facing=facing)
    assert scene.facing == facing
    points = dict(zip(KEYPOINTS, render(draw_identity(3, 0, 0, 0), scene).keypoints, strict=True))
    far_eye = "left eye" if near_eye == "right eye" else "right eye"
    assert points[near_eye][2] == 1 and points[far_eye][2] == 0
    assert (points["bill"][0] > points["tail"][0]) == (facing == "right")


def test_a_mirrored_pose_mirrors_the_silhouette():
    scene = dataclasses.replace(some_scene(2, 96), shift=(0.0, 0.0))
    bird = draw_identity(3, 1, 1, 1)
    a, b = render(bird, scene).mask, render(bird, mirrored(scene)).mask
    assert (a[:, ::-1] != b).mean() < 0.005


def test_photo_poses_stay_on_the_cameras_side_and_free_poses_do_not():
    photo = [some_scene(i) for i in range(200)]
    for scene in photo:
        assert math.sin(scene.yaw) >= 0 and abs(math.cos(scene.yaw)) >= math.cos(math.radians(40)) - 1e-9
        assert math.sin(scene.yaw + scene.head_yaw) >= -1e-9
    assert 60 < sum(s.facing == "left" for s in photo) < 140
    assert min(math.sin(some_scene(i, pose="free").yaw) for i in range(50)) < -0.5


def test_pose_range_zero_is_one_pose():
    poses = {
        (s.yaw, s.pitch, s.head_yaw, s.head_pitch, s.tail, s.wing, s.fill, s.shift)
        for s in (some_scene(i, pose_range=0.0, facing="right") for i in range(5))
    }
    assert len(poses) == 1


@pytest.mark.parametrize("bad", [{"pose_range": 1.5}, {"facing": "up"}, {"pose": "wild"}])
def test_bad_scene_options_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        some_scene(0, **bad)


def test_species_differ_plainly_plumages_visibly_and_individuals_slightly():
    species, plumages, individuals, flat = [], [], [], []
    for index in range(40):
        o, f, s = index % 4, index // 4 % 3, index % 6
        scene = some_scene(index)
        shot = render(draw_identity(8, o, f, s, 0, 1), scene)

        def error(*rest, shot=shot, scene=scene, path=(8, o, f)):
            return rmse(shot.rgb, render(draw_identity(*path, *rest), scene).rgb, shot.mask)

        species.append(error((s + 1 + index % 5) % 6, 0, 1))
        plumages.append(error(s, 1 + index % 2, 1))
        individuals.append(error(s, 0, 2))
        flat.append(rmse(shot.rgb, np.broadcast_to(shot.rgb[shot.mask].mean(0), shot.rgb.shape), shot.mask))
    assert np.mean(species) > 60 and min(species) > 25
    assert 20 < np.mean(plumages) < 45 and min(plumages) > 8
    assert 2 < np.mean(individuals) < 9 and min(individuals) > 0
    # A flat mean colour must be nearly as wrong as a sibling species, or blur would pass for identity.
    assert np.sum(flat) > 0.82 * np.sum(species)


def test_birds_stand_out_from_the_background():
    for index in range(20):
        shot = fresh_pair(6, index, size=64)[0]
        inside = np.abs(shot.rgb[shot.mask].astype(float) - np.median(shot.rgb[~shot.mask], 0)).sum(1)
        assert np.median(inside) > 60


def test_identity_depends_on_every_step_of_the_path_and_on_nothing_else():
    base = (5, 1, 2, 3, 0, 4)
    assert draw_identity(*base) == draw_identity(*base)
    assert len({draw_identity(*base[:i], base[i] + 1, *base[i + 1 :]) for i in range(6)} | {draw_identity(*base)}) == 7
    assert draw_identity(5, 1, 2, 0).shape == draw_identity(5, 1, 2, 5).shape != draw_identity(5, 1, 0, 0).shape


def test_fresh_pairs_show_one_new_bird_each_and_repeat_exactly():
    first, again, other = fresh_pair(1, 7, size=48), fresh_pair(1, 7, size=48), fresh_pair(1, 8, size=48)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.rgb, b.rgb)
    assert not np.array_equal(first[0].rgb, first[1].rgb) and not np.array_equal(first[0].rgb, other[0].rgb)
    scenes = fresh_scenes(1, 7, size=48)
    np.testing.assert_array_equal(render(fresh_identity(1, 7), scenes[1]).rgb, first[1].rgb)
    assert len({fresh_identity(2, i).shape for i in range(50)}) == 50


def test_a_disguise_is_the_second_view_in_another_coat():
    for index in range(6):
        second, disguise = fresh_pair(1, index)[1], fresh_disguise(1, index)
        np.testing.assert_array_equal(disguise.mask, second.mask)
        # Pixels on the border are partly bird.
        ground = ~scipy.ndimage.binary_dilation(second.mask)
        np.testing.assert_array_equal(disguise.rgb[ground], second.rgb[ground])
        changed = np.abs(disguise.rgb.astype(int) - second.rgb)[second.mask].max(-1) > 30
        assert changed.mean() > 0.3


def test_half_of_the_fresh_canvases_are_square():
    canvases = [scene.canvas for index in range(100) for scene in fresh_scenes(1, index)]
    assert all(max(canvas) == 48 for canvas in canvases)
    assert 0.35 < np.mean([height == width for height, width in canvases]) < 0.65


def test_mirror_probability_decides_how_often_the_second_view_faces_the_other_way():
    def turned(probability):
        pairs = [fresh_scenes(3, i, mirror_probability=probability) for i in range(60)]
        return np.mean([a.facing != b.facing for a, b in pairs])

    assert turned(0.0) == 0 and turned(1.0) == 1 and 0.25 < turned(0.5) < 0.75


def test_captions_use_the_closed_vocabulary_and_are_short():
    said = set()
    for index in range(200):
        bird, scene = fresh_identity(9, index), some_scene(index)
        short = caption(bird, scene)
        assert len(short.split()) <= 12
        said.add(short)
        for text in (short, background_caption(bird, scene), long_caption(bird, scene), FIXED_CAPTION):
            assert set(re.findall(r"\w+", text)) <= set(CAPTION_WORDS), text
    assert len(said) > 80
    assert len(PLUMAGES) == 3
