"""Weights, adapters and configurations that were found to raise something else than a UserError, or to be believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nabla_jax.checkpoints import adapters, pipeline, safetensors_io
from nabla_jax.checkpoints.adapter_formats import Pair
from nabla_jax.models import autoencoder, clip, dinov2, flux, keypoint_head, lpips, redux, siglip, t5
from tests.refusals import refused

NAME = "transformer.x_embedder"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes a safetensors file anew with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# ------------------------------------------------------------------------------------------------------------
# Safetensors files
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors_io.save_tree({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4))}, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["a"].update(data_offsets=[0, 20]),
        lambda h: h["a"].update(data_offsets=[8, 32]),
        lambda h: h["a"].update(shape=[2, 300]),
        lambda h: h["b"].update(shape=[2**62, 0]),
        lambda h: h["b"].update(shape=[2**64 - 1, 0]),
        lambda h: h["b"].update(shape=[0] * 40),
        lambda h: h.update(c=h["a"]),
        lambda h: h["a"].update(dtype="F64"),
        lambda h: h["a"].update(shape=None),
    ],
    ids=["short", "shifted", "large", "huge", "beyond 64 bits", "40 sides", "overlapping", "wider", "no shape"],
)
def test_headers_that_lie(change: Callable[[dict[str, Any]], object], file: Path) -> None:
    edit(file, change)
    refused(lambda: safetensors_io.read_header(file), "model.safetensors: not a complete safetensors file")


@pytest.mark.parametrize("length", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_lie(length: int, file: Path) -> None:
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(lambda: safetensors_io.read_header(file), "model.safetensors: not a complete safetensors file")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a/../../secret.safetensors", 3, None, ""])
def test_an_index_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    safetensors_io.save_tree({"a": np.zeros(3, np.float32)}, folder / "m-1.safetensors")
    safetensors_io.save_tree({"a": np.zeros(3, np.float32)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors"}}))
    assert list(safetensors_io.read_header(folder).tensors) == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: safetensors_io.read_header(folder), f"{index}: weight_map", repr(name))


def test_more_blocks_than_tensors(file: Path) -> None:
    """A configuration must not make the loader name a billion of them."""
    import jax

    tree = {"blocks": {"a": jax.ShapeDtypeStruct((10**9, 2, 3), np.float32)}}
    told = "found 2 tensors, expected those of 1000000000 blocks"
    refused(lambda: safetensors_io.check_tree(file, tree, stacked=("blocks",)), told)


# ------------------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------------------


def write_adapter(path: Path, a: np.ndarray, b: np.ndarray, alpha: Any = None, header: Any = None) -> Path:
    tensors = {f"{NAME}.lora_A.weight": a, f"{NAME}.lora_B.weight": b}
    if alpha is not None:
        tensors[f"{NAME}.alpha"] = np.asarray(alpha, np.float32)
    safetensors_io.save_tree(tensors, path, header)
    return path


A, B = np.ones((2, 4), np.float32), np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("a", "b", "alpha", "told"),
    [
        (A[:0], B[:, :0], 1.0, "expected no 0"),
        (A[:0], B[:, :0], None, "expected no 0"),
        (A, B, float("nan"), "alpha: found nan, expected a finite number"),
        (A, B, float("inf"), "alpha: found inf, expected a finite number"),
        (A, B, [1.0, 2.0], "alpha: found F32 of shape (2,), expected one number"),
        (np.full_like(A, np.nan), B, None, "lora_A.weight: found NaN or infinity"),
        (A, np.full_like(B, np.inf), None, "lora_B.weight: found NaN or infinity"),
    ],
)
def test_tensors_of_adapters(a: np.ndarray, b: np.ndarray, alpha: Any, told: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", a, b, alpha)
    refused(lambda: adapters.read_adapter(path), "a.safetensors: ", told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 0}, "rank: found 0, expected at least 1"),
        ({"rank": "2"}, "rank: found '2', expected a whole number"),
        ({"rank": True}, "rank: found True, expected a whole number"),
        ({"alpha": float("nan")}, "alpha: found nan, expected a finite number"),
        ({"alpha": 10**400}, "alpha: found 1000"),
        ({"guidance": float("inf")}, "guidance: found inf"),
        ({"size": 1.5}, "size: found 1.5, expected a whole number"),
        ({"expansion": [1.0]}, "expansion: found (1.0,), expected a list of 2"),
        ({"targets": "x"}, "targets: found 'x', expected a list"),
        ({"method": "other"}, "method: found 'other', expected omini or native or insert"),
        ({"control": None}, "control: found None, expected a text"),
        ({"later": 1}, "unexpected keyword argument 'later'"),
    ],
)
def test_metadata_of_adapters(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    adapters.write_adapter(path, {"x_embedder": Pair(A, B)}, adapters.AdapterMetadata(rank=2, alpha=2.0))
    assert adapters.read_metadata(path).rank == 2
    edit(
        path,
        lambda h: h["__metadata__"].update(nabla_jax=json.dumps(json.loads(h["__metadata__"]["nabla_jax"]) | change)),
    )
    refused(lambda: adapters.read_metadata(path), "a.safetensors: metadata nabla_jax: ", told)


@pytest.mark.parametrize("text", ["[]", "3", '{"a":' * 50_000, "9" * 5000, r'{"base": "\ud800"}'])
def test_metadata_of_other_shapes(text: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", A, B, header={"nabla_jax": text})
    refused(lambda: adapters.read_metadata(path), "a.safetensors: metadata nabla_jax: ")


@pytest.mark.parametrize(
    "config", [{"r": 0}, {"r": -2}, {"r": 2, "lora_alpha": float("inf")}, {"r": 1e400}, [], {"r": "x"}]
)
def test_lora_configurations_of_other_tools(config: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter_model.safetensors", A, B)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(lambda: adapters.read_adapter(path), "adapter_config.json: LoRA configuration cannot be read")


# ------------------------------------------------------------------------------------------------------------
# Configurations of networks
# ------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "transformer": flux.FluxConfig.dev(),
    "vae": autoencoder.AutoencoderKLConfig(),
    "clip": clip.CLIPTextConfig(),
    "t5": t5.T5Config(),
    "siglip": siglip.SiglipVisionConfig(),
    "dinov2": dinov2.Dinov2Config(),
    "redux": redux.ReduxEmbedderConfig(),
    "keypoints": keypoint_head.KeypointHeadConfig(("bill",), 8, 14, "0" * 64, 224),
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("transformer", "num_layers", "19"),
        ("transformer", "num_layers", -1),
        ("transformer", "axes_dims_rope", 3),
        ("transformer", "axes_dims_rope", [16, 56]),
        ("transformer", "axes_dims_rope", ["a", "b", "c"]),
        ("transformer", "guidance_embeds", 1),
        ("vae", "block_out_channels", "128"),
        ("vae", "block_out_channels", [128, 2**40]),
        ("vae", "down_block_types", 3),
        ("vae", "norm_num_groups", 0),
        ("vae", "scaling_factor", float("nan")),
        ("clip", "num_attention_heads", 0),
        ("clip", "hidden_size", None),
        ("clip", "layer_norm_eps", 1e308),
        ("t5", "num_layers", 10**6),
        ("t5", "d_model", 1.5),
        ("t5", "layer_norm_epsilon", float("inf")),
        ("siglip", "hidden_size", "768"),
        ("siglip", "model_type", []),
        ("dinov2", "patch_size", True),
        ("redux", "redux_dim", 10**400),
        ("keypoints", "parts", "bill"),
        ("keypoints", "dinov2_sha256", 3),
        ("keypoints", "margin", float("nan")),
    ],
)
def test_sizes_of_networks(name: str, key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    content = CONFIGS[name].to_json()
    (content["vision_config"] if "vision_config" in content and key != "model_type" else content)[key] = value
    path.write_text(json.dumps(content))
    refused(lambda: type(CONFIGS[name]).from_json(path), "config.json", key)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_configurations_are_read(name: str, tmp_path: Path) -> None:
    pipeline.write_json(tmp_path / "config.json", CONFIGS[name].to_json())
    assert type(CONFIGS[name]).from_json(tmp_path / "config.json") == CONFIGS[name]


@pytest.mark.parametrize("kind", [type(config) for config in CONFIGS.values()] + [lpips.LpipsConfig])
@pytest.mark.parametrize("text", ['{"a":' * 50_000, "[" * 50_000, "9" * 5000, "\xff"])
def test_configurations_that_are_no_json(kind: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: kind.from_json(tmp_path / "config.json"), "config.json: not valid JSON")


@pytest.mark.parametrize("text", ["[" * 50_000, "\xff", "3", '{"_class_name": []}'])
def test_indices_of_pipelines(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    refused(lambda: pipeline.is_kontext(tmp_path), "model_index.json: ")
