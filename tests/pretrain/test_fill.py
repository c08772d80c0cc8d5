"""Pre-training of FLUX.1-Fill: what a diptych shows, what each task reads, and that a training continues exactly."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax.models import layers
from nabla_jax.models.flux import Flux, FluxConfig
from nabla_jax.models.redux import ReduxEmbedder, ReduxEmbedderConfig
from nabla_jax.pretrain import fill
from nabla_jax.pretrain.pictures import Pictures
from nabla_jax.pretrain.transformer import Latents
from tests.pretrain import test_transformer as kontext

# Autoencoder factor 4 and 4 channels: 16 of the noise, 16 of the masked picture, 64 of the mask.
CONFIG = FluxConfig(
    in_channels=96, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
SETTINGS = fill.Settings(steps=8, batch=4, warmup=2, decay=0.2, ema=0.9, tasks=(0.3, 0.2, 0.5))
WIDTH, PATCHES, PLENTY = 6, 3, 200
_ONE_GREY = fill.DiptychConfig(copies=0.5, whole=0.5, alone=0.0, expansion=(1.0, 1.0))


def drawn(count: int) -> Pictures:
    """Every picture one grey level; the birds are squares."""
    rng = np.random.default_rng(0)
    grey = rng.permutation(250)[: count * 2].reshape(count, 2, 1, 1, 1).astype(np.uint8)
    pictures = np.broadcast_to(grey, (count, 2, 16, 16, 3)).copy()
    masks = np.zeros((count, 2, 16, 16), bool)
    masks[:, :, 3:12, 4:13] = True
    return Pictures(np.concatenate([pictures, pictures[:, 1:]], axis=1), masks, [("a", "b")] * count)


def diptychs(count: int = 8) -> fill.Diptychs:
    rng = np.random.default_rng(1)
    hole = np.zeros((count, 16, 16), bool)
    hole[:, 4:12, 4:12] = True
    return fill.Diptychs(
        picture=rng.normal(size=(count, 4, 4, 8)).astype(np.float16),
        masked=rng.normal(size=(count, 4, 4, 8)).astype(np.float16),
        hole=hole,
        copy=np.arange(count) % 4 == 0,
        individual=np.arange(count) % 5,
        view=np.arange(count) % 2,
        single=rng.normal(size=(3, 4, 4, 4)).astype(np.float16),
        single_hole=hole[:3],
        single_features=rng.normal(size=(3, PATCHES, WIDTH)).astype(np.float16),
        single_individual=np.array([0, 2, 4], np.int32),
        single_view=np.array([0, 1, 0], np.int32),
    )


def networks() -> tuple[fill.Networks, layers.Params]:
    graphdef, params = layers.initialize(lambda rngs: Flux(CONFIG, rngs=rngs), jax.random.key(0))
    embedder, redux = layers.initialize(
        lambda rngs: ReduxEmbedder(ReduxEmbedderConfig(WIDTH, 8), rngs=rngs), jax.random.key(1)
    )
    static = fill.Networks(graphdef, embedder, kontext.encode_text, 3, 8)
    return static, {"transformer": params, "text": kontext.text(), "redux": redux}


def batch_of(task: str, latents: Latents | None = None) -> dict[str, Any]:
    settings = dataclasses.replace(SETTINGS, tasks=tuple(float(task == name) for name in fill.TASKS))
    return fill.draw_batch(diptychs(), latents or kontext.latents(), 5, settings)


READ = {
    "caption": {"picture", "masked", "hole", "t5", "clip"},
    "variation": {"picture", "masked", "hole", "features"},
    "diptych": {"picture", "masked", "hole", "t5", "clip"},
}


@pytest.mark.parametrize("task", READ)
def test_each_task_reads_its_inputs_and_no_others(task: str) -> None:
    static, params = networks()
    batch = {name: jnp.asarray(value) for name, value in batch_of(task).items()}
    cost = jax.jit(lambda values: fill.loss(static, params, values, jax.random.key(1), SETTINGS)[0])
    plain = float(cost(batch))

    def other(value: jax.Array) -> jax.Array:
        if value.dtype == bool:
            return ~value
        return (value + 1) % 5 if value.dtype == jnp.int32 else -value

    changed = {name: {**batch, name: other(value)} for name, value in batch.items() if value.size}
    assert {name for name, given in changed.items() if float(cost(given)) != plain} == READ[task]
    assert {name for name, value in batch.items() if not value.size} == {"features", "t5", "clip"} - READ[task]


def test_what_is_not_repainted_weighs_less() -> None:
    static, params = networks()
    batch = {name: jnp.asarray(value) for name, value in batch_of("diptych").items()}
    heavy = dataclasses.replace(SETTINGS, hole_weight=1e6)
    value, metrics = fill.loss(static, params, batch, jax.random.key(1), heavy)
    assert float(value) == pytest.approx(float(metrics["hole"]), rel=1e-3)
    equal, _ = fill.loss(static, params, batch, jax.random.key(1), dataclasses.replace(SETTINGS, hole_weight=1.0))
    assert float(equal) != pytest.approx(float(value), rel=1e-3)


def test_a_diptych_shows_the_other_view_or_a_copy() -> None:
    pictures = drawn(PLENTY // 2)
    rows = [(index, row) for index in range(PLENTY // 2) for row in fill.draw_diptychs(pictures, index, _ONE_GREY, 16)]
    assert 0.3 < sum(row["copy"] for _, row in rows) / (PLENTY // 2) < 0.7
    for index, row in rows:
        target = int(row["target"][0, 0, 0])
        view = int(np.flatnonzero(pictures.pictures[index, :2, 0, 0, 0] == target)[0])
        shown = int(pictures.pictures[index, view if row["copy"] else 1 - view, 0, 0, 0])
        assert (row["reference"] == shown).all()
        assert (row["hole"] | ~pictures.masks[index, view]).all()
        assert (row["individual"], row["view"]) == (index, view)


def test_references_lose_their_background_in_their_share() -> None:
    picture, mask = np.full((16, 16, 3), 90, np.uint8), np.zeros((16, 16), bool)
    mask[4:12, 4:12] = np.eye(8, dtype=bool)
    config = fill.DiptychConfig(whole=0.0, alone=0.3, expansion=(1.0, 1.0))
    rng = np.random.default_rng(0)
    white = [255 in fill.draw_reference(rng, picture, mask, 16, config) for _ in range(PLENTY)]
    assert sum(white) / PLENTY == pytest.approx(0.3, abs=0.1)


def test_captions_are_those_of_the_targets_or_plain() -> None:
    data, latents = diptychs(), kontext.latents()
    settings = dataclasses.replace(SETTINGS, tasks=(0.0, 0.0, 1.0), batch=64)
    batch = fill.draw_batch(data, latents, 90, settings)
    plain = (batch["t5"] == latents.plain_t5).all(1)
    assert 0.2 < plain.mean() < 0.8
    numbers = {picture.tobytes(): index for index, picture in enumerate(data.picture)}
    for picture, ids in zip(batch["picture"][~plain], batch["t5"][~plain], strict=True):
        row = numbers[picture.tobytes()]
        np.testing.assert_array_equal(ids, latents.t5[data.individual[row], data.view[row]])


def test_a_variation_shows_siglip_the_picture_itself() -> None:
    data, latents = diptychs(), kontext.latents()
    settings = dataclasses.replace(SETTINGS, tasks=(0.0, 1.0, 0.0), batch=64)
    batch = fill.draw_batch(data, latents, 3, settings)
    whole = latents.whole[data.single_individual, data.single_view]
    rows = {picture.tobytes(): number for number, picture in enumerate(whole)}
    for picture, features in zip(batch["picture"], batch["features"], strict=True):
        np.testing.assert_array_equal(features, data.single_features[rows[picture.tobytes()]])


def test_copies_come_first_and_then_never() -> None:
    data, settings = (
        diptychs(),
        dataclasses.replace(SETTINGS, tasks=(0.0, 0.0, 1.0), batch=64, steps=100, curriculum=0.2),
    )
    copies = {picture.tobytes() for picture in data.picture[data.copy]}

    def share(step: int) -> float:
        batch = fill.draw_batch(data, kontext.latents(), step, settings)
        return float(np.mean([picture.tobytes() in copies for picture in batch["picture"]]))

    assert share(0) > 0.6 and all(share(step) == 0 for step in range(20, 30))


def test_learns_and_continues_exactly(tmp_path: Path) -> None:
    def train(name: str, rows: list[dict[str, float]], **kwargs: Any) -> Any:
        static, params = networks()
        return fill.train(
            static, params, diptychs(), kontext.latents(), SETTINGS, checkpoint=tmp_path / name, report=rows.append,
            every=4, **kwargs,
        )  # fmt: skip

    rows: list[dict[str, float]] = []
    whole = train("whole", rows)
    assert [row["step"] for row in rows] == [4, 8]
    assert train("part", [], seconds=0.0).step == 1
    continued = train("part", [])
    for name in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(continued, name), getattr(whole, name))
    _, fresh = networks()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), whole.params, fresh)
    assert all(jax.tree.leaves(moved["redux"])) and all(jax.tree.leaves(moved["text"])), "both train along"
