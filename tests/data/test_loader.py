import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nabla_jax.data import pairs
from nabla_jax.data.loader import check_files, make_loader, open_prepared, shard_name
from nabla_jax.data.records import encode_record, write_shard
from nabla_jax.errors import UserError

CLASS_IDS = [5, 5, 9, 5, 9, 9, 9, 12]
CAPTIONS = [0, 1, 0, 1, 0, 1, 0, 1]
TAXONOMY = {5: ["Birds", "A", "Aa", "x"], 9: ["Birds", "A", "Aa", "y"], 12: ["Birds", "B", "Ba", "z"]}
ROLES = ["target", "subject", "control_fill", "control_depth"]
NAMES = ("target", "subject", "control")


def moments(index: int, role: int) -> np.ndarray:
    return np.random.default_rng([index, role]).normal(size=(4, 2, 2)).astype(np.float16)


def features(index: int) -> np.ndarray:
    return np.random.default_rng([index, 99]).normal(size=6).astype(np.float32)


def write_prepared(folder: Path, made: str = "settings a") -> Path:
    """What prepare writes, of two shards with five and three pictures."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number, rows in enumerate((range(5), range(5, 8))):
        path = folder / shard_name(number, 2)

        def record(i: int, role: str, arrays: dict[str, np.ndarray]) -> bytes:
            meta = {"id": f"bird-{i}", "class_id": CLASS_IDS[i], "caption": CAPTIONS[i]}
            return encode_record(meta | {"index": i, "role": role, "made": made}, arrays)

        records = []
        for i in rows:
            mask = {"mask": np.full((2, 2), 51 * (i % 5), np.uint8)}
            records += [
                record(i, r, {"moments": moments(i, k)} | (mask if k == 0 else {})) for k, r in enumerate(ROLES)
            ]
        records += [record(i, "features", {"features": features(i)}) for i in rows]
        write_shard(path, records)
        shards.append({"file": path.name, "pictures": len(rows), "records": len(records)} | measured(path))
    text = {
        "prompt_embeds": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        "pooled": np.eye(2, dtype=np.float32),
    }
    save_file(text, folder / "text.safetensors")
    manifest = {
        "schema": 2, "made": made, "roles": ROLES, "features": 6, "moments": [4, 2, 2], "shards": shards,
        "text": {"file": "text.safetensors"} | measured(folder / "text.safetensors"),
        "ids": [f"bird-{i}" for i in range(8)], "class_ids": CLASS_IDS, "captions": CAPTIONS,
        "classes": {str(c): {"taxonomy": path} for c, path in TAXONOMY.items()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def measured(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_prepared(tmp_path / "prepared")


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
        "target": ((16, 4, 2, 2), "float16"),
        "subject": ((16, 4, 2, 2), "float16"),
        "control": ((16, 4, 2, 2), "float16"),
        "mask": ((16, 2, 2), "float32"),
        "prompt_embeds": ((16, 3, 2), "float32"),
        "pooled": ((16, 2), "float32"),
        "sample": ((16,), "int64"),
        "subject_index": ((16,), "int64"),
        "target_index": ((16,), "int64"),
        "level": ((16,), "int64"),
        "caption": ((16,), "int64"),
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
        assert pairs.LEVELS[batch["level"][row]] == "class" and batch["caption"][row] == CAPTIONS[target]


def test_the_control_is_chosen_when_the_folder_is_read(folder: Path) -> None:
    fill, depth = (next(make_loader(folder, "all_pairs", 4, seed=1, control=kind)) for kind in ("fill", "depth"))
    np.testing.assert_array_equal(fill["subject"], depth["subject"])
    for row, target in enumerate(fill["target_index"]):
        np.testing.assert_array_equal(fill["control"][row], moments(target, 2))
        np.testing.assert_array_equal(depth["control"][row], moments(target, 3))
    with pytest.raises(UserError, match="conditioning.control: found 'keypoints', prepared are fill, depth"):
        make_loader(folder, "all_pairs", 4, seed=1, control="keypoints")


def test_the_level_sampler_reads_the_taxonomy_and_its_step(folder: Path) -> None:
    loader = make_loader(folder, "level", 4, seed=1, levels=("0 self", "2 family", "4 class"))
    batches = take(loader, 6)
    same = [(b["subject_index"] == b["target_index"]).all() for b in batches]
    assert same == [True, True, False, False, False, False]
    for number, batch in enumerate(batches):
        for subject, target, level in zip(batch["subject_index"], batch["target_index"], batch["level"], strict=True):
            one_class = CLASS_IDS[subject] == CLASS_IDS[target]
            assert pairs.LEVELS[level] == ("self" if number < 2 else "class" if one_class else "family")
            assert one_class or 2 <= number < 4 and {CLASS_IDS[subject], CLASS_IDS[target]} == {5, 9}
    # Halves of a batch belong to the step of the whole.
    halves = [make_loader(folder, "level", 2, 1, (i, 2), levels=("0 self", "2 family", "4 class")) for i in (0, 1)]
    joined = [np.concatenate([a["level"], b["level"]]) for a, b in zip(*(take(h, 6) for h in halves), strict=True)]
    np.testing.assert_array_equal(joined, [b["level"] for b in batches])


@pytest.mark.parametrize(("sampler", "count"), [("all_pairs", 2), ("image_uniform", 3), ("level", 1)])
def test_pairs_are_drawn_from_so_many_pictures_of_a_class(sampler: str, count: int, folder: Path) -> None:
    allowed = pairs.few({5: (0, 1, 3), 9: (2, 4, 5, 6), 12: (7,)}, [f"bird-{i}" for i in range(8)], count)
    loader = make_loader(folder, sampler, 64, seed=1, levels=("0 self=2 family=1",), per_class=count)
    batch = next(loader)
    drawn = {int(i) for name in ("subject_index", "target_index") for i in batch[name]}
    lonely = () if sampler == "level" else allowed[12]  # a class of one picture has no pair but with itself
    assert drawn == {i for members in allowed.values() for i in members} - set(lonely)


def test_mined_pairs_are_alike_by_the_stored_features(folder: Path) -> None:
    stored = open_prepared(folder).features
    assert stored is not None
    np.testing.assert_array_equal(stored(), [features(i) for i in range(8)])
    batch = next(make_loader(folder, "mined", 32, seed=0, similarity=0.2))
    unit = stored() / np.linalg.norm(stored(), axis=1, keepdims=True)
    assert (np.sum(unit[batch["subject_index"]] * unit[batch["target_index"]], 1) > 0.199).all()
    with pytest.raises(UserError, match="data.similarity: found no two pictures"):
        make_loader(folder, "mined", 32, seed=0, similarity=0.999)


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


WORKERS = """
import sys
from pathlib import Path
import numpy as np
from nabla_jax.data.loader import make_loader
from nabla_jax.errors import UserError

