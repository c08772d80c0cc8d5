"""Sibling guidance: what it draws, whom it chooses, what is said of it and what is refused."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import nabla_jax
from nabla_jax import api, generate, reposing, runs, training
from nabla_jax.config import Conditioning, Sample
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.pairs import Pair, benchmark_pairs, shuffled_subjects
from nabla_jax.errors import UserError
from nabla_jax.parallel import mesh as meshes
from tests import fixtures
from tests.fixtures import picture

CONDITIONING = Conditioning(size=fixtures.SIZE, text_length=8)


# -------------------------------------------------------------------------------------------------- the sampler


def batch(seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=(2, 32, 4, 4)).astype(np.float32) for name in ("subject", "control", "sibling")}
    return drawn | {
        "prompt_embeds": rng.normal(size=(2, 4, 16)).astype(np.float32),
        "pooled": rng.normal(size=(2, 16)).astype(np.float32),
        "sample": np.array([3, 4], np.uint32),
    }


@pytest.mark.parametrize("changes", [{}, {"independent": True}, {"name": "native"}], ids=["omini", "cached", "native"])
def test_one_step_goes_along_the_line_from_sibling_to_subject(changes: dict[str, Any]) -> None:
    """A step of Euler's method is affine in the velocity: what is drawn at s is a + s (b - a) for the sibling's
    picture a and the subject's b."""
    config = fixtures.config(fixtures.prepared_root())
    method, base = training.load_method(config, meshes.data_mesh())
    sampler = reposing.make_sampler(dataclasses.replace(method, adapter=None, **changes))

    def draw(inputs: dict[str, np.ndarray], strength: float | None = None) -> np.ndarray:
        sibling = None if strength is None else jnp.float32(strength)
        levels = np.array([1.0, 0.0], np.float32)
        return np.asarray(sampler(base, {}, inputs, levels, jnp.float32(2.5), jnp.uint32(0), None, sibling))

    given = batch()
    plain = {name: value for name, value in given.items() if name != "sibling"}
    subject, sibling = draw(plain), draw({**plain, "subject": given["sibling"]})
    assert np.abs(subject - sibling).max() > 0.05
    for strength in (0.0, 1.0, 3.0):
        expected = sibling + strength * (subject - sibling)
        np.testing.assert_allclose(draw(given, strength), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_both_guidances_at_once_are_refused() -> None:
    method, base = training.load_method(fixtures.config(fixtures.prepared_root()), meshes.data_mesh())
    two = jnp.float32(2)
    levels = np.array([1.0, 0.0], np.float32)
    with pytest.raises(UserError, match="image_guidance, sibling_guidance: found both"):
        reposing.sample(method, base, {}, batch(), levels, two, jnp.uint32(0), two, two)
    insert = dataclasses.replace(method, name="insert")
    with pytest.raises(UserError, match="sibling_guidance: method insert has no conditions"):
        reposing.sample(insert, base, {}, batch(), levels, two, jnp.uint32(0), None, two)
    with pytest.raises(UserError, match=r"sample\.sibling_guidance: found 2\.0 beside sample\.image_guidance 3\.0"):
        fixtures.config(fixtures.prepared_root(), sample__image_guidance=3.0, sample__sibling_guidance=2.0)


# -------------------------------------------------------------------------------------------------- from Python


@functools.cache
def untuned() -> api.Reposer:
    root = fixtures.prepared_root()
    return nabla_jax.load(root / "base", conditioning=CONDITIONING, sample=Sample(steps=2, seed=5))


def test_one_is_the_subject_and_nought_the_sibling(tmp_path: Path) -> None:
    (a, a_mask), (b, b_mask), (c, c_mask) = picture(40, 60, 0), picture(50, 30, 1), picture(30, 44, 2)

    def draw(strength: float | None, **options: Any) -> np.ndarray:
        return np.asarray(untuned().repose(a, b, a_mask, b_mask, sibling_guidance=strength, **options)).astype(int)

    plain, sibling = draw(None), {"sibling": c, "sibling_mask": c_mask}
    np.testing.assert_array_equal(draw(1.0, **sibling), plain)
    as_subject = np.asarray(untuned().repose(c, b, c_mask, b_mask)).astype(int)
    assert np.abs(as_subject - plain).max() > 5
    assert np.abs(draw(0.0, **sibling) - as_subject).max() <= 1
    strong = draw(3.0, **sibling)
    assert np.abs(strong - plain).max() > 5
    for image, name in ((c, "c"), (c_mask, "m")):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(draw(3.0, sibling=tmp_path / "c.png", sibling_mask=tmp_path / "m.png"), strong)
    with pytest.raises(UserError, match="sibling_guidance: found no sibling, expected the picture and mask"):
        draw(3.0)
    with pytest.raises(UserError, match="sibling: found one of sibling and sibling_mask, expected both"):
        draw(3.0, sibling=c)
    with pytest.raises(UserError, match=r"sibling_mask: found shape \(40, 60\), expected \(30, 44\)"):
        draw(3.0, sibling=c, sibling_mask=a_mask)


# ---------------------------------------------------------------------------------------------------- who it is


def bird(id: str, class_id: int, *path: str, split: str = "test", mask: bool = True) -> Example:
    return Example(id, Path(id), class_id, path[-1], path, mask=Path("mask") if mask else None, split=split)


TEAL = ("Birds", "Fowl", "Ducks")
DATASET = Dataset(
    "birds",
    Path("birds"),
    (
        bird("blue-m", 1, *TEAL, "Blue-winged Teal", "Blue-winged Teal (Male)"),
        bird("blue-f", 2, *TEAL, "Blue-winged Teal", "Blue-winged Teal (Female/juvenile)"),
        bird("green-m", 3, *TEAL, "Green-winged Teal", "Green-winged Teal (Male)"),
        bird("green-m-2", 3, *TEAL, "Green-winged Teal", "Green-winged Teal (Male)"),
        bird("green-f", 4, *TEAL, "Green-winged Teal", "Green-winged Teal (Female)"),
        bird("green-m-train", 3, *TEAL, "Green-winged Teal", "Green-winged Teal (Male)", split="train"),
        bird("mallard", 5, *TEAL, "Mallard (Male)", mask=False),
        bird("swan", 6, "Birds", "Fowl", "Swans", "Mute Swan"),
        bird("owl", 7, "Birds", "Owls", "Barn Owls", "Barn Owl"),
    ),
)


def drawn(id: str, dataset: Dataset = DATASET) -> set[str]:
    pairs = [Pair(f"{n}_1in2", id, id, dataset.by_id[id].class_id) for n in range(60)]
    return set(generate.sibling_subjects(pairs, {pair.key: id for pair in pairs}, dataset, 0).values())


def test_a_sibling_is_of_the_nearest_group_and_of_the_subjects_plumage() -> None:
    assert drawn("blue-m") == {"green-m", "green-m-2"}
    assert drawn("blue-f") == {"green-f"}  # both name females
    assert drawn("green-f") == {"blue-f"}
    # No other swan: the order's other birds, of whatever plumage since none is without one.
    assert drawn("swan") == {"blue-m", "blue-f", "green-m", "green-m-2", "green-f"}
    # No other owl, nor another family of its order: any bird, but first those without a qualifier.
    assert drawn("owl") == {"swan"}
    alone = dataclasses.replace(DATASET, examples=DATASET.examples[:2])
    with pytest.raises(UserError, match="found no picture with a mask of a species other than Blue-winged Teal"):
        drawn("blue-m", alone)


def test_the_draw_depends_on_seed_and_pair_alone() -> None:
    root = fixtures.prepared_root() / "world" / "nabirds"
    dataset, pairs = read_dataset(root), benchmark_pairs(root)
    subjects = {pair.key: pair.subject_id for pair in pairs}
    whole = generate.sibling_subjects(pairs, subjects, dataset, 0)
    part = generate.sibling_subjects(pairs[::-3], subjects, dataset, 0)
    assert part == {pair.key: whole[pair.key] for pair in pairs[::-3]}
    other = generate.sibling_subjects(pairs, subjects, dataset, 1)
    assert other.keys() == whole.keys() and other != whole


# ------------------------------------------------------------------------------------------------- the command


def run(tmp_path: Path, *words: str, out: str = "pictures", **overrides: Any) -> Path:
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **overrides)
    generate.main(["--config", str(config), "--out", str(tmp_path / out), *words])
    return tmp_path / out


