"""Pre-training of a transformer: it learns, continues exactly, and its tasks are what they say."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax.models.flux import FluxConfig
from nabla_jax.pretrain import transformer as pretrain
from nabla_jax.pretrain.pictures import PictureConfig, pose_range

CONFIG = FluxConfig(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
SETTINGS = pretrain.Settings(steps=12, batch=4, learning_rate=3e-3, warmup=2, decay=0.2, ema=0.9)


def latents(count: int = 6) -> pretrain.Latents:
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(count, 2, 4, 4, 4)).astype(np.float16)
    return pretrain.Latents(
        whole=whole,
        crop=whole + np.float16(100),
        disguise=whole[:, 1] + np.float16(50),
        blank=np.full((4, 4, 4), 7, np.float32),
        cover=rng.integers(0, 256, (count, 2, 2, 2)).astype(np.uint8),
        t5=rng.integers(1, 5, (count, 2, 3)).astype(np.int32),
        clip=rng.integers(1, 5, (count, 2, 3)).astype(np.int32),
        plain_t5=np.zeros(3, np.int32),
        plain_clip=np.zeros(3, np.int32),
    )


def text() -> dict[str, jax.Array]:
    return {"t5": jax.random.normal(jax.random.key(1), (5, 8)), "clip": jax.random.normal(jax.random.key(2), (5, 8))}


def encode_text(params: Any, t5: jax.Array, clip: jax.Array) -> tuple[jax.Array, jax.Array]:
    return params["t5"][t5], params["clip"][clip].mean(1)


def train(path: Path, settings: pretrain.Settings, rows: list[dict[str, float]], **kwargs: Any) -> pretrain.State:
    return pretrain.train(
        CONFIG, text(), encode_text, latents(), settings, checkpoint=path, report=rows.append, every=4, save_every=4,
        **kwargs,
    )  # fmt: skip


def test_learns_and_continues_exactly(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    whole = train(tmp_path / "whole.safetensors", SETTINGS, rows)
    assert [row["step"] for row in rows] == [4, 8, 12]

    part = tmp_path / "part.safetensors"
    stopped = train(part, SETTINGS, [], seconds=0.0)
    assert stopped.step == 1
    continued = train(part, SETTINGS, [])
    jax.tree.map(np.testing.assert_array_equal, continued.ema, whole.ema)
    jax.tree.map(np.testing.assert_array_equal, continued.params, whole.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), whole.params["text"], text())
    assert all(jax.tree.leaves(moved)), "the text encoders train along"

    again = train(tmp_path / "again.safetensors", SETTINGS, [], seconds=0.0, start=whole.ema)
    difference = jnp.abs(
        again.params["transformer"]["proj_out"]["weight"] - whole.ema["transformer"]["proj_out"]["weight"]
    )
    assert float(difference.max()) < 0.01, "it starts from the given weights"


def test_blanked_rectangles_are_black_and_leave_the_rest() -> None:
    pictures = jnp.ones((32, 4, 8, 8))
    blank = jnp.full((4, 8, 8), -2.0)
    out = np.asarray(pretrain.blank_rectangles(jax.random.key(0), pictures, blank))
    assert set(np.unique(out)) == {-2.0, 1.0}
    holes = (out == -2.0).all(1)
    np.testing.assert_array_equal(holes, (out == -2.0).any(1))
    share = holes.mean((1, 2))
    assert share.min() > 0 and share.max() < 1


def test_a_reference_is_the_other_view_once_the_curriculum_is_over() -> None:
    data = latents()
    settings = dataclasses.replace(SETTINGS, batch=64)
    for step in range(4, 12):
        _, batch = pretrain.draw_batch(data, step, settings)
        index = [int(np.flatnonzero((data.whole == t).all((2, 3, 4)))[0]) for t in batch["target"]]
        for place, reference in zip(index, batch["reference"], strict=True):
            other = divmod(place, 2)[0], 1 - place % 2
            assert any(np.array_equal(reference, views[other]) for views in (data.whole, data.crop))


READ = {
    ("caption", 0.5): set(),
    ("reference", 0.5): {"reference"},
    ("edit", 0.5): {"blank"},
    ("compose", 1.0): {"reference", "disguise"},
    ("compose", 0.0): {"reference", "blank"},
}


@pytest.mark.parametrize(("task", "disguised"), READ)
def test_each_task_reads_its_pictures_and_no_others(task: str, disguised: float) -> None:
    settings = dataclasses.replace(SETTINGS, disguised=disguised)
    graphdef, params = pretrain.initialize(CONFIG, text(), 0)
    # A fresh model's output is zero whatever it reads.
    shape = params["transformer"]["proj_out"]["weight"].shape
    params["transformer"]["proj_out"]["weight"] = jax.random.normal(jax.random.key(2), shape)
    batch = {name: jnp.asarray(value) for name, value in pretrain.draw_batch(latents(), 4, settings)[1].items()}
    batch["blank"] = jnp.asarray(latents().blank)

    def cost(**changed: jax.Array) -> float:
        given = {**batch, **changed}
        return float(pretrain.loss(graphdef, params, encode_text, given, jax.random.key(1), task, settings)[0])

    found = {name for name in ("reference", "disguise", "blank") if cost(**{name: batch[name] * 0 - 3}) != cost()}
    assert found == READ[task, disguised]


def test_composition_makes_the_view_that_has_a_disguise() -> None:
    data, settings = latents(), dataclasses.replace(SETTINGS, tasks=(0, 0, 0, 1))
    for step in range(4, 8):
        task, batch = pretrain.draw_batch(data, step, settings)
        assert task == "compose"
        np.testing.assert_array_equal(batch["disguise"], batch["target"] + np.float16(50))


def test_batches_depend_on_the_step_alone() -> None:
    first, second = (pretrain.draw_batch(latents(), 5, SETTINGS) for _ in range(2))
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


def test_tasks_are_drawn_in_their_shares() -> None:
    drawn = [pretrain.draw_batch(latents(), step, SETTINGS)[0] for step in range(600)]
    for task, share in zip(pretrain.TASKS, SETTINGS.tasks, strict=True):
        assert drawn.count(task) / 600 == pytest.approx(share, abs=0.06)


def test_pose_ranges_are_spread_in_their_shares() -> None:
    config = PictureConfig("world", 0, 1000, 48, pose_ranges=((0.3, 0.2), (0.6, 0.3), (1.0, 0.5)))
    drawn = [pose_range(config, i) for i in range(1000)]
    for value, share in config.pose_ranges:
        assert drawn.count(value) / 1000 == pytest.approx(share, abs=0.01)
