"""Adapter files: every naming scheme, fused matrices, alpha wherever tools put it. No model runs here."""

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from diffusers import FluxPipeline
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints import adapter_formats as formats
from nabla_jax.checkpoints.adapter_formats import FORMATS, Pair
from nabla_jax.checkpoints.adapters import AdapterMetadata, check_fits, load_adapter, read_adapter, write_adapter
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.flux import Flux, FluxConfig
from tests.golden import golden

WIDTH, RANK, BLOCKS = 8, 3, 2
# (out, in) of every kind of linear of a transformer of that width.
SHAPES = {
    "x_embedder": (WIDTH, 6),
    "context_embedder": (WIDTH, 5),
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "norm_out.linear": (2 * WIDTH, WIDTH),
    "proj_out": (6, WIDTH),
    "transformer_blocks.#.norm1.linear": (6 * WIDTH, WIDTH),
    "transformer_blocks.#.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.#.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.#.attn.to_v": (WIDTH, WIDTH),
    "transformer_blocks.#.attn.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.#.attn.add_k_proj": (WIDTH, WIDTH),
    "transformer_blocks.#.attn.to_add_out": (WIDTH, WIDTH),
    "transformer_blocks.#.ff.net.0.proj": (4 * WIDTH, WIDTH),
    "transformer_blocks.#.ff.net.2": (WIDTH, 4 * WIDTH),
    "transformer_blocks.#.ff_context.net.2": (WIDTH, 4 * WIDTH),
    "single_transformer_blocks.#.norm.linear": (3 * WIDTH, WIDTH),
    "single_transformer_blocks.#.attn.to_q": (WIDTH, WIDTH),
    "single_transformer_blocks.#.attn.to_v": (WIDTH, WIDTH),
    "single_transformer_blocks.#.proj_mlp": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.#.proj_out": (WIDTH, 5 * WIDTH),
}


def names(pattern: str) -> list[str]:
    return [pattern.replace("#", str(i)) for i in range(BLOCKS)] if "#" in pattern else [pattern]


def pairs(seed: int = 0, rank: int = RANK, dtype=np.float32, only: str = ".*") -> dict[str, Pair]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    return {
        name: Pair(draw(rank, in_features), draw(out_features, rank))
        for pattern, (out_features, in_features) in SHAPES.items()
        for name in names(pattern)
        if re.fullmatch(only, name)
    }


def same(found: dict[str, Pair], expected: dict[str, Pair]) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for matrix in Pair._fields:
            ours, theirs = getattr(found[name], matrix), getattr(pair, matrix)
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name}.{matrix}")


METADATA = AdapterMetadata(
    rank=RANK,
    alpha=1.7 * RANK,
    base="FLUX.1-Kontext-dev",
    control="depth",
    caption="background",
    guidance=1.0,
    sample_guidance=2.5,
    independent_conditions=True,
    reads="control",
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_round_trip_through_each_format_is_bitwise(format: str, dtype, tmp_path: Path) -> None:
    modules = pairs(dtype=dtype)
    first, there, back = (tmp_path / f"{name}.safetensors" for name in ("first", "there", "back"))
    write_adapter(first, modules, METADATA, header={"licence": "none"})
    one = read_adapter(first)
    write_adapter(there, one.modules, one.metadata, format=format, header=one.header)
    two = read_adapter(there)
    assert (two.format, two.metadata, two.header) == (format, one.metadata, {"licence": "none"})
    same(two.modules, modules)
    write_adapter(back, two.modules, two.metadata, header=two.header)
    assert back.read_bytes() == first.read_bytes()
    expected = dataclasses.replace(METADATA, targets=tuple(sorted(p.replace("#", "*") for p in SHAPES)))
    assert one.metadata == expected


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "fresh"])
def test_parts_of_a_fused_linear_that_are_not_adapted_stay_so(zero: bool, tmp_path: Path) -> None:
    """Queries alone, or queries and values: the file says which; with B zero nothing else could."""
    modules = pairs(only=r".*single_transformer_blocks\.\d+\.attn\.to_[qv]|transformer_blocks\.\d+\.attn\.to_k")
    if zero:
        modules = {name: Pair(a, np.zeros_like(b)) for name, (a, b) in modules.items()}
    path = tmp_path / "kohya.safetensors"
    write_adapter(path, modules, AdapterMetadata(rank=RANK, alpha=RANK), format="kohya")
    same(read_adapter(path).modules, modules)
    tensors = load_file(path)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (2 * RANK, WIDTH)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * WIDTH, 2 * RANK)
    assert tensors["lora_unet_single_blocks_0_linear1.alpha"] == 2 * RANK


