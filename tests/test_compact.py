"""Compact conditions: subject and control at a fraction of the resolution, from their positions to the verbs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import nabla_jax
from nabla_jax import config as configs
from nabla_jax import draws, evaluate, flow, generate, prepare, reposing, runs, train, training
from nabla_jax.checkpoints import adapters
from nabla_jax.conditioning import omini
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.loader import open_prepared
from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.parallel import mesh as meshes
from tests import fixtures, stand_ins

SIZE = fixtures.SIZE
LEVELS = np.array([1.0, 0.6, 0.0], np.float32)


def covered(ids: np.ndarray, height: int, width: int, compact: int) -> np.ndarray:
    """The mean position of each square of compact x compact tokens of a grid."""
    squares = ids.reshape(height // compact, compact, width // compact, compact, 3)
    return squares.mean((1, 3)).reshape(-1, 3)


@pytest.mark.parametrize("kontext", [True, False])
@pytest.mark.parametrize(("height", "width", "compact"), [(4, 6, 2), (6, 3, 3), (4, 4, 4), (2, 3, 1)])
def test_a_token_lies_in_the_middle_of_what_it_covers(height: int, width: int, compact: int, kontext: bool) -> None:
    small = height // compact, width // compact
    subject = omini.subject_ids(height, width, kontext=kontext)
    found = omini.subject_ids(*small, kontext=kontext, scale=compact)
    np.testing.assert_allclose(found, covered(subject, height, width, compact), rtol=0, atol=1e-6)
    found = omini.grid_ids(*small, scale=compact)
    np.testing.assert_allclose(found, covered(omini.grid_ids(height, width), height, width, compact), rtol=0, atol=1e-6)


def opened(**changes: Any) -> tuple[reposing.Method, layers.Params]:
    config = fixtures.config(fixtures.prepared_root(), conditioning__compact=2)
    method, base = training.load_method(config, meshes.data_mesh())
    return dataclasses.replace(method, adapter=None, **changes), base


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    drawn = {name: rng.normal(size=(2, 32, 2, 4)).astype(np.float32) for name in ("subject", "control")}
    return drawn | {
        "target": rng.normal(size=(2, 32, 4, 8)).astype(np.float32),
        "mask": rng.uniform(size=(2, 4, 8)).astype(np.float32),
        "prompt_embeds": rng.normal(size=(2, 4, 16)).astype(np.float32),
        "pooled": rng.normal(size=(2, 16)).astype(np.float32),
        "sample": np.array([3, 4], np.uint32),
    }


@pytest.mark.parametrize("changes", [{}, {"name": "native"}, {"kontext": False, "independent": True}])
def test_sampling_and_loss_are_those_of_the_branches_written_out(changes: dict[str, Any]) -> None:
    method, base = opened(**changes)
    data, grid = batch(), (2, 4)
    tokens = reposing.condition_tokens(method, data["subject"], data["control"], 0, data["sample"])
    noise = omini.grid_ids(*grid)
    subject = covered(noise + np.float32([1, 0, 0] if method.kontext else [0, 0, -4]), *grid, 2)
    control = covered(noise + np.float32([2 if method.name == "native" else 0, 0, 0]), *grid, 2)

    @jax.jit
    def velocity(latents: jax.Array, time: jax.Array, guidance: float) -> jax.Array:
        text = (data["prompt_embeds"], data["pooled"])
        pictures = list(zip(tokens, (subject, control), strict=True))
        if method.name == "native":
            streams = omini.native(*text, latents, noise, time, guidance=guidance, references=pictures)
        else:
            conditions = [omini.Condition(picture, ids, None) for picture, ids in pictures]
            streams = omini.branches(
                *text, latents, noise, time, guidance=guidance, conditions=conditions, independent=method.independent
            )
        return layers.bind(method.transformer, base)(streams)[:, :8]

    def normal(purpose: int) -> jax.Array:
        return draws.normal(draws.keys(0, data["sample"], purpose), (8, 64))

    state = normal(draws.NOISE)
    for now, following in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        state = state + (following - now) * velocity(state, jnp.full(2, now), jnp.full(2, 2.5))
    expected = np.asarray(flow.unpack(state, 4, 8))
    shown = {name: value for name, value in data.items() if name not in ("target", "mask")}
    found = reposing.make_sampler(method)(base, {}, shown, LEVELS, jnp.float32(2.5), jnp.uint32(0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    # Training: the target at its own size.
    time = jax.nn.sigmoid(jax.vmap(jax.random.normal)(draws.keys(0, data["sample"], draws.TIME)))
    mean = np.split(data["target"], 2, axis=1)
    eps = draws.normal(draws.keys(0, data["sample"], draws.TARGET_LATENT), (16, 4, 8))
    latents = (mean[0] + np.exp(0.5 * mean[1]) * eps - method.vae.shift_factor) * method.vae.scaling_factor
    x0, x1 = flow.pack(latents), normal(draws.NOISE)
    noisy = (1 - time[:, None, None]) * x0 + time[:, None, None] * x1
    error = float(jnp.mean((velocity(noisy, time, jnp.ones(2)) - (x1 - x0)) ** 2))
    loss = jax.jit(lambda p, b: reposing.loss(method, {}, p, b, seed=0, guidance=1.0))
    np.testing.assert_allclose(float(loss(base, data)), error, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- prepare


def test_records_hold_smaller_conditions_beside_whole_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PICTURES_PER_SHARD", "PIXELS_PER_CALL"):
        monkeypatch.setattr(prepare, name, getattr(prepare, name))  # put back in the end
    stand_ins.small_shards()
    root = fixtures.prepared_root() / "world" / "nabirds"
    shapes = set()

    def spy(images: np.ndarray) -> np.ndarray:
        shapes.add(images.shape)
        return stand_ins.pool(images)

    config = stand_ins.config_for(root, tmp_path / "out", compact=2)
    prepared = open_prepared(prepare.prepare(config, stand_ins.encoders(images=spy)))
    # One shape of call for each size of picture.
    assert shapes == {(6, 3, SIZE, SIZE), (6, 3, SIZE // 2, SIZE // 2)}
    examples = read_dataset(root).by_id
    for position, id in enumerate(prepared.manifest["ids"][:8]):
        view = controls.read_view(examples[id])
        height, width = view.mask.shape
        filled = np.where(view.mask[:, :, None], np.uint8(0), view.image)
        canvases = {
            "target": Placement.square(height, width, SIZE).apply(view.image, 255, "lanczos"),
            "subject": Placement.subject(view.mask, SIZE // 2).apply(view.image, 255, "lanczos"),
            "control_fill": Placement.square(height, width, SIZE // 2).apply(filled, 255, "bilinear"),
        }
        found = prepared.read(position, tuple(canvases))
        for role, canvas in canvases.items():
            expected = stand_ins.pool(canvas.transpose(2, 0, 1)[None])[0].astype(np.float16)
            np.testing.assert_array_equal(found[role], expected)
        assert found["mask"].shape == (SIZE // 8, SIZE // 8)
    # Folders of whole conditions say nothing of it and are told apart from these.
    assert prepared.manifest["settings"]["conditioning"]["compact"] == 2
    whole = open_prepared(fixtures.prepared_root() / "prepared")
    assert "compact" not in whole.manifest["settings"]["conditioning"]
    other = stand_ins.config_for(root, tmp_path / "out")
    with pytest.raises(UserError, match="prepared with other settings .*conditioning.compact: 2 there, None here"):
        prepare.prepare(other, stand_ins.encoders())


# --------------------------------------------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``prepared``, and ``run`` trained on it, of compact conditions."""
    folder = tmp_path_factory.mktemp("compact")
    prepare.main(arguments(folder))
    train.main(arguments(folder, train__sample_every=2))
    return folder


