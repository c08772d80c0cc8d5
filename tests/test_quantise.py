"""A quantised frozen base: the formats against NumPy, the model against the same weights in full, its memory."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nabla_jax import api, config, runs, train
from nabla_jax.checkpoints import adapters as adapter_files
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.safetensors_io import flatten
from nabla_jax.conditioning import omini
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.quantised import FORMATS, Format, Quantised, dequantise, quantise
from tests import fixtures

# QLoRA (Dettmers et al. 2023), appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
CONFIG = flux.FluxConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=7,
    axes_dims_rope=(8, 12, 12),
    in_channels=12,
    guidance_embeds=True,
)
FLUX = pipeline.PARTS["transformer"]
ADAPTER = "subject"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def by_hand(weight: np.ndarray, kind: Format) -> np.ndarray:
    """What is left of a weight [..., out, in] in this format."""
    if kind == "nf4":
        tiles = weight.reshape(*weight.shape[:-1], -1, 64)
        largest = np.abs(tiles).max(-1, keepdims=True)
        relative = tiles / np.where(largest > 0, largest, 1)
        nearest = NF4[np.abs(relative[..., None] - NF4).argmin(-1)]
        kept = np.where(largest > 0, largest, 1).astype(ml_dtypes.bfloat16).astype(np.float32)
        return (nearest * kept).reshape(weight.shape)
    largest = np.abs(weight).max(-1, keepdims=True)
    # The 255 steps of int8 reach from -127.5 to 127.5, whose outermost halves are cut off.
    scale = np.where(largest > 0, largest / np.float32({"int8": 127.5, "fp8": 448}[kind]), np.float32(1))
    if kind == "fp8":
        return (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.clip(np.rint(weight / scale), -128, 127) * scale


def assert_is(found: Any, weight: Any, kind: Format) -> None:
    """Number for number what NumPy makes of a weight; of two that are as near, either."""
    found, weight = np.asarray(found), np.asarray(weight).astype(np.float32)
    expected = by_hand(weight, kind)
    # XLA multiplies with the inverse of a constant divisor: a scale may differ in its last bit.
    other = ~np.isclose(found, expected, rtol=5e-7, atol=0)
    np.testing.assert_allclose(np.abs(found - weight)[other], np.abs(expected - weight)[other], rtol=1e-4)
    # Of int8 one number in a row always lies between two: the largest.
    assert other.sum() <= weight.size // weight.shape[-1]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_weight_and_back_is_what_numpy_makes_of_it(kind: Format, dtype: Any) -> None:
    weight = random(2, 24, 192) * np.exp(random(2, 24, 1, seed=1))
    weight[0, 3], weight[1, 5, 64:128] = 0, 0
    weight = weight.astype(dtype)
    kept = quantise(weight, kind)
    assert kept.shape == weight.shape
    found = np.asarray(dequantise(kept, jnp.float32))
    assert_is(found, weight, kind)
    rounded = np.asarray(dequantise(kept, jnp.bfloat16))
    np.testing.assert_array_equal(rounded, found.astype(ml_dtypes.bfloat16))


def test_the_error_of_fewer_bits_is_larger_and_that_of_int8_is_as_theory_says() -> None:
    weight = random(256, 1024)
    error = {
        k: np.sqrt(np.mean((np.asarray(dequantise(quantise(weight, k), jnp.float32)) - weight) ** 2)) for k in FORMATS
    }
    assert error["int8"] < error["fp8"] < error["nf4"]
    # Uniform rounding to steps of one scale: variance scale**2 / 12.
    steps = np.abs(weight).max(-1) / 127.5
    np.testing.assert_allclose(error["int8"], np.sqrt(np.mean(steps**2) / 12), rtol=0.01)


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's folder, published in bfloat16."""
    path = tmp_path_factory.mktemp("base")
    params = fixtures.random_params(lambda rngs: flux.Flux(CONFIG, rngs=rngs), np.random.default_rng(0))
    pipeline.save_part(path, "transformer", CONFIG, params, dtype="bfloat16")
    return path


def is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


def in_full(params: layers.Params, dtype: str = "float32") -> layers.Params:
    """The tree with plain weights in place of quantised ones."""
    return jax.tree.map(lambda x: dequantise(x, dtype) if is_weight(x) else x, params, is_leaf=is_weight)


@functools.cache
def adapter() -> lora.Adapter:
    _, shapes = layers.abstract(lambda rngs: flux.Flux(CONFIG, rngs=rngs))
    fresh = lora.initialize(jax.random.key(0), shapes, rank=2, alpha=2, stacked=flux.STACKED)
    return lora.Adapter(jax.tree.map(lambda leaf: random(*leaf.shape) / 4, fresh.params), fresh.scale)


