"""Re-posing from Python, on a tiny random base."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.numpy import load_file, save_file

import nabla_jax
from nabla_jax import api, evaluate, generate, runs
from nabla_jax.checkpoints import adapters
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.config import Conditioning, Sample
from nabla_jax.errors import UserError
from nabla_jax.models import flux
from nabla_jax.models.lora import Adapter
from tests import fixtures
from tests.fixtures import picture

CONDITIONING = Conditioning(size=fixtures.SIZE, text_length=8)


def base() -> Path:
    return fixtures.prepared_root() / "base"


@functools.cache
def untuned() -> api.Reposer:
    return nabla_jax.load(base(), conditioning=CONDITIONING, sample=Sample(steps=2, seed=5))


@functools.cache
def tuned() -> api.Reposer:
    return nabla_jax.load(base(), fixtures.trained_run())


@pytest.mark.parametrize(
    ("subject", "target"),
    [((40, 60), (50, 30)), ((31, 33), (97, 20)), ((8, 200), (1, 5)), ((32, 32), (32, 32))],
)
def test_any_two_sizes_give_a_picture_of_the_targets_size(subject: tuple[int, int], target: tuple[int, int]) -> None:
    (a, a_mask), (b, b_mask) = picture(*subject, 0), picture(*target, 1)
    b_mask[0, 0] = True
    result = untuned().repose(a, b, a_mask, b_mask)
    assert isinstance(result, Image.Image)
    assert (result.height, result.width) == target


def test_paths_pil_images_and_arrays_are_the_same_and_the_seed_decides(tmp_path: Path) -> None:
    (a, a_mask), (b, b_mask) = picture(40, 60, 0), picture(50, 30, 1)
    images = [Image.fromarray(x) for x in (a, b, a_mask, b_mask)]
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    first = np.asarray(untuned().repose(a, b, a_mask, b_mask))
    np.testing.assert_array_equal(first, np.asarray(untuned().repose(*images)))
    np.testing.assert_array_equal(first, np.asarray(untuned().repose(*paths)))
    assert not np.array_equal(first, np.asarray(untuned().repose(a, b, a_mask, b_mask, seed=6)))
    np.testing.assert_array_equal(first, np.asarray(untuned().repose(a, b, a_mask, b_mask, seed=5)))
    assert not np.array_equal(first, np.asarray(untuned().repose(a, b, a_mask, b_mask, steps=3)))
    assert not np.array_equal(first, np.asarray(untuned().repose(a, b, a_mask, b_mask, guidance=9.0)))


def test_whoever_wants_to_know_is_told_of_each_step_and_gets_the_same_picture() -> None:
    (a, a_mask), (b, b_mask) = picture(40, 60, 0), picture(50, 30, 1)
    said: list[int] = []
    for reposer in (untuned(), tuned()):
        at_once = np.asarray(reposer.repose(a, b, a_mask, b_mask, steps=3)).astype(int)
        by_step = np.asarray(reposer.repose(a, b, a_mask, b_mask, steps=3, on_step=said.append))
        assert np.abs(by_step - at_once).max() <= 1
    assert said == [1, 2, 3, 1, 2, 3]
    untuned().repose(a, b, a_mask, b_mask)
    assert len(said) == 6


def test_keys_of_pairs_give_them_different_noise() -> None:
    a, b = picture(40, 40, 0), picture(40, 40, 1)
    sample = Sample(steps=2, batch=2)
    (one, _), (two, _) = untuned().repose_batch([api.Job("1_1in2", *a, *b), api.Job("1_2in1", *a, *b)], sample)
    assert not np.array_equal(one, two)


def test_an_adapter_whose_b_is_zero_is_the_bare_base() -> None:
    trained = tuned()

    def with_b(factor: float) -> api.Reposer:
        scaled = {n: Adapter(_scale_b(a.params, factor), a.scale) for n, a in trained.adapters.items()}
        return dataclasses.replace(trained, adapters=scaled)

    (a, a_mask), (b, b_mask) = picture(40, 60, 0), picture(50, 30, 1)
    options = {"seed": 5, "steps": 2, "guidance": 2.5}
    bare = np.asarray(untuned().repose(a, b, a_mask, b_mask, **options)).astype(int)
    assert np.abs(np.asarray(with_b(0.0).repose(a, b, a_mask, b_mask, **options)) - bare).max() <= 1
    # Four steps move it little; the same direction further shows.
    assert np.abs(np.asarray(with_b(1000.0).repose(a, b, a_mask, b_mask, **options)) - bare).max() > 10


def _scale_b(tree: dict, factor: float) -> dict:
    return {k: v * factor if k == "lora_B" else v if k == "lora_A" else _scale_b(v, factor) for k, v in tree.items()}


def test_reconstruction_equals_diffusers_autoencoder() -> None:
    image, _ = picture(fixtures.SIZE, fixtures.SIZE, 3)
    ours = untuned().reconstruct([image], 1)[0]
    vae = AutoencoderKL.from_pretrained(base() / "vae")
    x = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    theirs = ((y[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(ours - theirs).max() <= 1


def test_settings_come_from_the_adapters_metadata() -> None:
    reposer = tuned()
    assert reposer.conditioning == CONDITIONING
    assert (reposer.defaults.steps, reposer.defaults.guidance) == (2, 2.5)
    assert reposer.method.adapter == "fill"
    assert reposer.adapter_path == runs.RunFolder(fixtures.trained_run()).adapter(4, "fill")


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_what_the_two_commands_give(tmp_path: Path) -> None:
    root = fixtures.prepared_root()
    benchmarks = {"nabla": root / "world" / "nabirds"}
    rows = tuned().evaluate(benchmarks, tmp_path / "out", limit=2)
    config = str(fixtures.write_config(root, tmp_path / "config.py", sample__batch=tuned().defaults.batch))
    adapter = ["--adapter", str(fixtures.trained_run())]
    generate.main(["--config", config, "--out", str(tmp_path / "pictures"), "--limit", "2", *adapter])
    pictures = ["--pictures", f"fill={tmp_path / 'pictures'}"]
    evaluate.main(["--config", config, "--out", str(tmp_path / "report"), "--limit", "2", "--workers", "0", *pictures])
    assert {row["model"] for row in rows} == {"fill", *evaluate.REFERENCES}
    assert rows == runs.read_json(tmp_path / "report" / "summary.json")
    assert (tmp_path / "out" / "index.html").is_file()

    # A second call draws and scores nothing; the untuned base stands beside it, as what differences are from.
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(made) >= 4
    beside = {"fill": tmp_path / "out" / "pictures" / "fill"}
    untuned().evaluate(benchmarks, tmp_path / "out", limit=2, beside=beside)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    compared = runs.read_json(tmp_path / "out" / "comparisons.json")
    assert {row["baseline"] for row in compared} == {"untuned"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": {"nabla": "nowhere"}}, "evaluate is missing .*nowhere"),
        ({"name": "copy-target"}, "cannot be called 'copy-target'"),
        ({"name": "a", "beside": {"a": "pictures"}}, "cannot be called 'a'"),
        ({"subjects": ("left",)}, "subjects: found 'left', expected right or shuffled"),
    ],
)
def test_evaluations_that_cannot_be(options: dict, message: str, tmp_path: Path) -> None:
    known = {"benchmarks": {"nabla": fixtures.prepared_root() / "world" / "nabirds"}}
    with pytest.raises(UserError, match=message):
        untuned().evaluate(out=tmp_path, **known | options)
    assert list(tmp_path.rglob("*.png")) == []


def test_the_method_leaves_the_command_alone() -> None:
    """``nabla_jax.evaluate`` is the module that ``python -m nabla_jax.evaluate`` runs, whatever is imported first."""
    assert nabla_jax.evaluate is evaluate and callable(evaluate.evaluate)
    assert callable(api.Reposer.evaluate)


# ------------------------------------------------------------------------------------------------- bad input


def trained_file() -> Path:
    return runs.RunFolder(fixtures.trained_run()).adapter(4, "fill")


def test_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    other = fixtures.write_base(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match=r"fill\.safetensors: adapter for another base: trained on base"):
        nabla_jax.load(other, trained_file())


def test_adapter_trained_under_other_conditions_is_refused() -> None:
    with pytest.raises(UserError, match="trained with prompt 'A photo of a bird.', the configuration asks for"):
        nabla_jax.load(base(), trained_file(), conditioning=dataclasses.replace(CONDITIONING, prompt="An owl."))


def test_the_cache_is_refused_for_an_adapter_whose_conditions_see_text_and_noise() -> None:
    with pytest.raises(UserError, match=r"fill\.safetensors: condition cache: found independent_conditions false"):
        nabla_jax.load(base(), trained_file(), cache=True)


def test_adapter_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing at"):
        nabla_jax.load(base(), tmp_path / "absent", conditioning=CONDITIONING)
    with pytest.raises(UserError, match="expected one safetensors file, found none"):
        nabla_jax.load(base(), tmp_path, conditioning=CONDITIONING)
    with pytest.raises(UserError, match="no-such"):
        nabla_jax.load(base(), "asset:no-such", conditioning=CONDITIONING)


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_adapter_with_a_wrong_tensor_is_refused(damage: str, tmp_path: Path) -> None:
    tensors = load_file(trained_file())
    name = "transformer.transformer_blocks.1.attn.to_k.lora_A.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = name.replace("to_k", "to_z")
        tensors[name] = np.zeros((2, 3), np.float32)
    else:
        tensors[name] = tensors[name][:, :-1]
    save_file(tensors, tmp_path / "fill.safetensors")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        nabla_jax.load(base(), tmp_path / "fill.safetensors", conditioning=CONDITIONING)


def test_a_file_without_metadata_needs_conditions_and_has_alpha_equal_to_rank(tmp_path: Path) -> None:
    save_file(load_file(trained_file()), tmp_path / "fill.safetensors")
    with pytest.raises(UserError, match="has no metadata"):
        nabla_jax.load(base(), tmp_path / "fill.safetensors")
    reposer = nabla_jax.load(base(), tmp_path / "fill.safetensors", conditioning=CONDITIONING)
    assert reposer.adapters["fill"].scale == 1.0


def test_alpha_is_respected(tmp_path: Path) -> None:
    trained = tuned()
    metadata = dataclasses.replace(adapters.read_metadata(trained_file()), alpha=6.0)
    adapters.save_adapter(tmp_path / "fill.safetensors", trained.adapters["fill"], metadata, stacked=flux.STACKED)
    assert nabla_jax.load(base(), tmp_path / "fill.safetensors").adapters["fill"].scale == 3.0


def test_masks_and_pictures_that_do_not_fit(tmp_path: Path) -> None:
    (a, a_mask), (b, b_mask) = picture(40, 60, 0), picture(50, 30, 1)
    with pytest.raises(UserError, match=r"target_mask: found shape \(40, 60\), expected \(50, 30\)"):
        untuned().repose(a, b, a_mask, a_mask)
    with pytest.raises(UserError, match="subject_mask: the mask is empty"):
        untuned().repose(a, b, np.zeros_like(a_mask), b_mask)
    with pytest.raises(UserError, match="subject: found float32"):
        untuned().repose(a.astype(np.float32), b, a_mask, b_mask)
    Image.fromarray(a).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(UserError, match="a.png: truncated or damaged"):
        untuned().repose(tmp_path / "a.png", b, a_mask, b_mask)


def test_placement_of_a_result_inverts_its_canvas() -> None:
    job = api.Job("x", *picture(40, 60, 0), *picture(50, 30, 1))
    image, placement = untuned().repose_batch([job], Sample(steps=2, batch=1))[0]
    assert placement == Placement.square(50, 30, fixtures.SIZE)
    assert image.shape == (50, 30, 3)