def test_a_benchmark_says_which_siblings_it_used(tmp_path: Path) -> None:
    chosen = ("--limit", "4")
    out = run(tmp_path, *chosen, sample__sibling_guidance=2.0, sample__batch=1)
    plain = run(tmp_path, *chosen, out="plain", sample__batch=1)
    root = fixtures.prepared_root() / "world" / "nabirds"
    dataset, pairs = read_dataset(root), {pair.key: pair for pair in benchmark_pairs(root)}
    shuffled = shuffled_subjects(list(pairs.values()), dataset, 42)
    reposer = untuned()
    for kind in ("right", "shuffled"):
        rows = runs.read_rows(out / "nabla" / kind / "manifest.jsonl")
        assert len(rows) == 4
        for row in rows:
            used, sibling = dataset.by_id[row["subject_used"]], dataset.by_id[row["sibling_used"]]
            assert used.id == (row["subject_id"] if kind == "right" else shuffled[row["pair"]])
            assert sibling.species != used.species and sibling.taxonomy[:3] == used.taxonomy[:3]
            assert row["sibling_guidance"] == 2.0
        # It is the one that Python draws with that sibling, and not the plain one.
        made, without = (
            controls.read_image(folder / "nabla" / kind / rows[0]["file"]).astype(int) for folder in (out, plain)
        )
        subject, target, sibling = (
            controls.read_view(dataset.by_id[rows[0][name]]) for name in ("subject_used", "target_id", "sibling_used")
        )
        again = reposer.repose(
            subject.image, target.image, subject.mask, target.mask, sibling=sibling.image, sibling_mask=sibling.mask,
            sibling_guidance=2.0, seed=42, steps=2, key=f"nabla/{rows[0]['pair']}",
        )  # fmt: skip
        assert np.abs(np.asarray(again).astype(int) - made).max() <= 1
        assert np.abs(made - without).max() > 1
    assert "sibling_used" not in runs.read_rows(plain / "nabla" / "right" / "manifest.jsonl")[0]
    # Neither set goes on with the other's settings.
    with pytest.raises(UserError, match=r"other settings .*sibling_guidance: None there, 2\.0 here"):
        run(tmp_path, *chosen, out="plain", sample__sibling_guidance=2.0)
    with pytest.raises(UserError, match=r"other settings .*sibling_guidance: 2\.0 there, None here"):
        run(tmp_path, *chosen)


def test_one_picture_needs_its_sibling(tmp_path: Path) -> None:
    words = []
    for seed, name in enumerate(("subject", "target", "sibling")):
        pixels, mask = picture(40, 60, seed)
        for key, image in {name: pixels, f"{name}_mask": mask}.items():
            Image.fromarray(image).save(tmp_path / f"{key}.png")
            words += [f"--{key}", str(tmp_path / f"{key}.png")]
    with pytest.raises(UserError, match="--sibling: found a picture, but sample.sibling_guidance is 1"):
        run(tmp_path, *words, out="a.png")
    guided = {"sample__sibling_guidance": 3.0}
    with pytest.raises(UserError, match="sibling_guidance 3: missing --sibling, --sibling_mask"):
        run(tmp_path, *words[:8], out="a.png", **guided)
    plain = np.asarray(Image.open(run(tmp_path, *words[:8], out="plain.png"))).astype(int)
    made = np.asarray(Image.open(run(tmp_path, *words, out="a.png", **guided))).astype(int)
    assert made.shape == plain.shape and np.abs(made - plain).max() > 5