@functools.cache
def velocity(dtype: str = "float32", config: flux.FluxConfig = CONFIG, **options: Any) -> Callable[..., jax.Array]:
    """Compiled: (parameters, adapter's matrices) -> the velocity of two samples with one condition."""
    condition = omini.Condition(random(2, 12, 12, seed=1), omini.grid_ids(3, 4, index=1), ADAPTER)
    streams = omini.branches(
        random(2, 5, 10, seed=3), random(2, 7, seed=4), random(2, 12, 12, seed=5), omini.grid_ids(3, 4),
        np.array([0.3, 0.9], np.float32), guidance=2.0, conditions=[condition],
    )  # fmt: skip

    graphdef, _ = pipeline.abstract_model(FLUX, config)

    @jax.jit
    def run(params: layers.Params, matrices: layers.Params) -> jax.Array:
        model, acting = layers.bind(graphdef, params), {ADAPTER: lora.Adapter(matrices, adapter().scale)}
        return model(streams, adapters=acting, dtype=jnp.dtype(dtype), **options)

    return run


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_read_block_by_block_is_the_quantised_file(kind: Format, folder: Path) -> None:
    """Of bfloat16 files the reference is bfloat16; biases, norms and linears outside the blocks are as they were."""
    plain, kept = (flatten(pipeline.load_transformer(folder, quantise=q).params) for q in ("none", kind))
    assert plain.keys() == kept.keys()
    seen = 0
    for name, leaf in plain.items():
        if name.startswith(flux.STACKED) and name.endswith(".weight") and leaf.ndim == 3:
            seen += 1
            assert_is(dequantise(kept[name], jnp.float32), leaf, kind)
        else:
            np.testing.assert_array_equal(kept[name], leaf)
    # Of the published module list: 14 linears of a double block and 6 of a single one.
    assert seen == 14 + 6


@pytest.mark.parametrize(
    ("kind", "dtype", "scan"),
    [("int8", "float32", True), ("fp8", "float32", True), ("nf4", "float32", True), ("nf4", "bfloat16", False)],
)
def test_the_model_gives_what_the_same_weights_in_full_give(kind: Format, dtype: str, scan: bool, folder: Path) -> None:
    component = pipeline.load_transformer(folder, dtype=dtype, quantise=kind)
    run = velocity(dtype, scan=scan)
    found = np.asarray(run(component.params, adapter().params))
    np.testing.assert_array_equal(found, run(in_full(component.params, dtype), adapter().params))
    reference = pipeline.load_transformer(folder, dtype=dtype)
    change = np.std(found - np.asarray(run(reference.params, adapter().params))) / np.std(found)
    assert 1e-4 < change < 0.3


def test_scanned_and_unrolled_blocks_agree(folder: Path) -> None:
    params = pipeline.load_transformer(folder, quantise="nf4").params
    one, other = (velocity(scan=scan)(params, adapter().params) for scan in (True, False))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "remat"), [("nf4", "none"), ("int8", "full")])
