"""Method insert on a tiny random FLUX.1-Fill and Redux: training, sampling, evaluation, and what is refused."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import nabla_jax
from nabla_jax import api, diptychs, draws, flow, generate, reposing, runs, train, training
from nabla_jax import config as configs
from nabla_jax.checkpoints import adapters, pipeline
from nabla_jax.conditioning import masks
from nabla_jax.config import Conditioning, Sample
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.loader import make_loader
from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import flux, layers
from nabla_jax.models.flux import Branch
from nabla_jax.parallel import mesh as meshes
from tests import fixtures
from tests.fixtures import oval_picture

SIZE = fixtures.SIZE
SETTINGS = Sample(steps=2, seed=5, window=2.4, feather=2)


def arguments(tmp_path: Path, **overrides: Any) -> list[str]:
    """The command line of a run in ``tmp_path / "run"``."""
    overrides = {"train__workdir": str(tmp_path / "run"), **overrides}
    values = fixtures.insert_values(fixtures.insert_root(), **overrides)
    return ["--config", str(fixtures.write_values(values, tmp_path / "config.py"))]


def config(**overrides: Any) -> configs.Config:
    return configs.from_dict(fixtures.insert_values(fixtures.insert_root(), **overrides))


def trained_file() -> Path:
    return runs.RunFolder(fixtures.insert_root() / "insert").adapter(4, "fill")


@functools.cache
def opened() -> tuple[training.Input, reposing.Method, layers.Params]:
    """What training opens: the pictures and their encoder, the method, the base."""
    mesh = meshes.data_mesh()
    method, base = training.load_method(config(), mesh)
    return training.open_input(config(), mesh), method, base


@functools.cache
def tuned() -> api.Reposer:
    return nabla_jax.load(fixtures.insert_root() / "fill", fixtures.insert_root() / "insert")


# ------------------------------------------------------------------------------------------------- the method


def fold(mask: np.ndarray, factor: int) -> np.ndarray:
    """Channel ``((y mod f) f + x mod f) 4 + 2 dy + dx`` of each token, pixel by pixel."""
    batch, height, width = mask.shape
    side = 2 * factor
    out = np.zeros((batch, (height // side) * (width // side), 4 * factor**2), np.float32)
    for y in range(height):
        for x in range(width):
            dy, dx = y // factor % 2, x // factor % 2
            channel = ((y % factor) * factor + x % factor) * 4 + 2 * dy + dx
            out[:, (y // side) * (width // side) + x // side, channel] = mask[:, y, x]
    return out


@functools.cache
def networks() -> tuple[Any, Any, Any]:
    """Moments of pictures, Redux tokens of what it sees, and the velocity of two streams, compiled once."""
    inputs, method, base = opened()
    encoder = inputs.diptychs
    assert encoder is not None
    vae, redux = (layers.bind(part.graphdef, part.params) for part in (encoder.vae, encoder.redux))
    run = jax.jit(lambda p, s, a: layers.bind(method.transformer, p)(streams_of(*s), adapters={"fill": a}))
    return jax.jit(lambda x: vae.encode(x)), jax.jit(lambda x: redux(x)), functools.partial(run, base)


def streams_of(prompt: jax.Array, tokens: jax.Array, time: jax.Array) -> list[Branch]:
    """Text and picture at one time, guidance 1, one adapter on both; one grid over the whole diptych."""
    batch = len(time)
    rows, columns = np.mgrid[: SIZE // 16, : 2 * SIZE // 16]
    ids = np.stack([np.zeros(rows.size), rows.ravel(), columns.ravel()], axis=-1).astype(np.float32)
    shared = (time, jnp.ones(batch), jnp.zeros((batch, 16)), "fill")
    return [
        Branch(prompt, np.zeros((prompt.shape[1], 3), np.float32), *shared, kind="text"),
        Branch(tokens, ids, *shared),
    ]


def by_hand(pairs: dict[str, np.ndarray], seed: int, adapter: Any) -> np.ndarray:
    """Squared errors [B, N] from pictures, written out: reference left, target right, grey hole, Redux's prompt."""
    encode, redux, run = networks()
    left, right = (pairs[name].astype(np.float32) / 127.5 - 1 for name in ("subject", "target"))
    whole = np.concatenate([left, right], axis=3)
    mask = np.concatenate([np.zeros_like(pairs["repaint"]), pairs["repaint"]], axis=2)
    masked = whole * (1 - mask[:, None]).astype(np.float32)

    def normal(purpose: int, shape: tuple[int, ...]) -> np.ndarray:
        root = jax.random.fold_in(jax.random.key(seed), purpose)
        return np.stack([jax.random.normal(jax.random.fold_in(root, int(n)), shape) for n in pairs["sample"]])

    def latents(image: np.ndarray, purpose: int) -> np.ndarray:
        mean, logvar = np.split(np.asarray(encode(image)), 2, axis=1)
        eps = normal(purpose, mean.shape[1:])
        z = (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * eps - 0.1159) * 0.3611
        batch, channels, height, width = z.shape
        squares = z.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
        return squares.reshape(batch, -1, 4 * channels)

    x0, source = latents(whole, draws.TARGET_LATENT), latents(masked, draws.MASKED_LATENT)
    x1 = normal(draws.NOISE, x0.shape[1:])
    time = 1 / (1 + np.exp(-normal(draws.TIME, ())))
    noisy = (1 - time[:, None, None]) * x0 + time[:, None, None] * x1
    tokens = np.concatenate([noisy, source, fold(mask, 8)], axis=-1).astype(np.float32)
    seen = redux(ImageProcessor.siglip(32)(list(pairs["subject"].transpose(0, 2, 3, 1))))
    prompt = jnp.concatenate([jnp.zeros((len(time), 8, 16)), seen], axis=1)
    found = run((prompt, jnp.asarray(tokens), jnp.asarray(time, jnp.float32)), adapter)
    return np.mean((np.asarray(found) - (x1 - x0)) ** 2, axis=2)


