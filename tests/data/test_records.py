from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nabla_jax.data.records import RecordError, RecordReader, decode_record, encode_record, write_shard
from nabla_jax.errors import UserError

DTYPES = st.sampled_from(["<f2", "<f4", "|u1", "<i8", "|b1", ">f4"])
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, min_side=0)))


def record(i: int) -> bytes:
    values = np.random.default_rng(i).normal(size=(32, 6, 6)).astype(np.float16)
    return encode_record({"index": i, "id": f"bird-{i}"}, {"target": values, "mask": np.full((6, 6), i, np.uint8)})


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.array_record", tmp_path / "b.array_record"]
    write_shard(paths[0], (record(i) for i in range(40)))
    write_shard(paths[1], (record(i) for i in range(40, 47)))
    return paths


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=4))
def test_round_trip(arrays: dict[str, np.ndarray]) -> None:
    meta = {"id": "ä/1", "class_id": 817, "nested": {"x": [1, 2.5, None]}}
    found_meta, found = decode_record(encode_record(meta, arrays))
    assert found_meta == meta
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")


def test_arrays_lie_on_64_bytes() -> None:
    data = encode_record({"id": "x" * 77}, {"a": np.arange(3, dtype=np.uint8), "b": np.arange(5.0)})
    _, arrays = decode_record(data)
    base = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    for array in arrays.values():
        assert (array.__array_interface__["data"][0] - base) % 64 == 0
    assert len(data) % 64 == 0


def test_every_changed_byte_is_noticed() -> None:
    data = encode_record({"id": "x"}, {"a": np.arange(7, dtype=np.uint8)})
    for i in range(len(data)):
        changed = bytearray(data)
        changed[i] ^= 0x20
        with pytest.raises(RecordError):
            decode_record(bytes(changed))
    for length in (0, 5, 16, len(data) - 1):
        with pytest.raises(RecordError):
            decode_record(data[:length])


def test_records_are_numbers_only() -> None:
    with pytest.raises(ValueError, match="'a' has dtype"):
        encode_record({}, {"a": np.array(["text"])})


def test_shards_give_random_access(shards: list[Path]) -> None:
    reader = RecordReader(shards, [40, 7])
    assert len(reader) == 47
    for i in (46, 0, 39, 40, 12):
        assert reader[i] == record(i)
        assert reader.record(i)[0]["index"] == i
    assert (reader.locate(39), reader.locate(40)) == ((0, 39), (1, 0))
    with pytest.raises(IndexError):
        reader[47]


def test_equal_records_give_equal_files(tmp_path: Path, shards: list[Path]) -> None:
    write_shard(tmp_path / "again", (record(i) for i in range(40)))
    assert (tmp_path / "again").read_bytes() == shards[0].read_bytes()


@pytest.mark.parametrize("cut", [0, 100, 0.3, -1])
def test_a_cut_shard_is_named(shards: list[Path], cut: float) -> None:
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: int(cut * len(whole)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match=r"b\.array_record: corrupt or truncated shard"):
        RecordReader(shards, [40, 7]).record(41)


def test_a_changed_shard_is_named(shards: list[Path]) -> None:
    whole = bytearray(shards[0].read_bytes())
    place = whole.index(b"bird-17")
    whole[place] ^= 1
    shards[0].write_bytes(bytes(whole))
    reader = RecordReader(shards, [40, 7])
    with pytest.raises(UserError, match=r"a\.array_record: corrupt"):
        reader.record(17)
    assert reader.record(45)[0]["index"] == 45


def test_missing_shards_and_wrong_counts(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard"):
        RecordReader([tmp_path / "none.array_record"])
    with pytest.raises(UserError, match=r"b\.array_record: .*found 7 records, expected 8"):
        RecordReader(shards, [40, 8])


def test_a_shard_is_whole_or_not_there(tmp_path: Path) -> None:
    def failing() -> object:
        yield record(0)
        raise UserError("a bad picture")

    with pytest.raises(UserError, match="a bad picture"):
        write_shard(tmp_path / "s.array_record", failing())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/s\.array_record: cannot be written"):
        write_shard(tmp_path / "none" / "s.array_record", [record(0)])
