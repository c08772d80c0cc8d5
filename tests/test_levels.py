"""Adapters on top of frozen ones, their dtype, and training settings beyond the paper's: each trains and continues."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_jax import api, optim, prepare, reposing, runs, train, training
from nabla_jax import config as configs
from nabla_jax.checkpoints import adapters, merge, pipeline
from nabla_jax.data import pairs
from nabla_jax.data.loader import make_loader, open_prepared
from nabla_jax.data.pictures import Pictures, ordered
from nabla_jax.errors import UserError
from nabla_jax.models import flux, lora
from nabla_jax.models.lora import Adapter
from nabla_jax.parallel import mesh as meshes
from tests import fixtures, stand_ins
from tests.test_train import arguments, arrays, assert_same_run, metrics

LEVEL = {
    "train__sampler": "level", "data__levels": ("0 family",), "lora__rank": 3, "lora__alpha": 6.0,
    "train__save_every": 2,
}  # fmt: skip


def coarse() -> Path:
    """An adapter of rank 2 and alpha 2 after four steps."""
    return runs.RunFolder(fixtures.trained_run()).adapter(4, "fill")


@functools.cache
def fine() -> Path:
    """The run folder of four steps on top of ``coarse``: rank 3 and alpha 6, pairs of a family."""
    root = fixtures.prepared_root()
    settings = LEVEL | {"lora__frozen": str(fixtures.trained_run()), "train__workdir": str(root / "fine")}
    train.main(["--config", str(fixtures.write_config(root, root / "fine.py", **settings))])
    return root / "fine"


def random_adapter(seed: int, rank: int, scale: float) -> Adapter:
    """For ``fixtures.write_base``, no matrix zero."""
    base = pipeline.load_transformer(fixtures.prepared_root() / "base").params
    fresh = lora.initialize(jax.random.key(0), base, rank=rank, alpha=scale * rank, stacked=flux.STACKED)
    rng = np.random.default_rng(seed)
    return Adapter(jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, fresh.params), scale)


def changes(file: Path) -> dict[str, np.ndarray]:
    """What a file without alphas adds to each weight, in float64."""
    tensors = load_file(file)
    assert not any(name.endswith("alpha") for name in tensors)
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    return {
        name: tensors[f"{name}.lora_B.weight"].astype(np.float64) @ tensors[f"{name}.lora_A.weight"].astype(np.float64)
        for name in names
    }


# ------------------------------------------------------------------------------------------- the sum of adapters


def test_a_sum_is_what_merging_one_after_the_other_gives(tmp_path: Path) -> None:
    """Of alpha / rank 0.5 and 0.3, ranks 4 and 3: every weight of the merged base."""
    base = fixtures.prepared_root() / "base"
    both = random_adapter(1, 4, 0.5), random_adapter(2, 3, 0.3)
    total = lora.add(*both)
    assert (total.rank, total.scale) == (7, 1.0)
    for name, adapter in zip(("first", "second", "sum"), (*both, total), strict=True):
        alpha = adapter.scale * adapter.rank
        metadata = adapters.AdapterMetadata(rank=adapter.rank, alpha=alpha, applies_to="all")
        adapters.save_adapter(tmp_path / f"{name}.safetensors", adapter, metadata, stacked=flux.STACKED)
    folder = merge.merge_adapter(tmp_path / "first.safetensors", base, tmp_path / "once")
    folder = merge.merge_adapter(tmp_path / "second.safetensors", folder, tmp_path / "twice")
    summed = merge.merge_adapter(tmp_path / "sum.safetensors", base, tmp_path / "merged")
    weights, expected, before = (load_file(next((f / "transformer").glob("*.safetensors")))
                                 for f in (summed, folder, base))  # fmt: skip
    assert weights.keys() == expected.keys()
    moved = [name for name in weights if not np.array_equal(before[name], expected[name])]
    assert len(moved) == 2 * 6 + 2 * 6 + 1
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6, err_msg=name)


def test_the_exported_adapter_is_the_frozen_one_and_the_trained_one() -> None:
    """Written out from both files and the checkpoint; the frozen part keeps its bits."""
    path = runs.RunFolder(fine()).adapter(4, "fill")
    metadata = adapters.read_metadata(path)
    assert (metadata.rank, metadata.alpha, metadata.step, metadata.control) == (5, 5.0, 4, "fill")
    tensors, beneath, state = load_file(path), load_file(coarse()), arrays(fine(), 4)
    assert tensors.keys() == beneath.keys()
    for name, value in beneath.items():
        kept = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
        np.testing.assert_array_equal(kept, value, err_msg=name)
    where = "['adapters']['fill']['transformer_blocks']['attn']['to_q']"
    down, up = (state[f"{where}['lora_{x}']"][1] for x in "AB")
    assert down.shape == (3, 32) and np.abs(up).max() > 0
    name = "transformer.transformer_blocks.1.attn.to_q"
    found = changes(path)[name]
    expected = changes(coarse())[name] + 2.0 * up.astype(np.float64) @ down.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    # Trained are the new matrices alone.
    assert not any(value.shape[-2:].count(5) for key, value in state.items() if "lora_" in key)


def test_training_passes_through_the_sum() -> None:
    """The first step's loss is that of the frozen adapter alone; the third's that of the file exported before it."""
    config = fixtures.config(fixtures.prepared_root(), **LEVEL)
    mesh = meshes.data_mesh()
    method, base = training.load_method(config, mesh)
    loader = training.run_batches(training.open_input(config, mesh), mesh)
    batches = [training.device_batch(next(loader), mesh) for _ in range(3)]
    loader.close()

    def loss(path: Path, batch: Any) -> float:
        adapter, _ = adapters.load_adapter(path, base, stacked=flux.STACKED)
        run = jax.jit(lambda a, p, b: reposing.loss(method, {"fill": a}, p, b, seed=config.train.seed, guidance=1.0))
        return float(run(adapter, base, batch))

    rows = [row["loss"] for row in metrics(fine())]
    assert np.isclose(rows[0], loss(coarse(), batches[0]), rtol=1e-6)
    assert np.isclose(rows[2], loss(runs.RunFolder(fine()).adapter(2, "fill"), batches[2]), rtol=1e-6)
    assert not np.isclose(rows[2], loss(coarse(), batches[2]), rtol=1e-6)


def test_a_level_is_continued_on_the_very_adapter_it_was_begun_on(tmp_path: Path) -> None:
    """Two steps and two more are four, bit for bit; another file of the same name is refused in one line."""
    path = tmp_path / "coarse.safetensors"
    shutil.copy(coarse(), path)
    settings = LEVEL | {"lora__frozen": str(path)}
    train.main(arguments(tmp_path, **settings, train__steps=2))
    shutil.copy(runs.RunFolder(fixtures.trained_run()).adapter(2, "fill"), path)
    with pytest.raises(UserError, match=r"another configuration \(sha256\.lora\.frozen: '\w+' there, '\w+' here\)"):
        train.main(arguments(tmp_path, **settings))
    shutil.copy(coarse(), path)
    train.main(arguments(tmp_path, **settings))
    assert_same_run(tmp_path / "run", fine())


def test_generation_needs_the_finest_adapter_alone() -> None:
    reposer = api.load(fixtures.prepared_root() / "base", fine())
    assert (reposer.adapters["fill"].rank, reposer.adapters["fill"].scale) == (5, 1.0)
    assert reposer.conditioning == fixtures.config(fixtures.prepared_root()).conditioning


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base_sha256": "0" * 64}, "adapter for another base: trained on base (transformer sha256 000000000000)"),
        ({"method": "insert"}, "adapter of another method: found 'insert', expected 'omini'"),
        ({"applies_to": "all"}, "applies_to: found 'all', expected 'condition' for method omini"),
        ({"control": "depth"}, "trained with control 'depth', the configuration asks for 'fill'"),
        ({"size": 48}, "trained with size 48, the configuration asks for 32"),
        ({"reads": "subject"}, "reads subject, expected both for lora.frozen"),
        ({}, "another set of linears: x_embedder is missing"),
    ],
)
def test_an_adapter_that_cannot_be_beneath_is_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    file = adapters.read_adapter(coarse())
    modules = {name: pair for name, pair in file.modules.items() if change or name != "x_embedder"}
    path = tmp_path / "beneath.safetensors"
    adapters.write_adapter(path, modules, dataclasses.replace(file.metadata, **change))
    with pytest.raises(UserError) as error:
        train.main(arguments(tmp_path, lora__frozen=str(path)))
    assert expected in str(error.value) and "beneath.safetensors" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_absent_adapter_is_told_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.frozen: found nothing at absent, expected a safetensors file or"):
        train.main(arguments(tmp_path, lora__frozen="absent"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- settings beyond the paper's


@functools.cache
def with_features() -> Path:
    """A prepared folder that look-alikes can be found in."""
    root = fixtures.prepared_root()
    config = fixtures.config(root, data__prepared=str(root / "features"))
    encoders = dataclasses.replace(prepare.load_encoders(config), vision=stand_ins.colours())
    return prepare.prepare(config, encoders)


VARIANTS: dict[str, dict[str, Any]] = {
    "self to class": {
        "train__sampler": "level", "data__levels": ("0 self=1 order=1", "2 class"), "train__guidance": 3.5,
        "train__foreground_weight": 3.0, "conditioning__independent_conditions": True, "lora__dtype": "bfloat16",
    },
    "coarse to class": {"train__sampler": "level", "data__levels": ("0 order", "2 class"), "data__per_class": 5},
    "one picture": {"train__sampler": "level", "data__levels": ("0 self",), "data__per_class": 1},
    "mined": {"train__sampler": "mined", "data__similarity": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    changed = VARIANTS[name] | ({"data__prepared": str(with_features())} if name == "mined" else {})
    train.main(arguments(tmp_path, **changed, train__workdir=str(tmp_path / "whole")))
    train.main(arguments(tmp_path, **changed, train__steps=2))
    train.main(arguments(tmp_path, **changed))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    found, plain = metrics(tmp_path / "run"), metrics(fixtures.trained_run())
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["loss"] != other["loss"] for row, other in zip(found, plain, strict=True))
    tensors = load_file(runs.RunFolder(tmp_path / "run").adapter(4, "fill"))
    assert any(value.any() for key, value in tensors.items() if "lora_B" in key)
    # In the file as in the state: what is kept in bfloat16 is written so.
    low = changed.get("lora__dtype") == "bfloat16"
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16 if low else np.float32)}
    trees = ("first", "second", "start", "denominator")
    kept = {value.dtype for key, value in arrays(tmp_path / "run", 4).items()
            if "['adapters']" in key or any(f"['{tree}']" in key for tree in trees)}  # fmt: skip
    assert kept == {np.dtype(ml_dtypes.bfloat16 if low else np.float32)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_every_dtype(dtype: str) -> None:
    """A state that changed its dtypes would be compiled twice and could not be restored. The average is float32."""
    config = fixtures.config(fixtures.prepared_root(), lora__dtype=dtype, train__ema=0.9)
    mesh = meshes.data_mesh()
    method, base = training.load_method(config, mesh)
    fresh = lora.initialize(jax.random.key(0), base, rank=2, alpha=2.0, stacked=flux.STACKED).params
    optimizer = optim.make(config.optim, dtype)
    batch = training.device_batch(next(make_loader(config.data.prepared, "all_pairs", 2, 7)), mesh)
    state = jax.eval_shape(lambda tree: training.initial_state({"fill": tree}, optimizer, config), fresh)
    after, _ = jax.eval_shape(training.make_step(method, optimizer, config), state, base, batch)
    jax.tree.map(lambda x, y: np.testing.assert_equal(y.dtype, x.dtype), state, after)
    found = {name: {x.dtype for x in jax.tree.leaves(state[name])} for name in ("adapters", "average")}
    assert found == {"adapters": {jnp.dtype(dtype)}, "average": {jnp.dtype("float32")}}
    (adapter,) = training.exported(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), config).values()
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(dtype)}


def test_pictures_and_prepared_records_are_chosen_alike() -> None:
    root = fixtures.prepared_root()
    prepared = open_prepared(root / "prepared")
    from nabla_jax.data import read_dataset

    examples = ordered(read_dataset(root / "world" / "nabirds"), "train")
    nothing = np.zeros((1, 0, 0), np.float32)
    pictures = Pictures(examples, (0,) * len(examples), nothing, nothing[0], configs.Conditioning(fixtures.SIZE), 8)
    chosen = [pairs.few(source.classes, source.ids, 2) for source in (prepared, pictures)]
    assert chosen[0] == chosen[1]
    assert all(len(members) == 2 for members in chosen[0].values())
