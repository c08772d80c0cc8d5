"""keypoints.json is read by every source; annotations go before it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax.data import keypoint_file, read_dataset, skeleton
from nabla_jax.errors import UserError
from tests.data.folders import write_inat, write_nabirds

FOUND = np.array([[5 + i, 2 * i, i % 2] for i in range(11)], np.int32)
FOUND[FOUND[:, 2] == 0] = 0


def write_manifest(root: Path) -> Path:
    rows = ["image,class,keypoints"]
    for i, points in enumerate(("", ";".join(f"{x} 7 1" for x in range(11)))):
        root.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(root / f"{i}.png")
        rows.append(f"{i}.png,Wren,{points}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


def write_clips(root: Path) -> Path:
    for i in (0, 30):
        path = root / "Wren" / "a" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)
    (root / "clips.csv").write_text("clip,frames_per_second\nWren/a,30\n")
    return root


def write_bare_nabirds(root: Path) -> Path:
    write_nabirds(root)
    for name in ("part_locs.txt", "parts.txt"):
        (root / "parts" / name).unlink(missing_ok=True)
    return root


@pytest.mark.parametrize("make", [write_inat, write_manifest, write_clips, write_bare_nabirds])
def test_every_source_reads_it_back(make, tmp_path):
    root = make(tmp_path / "data")
    bare = [e for e in read_dataset(root).examples if e.keypoints is None]
    assert bare
    keypoint_file.write(root / "keypoints.json", {e.id: keypoint_file.to_rows(FOUND) for e in bare[:-1]})
    dataset = read_dataset(root)
    for example in bare[:-1]:
        np.testing.assert_array_equal(dataset.by_id[example.id].keypoints, FOUND)
    assert dataset.by_id[bare[-1].id].keypoints is None


@pytest.mark.parametrize("make", [write_nabirds, write_manifest])
def test_annotations_go_before(make, tmp_path):
    root = make(tmp_path / "data")
    before = {e.id: e.keypoints for e in read_dataset(root).examples if e.keypoints is not None}
    assert before
    keypoint_file.write(root / "keypoints.json", dict.fromkeys(before, keypoint_file.to_rows(FOUND)))
    for id, keypoints in before.items():
        np.testing.assert_array_equal(read_dataset(root).by_id[id].keypoints, keypoints)


def test_rows_are_x_y_visible_and_come_back():
    rows = keypoint_file.to_rows(np.array([[7, 3, 1]] + [[9, 9, 0]] * 10))
    assert rows == [[3, 7, 1]] + [[0, 0, 0]] * 10 and len(rows) == len(skeleton.PARTS)
    np.testing.assert_array_equal(keypoint_file.from_rows(keypoint_file.to_rows(FOUND)), FOUND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "found list, expected one object of id: rows"),
        ("{", "not JSON"),
        (json.dumps({"111_9001": [[1, 2, 1]]}), "111_9001: expected 11 rows of three integers, x y visible"),
        (json.dumps({"111_9001": [[1, 2.5, 1]] * 11}), "expected 11 rows of three integers"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    root = write_inat(tmp_path / "inat")
    (root / "keypoints.json").write_text(text)
    with pytest.raises(UserError, match=f"keypoints.json: .*{message}"):
        read_dataset(root)
