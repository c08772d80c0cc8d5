import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nabla_jax.data.loader import make_loader, open_prepared, shard_name
from nabla_jax.data.records import encode_record, write_shard
from nabla_jax.errors import UserError

CLASS_IDS = [5, 5, 9, 5, 9, 9, 9, 12]
CAPTIONS = [0, 1, 0, 1, 0, 1, 0, 1]


def moments(index: int, role: int) -> np.ndarray:
    return np.random.default_rng([index, role]).normal(size=(4, 2, 2)).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = []
    for number, rows in enumerate((range(5), range(5, 8))):
        name = shard_name(number, 2)
        write_shard(tmp_path / name, (
            encode_record(
                {"id": f"bird-{i}", "class_id": CLASS_IDS[i], "caption": CAPTIONS[i], "index": i},
                {role: moments(i, k) for k, role in enumerate(("target", "subject", "control"))}
                | {"mask": np.full((2, 2), 51 * (i % 5), np.uint8)},
            )
            for i in rows
        ))  # fmt: skip
        shards.append({"file": name, "records": len(rows), "bytes": (tmp_path / name).stat().st_size})
    manifest = {"schema": 1, "shards": shards, "class_ids": CLASS_IDS, "captions": CAPTIONS}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = {
        "prompt_embeds": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        "pooled": np.eye(2, dtype=np.float32),
    }
    save_file(text, tmp_path / "text.safetensors")
    return tmp_path


def take(loader: object, n: int) -> list[dict[str, np.ndarray]]:
    return [next(loader) for _ in range(n)]  # type: ignore[call-overload]


def assert_equal(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_a_batch_holds_what_the_records_hold(folder: Path) -> None:
    (batch,) = take(make_loader(folder, "all_pairs", 16, seed=1), 1)
    shapes = {k: (v.shape, str(v.dtype)) for k, v in batch.items()}
    assert shapes == {
        "target": ((16, 4, 2, 2), "float32"),
        "subject": ((16, 4, 2, 2), "float32"),
        "control": ((16, 4, 2, 2), "float32"),
        "mask": ((16, 2, 2), "float32"),
        "prompt_embeds": ((16, 3, 2), "float32"),
        "pooled": ((16, 2), "float32"),
        "sample": ((16,), "int64"),
        "subject_index": ((16,), "int64"),
        "target_index": ((16,), "int64"),
    }
    np.testing.assert_array_equal(batch["sample"], np.arange(16))
    for row in range(16):
        subject, target = int(batch["subject_index"][row]), int(batch["target_index"][row])
        assert subject != target and CLASS_IDS[subject] == CLASS_IDS[target]
        np.testing.assert_array_equal(batch["target"][row], moments(target, 0))
        np.testing.assert_array_equal(batch["subject"][row], moments(subject, 1))
        np.testing.assert_array_equal(batch["control"][row], moments(target, 2))
        np.testing.assert_allclose(batch["mask"][row], (target % 5) / 5)
        np.testing.assert_array_equal(batch["pooled"][row], np.eye(2)[CAPTIONS[target]])


def test_threads_and_restarts_change_nothing(folder: Path) -> None:
    expected = take(make_loader(folder, "class_uniform", 3, seed=1, threads=0), 12)
    assert_equal(take(make_loader(folder, "class_uniform", 3, seed=1, threads=8), 12), expected)
    loader = make_loader(folder, "class_uniform", 3, seed=1)
    take(loader, 5)
    state = loader.get_state()
    assert state == json.loads(json.dumps(state))
    again = make_loader(folder, "class_uniform", 3, seed=1, threads=2)
    again.set_state(state)
    assert_equal(take(again, 7), expected[5:])
    assert_equal(take(loader, 7), expected[5:])
    other = take(make_loader(folder, "class_uniform", 3, seed=2), 12)
    assert any((a["target_index"] != b["target_index"]).any() for a, b in zip(other, expected, strict=True))


def test_processes_share_one_stream(folder: Path) -> None:
    """Two processes with half the batch see together what one process sees, also after a restart."""
    whole = take(make_loader(folder, "all_pairs", 6, seed=4), 5)
    halves = [make_loader(folder, "all_pairs", 3, seed=4, shard=(i, 2)) for i in range(2)]
    parts = [take(half, 3) for half in halves]
    resumed = [make_loader(folder, "all_pairs", 3, seed=4, shard=(i, 2)) for i in range(2)]
    for old, new in zip(halves, resumed, strict=True):
        new.set_state(old.get_state())
    parts = [first + take(new, 2) for first, new in zip(parts, resumed, strict=True)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert_equal(joined, whole)


def test_one_state_fits_another_number_of_processes(folder: Path) -> None:
    whole = take(make_loader(folder, "all_pairs", 6, seed=4), 5)
    half = make_loader(folder, "all_pairs", 3, seed=4, shard=(1, 2))
    take(half, 2)
    alone = make_loader(folder, "all_pairs", 6, seed=4)
    alone.set_state(half.get_state())
    assert_equal(take(alone, 3), whole[2:])


def test_classes_are_indexed_from_the_manifest(folder: Path) -> None:
    assert open_prepared(folder).classes == {5: (0, 1, 3), 9: (2, 4, 5, 6), 12: (7,)}


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    shard = folder / shard_name(1, 2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: corrupt or truncated shard"):
        make_loader(folder, "all_pairs", 2, seed=0)
    changed = bytearray(whole)
    changed[whole.index(b"bird-6") + 5] ^= 1
    shard.write_bytes(bytes(changed))
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: corrupt"):
        take(make_loader(folder, "all_pairs", 4, seed=0), 50)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: no such shard"):
        make_loader(folder, "all_pairs", 2, seed=0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"{", "not a readable JSON"),
        ("manifest.json", b'{"schema": 99}', "schema: found 99, expected 1"),
        ("manifest.json", None, "no such file, expected the folder that prepare writes"),
        ("text.safetensors", b"xx", "not the text embeddings"),
        ("text.safetensors", None, "not the text embeddings"),
    ],
)
def test_damaged_companions_are_named(folder: Path, file: str, content: bytes | None, message: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: .*{message}"):
        make_loader(folder, "all_pairs", 2, seed=0)


def test_unknown_sampler(folder: Path) -> None:
    with pytest.raises(UserError, match="train.sampler"):
        make_loader(folder, "some_pairs", 2, seed=0)