def test_gradients_reach_the_adapter_as_through_the_same_weights_in_full(
    kind: Format, remat: flux.Remat, folder: Path
) -> None:
    params = pipeline.load_transformer(folder, quantise=kind).params
    run = velocity(remat=remat, scan=True)
    gradient = jax.jit(jax.grad(lambda matrices, params: jnp.mean(run(params, matrices) ** 2)))
    found = flatten(gradient(adapter().params, params))
    expected = flatten(gradient(adapter().params, in_full(params)))
    for name, value in found.items():
        assert value.dtype == jnp.float32
        assert np.abs(value).max() > 0 or "norm_out" in name, name
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_tree_takes_the_bytes_of_its_format(kind: Format, folder: Path) -> None:
    held = jax.tree.leaves(pipeline.load_transformer(folder, dtype="bfloat16", quantise=kind).params)
    plain = flatten(pipeline.load_transformer(folder, dtype="bfloat16").params)
    blocks = [x for n, x in plain.items() if n.startswith(flux.STACKED) and n.endswith(".weight") and x.ndim == 3]
    numbers = sum(x.size for x in blocks)
    rows = sum(x.size // x.shape[-1] for x in blocks)
    rest = sum(2 * x.size for x in plain.values()) - 2 * numbers
    # Bits a number: 8 and a float32 a row; or 4 and a bfloat16 for every 64.
    expected = numbers // 2 + numbers // 64 * 2 if kind == "nf4" else numbers + 4 * rows
    assert sum(x.nbytes for x in held) == rest + expected


def test_full_size_flux_in_each_format() -> None:
    """Bytes of FLUX.1-dev's 11.9 billion parameters, nothing allocated."""
    sizes = {}
    for kind in ("none", *FORMATS):
        _, shapes = pipeline.abstract_model(FLUX, flux.FluxConfig.dev(), dtype="bfloat16", quantise=kind)
        sizes[kind] = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert sizes["none"] == 2 * 11_901_408_320
    # Nearly all of it are the blocks' weights.
    for kind, bits in (("int8", 8), ("fp8", 8), ("nf4", 4.25)):
        assert bits / 16 < sizes[kind] / sizes["none"] < bits / 16 + 0.008, kind


def test_no_more_than_a_few_blocks_are_whole_at_a_time() -> None:
    """Temporary memory of a compiled training step of a deep model that keeps every activation.

    What it takes beyond that of plain weights would be all blocks if the forward pass made them whole beforehand, or
    the backward pass kept them.
    """
    deep = dataclasses.replace(CONFIG, num_single_layers=24, num_attention_heads=4)
    run = velocity(config=deep, scan=True)
    step = jax.jit(jax.grad(lambda matrices, params: jnp.mean(run(params, matrices))))
    memory = {}
    for kind in ("none", "nf4"):
        _, shapes = pipeline.abstract_model(FLUX, deep, quantise=kind)
        make = functools.partial(lora.initialize, params=shapes, rank=1, alpha=1, stacked=flux.STACKED)
        matrices = jax.eval_shape(make, jax.random.key(0)).params
        memory[kind] = step.lower(matrices, shapes).compile().memory_analysis().temp_size_in_bytes
    plain = pipeline.abstract_model(FLUX, deep)[1]["single_transformer_blocks"]
    block = sum(4 * x.size for x in jax.tree.leaves(plain)) // 24
    assert memory["nf4"] - memory["none"] < 5 * block


# ----------------------------------------------------------------------------------------------------------
# Verbs
# ----------------------------------------------------------------------------------------------------------


def test_a_run_trains_draws_and_goes_on_with_the_same_base_alone(tmp_path: Path) -> None:
    root = fixtures.prepared_root()

    def arguments(**overrides: Any) -> list[str]:
        overrides = {"train__workdir": str(tmp_path / "run"), "base__quantise": "int8", **overrides}
        return ["--config", str(fixtures.write_config(root, tmp_path / "config.py", **overrides))]

    train.main(arguments(train__steps=2, train__sample_every=2))
    run = runs.RunFolder(tmp_path / "run")
    assert (run.samples / "step_2.png").is_file()
    with pytest.raises(UserError, match=r"base\.quantise: 'int8' there, 'none' here"):
        train.main(arguments(base__quantise="none"))
    train.main(arguments())
    path = run.adapter(4, "fill")
    assert adapter_files.read_metadata(path).quantise == "int8"
    # A step on the plain base is another one, and not far from it.
    losses = [[row["loss"] for row in runs.read_rows(f / "metrics.jsonl")] for f in (run.path, fixtures.trained_run())]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.05)
    # What it was trained on is what it is used on, if nothing else is said.
    loaded = {None: api.load(root / "base", path), "none": api.load(root / "base", path, quantise="none")}
    kinds = {q: {type(x) for x in jax.tree.leaves(r.base, is_leaf=is_weight)} for q, r in loaded.items()}
    assert Quantised in kinds[None]
    assert Quantised not in kinds["none"]


def test_metadata_of_older_files_say_none() -> None:
    assert adapter_files.AdapterMetadata.from_json('{"rank": 2, "alpha": 2}', "old").quantise == "none"


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    fixtures.write_base(tmp_path / "base")
    with pytest.raises(UserError, match=r"base\.quantise: found 'int4', expected one of none, int8, fp8, nf4$"):
        fixtures.config(tmp_path, base__quantise="int4")
    with pytest.raises(UserError, match=r"base\.quantise: found 'int4', expected one of none, int8, fp8, nf4$"):
        api.load(tmp_path / "base", conditioning=config.Conditioning(size=32), quantise="int4")
    wrong = r"base\.quantise: found nf4 for \S+ with 32 inputs, expected a multiple of 64; int8 and fp8 take any$"
    with pytest.raises(UserError, match=wrong):
        config.check_method(fixtures.config(tmp_path, base__quantise="nf4"))
