"""Data files that were found to raise something else than a UserError, to leave their folder or to be read wrongly."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nabla_jax.curation import verdicts
from nabla_jax.data import (
    inat21,
    inaturalist,
    keypoint_file,
    loader,
    manifest,
    nabirds,
    pair_lists,
    records,
    tfds,
    unpack,
)
from nabla_jax.data.problems import Problems
from nabla_jax.data.tables import read_csv
from tests.data import folders
from tests.fuzz import parsers
from tests.refusals import refused

# ------------------------------------------------------------------------------------------------------------
# Lists
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1," + "x" * 140_000 + "\n", "t.csv:2: not CSV (field larger than field limit"),
        ("a,b\n1,x\ry\n", "t.csv:2: not CSV (new-line character"),
        ("a,b,a\n1,2,3\n", "t.csv:1: column a occurs twice"),
    ],
    ids=["long field", "carriage return", "a column twice"],
)
def test_lists_that_are_no_csv(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())
    problems = Problems()
    assert read_csv(tmp_path / "t.csv", ("a", "b"), problems) == []
    refused(problems.refuse, told)


def test_a_field_of_two_lines_keeps_them_apart(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'a,b\r\n"one\r\ntwo",3\r\n4,5\r\n')
    rows = read_csv(tmp_path / "t.csv", ("a", "b"), Problems())
    assert rows == [(3, {"a": "one\r\ntwo", "b": "3"}), (4, {"a": "4", "b": "5"})]


CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.tuples(CELLS, CELLS), max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_lists_are_read_as_they_were_written(cells: list[tuple[str, str]], end: str, tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([("a", "b"), *cells])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode())
    problems = Problems()
    rows = read_csv(tmp_path / "t.csv", ("a", "b"), problems)
    assert [(row["a"], row["b"]) for _, row in rows] == cells and len(problems) == 0
    assert [line for line, _ in rows] == list(range(2, 2 + len(cells)))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_1", "../../../../secret.jpg"),
        ("image_1", "/etc/hostname"),
        ("image_2", "a/b.jpg"),
        ("relative_path", "../x"),
        ("relative_path", "/etc"),
        ("relative_path", "x/" * 3000),
        ("image_1", "x" * 300),
    ],
)
def test_pair_lists_stay_in_their_folder(column: str, value: str, tmp_path: Path) -> None:
    root = folders.write_inat(tmp_path / "inat")
    (tmp_path / "secret.jpg").write_bytes(b"\xff\xd8")
    lines = (root / "final_pairs.csv").read_text().splitlines()
    fields = lines[1].split(",")
    # "Genus, sp" is one quoted field, so that later ones stand one place further on.
    place = lines[0].split(",").index(column) + 1
    fields[place] = value
    (root / "final_pairs.csv").write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]) + "\n")
    refused(lambda: inaturalist.read(root), "final_pairs.csv:2: ", column)


@pytest.mark.parametrize("count", ["²", "9" * 5000])
def test_counts_that_are_no_number(count: str, tmp_path: Path) -> None:
    head = "observation_id,common_name,relative_path,image_1,image_2,photo_count"
    (tmp_path / "l.csv").write_text(f"{head}\n1,Wren,images/a,photo_1.jpg,photo_2.jpg,{count}\n", encoding="utf-8")
    (row,) = inaturalist.rows(tmp_path, tmp_path / "l.csv")
    assert row.position("image_1") == 1


@pytest.mark.parametrize("class_id", ["²", "9" * 5000])
def test_class_ids_that_are_no_number(class_id: str, tmp_path: Path) -> None:
    dataset = nabirds.read(folders.write_nabirds(tmp_path / "nabirds"))
    (tmp_path / "l.csv").write_text(f"class_id,image_1,image_2\n{class_id},a/²/b.jpg,c.jpg\n", encoding="utf-8")
    problems = Problems()
    pair_lists.report_all([tmp_path / "l.csv"], problems, dataset, published=False)
    refused(problems.refuse, "l.csv:2: ")


@pytest.mark.parametrize("class_id", ["²", "9" * 5000])
def test_verdicts_on_classes_that_are_no_number(class_id: str, tmp_path: Path) -> None:
    dataset = nabirds.read(folders.write_nabirds(tmp_path / "nabirds", per_class=2))
    sides = [example.image.relative_to(dataset.root).as_posix() for example in dataset.examples[:2]]
    rows = (verdicts.COLUMNS, (class_id, *sides, "Ann", "accept"))
    parsers.write_table(tmp_path / "v.csv", *rows)
    refused(lambda: verdicts.read([tmp_path / "v.csv"], dataset), "v.csv:2: class_id")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("x/" * 3000 + "a.png,Teal,", "leaves the folder"),
        ("x" * 300 + ",Teal,", "leaves the folder"),
        ("../.,Teal,", "leaves the folder"),
        ("./.,Teal,", "image"),
        ("a.png,Teal,99999999999 2 1", "keypoints: found"),
    ],
)
def test_manifests(row: str, told: str, tmp_path: Path) -> None:
    Image.new("L", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "manifest.csv").write_text(f"image,class,keypoints\n{row}\n")
    refused(lambda: manifest.read(tmp_path), "manifest.csv:2: ", told)


# ------------------------------------------------------------------------------------------------------------
# NABirds, keypoints, iNaturalist 2021
# ------------------------------------------------------------------------------------------------------------


def _first_line(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = path.read_text().splitlines()
    lines[0] = " ".join(change(lines[0].split()))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sizes.txt", lambda w: [w[0], "9223372036854775808", w[2]]),
        ("sizes.txt", lambda w: [w[0], "2147483648", w[2]]),
        ("images.txt", lambda w: [w[0], "."]),
        ("parts/part_locs.txt", lambda w: [*w[:2], "4294967301", *w[3:]]),
        ("parts/part_locs.txt", lambda w: [*w[:2], "9" * 30, *w[3:]]),
        ("image_class_labels.txt", lambda w: [w[0], "9" * 30]),
    ],
    ids=["size of 64 bits", "size of 32 bits", "the folder itself", "point of 33 bits", "point of 100", "class"],
)
def test_lists_of_nabirds(name: str, change: Callable[[list[str]], list[str]], tmp_path: Path) -> None:
    root = folders.write_nabirds(tmp_path / "nabirds", per_class=2)
    _first_line(root / name, change)
    refused(lambda: nabirds.read(root), f"{name}:1: ")


def test_an_odd_folder_name_is_no_class(tmp_path: Path) -> None:
    root = folders.write_nabirds(tmp_path / "nabirds", per_class=2)
    old, *_ = (root / "images.txt").read_text().split("\n")[0].split()[1:]
    new = f"²/{Path(old).name}"
    (root / "images" / "²").mkdir()
    (root / "images" / old).rename(root / "images" / new)
    (root / "images.txt").write_text((root / "images.txt").read_text().replace(old, new))
    assert any(e.image == root / "images" / new for e in nabirds.read(root).examples)


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30])
def test_keypoints_that_no_picture_has(value: int, tmp_path: Path) -> None:
    rows = [[0, 0, 0]] * 10 + [[value, 0, 1]]
    (tmp_path / "keypoints.json").write_text(json.dumps({"a": rows}))
    refused(lambda: keypoint_file.read(tmp_path / "keypoints.json"), "keypoints.json: a: ")


@pytest.mark.parametrize("read", [keypoint_file.read, nabirds.read_captions], ids=["keypoints", "captions"])
def test_deep_json(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"a":' * 50_000)
    refused(lambda: read(tmp_path / "f.json"), "f.json: not JSON (nested too deeply)")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["images"][0].update(file_name="../secret/a.jpg"), "leaves the folder"),
        (lambda c: c["images"][0].update(file_name="/etc/hostname"), "leaves the folder"),
        (lambda c: c["images"][0].update(file_name=3), "file_name: found 3"),
        (lambda c: c["images"][0].pop("file_name"), "missing file_name"),
        (lambda c: c["licenses"].insert(0, "x"), "not a list of iNaturalist 2021"),
        (lambda c: c["annotations"][0].update(image_id=1e400), "not a list of iNaturalist 2021"),
        (lambda c: c["annotations"][0].update(image_id=2**70), "not a list of iNaturalist 2021"),
    ],
)
def test_lists_of_inaturalist_2021(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    parsers._inat21(tmp_path / "inat21")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.jpg").write_bytes(b"\xff\xd8")
    path = tmp_path / "inat21" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(lambda: inat21.read(path.parent), "train.json: ", told)


def test_a_deep_list_of_inaturalist_2021(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"images": ' + "[" * 50_000)
    refused(lambda: inat21.read(tmp_path), "nested too deeply")


# ------------------------------------------------------------------------------------------------------------
# Unpacked pictures, prepared folders
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("rows"), "rows: found None"),
        (lambda c: c["rows"][0].update(image="../../../secret.jpg"), "expected the path of a file below the folder"),
        (lambda c: c["rows"][0].update(image="/etc/hostname"), "expected the path of a file below the folder"),
        (lambda c: c["rows"][0].update(mask="../secret.png"), "expected the path of a file below the folder"),
        (lambda c: c["rows"][0].update(image="images/z.jpg"), "expected the path of a file below the folder"),
        (lambda c: c["rows"][0].update(mask=3), "rows.0.mask: found 3, expected a text"),
        (lambda c: c["rows"][0].pop("class_id"), "rows.0: missing class_id"),
        (lambda c: c["rows"][0].update(box=[0, 4, 5]), "rows.0.box: found [0, 4, 5], expected a list of 4"),
        (lambda c: c["rows"][0].update(split="x"), "rows.0.split: found 'x'"),
    ],
)
def test_an_index_that_came_with_a_folder(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    parsers._tfds(tmp_path)
    path = tmp_path / "unpacked" / unpack.INDEX
    content = json.loads(path.read_text())
    assert len(tfds.read(tmp_path).examples) == 2
    change(content)
    path.write_text(json.dumps(content))
    refused(lambda: tfds.read(tmp_path), f"{unpack.INDEX}: ", told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(name="../../x"), "a shard is named '../../x-train"),
        (lambda c: c.update(name=3), "name: found 3"),
        (lambda c: c.update(splits=["#"]), "splits.0: found '#'"),
        (lambda c: c.update(fileFormat=None), "fileFormat: found None"),
        (lambda c: c["splits"][0].update(shardLengths=7), "splits.0.shardLengths: found 7"),
    ],
)
def test_the_description_of_a_tfds_folder(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    parsers._tfds(tmp_path)
    content = json.loads((tmp_path / tfds.INFO).read_text())
    change(content)
    (tmp_path / tfds.INFO).write_text(json.dumps(content))
    refused(lambda: tfds.read(tmp_path), tfds.INFO, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("roles"), "missing roles"),
        (lambda c: c.update(made=-1), "made: found -1"),
        (lambda c: c.update(schema="\r"), "schema: found"),
        (lambda c: c["shards"][0].update(file="../x"), "expected the name of a file of the folder"),
        (lambda c: c["text"].update(file="/etc/x"), "expected the name of a file of the folder"),
        (lambda c: c["shards"][0].update(records=5), "found 5 records of 3 pictures"),
        (lambda c: c["ids"].pop(), "found other numbers of pictures"),
        (lambda c: c["captions"].__setitem__(0, -1), "out of range"),
        (lambda c: c["captions"].__setitem__(0, "0"), "captions.0: found '0'"),
        (lambda c: c["classes"].pop("9"), "such as '9'"),
        (lambda c: c.update(classes=1.5), "classes: found 1.5"),
        (lambda c: c.update(features={"file": 3}), "features: found {'file': 3}"),
        (lambda c: c.update(roles=[]), "found 0 roles"),
    ],
)
def test_manifests_of_prepared_folders(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    parsers._prepared(tmp_path / "prepared")
    path = tmp_path / "prepared" / loader.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(lambda: loader.open_prepared(path.parent), f"{loader.MANIFEST}: ", told)


# ------------------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------------------


def forged(**array: Any) -> bytes:
    """A record whose checksums are right and whose header lies."""
    whole = records.encode_record({"id": "a"}, {"x": np.arange(6, dtype=np.float32)})
    length = records._PREFIX.unpack_from(whole)[1]
    body = whole[records._PREFIX.size + length :]
    header = {"meta": {"id": "a"}, "arrays": {"x": {"dtype": "<f4", "shape": [6], "offset": 0} | array}}
    text = json.dumps(header | array.pop("header", {})).encode()
    checks = records._header_checksum(text), records.zlib.crc32(body)
    return records._PREFIX.pack(records.MAGIC, len(text), *checks) + text + body


def test_a_forged_record_that_tells_the_truth() -> None:
    _, arrays = records.decode_record(forged())
    np.testing.assert_array_equal(arrays["x"], np.arange(6))


@pytest.mark.parametrize(
    "array",
    [
        {"shape": [-1]},
        {"shape": [2**40]},
        {"shape": [2**31, 2**31, 0]},
        {"shape": [0] * 100},
        {"shape": 6},
        {"shape": ["6"]},
        {"shape": [10_000]},
        {"offset": -8},
        {"offset": 2**40},
        {"offset": "0"},
        {"dtype": "O"},
        {"dtype": "object"},
        {"dtype": "S1000000000"},
        {"dtype": ">f4"},
        {"dtype": None},
        {"header": {"meta": 3}},
        {"header": {"arrays": []}},
        {"header": {"arrays": {"x": 3}}},
    ],
    ids=str,
)
def test_records_that_lie(array: dict[str, Any]) -> None:
    with pytest.raises(records.RecordError):
        records.decode_record(forged(**array))


def test_a_shard_of_records_that_lie(tmp_path: Path) -> None:
    records.write_shard(tmp_path / "s", [forged(shape=[10_000])])
    reader = records.RecordReader([tmp_path / "s"])
    refused(lambda: reader.record(0), f"{tmp_path / 's'}: corrupt shard: record 0: array x")
    reader.close()
