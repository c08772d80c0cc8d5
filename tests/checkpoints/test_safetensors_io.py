"""Streaming of parameter trees: against the safetensors package's own reader and writer."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from nabla_jax.checkpoints import safetensors_io as io
from nabla_jax.errors import UserError
from tests.fixtures import fake_devices

STACKED = ("blocks",)


def tensors(n=3, rng=None):
    rng = rng or np.random.default_rng(0)
    flat = {f"blocks.{i}.to_q.weight": rng.normal(size=(4, 2)).astype(np.float32) for i in range(n)}
    flat |= {f"blocks.{i}.to_q.bias": rng.normal(size=(4,)).astype(np.float32) for i in range(n)}
    return flat | {
        "head.weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
        "scale": np.float32([2.5]),
    }


def abstract(n=3):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        "blocks": {"to_q": {"weight": leaf(n, 4, 2), "bias": leaf(n, 4)}},
        "head": {"weight": leaf(5, 4)},
        "scale": leaf(1),
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


def test_blocks_land_in_their_rows_and_dtypes_follow_the_model(file):
    flat = tensors()
    params = io.load_tree(file, abstract(), stacked=STACKED)
    for i in range(3):
        np.testing.assert_array_equal(params["blocks"]["to_q"]["weight"][i], flat[f"blocks.{i}.to_q.weight"])
        np.testing.assert_array_equal(params["blocks"]["to_q"]["bias"][i], flat[f"blocks.{i}.to_q.bias"])
    assert params["head"]["weight"].dtype == jnp.float32
    np.testing.assert_array_equal(params["head"]["weight"], flat["head.weight"].astype(np.float32))
    half = io.load_tree(file, abstract(), stacked=STACKED, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_more_than_ten_blocks_keep_their_numeric_order(tmp_path):
    save_file(tensors(12), tmp_path / "model.safetensors")
    params = io.load_tree(tmp_path, abstract(12), stacked=STACKED)
    np.testing.assert_array_equal(
        params["blocks"]["to_q"]["weight"],
        np.stack([tensors(12)[f"blocks.{i}.to_q.weight"] for i in range(12)]),
    )


def test_saving_is_the_inverse_of_loading(file, tmp_path):
    params = io.load_tree(file, abstract(), stacked=STACKED)
    io.save_tree(params, tmp_path / "out" / "copy.safetensors", {"rank": "4"}, stacked=STACKED)
    written = load_file(tmp_path / "out" / "copy.safetensors")
    original = {name: value.astype(np.float32) for name, value in tensors().items()}
    assert set(written) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)
    assert io.read_header(tmp_path / "out").metadata == {"format": "pt", "rank": "4"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["copy.safetensors"]


def test_saving_in_bfloat16_rounds_as_numpy_does(file, tmp_path):
    params = io.load_tree(file, abstract(), stacked=STACKED)
    io.save_tree(params, tmp_path / "half.safetensors", dtype=jnp.bfloat16, stacked=STACKED)
    written = load_file(tmp_path / "half.safetensors")
    for name, value in tensors().items():
        assert written[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(written[name], value.astype(ml_dtypes.bfloat16))


def test_a_failed_save_leaves_the_old_file(file, tmp_path):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="complex64"):
        io.save_tree({"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.complex64)}, file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def shard(flat, folder, stem="diffusion_pytorch_model"):
    names = sorted(flat)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard_name = f"{stem}-0000{i + 1}-of-00002.safetensors"
        save_file({name: flat[name] for name in part}, folder / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_load_like_one_file(file, tmp_path):
    (tmp_path / "sharded").mkdir()
    shard(tensors(), tmp_path / "sharded")
    one = io.load_tree(file, abstract(), stacked=STACKED)
    two = io.load_tree(tmp_path / "sharded", abstract(), stacked=STACKED)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_missing_shard_is_named(tmp_path):
    shard(tensors(), tmp_path)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing: .*00002-of-00002"):
        io.read_header(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path):
    index = shard(tensors(), tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ghost.weight"):
        io.read_header(tmp_path)


def test_all_mismatches_are_reported_at_once(tmp_path):
    flat = tensors()
    del flat["blocks.1.to_q.bias"], flat["scale"]
    flat["blocks.3.to_q.bias"] = np.zeros(4, np.float32)
    flat["stray"] = np.zeros(1, np.float32)
    flat["head.weight"] = np.zeros((4, 5), np.float32)
    save_file(flat, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        io.load_tree(tmp_path, abstract(), stacked=STACKED)
    message = str(caught.value)
    for expected in (
        str(tmp_path),
        "2 missing: blocks.1.to_q.bias, scale",
        "2 not expected (in model.safetensors): blocks.3.to_q.bias, stray",
        "head.weight in model.safetensors: found (4, 5), expected (5, 4)",
    ):
        assert expected in message
    assert "\n" not in message


def test_missing_blocks_are_listed_compactly_but_completely(tmp_path):
    save_file({k: v for k, v in tensors().items() if not k.startswith("blocks.")}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"6 missing: blocks\.\{0\.\.2\}\.to_q\.weight, blocks\.\{0\.\.2\}\.to_q\.bias"):
        io.load_tree(tmp_path, abstract(), stacked=STACKED)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(file, damage):
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-3], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    with pytest.raises(UserError, match=str(file)):
        io.load_tree(file, abstract(), stacked=STACKED)


def test_an_absent_path_and_an_ambiguous_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        io.read_header(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found none"):
        io.read_header(tmp_path)
    save_file(tensors(), tmp_path / "a.safetensors")
    save_file(tensors(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors"):
        io.read_header(tmp_path)


def test_the_published_name_wins_over_variants_beside_it(file):
    save_file({"other": np.zeros(1, np.float32)}, file.with_name("model.fp16.safetensors"))
    assert set(io.read_header(file.parent).tensors) == set(tensors())


def test_a_table_renames_and_leaves_out(tmp_path):
    flat = tensors() | {"position_ids": np.arange(4)}
    flat["net.head.weight"] = flat.pop("head.weight")
    save_file(flat, tmp_path / "model.safetensors")
    table = ((r".*position_ids", None), (r"net\.(.*)", r"\1"))
    params = io.load_tree(tmp_path, abstract(), table, stacked=STACKED)
    np.testing.assert_array_equal(params["head"]["weight"], tensors()["head.weight"].astype(np.float32))


def test_aliases_must_agree(tmp_path):
    table = ((r"tied\.weight", "head.weight"),)
    flat = tensors()
    save_file(flat | {"tied.weight": flat["head.weight"].copy()}, tmp_path / "model.safetensors")
    params = io.load_tree(tmp_path, abstract(), table, stacked=STACKED)
    np.testing.assert_array_equal(params["head"]["weight"], flat["head.weight"].astype(np.float32))
    save_file(flat | {"tied.weight": flat["head.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"head\.weight and tied\.weight"):
        io.load_tree(tmp_path, abstract(), table, stacked=STACKED)


def test_an_unreadable_dtype_is_named(tmp_path):
    save_file({"w": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"w in model\.safetensors: found dtype F8_E4M3"):
        io.load_tree(tmp_path, {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)})


def test_sharded_loading_reads_the_parts_of_the_same_arrays(file):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    flat = NamedSharding(mesh, PartitionSpec())
    shardings = {
        "blocks": {"to_q": {"weight": rows, "bias": rows}},
        "head": {"weight": rows},
        "scale": flat,
    }
    plain = io.load_tree(file, abstract(), stacked=STACKED)
    sharded = io.load_tree(file, abstract(), stacked=STACKED, sharding=shardings)
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)
    assert sharded["head"]["weight"].sharding == rows
    everywhere = io.load_tree(file, abstract(), stacked=STACKED, sharding=flat)
    jax.tree.map(np.testing.assert_array_equal, plain, everywhere)


def test_eight_devices_receive_their_own_parts(tmp_path):
    rng = np.random.default_rng(1)
    flat = {f"blocks.{i}.w": rng.normal(size=(4, 6)).astype(np.float32) for i in range(4)}
    save_file(flat | {"head": rng.normal(size=(8, 3)).astype(np.float32)}, tmp_path / "model.safetensors")
    program = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nabla_jax.checkpoints.safetensors_io import load_tree
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
abstract = {
    "blocks": {"w": jax.ShapeDtypeStruct((4, 4, 6), "float32")},
    "head": jax.ShapeDtypeStruct((8, 3), "bfloat16"),
}
whole = load_tree(sys.argv[1], abstract, stacked=("blocks",))
for first, second in ((P("a", None, "b"), P("a")), (P(None, "a"), P(("a", "b"))), (P("b", "a"), P())):
    shardings = {"blocks": {"w": NamedSharding(mesh, first)}, "head": NamedSharding(mesh, second)}
    parts = load_tree(sys.argv[1], abstract, stacked=("blocks",), sharding=shardings)
    assert jax.tree.map(lambda x: x.sharding, parts) == shardings
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
print(len(jax.devices()), "devices")
"""
    environment = os.environ | {
        "XLA_FLAGS": fake_devices(8),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "8 devices"


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"0": {"w": 1}, "1": {"w": 2}}, "b": 3}
    assert io.flatten(tree) == {"a.0.w": 1, "a.1.w": 2, "b": 3}
    assert io.unflatten(io.flatten(tree)) == tree