if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:3])
    loader = make_loader(folder, "mined", 3, 5, workers=2, similarity=-0.5)
    loader.set_state({"step": 4})
    batches = [next(loader) for _ in range(5)]
    state = loader.get_state()
    loader.close()
    np.savez(out, step=state["step"], **{f"{k}_{i}": v for i, b in enumerate(batches) for k, v in b.items()})
    shard = sorted(folder.glob("shard*"))[1]
    loader = make_loader(folder, "class_uniform", 3, 5, workers=1)
    data = bytearray(shard.read_bytes())
    data[data.index(b"bird-6") + 5] ^= 1
    shard.write_bytes(data)
    try:
        for _ in range(40):
            next(loader)
    except UserError as error:
        print(error)
    loader.close()
"""


def test_worker_processes_give_the_same_stream_and_name_damage(folder: Path, tmp_path: Path) -> None:
    expected = take(make_loader(folder, "mined", 3, 5, similarity=-0.5), 9)[4:]
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(tmp_path / "out.npz")],
        capture_output=True, text=True, check=False, timeout=240, cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    assert found["step"] == 9
    assert_equal([{k: found[f"{k}_{i}"] for k in expected[0]} for i in range(5)], expected)
    assert "shard-00001-of-00002.array_record: corrupt" in done.stdout


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


def swap(a: Path, b: Path) -> None:
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])


def test_swapped_shards_are_named_when_the_folder_is_opened(folder: Path, tmp_path: Path) -> None:
    """Of one folder with sizes that are alike, and of two folders that differ in their settings alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    other = write_prepared(tmp_path / "other", made="settings b")
    shutil.copy(other / shard_name(1, 2), folder / shard_name(1, 2))
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: swapped shard: .*made with settings b"):
        open_prepared(folder)
    swap(write_prepared(folder) / shard_name(0, 2), folder / shard_name(1, 2))
    a, b = manifest["shards"]
    a |= {"bytes": b["bytes"], "pictures": 3, "records": b["records"]}
    b |= {"bytes": (folder / b["file"]).stat().st_size, "pictures": 5, "records": 25}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00000-of-00002\.array_record: swapped shard: .*target of picture 5"):
        open_prepared(folder)


def test_the_full_check_names_every_file_that_differs(folder: Path, tmp_path: Path) -> None:
    assert check_files(folder) == 3
    first, second = folder / shard_name(0, 2), folder / shard_name(1, 2)
    swap(first, second)
    with pytest.raises(UserError) as error:
        check_files(folder)
    assert f"{first}: swapped: holds what {second.name} should hold" in str(error.value)
    assert f"{second}: swapped: holds what {first.name} should hold" in str(error.value)
    swap(first, second)
    whole = second.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 20):
        changed = bytearray(whole)
        changed[place] ^= 1
        second.write_bytes(bytes(changed))
        with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: corrupt: found sha256"):
            check_files(folder)
    second.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: truncated"):
        check_files(folder)
    second.unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00002\.array_record: no such file"):
        check_files(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"{", "not a readable JSON"),
        ("manifest.json", b'{"schema": 99}', "schema: found 99, expected 2"),
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