def delta(pair: Pair) -> np.ndarray:
    return pair.lora_B.astype(np.float64) @ pair.lora_A.astype(np.float64)


def kohya_tensors(rank: int, alpha: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Dense matrices on the fused linears, as kohya's trainer writes them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "double_blocks_#_img_attn_qkv": (3 * WIDTH, WIDTH),
        "double_blocks_#_img_attn_proj": (WIDTH, WIDTH),
        "single_blocks_#_linear1": (7 * WIDTH, WIDTH),
        "final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH),
    }
    out: dict[str, np.ndarray] = {}
    for pattern, (rows, columns) in shapes.items():
        for name in names(pattern):
            out[f"lora_unet_{name}.lora_down.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
            out[f"lora_unet_{name}.lora_up.weight"] = rng.normal(size=(rows, rank)).astype(np.float32)
            out[f"lora_unet_{name}.alpha"] = np.array(alpha, np.float32)
    return out


def test_splitting_a_trained_fused_pair_is_exact_and_undone_bit_by_bit(tmp_path: Path) -> None:
    tensors = kohya_tensors(rank=4, alpha=2.0)
    path, again = tmp_path / "theirs.safetensors", tmp_path / "again.safetensors"
    save_file(tensors, path)
    file = read_adapter(path)
    assert (file.format, file.metadata.rank, file.metadata.alpha) == ("kohya", 4, 2.0)
    assert file.metadata.applies_to == "unknown"
    for fused, parts in (
        ("double_blocks_1_img_attn_qkv", [f"transformer_blocks.1.attn.to_{n}" for n in "qkv"]),
        (
            "single_blocks_0_linear1",
            [*(f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"), "single_transformer_blocks.0.proj_mlp"],
        ),
    ):
        whole = Pair(*(tensors[f"lora_unet_{fused}.lora_{n}.weight"] for n in ("down", "up")))
        np.testing.assert_array_equal(np.concatenate([delta(file.modules[p]) for p in parts]), delta(whole))
    # The last modulation's halves change places: shift and scale here, scale and shift there.
    last = delta(file.modules["norm_out.linear"])
    fused = Pair(*(tensors[f"lora_unet_final_layer_adaLN_modulation_1.lora_{n}.weight"] for n in ("down", "up")))
    np.testing.assert_array_equal(np.concatenate([last[WIDTH:], last[:WIDTH]]), delta(fused))
    write_adapter(again, file.modules, file.metadata, format="kohya")
    written = load_file(again)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_fusing_is_exact() -> None:
    """diag(B) [A] is the parts' own products, and the rest is zero."""
    parts = [*(f"single_transformer_blocks.0.attn.to_{n}" for n in "qkv"), "single_transformer_blocks.0.proj_mlp"]
    modules = pairs(only=r"single_transformer_blocks\.0\.(attn\.to_[qv]|proj_mlp)")
    fused = formats.fuse(modules, parts)
    assert fused.lora_A.shape == (3 * RANK, WIDTH)
    expected = np.zeros((7 * WIDTH, WIDTH))
    for part, start, stop in zip(parts, (0, 1, 2, 3), (1, 2, 3, 7), strict=True):
        if part in modules:
            expected[start * WIDTH : stop * WIDTH] = delta(modules[part])
    np.testing.assert_array_equal(delta(fused), expected)


def test_the_same_matrices_as_the_conversion_of_diffusers(tmp_path: Path) -> None:
    """At the real width, because diffusers' converter knows no other; kohya and ComfyUI names, dense and ours."""
    width, rank = 3072, 2
    rng = np.random.default_rng(0)
    modules = {
        name: Pair(
            rng.normal(size=(rank, in_features)).astype(np.float32),
            rng.normal(size=(out_features, rank)).astype(np.float32),
        )
        for name, out_features, in_features in (
            *((f"transformer_blocks.7.attn.to_{n}", width, width) for n in "qkv"),
            *((f"transformer_blocks.7.attn.add_{n}_proj", width, width) for n in "qkv"),
            ("transformer_blocks.7.attn.to_out.0", width, width),
            ("transformer_blocks.7.norm1.linear", 6 * width, width),
            ("transformer_blocks.7.ff.net.2", width, 4 * width),
            *((f"single_transformer_blocks.21.attn.to_{n}", width, width) for n in "qkv"),
            ("single_transformer_blocks.21.proj_mlp", 4 * width, width),
            ("single_transformer_blocks.21.proj_out", width, 5 * width),
            ("single_transformer_blocks.21.norm.linear", 3 * width, width),
        )
    }
    for format in ("kohya", "comfyui"):
        path = tmp_path / f"{format}.safetensors"
        write_adapter(path, modules, AdapterMetadata(rank=rank, alpha=rank), format=format)
        converted = FluxPipeline.lora_state_dict(str(path))
        expected = formats.write(modules, 1.0, "peft")
        assert converted.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(converted[name].numpy(), value, err_msg=name)
    dense = {
        "lora_unet_single_blocks_3_linear1.lora_down.weight": rng.normal(size=(rank, width)).astype(np.float32),
        "lora_unet_single_blocks_3_linear1.lora_up.weight": rng.normal(size=(7 * width, rank)).astype(np.float32),
        "lora_unet_single_blocks_3_linear1.alpha": np.array(rank, np.float32),
    }
    save_file(dense, tmp_path / "dense.safetensors")
    converted = FluxPipeline.lora_state_dict(str(tmp_path / "dense.safetensors"))
    ours = formats.write(read_adapter(tmp_path / "dense.safetensors").modules, 1.0, "peft")
    assert converted.keys() == ours.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(converted[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize(
    ("style", "rename"),
    [
        ("peft", lambda m, k: f"transformer.{m}.lora_{'AB'[k]}.weight"),
        ("peft", lambda m, k: f"base_model.model.{m}.lora_{'AB'[k]}.weight"),
        ("peft", lambda m, k: f"base_model.model.transformer.{m}.lora_{'AB'[k]}.default.weight"),
        ("peft", lambda m, k: f"{m}.lora_{'AB'[k]}.weight"),
        ("peft", lambda m, k: f"transformer.{m}.lora.{('down', 'up')[k]}.weight"),
        ("peft", lambda m, k: f"diffusion_model.{m}.lora_{('down', 'up')[k]}.weight"),
        ("onetrainer", lambda m, k: f"lora_transformer_{m.replace('.', '_')}.lora_{('down', 'up')[k]}.weight"),
    ],
)
def test_names_under_which_the_same_adapter_is_published(style: str, rename, tmp_path: Path) -> None:
    modules = pairs()
    path = tmp_path / "a.safetensors"
    save_file({rename(m, k): matrix for m, pair in modules.items() for k, matrix in enumerate(pair)}, path)
    file = read_adapter(path)
    assert (file.format, file.metadata.rank, file.metadata.alpha) == (style, RANK, RANK)
    same(file.modules, modules)


def test_the_published_omini_files_are_read_as_they_are() -> None:
    case = golden.case("omini_kontext")
    path = case.path("lora_subject")
    file = read_adapter(path)
    assert file.format == "peft"
    assert sorted(file.modules) == case.config["lora_modules"]
    np.testing.assert_array_equal(
        file.modules["x_embedder"].lora_B, case.tensor("lora_subject", "transformer.x_embedder.lora_B.weight")
    )


@pytest.fixture(scope="module")
def every_name() -> tuple[FluxConfig, layers.Params]:
    config = FluxConfig.fill()
    return config, layers.abstract(lambda rngs: Flux(config, rngs=rngs))[1]


def test_every_linear_of_the_full_model_has_a_name_in_every_format(every_name) -> None:
    """All 19 + 38 blocks, checked by name alone: each linear comes back as itself."""
    _, abstract = every_name
    every = {n for p, s in lora.linears(abstract, flux.STACKED) for n in lora.module_names(p, s, flux.STACKED)}
    assert len(every) == 10 + 19 * 14 + 38 * 6
    for format in FORMATS:
        tensors = formats.write({n: Pair(np.zeros((1, 1)), np.zeros((4, 1))) for n in every if _alone(n)}, 1.0, format)
        style, entries = formats.recognise(tensors, "file")
        assert style == format
        assert {part for entry in entries for part in entry.parts} == {n for n in every if _alone(n)}
    fused = {n: Pair(np.zeros((1, 1)), np.zeros((4 if n.endswith("mlp") else 1, 1))) for n in every if not _alone(n)}
    style, entries = formats.recognise(formats.write(fused, 1.0, "kohya"), "file")
    assert {part for entry in entries for part in entry.parts} == set(fused)


def _alone(name: str) -> bool:
    """Whether the original file has this linear by itself."""
    return re.search(r"attn\.(to_[qkv]|add_[qkv]_proj)$|proj_mlp$", name) is None


def test_alpha_is_found_wherever_it_is_stated(tmp_path: Path) -> None:
    modules = pairs(only=".*to_q")
    plain = formats.write(modules, 1.0, "peft")
    alphas = formats.write(modules, 0.5, "peft")
    assert {n for n in alphas if n.endswith("alpha")} == {f"transformer.{m}.alpha" for m in modules}
    cases = {
        "nowhere": (plain, {}, RANK),
        "tensors": (alphas, {}, RANK / 2),
        "diffusers": (
            plain,
            {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 12})},
            12,
        ),
        "rslora": (
            plain,
            {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": RANK, "use_rslora": True})},
            RANK**1.5,
        ),
    }
    for name, (tensors, header, alpha) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=header)
        assert read_adapter(path).metadata.alpha == pytest.approx(alpha), name
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(plain, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6, "peft_type": "LORA"}))
    for path in (folder, folder / "adapter_model.safetensors"):
        assert read_adapter(path).metadata.alpha == 6


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = formats.write(pairs(only=".*to_[qk]"), 1.0, "peft")
    q = "transformer.transformer_blocks.0.attn.to_q"
    other = formats.write(pairs(rank=5, only=".*proj_out"), 1.0, "peft")
    kohya = formats.write(pairs(only=".*norm1.linear"), 1.0, "kohya")
    cases = {
        "is no LoRA": ({"down_blocks.0.weight": np.zeros(1)}, "not a LoRA of a FLUX transformer: down_blocks.0.weight"),
        "text encoder": (
            {**good, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": np.zeros((1, 1))},
            "lora_te1_text_model",
        ),
        "dora": ({**good, f"{q}.lora_magnitude_vector": np.zeros(1)}, "lora_magnitude_vector"),
        "half": (
            {n: v for n, v in good.items() if n != f"{q}.lora_B.weight"},
            rf"1 missing: {re.escape(q)}\.lora_B\.weight",
        ),
        "mixed": ({**good, **kohya}, "mix the formats kohya, peft"),
        "twice": (
            {**good, f"base_model.model.{q}.lora_A.weight": good[f"{q}.lora_A.weight"]},
            "1 missing: base_model.*lora_B",
        ),
        "ranks": ({**good, **other}, "found ranks 3, 5"),
        "alphas": (
            {
                **good,
                f"{q}.alpha": np.array(3.0, np.float32),
                f"{q.replace('0', '1')}.alpha": np.array(6.0, np.float32),
            },
            "expected one alpha / rank, found 1 in",
        ),
        "shapes": ({**good, f"{q}.lora_B.weight": np.zeros((WIDTH, RANK + 1), np.float32)}, r"expected \[r, in\]"),
        "rows": (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": np.zeros((2, WIDTH), np.float32),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": np.ones((WIDTH, 2), np.float32),
            },
            "lora_B has 8 rows, expected 24",
        ),
    }
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(UserError, match=message) as caught:
            read_adapter(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path = tmp_path / "metadata.safetensors"
    save_file(good, path, metadata={"nabla_jax": json.dumps({"rank": 4, "alpha": 4})})
    with pytest.raises(UserError, match="rank is 4, but the tensors have rank 3"):
        read_adapter(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        read_adapter(path)


def test_an_adapter_of_fill_on_another_base_is_told_with_both_shapes(every_name, tmp_path: Path) -> None:
    _, fill = every_name
    config = FluxConfig.kontext()
    kontext = layers.abstract(lambda rngs: Flux(config, rngs=rngs))[1]
    for channels, base, message in (
        (384, kontext, r"\(16, 384\), this base takes \(16, 64\): .*FLUX\.1-Fill \(384 .*Kontext \(64\)"),
        (64, fill, r"\(16, 64\), this base takes \(16, 384\): .*Kontext \(64 .*FLUX\.1-Fill \(384\)"),
    ):
        modules = {"x_embedder": Pair(np.zeros((16, channels), np.float32), np.zeros((3072, 16), np.float32))}
        path = tmp_path / f"{channels}.safetensors"
        write_adapter(path, modules, AdapterMetadata(rank=16, alpha=16))
        with pytest.raises(UserError, match=message):
            load_adapter(path, base, stacked=flux.STACKED)
    check_fits("file", modules, kontext, stacked=flux.STACKED)
