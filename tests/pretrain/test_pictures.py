"""Rendered pictures for pre-training: drawn once, kept, and those of their world."""

from pathlib import Path

import numpy as np
import pytest

from nabla_jax import toybirds
from nabla_jax.errors import UserError
from nabla_jax.pretrain import pictures
from nabla_jax.pretrain.pictures import FamilyConfig, PictureConfig, render, render_families


def test_pairs_are_those_of_the_world_and_an_interrupted_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_CHUNK", 2)
    config = PictureConfig("nabla_jax.toybirds", 5, 3, 24)
    drawn = render(config, tmp_path, 1)
    spread = pictures.pose_range(config, 2)
    views = toybirds.fresh_pair(5, 2, 24, 2, spread, config.mirror_probability)
    for view, shot in enumerate(views):
        rows, columns = shot.mask.shape
        top, left = (24 - rows) // 2, (24 - columns) // 2
        inside = np.s_[top : top + rows, left : left + columns]
        np.testing.assert_array_equal(drawn.pictures[2, view][inside], shot.rgb)
        np.testing.assert_array_equal(drawn.masks[2, view][inside], shot.mask)
    assert drawn.captions[2] == tuple(toybirds.fresh_captions(5, 2, 24, 2, spread, config.mirror_probability))
    before = np.array(drawn.pictures)
    # As if the run had died before the second chunk was written.
    (tmp_path / "captions-0000002.json").unlink()
    drawn.pictures[2] = 0
    drawn.pictures.flush()
    np.testing.assert_array_equal(render(config, tmp_path, 1).pictures, before)


def test_families_are_drawn_once_and_share_their_scenes(tmp_path: Path) -> None:
    config = FamilyConfig("nabla_jax.toybirds", 5, 3, 4, 2, 32)
    families = render_families(config, tmp_path, 1)
    assert families.pictures.shape == (3, 4, 2, 32, 32, 3) and families.masks.shape == (3, 2, 32, 32)
    for birds, masks, canvases in zip(families.pictures, families.masks, families.canvases, strict=True):
        for view, mask in enumerate(masks):
            rows, columns = canvases[view]
            assert max(rows, columns) == 32
            # Background is the same for all siblings, birds are not; half covered pixels at the outline belong to both.
            shots = birds[:, view].astype(int)
            spread = np.abs(shots - shots[0]).max(-1)
            assert (spread[1:, mask].mean(1) > 10).all()
            assert np.median(spread[1:][:, ~mask]) == 0
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("canvases-*")}
    again = render_families(config, tmp_path, 1)
    np.testing.assert_array_equal(again.pictures, families.pictures)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("canvases-*")} == stamps
    with pytest.raises(UserError, match="choose another folder"):
        render_families(FamilyConfig("nabla_jax.toybirds", 6, 3, 4, 2, 32), tmp_path, 1)