def arguments(folder: Path, **overrides: Any) -> list[str]:
    """The command line of a run of two steps in ``folder / "run"`` on ``folder / "prepared"``."""
    settings = {
        "conditioning__compact": 2, "train__workdir": str(folder / "run"), "data__prepared": str(folder / "prepared"),
        "train__steps": 2,
    }  # fmt: skip
    file = folder / f"config{len(list(folder.glob('config*')))}.py"
    return ["--config", str(fixtures.write_config(fixtures.prepared_root(), file, **settings | overrides))]


def test_training_generation_and_evaluation(folder: Path, tmp_path: Path) -> None:
    path = runs.RunFolder(folder / "run").adapter(2, "fill")
    assert adapters.read_metadata(path).compact == 2
    assert adapters.read_metadata(runs.RunFolder(fixtures.trained_run()).adapter(4, "fill")).compact == 1
    assert np.asarray(Image.open(folder / "run" / "samples" / "step_2.png")).shape == (3 * SIZE, 4 * SIZE, 3)
    # Encoded when they are drawn, the pictures give the same run, bit for bit.
    train.main(arguments(tmp_path, data__mode="on_the_fly"))
    assert runs.RunFolder(tmp_path / "run").adapter(2, "fill").read_bytes() == path.read_bytes()
    out = tmp_path / "pictures"
    words = arguments(folder)
    generate.main([*words, "--adapter", str(folder / "run"), "--out", str(out), "--limit", "2"])
    for row in runs.read_rows(out / "nabla" / "right" / "manifest.jsonl"):
        assert (row["compact"], row["placement"]["size"]) == (2, SIZE)
        made = Image.open(out / "nabla" / "right" / row["file"])
        assert (made.height, made.width) == (row["height"], row["width"])
    evaluate.main([*words, "--pictures", f"compact={out}", "--out", str(tmp_path / "report"), "--limit", "2"])
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert "compact" in {row["model"] for row in summary}


def test_the_adapter_says_how_small_its_conditions_are(folder: Path) -> None:
    reposer = nabla_jax.load(fixtures.prepared_root() / "base", folder / "run")
    assert (reposer.conditioning.compact, reposer.method.compact) == (2, 2)
    whole = dataclasses.replace(reposer.conditioning, compact=1)
    with pytest.raises(UserError, match="trained with compact 2, the configuration asks for 1"):
        nabla_jax.load(fixtures.prepared_root() / "base", folder / "run", conditioning=whole)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="conditioning.compact: 1 there, 2 here"):
        train.main(arguments(tmp_path, data__prepared=str(fixtures.prepared_root() / "prepared")))
    with pytest.raises(UserError, match="conditioning.compact: 2 there, 1 here"):
        train.main(arguments(tmp_path, conditioning__compact=1, data__prepared=str(folder / "prepared")))
    with pytest.raises(
        UserError, match=r"conditioning\.compact: found 3, expected a divisor of conditioning\.size, 32"
    ):
        train.main(arguments(tmp_path, conditioning__compact=3))
    with pytest.raises(UserError, match=r"conditioning\.compact: found 0, expected more than 0"):
        train.main(arguments(tmp_path, conditioning__compact=0))
    with pytest.raises(UserError, match=r"compact: found 4 for conditioning\.size 32, .* a multiple of 16 pixels"):
        train.main(arguments(tmp_path, conditioning__compact=4, data__mode="on_the_fly"))
    conditioning = configs.Conditioning(size=SIZE, text_length=8, compact=4)
    with pytest.raises(UserError, match=r"compact: found 4 for conditioning\.size 32"):
        nabla_jax.load(fixtures.prepared_root() / "base", conditioning=conditioning)