def test_the_loss_is_the_written_out_one() -> None:
    """Over the whole diptych, by the adapter on the whole sequence; of a batch the mean of its samples."""
    inputs, method, base = opened()
    pairs = next(inputs.batches(2, 7))
    large = dataclasses.replace(tuned().adapters["fill"], scale=50.0)
    batch = training.device_batch(pairs, meshes.data_mesh(), inputs.diptychs)

    @jax.jit
    def loss(base: layers.Params, batch: dict[str, jax.Array]) -> jax.Array:
        return reposing.loss(method, {"fill": large}, base, batch, seed=3, guidance=1.0, foreground_weight=1e7)

    # Where the foreground is everything, weights are equal: the plain mean.
    errors = by_hand(pairs, 3, large)
    everything = np.ones(batch["mask"].shape, np.float32)
    np.testing.assert_allclose(float(loss(base, {**batch, "mask": everything})), errors.mean(), rtol=2e-5)
    assert not np.isclose(*errors.mean(axis=1), rtol=1e-3)
    # The reference is background.
    half = batch["mask"].shape[2] // 2
    assert not np.asarray(batch["mask"])[:, :, :half].any()
    np.testing.assert_array_equal(np.asarray(batch["mask"])[:, :, half:], pairs["mask"])
    right = everything.copy()
    right[:, :, :half] = 0
    columns = np.arange(errors.shape[1]) % (2 * SIZE // 16) >= SIZE // 16
    for side, chosen in ((right, columns), (1 - right, ~columns)):
        found = float(loss(base, {**batch, "mask": side}))
        np.testing.assert_allclose(found, errors[:, chosen].mean(), rtol=2e-5)
        assert not np.isclose(found, errors.mean(), rtol=1e-3)


def test_sampling_is_eulers_method_on_the_same_branches() -> None:
    inputs, method, base = opened()
    batch = training.device_batch(next(inputs.batches(2, 7)), meshes.data_mesh(), inputs.diptychs)
    # As many as the other tests draw at a time: one program.
    batch = {
        name: jnp.concatenate([value, value[:1]]) for name, value in batch.items() if name not in ("target", "mask")
    }
    levels = np.array([1.0, 0.6, 0.0], np.float32)
    adapters_ = tuned().adapters
    found = reposing.make_sampler(method)(base, adapters_, batch, levels, jnp.float32(2.5), jnp.uint32(4))
    height, width = batch["masked"].shape[-2:]
    grid = (height // 2, width // 2)
    masked = reposing.shown(method, batch, 4)
    text = (batch["prompt_embeds"], batch["pooled"])

    @jax.jit
    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return reposing.predict(method, base, adapters_, x, jnp.full(3, sigma), masked, text, 2.5, grid)

    state = draws.normal(draws.keys(4, batch["sample"], draws.NOISE), (grid[0] * grid[1], 64))
    for now, following in zip(levels[:-1], levels[1:], strict=True):
        state = state + (following - now) * velocity(state, now)
    np.testing.assert_allclose(found, flow.unpack(state, height, width), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="image_guidance: method insert has no conditions"):
        reposing.sample(method, base, adapters_, batch, levels, jnp.float32(1), jnp.uint32(0), jnp.float32(2))


def test_encoding_a_few_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, _ = opened()
    encoder = inputs.diptychs
    assert encoder is not None
    pairs = next(inputs.batches(4, 7))
    whole = encoder(pairs)
    monkeypatch.setattr("nabla_jax.diptychs.PIXELS_PER_CALL", 4 * SIZE * SIZE)
    parts = encoder(pairs)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(np.asarray(parts[name]), np.asarray(value), rtol=0, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(np.asarray(parts["sample"]), pairs["sample"])
    # At most two a device at a time, in calls of one size, a multiple of the devices.
    sizes = {
        (rows, n): diptychs.pictures_per_call(rows, SIZE, n) for rows, n in ((1, 1), (4, 1), (5, 1), (6, 2), (8, 8))
    }
    assert sizes == {(1, 1): 1, (4, 1): 2, (5, 1): 2, (6, 2): 4, (8, 8): 8}


def test_a_training_picture_depends_on_its_sample_alone() -> None:
    """Another batch size, another number of threads and another process give the same mask and the same border."""
    inputs, _, _ = opened()
    whole = [next(inputs.batches(4, 7, (i, 2))) for i in range(2)]
    source = inputs.source
    alone = make_loader(source, "all_pairs", 1, 7, threads=0)
    rows = [next(alone) for _ in range(4)]
    names = ("subject", "target", "repaint", "mask", "sample")
    for name in names:
        together = np.concatenate([batch[name] for batch in whole])
        np.testing.assert_array_equal(together, np.concatenate([row[name] for row in rows]), err_msg=name)
    other = next(make_loader(source, "all_pairs", 4, 8, threads=0))
    assert not np.array_equal(other["repaint"], np.concatenate([b["repaint"] for b in whole]))


def test_training_draws_every_policy_and_the_whole_range_of_borders() -> None:
    """Each mask is the named policy's; every subject's border lies in the range and the range is used."""
    inputs, _, _ = opened()
    source = inputs.source
    example = max(source.examples, key=lambda e: controls.read_view(e, "fill").mask.sum())
    view = controls.read_view(example, "fill")
    position = source.examples.index(example)
    placement = controls.target_placement(view.mask, SIZE, 0)
    seen, ratios = set(), []
    for number in range(60):
        draw = functools.partial(draws.generator, 1, number)
        found = source.read(position, ("target", "repaint", "subject"), draw)
        rng = draw(draws.REPAINT_MASK)
        policy = source.conditioning.mask_policies[rng.integers(4)]
        expected = masks.repaint_mask(view.mask, policy, rng)
        np.testing.assert_array_equal(found["repaint"], controls.repaint_canvas(expected, placement))
        seen.add(policy)
        ratio = draw(draws.EXPANSION).uniform(1.1, 1.4)
        canvas = controls.subject_canvas(view.image, view.mask, SIZE, ratio)
        np.testing.assert_array_equal(found["subject"], canvas.pixels.transpose(2, 0, 1))
        ratios.append(canvas.placement.side / max(canvas.placement.crop_size))
        assert (found["repaint"] >= controls.repaint_canvas(view.mask, placement)).all()
    assert seen == set(masks.POLICIES)
    assert 1 < min(ratios) < 1.2 and 1.3 < max(ratios) <= 1.4


# ---------------------------------------------------------------------------------------- sampling pictures


def test_nothing_outside_the_window_changes_and_the_seam_is_continuous() -> None:
    (a, a_mask), (b, b_mask) = oval_picture(40, 60, 0), oval_picture(70, 90, 1)
    job = api.Job("x", a, a_mask, b, b_mask)
    sample = dataclasses.replace(SETTINGS, batch=1, window=1.5, feather=3)
    image, placement = tuned().repose_batch([job], sample)[0]
    assert image.shape == b.shape
    top, left, bottom, right = placement.box
    outside = np.ones(b.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert 0 < outside.mean() < 1
    np.testing.assert_array_equal(image[outside], b[outside])
    hard = tuned().repose_batch([job], dataclasses.replace(sample, feather=0))[0][0]
    inside = placement.invert(np.zeros((SIZE, SIZE, 3), np.uint8)).shape[:2]
    assert inside == (bottom - top, right - left)
    # A step inside the window a quarter of the new picture shows, then a half, three quarters, all of it.
    row = (top + bottom) // 2
    for step in range(4):
        at = (row, left + step)
        share = min((step + 1) / 4, 1)
        expected = b[at] + share * (hard[at].astype(float) - b[at])
        assert np.abs(image[at] - expected).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(image[b_mask], hard[b_mask])
    assert (image[b_mask] != b[b_mask]).mean() > 0.9


def test_the_key_the_subject_and_every_setting_matter() -> None:
    (a, a_mask), (b, b_mask), (c, c_mask) = oval_picture(40, 60, 0), oval_picture(70, 90, 1), oval_picture(40, 60, 2)
    base = api.Job("x", a, a_mask, b, b_mask)
    jobs = [base, dataclasses.replace(base, key="y"), dataclasses.replace(base, subject=c, subject_mask=c_mask)]
    sample = dataclasses.replace(SETTINGS, batch=3)
    first, other, shuffled = (image for image, _ in tuned().repose_batch(jobs, sample))
    assert not np.array_equal(first, other) and not np.array_equal(first, shuffled)
    for changes in ({"mask_policy": "box"}, {"expansion": 1.0}, {"window": 0.0}, {"guidance": 9.0}, {"seed": 6}):
        changed = tuned().repose_batch(jobs, dataclasses.replace(sample, **changes))[0][0]
        assert not np.array_equal(first, changed), changes
    whole = tuned().repose_batch(jobs, dataclasses.replace(sample, window=0.0))[0][1]
    assert whole.box == (0, 0, 70, 90)


# ------------------------------------------------------------------------------------------------- the verbs


def test_two_steps_and_two_more_are_four(tmp_path: Path) -> None:
    run, whole = tmp_path / "run", fixtures.insert_root() / "insert"
    train.main(arguments(tmp_path, train__steps=2))
    assert runs.RunFolder(run).last_step() == 2
    train.main(arguments(tmp_path, train__sample_every=4))
    rows = [
        [{k: row[k] for k in ("step", "loss", "grad_norm", "d")} for row in runs.read_rows(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert runs.RunFolder(run).adapter(4, "fill").read_bytes() == trained_file().read_bytes()
    # The sheet: the diptych with its hole, the whole one, and the drawn one.
    sheet = np.asarray(Image.open(run / "samples" / "step_4.png"))
    assert sheet.shape == (3 * SIZE, 3 * 2 * SIZE, 3)


def test_metadata_says_all_that_sampling_needs() -> None:
    root = fixtures.insert_root()
    metadata = adapters.read_metadata(trained_file())
    assert (metadata.method, metadata.applies_to, metadata.in_channels) == ("insert", "all", 384)
    assert (metadata.mask_policies, metadata.expansion, metadata.window) == (tuple(masks.POLICIES), (1.1, 1.4), 0.0)
    assert (metadata.size, metadata.guidance, metadata.redux) == (SIZE, 1.0, str(root / "redux"))
    assert metadata.base_sha256 == pipeline.folder_hash(root / "fill" / "transformer")
    reposer = tuned()
    assert reposer.conditioning == config().conditioning
    chosen = ("steps", "guidance", "mask_policy", "expansion", "window", "feather")
    assert {n: getattr(reposer.defaults, n) for n in chosen} == {n: getattr(config().sample, n) for n in chosen}
    # Every adapted linear learns: the adapter acts on text and picture alike.
    tensors = load_file(trained_file())
    assert all(tensors[name].any() for name in tensors if name.endswith("lora_B.weight"))


def test_generate_changes_the_window_alone(tmp_path: Path) -> None:
    """With the trained adapter and with the bare base."""
    root = fixtures.insert_root()
    words = arguments(tmp_path)
    dataset = read_dataset(root / "world" / "nabirds")
    for name, adapter in (("tuned", str(root / "insert")), ("untuned", "none")):
        out = tmp_path / name
        generate.main([*words, "--adapter", adapter, "--out", str(out), "--limit", "2", "--subjects", "right"])
        rows = runs.read_rows(out / "nabla" / "right" / "manifest.jsonl")
        assert len(rows) == 2
        for row in rows:
            chosen = (row["method"], row["mask_policy"], row["expansion"], row["window"], row["feather"])
            assert chosen == ("insert", "silhouette", 1.3, 2.4, 2)
            example = dataset.by_id[row["target_id"]]
            made = np.asarray(Image.open(out / "nabla" / "right" / row["file"]))
            target = controls.read_view(example, "fill")
            top, left, bottom, right = row["placement"]["box"]
            outside = np.ones(target.mask.shape, bool)
            outside[top:bottom, left:right] = False
            np.testing.assert_array_equal(made[outside], target.image[outside])
            assert (made[target.mask] != target.image[target.mask]).any()


def test_the_paper_run_is_the_published_one() -> None:
    found = configs.load("configs/insert_fill.py")
    assert found.base.path.endswith("FLUX.1-Fill-dev") and found.base.redux.endswith("FLUX.1-Redux-dev")
    conditioning = found.conditioning
    assert (conditioning.method, conditioning.size, conditioning.text_length) == ("insert", 1024, 512)
    assert (conditioning.expansion, conditioning.window) == ((1.1, 1.4), 0.0)
    assert (found.lora.rank, found.lora.alpha, found.lora.init) == (256, 256.0, "gaussian")
    assert found.lora.start.endswith("20250321_steps5000_pytorch_lora_weights.safetensors")
    assert (found.train.steps, found.train.batch, found.train.seed, found.train.guidance) == (10_000, 4, 42, 1.0)
    assert (found.sample.steps, found.sample.window, found.data.mode) == (50, 2.4, "on_the_fly")
    omini = configs.load("configs/omk_fill.py")
    assert (found.optim, found.metrics, found.benchmarks) == (omini.optim, omini.metrics, omini.benchmarks)


def test_toy_changes_only_sizes_paths_and_numbers() -> None:
    real, toy = (configs.flatten(configs.to_dict(configs.load(f"configs/insert_fill.py{s}"))) for s in ("", ":toy"))
    changed = {key for key in real.keys() | toy.keys() if real.get(key) != toy.get(key)}
    method = {key for key in real if key.startswith(("conditioning.", "data.", "optim.", "lora."))}
    method -= {f"conditioning.{name}" for name in ("size", "dot", "line", "text_length")}
    method -= {"data.root", "data.obtain", "optim.d0", "lora.rank", "lora.alpha", "lora.start"}
    assert not changed & (method | {"train.guidance", "train.sampler", "sample.mask_policy", "sample.expansion"})
    assert (toy["base.path"], toy["base.redux"]) == ("asset:toy-flux-fill", "asset:toy-flux-redux")


# ------------------------------------------------------------------------------------------------- bad input


def refusal(tmp_path: Path, **overrides: Any) -> str:
    """The one line that training answers before it makes a run folder's metrics."""
    with pytest.raises(UserError) as error:
        train.main(arguments(tmp_path, **overrides))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data__mode": "precomputed"}, "data.mode: found 'precomputed', expected 'on_the_fly' for method insert"),
        ({"base__redux": ""}, "base.redux: found '', expected a FLUX.1-Redux folder"),
        ({"base__redux": "absent"}, "FLUX.1-Redux (base.redux: found no absent/image_encoder/config.json)"),
        ({"conditioning__control": "depth"}, "conditioning.control: found 'depth', expected 'fill'"),
        ({"conditioning__prompt": "A bird."}, "conditioning.prompt: found 'A bird.', expected ''"),
        ({"conditioning__independent_conditions": True}, "conditioning.independent_conditions: found True"),
        (
            {"conditioning__mask_policies": ("round",)},
            "conditioning.mask_policies: found 'round', expected silhouette, dilated",
        ),
        ({"conditioning__mask_policies": ()}, "conditioning.mask_policies: found none"),
        ({"conditioning__expansion": (1.4, 1.1)}, "conditioning.expansion: found (1.4, 1.1)"),
        ({"conditioning__window": 0.5}, "conditioning.window: found 0.5, expected 1 or more, or 0"),
        (
            {"conditioning__method": "paste"},
            "conditioning.method: found 'paste', expected one of omini, native, insert",
        ),
        ({"sample__mask_policy": "round"}, "sample.mask_policy: found 'round'"),
        ({"sample__expansion": 0.5}, "sample.expansion: found 0.5"),
        ({"sample__feather": -1}, "sample.feather: found -1, expected 0 or more"),
        ({"sample__image_guidance": 2.0}, "sample.image_guidance: found 2.0, expected 1.0 for method insert"),
        ({"lora__start": "absent"}, "the adapter to begin with (lora.start: found nothing at absent"),
    ],
)
def test_what_does_not_belong_together_is_refused(overrides: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(tmp_path, **overrides)


def test_bases_of_another_method_are_refused(tmp_path: Path) -> None:
    root = fixtures.insert_root()
    said = refusal(tmp_path, base__path=str(root / "base"))
    assert "method insert needs FLUX.1-Fill (384 channels a token), found FLUX.1 schnell, dev or Kontext (64)" in said
    words = ["--config", str(fixtures.write_config(root, tmp_path / "omini.py", train__workdir=str(tmp_path / "run")))]
    with pytest.raises(
        UserError, match=r"method omini needs FLUX\.1 schnell, dev or Kontext \(64 .*found FLUX\.1-Fill"
    ):
        train.main([*words, "--config.base.path", str(root / "fill")])
    fixtures.write_redux(tmp_path / "redux", width=24)
    said = refusal(tmp_path, base__redux=str(tmp_path / "redux"))
    assert "txt_in_features: found 24, expected 16, the joint_attention_dim of the base" in said


def test_there_is_nothing_to_prepare(tmp_path: Path) -> None:
    from nabla_jax import prepare

    with pytest.raises(UserError, match="insert encodes pictures when they are drawn: there is nothing to prepare"):
        prepare.main(arguments(tmp_path))


def omini_file(folder: Path) -> Path:
    """An adapter of the other method that would fit in every other way."""
    metadata = adapters.read_metadata(trained_file())
    metadata = dataclasses.replace(metadata, method="omini", applies_to="condition")
    path = folder / "omini.safetensors"
    adapters.save_adapter(path, tuned().adapters["fill"], metadata, stacked=flux.STACKED)
    return path


def test_adapters_of_the_other_method_are_refused(tmp_path: Path) -> None:
    root = fixtures.insert_root()
    insert = config().conditioning
    said = r"omini\.safetensors: adapter of another method: found 'omini', expected 'insert'"
    with pytest.raises(UserError, match=said):
        nabla_jax.load(root / "fill", omini_file(tmp_path), conditioning=insert, redux=root / "redux")
    said = r"fill\.safetensors: adapter of another method: found 'insert', expected 'omini'"
    with pytest.raises(UserError, match=said):
        nabla_jax.load(root / "base", trained_file(), conditioning=Conditioning(size=SIZE, text_length=8))
    with pytest.raises(UserError, match="adapter for another base"):
        nabla_jax.load(root / "base", trained_file())


def test_another_redux_is_refused(tmp_path: Path) -> None:
    root = fixtures.insert_root()
    other = fixtures.write_redux(tmp_path / "redux", seed=1)
    with pytest.raises(UserError, match=r"fill\.safetensors: adapter for another FLUX\.1-Redux: trained with"):
        nabla_jax.load(root / "fill", trained_file(), redux=other)
    with pytest.raises(UserError, match="redux: found no"):
        nabla_jax.load(root / "fill", trained_file(), redux=tmp_path / "absent")
    with pytest.raises(UserError, match="redux: method insert needs a FLUX"):
        nabla_jax.load(root / "fill", conditioning=config().conditioning)
    with pytest.raises(UserError, match="method insert has no control with an adapter of its own"):
        nabla_jax.load(root / "fill", trained_file(), control_adapter=trained_file())


@pytest.mark.parametrize("what", ["rank", "alpha", "linears", "method"])
def test_an_adapter_to_begin_with_that_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    start, overrides = tmp_path / "start.safetensors", {"lora__start": str(tmp_path / "start.safetensors")}
    tensors = load_file(trained_file())
    if what == "linears":
        tensors = {name: array for name, array in tensors.items() if "ff.net.2" not in name}
    save_file(tensors, start)
    if what == "rank":
        said = refusal(tmp_path, **overrides, lora__rank=4, lora__alpha=4.0)
        assert "start.safetensors: rank: found 2, expected 4" in said
    elif what == "alpha":
        assert "alpha / rank: found 1, expected 2" in refusal(tmp_path, **overrides, lora__alpha=4.0)
    elif what == "linears":
        assert "another set of linears: transformer_blocks.ff.net.2 is missing" in refusal(tmp_path, **overrides)
    else:
        said = refusal(tmp_path, lora__start=str(omini_file(tmp_path)))
        assert "adapter of another method: found 'omini', expected 'insert'" in said
