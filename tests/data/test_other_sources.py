"""Manifest, prepared TFDS folders, iNaturalist 2021 and clips."""

import csv
import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nabla_jax import images
from nabla_jax.data import clips, inat21, pairs, read_dataset, scan_dataset
from nabla_jax.data.problems import Problems
from nabla_jax.errors import UserError
from tests.data.folders import write_nabirds


def draw(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


# ----------------------------------------------------------------------------------- manifest


def write_manifest(root: Path, rows: list[dict[str, str]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.fixture
def fish(tmp_path: Path) -> Path:
    for n in range(3):
        save(tmp_path / "fish" / "images" / f"{n}.png", draw(n))
    save(tmp_path / "fish" / "masks" / "1.png", np.full((20, 30), 255, np.uint8))
    rows = [
        {"image": "images/0.png", "class": "Zander  (Juvenile )", "taxonomy": "Fishes > Percidae", "split": "test",
         "box": "2 3 9 11", "keypoints": "5 6 1; 7 8 0", "individual": "z1", "caption": "A zander, small"},
        {"image": "images/1.png", "class": "Pike", "id": "the-pike", "licence": "CC0"},
        {"image": "images/2.png", "class": "Pike", "keypoints": "1 2 1;3 4 1", "credit": "Tūī"},
    ]  # fmt: skip
    return write_manifest(tmp_path / "fish", rows)


def test_a_manifest_says_everything_an_example_holds(fish: Path) -> None:
    dataset = read_dataset(fish)
    young, pike, other = dataset.examples
    assert (young.id, pike.id, other.id) == ("images/0", "the-pike", "images/2")
    assert (young.class_name, young.species, young.age, young.sex) == ("Zander (Juvenile)", "Zander", "juvenile", None)
    assert young.taxonomy == ("Fishes", "Percidae", "Zander (Juvenile)") and pike.taxonomy == ("Pike",)
    assert (young.split, pike.split, young.box) == ("test", "train", (3, 2, 11, 9))
    assert young.keypoints is not None and young.keypoints.tolist() == [[6, 5, 1], [8, 7, 0]]
    assert (young.individual, young.caption, pike.licence, other.credit) == ("z1", "A zander, small", "CC0", "Tūī")
    assert (pike.mask, young.mask) == (fish / "masks" / "1.png", None)
    assert pike.class_id == other.class_id == 0 and young.class_id == 1


def test_every_problem_of_a_manifest_is_found_at_once(fish: Path) -> None:
    path = fish / "manifest.csv"
    path.write_text(
        "image,class,split,box,keypoints,taxonomy\n"
        "images/0.png,Pike,val,1 2 3,,A\n"  # 2: split, box
        "images/9.png,Pike,,,,A\n"  # 3: missing
        "images/0.png,Pike,,,1 2,A\n"  # 4: id again, keypoints
        "images/1.png,Pike,,9 1 3 4,,B\n"  # 5: box, taxonomy
        ",Pike,,,,\n"  # 6: empty
        "../images/1.png,Pike,,,,A\n"  # 7: leaves
    )
    problems = Problems()
    dataset = scan_dataset(fish, problems)
    assert dataset.examples == ()
    assert sorted(p.line or 0 for p in problems.errors) == [2, 2, 3, 4, 4, 5, 5, 6, 7]
    with pytest.raises(UserError, match=r"manifest.csv:6: image is empty; .* \(and 8 more: .*--validate"):
        read_dataset(fish)
    path.write_text("image,class,taxon\n")
    with pytest.raises(UserError, match="unknown column 'taxon', expected taxonomy"):
        read_dataset(fish)


# --------------------------------------------------------------------------------------- TFDS

PREPARE = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

def encoded(pixels, format):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    out.seek(0)
    return out

class CaltechBirds2011(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("0.2.0")

    def _info(self):
        # The features of the published builder, which itself needs TensorFlow to run.
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=200),
            "label_name": tfds.features.Text(),
            "bbox": tfds.features.BBoxFeature(),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
        }))

    def _split_generators(self, manager):
        return {"train": self._generate_examples("train", 4), "test": self._generate_examples("test", 2)}

    def _generate_examples(self, split, count):
        for n in range(count):
            folder = ["001.Black_footed_Albatross", "002.Laysan_Albatross"][n % 2]
            name = f"CUB_200_2011/images/{folder}/{split}_{n}.jpg"
            rng = np.random.default_rng([n, len(split)])
            mask = np.full((20 + n, 40), 51, np.uint8)
            mask[5:10, 10:20] = 255 if n else 1
            if not n:
                mask[mask == 51] = 0
            yield name, {
                "image": encoded(rng.integers(0, 256, (20 + n, 40, 3), np.uint8), "jpeg"),
                "image/filename": name,
                "label": n % 2,
                "label_name": folder[4:].lower(),
                "bbox": tfds.features.BBox(ymin=5 / (20 + n), xmin=0.25, ymax=10 / (20 + n), xmax=0.5),
                "segmentation_mask": encoded(mask, "png"),
            }

CaltechBirds2011(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", PREPARE, str(root)], check=True, capture_output=True)
    return root / "caltech_birds2011"


def test_cub_is_read_without_tensorflow(prepared: Path) -> None:
    code = "import sys; from nabla_jax.data import read_dataset; print(len(read_dataset(sys.argv[1]).examples))"
    code += "; assert not [m for m in sys.modules if m.partition('.')[0] == 'tensorflow']"
    out = subprocess.run([sys.executable, "-c", code, str(prepared)], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "6"
    dataset = read_dataset(prepared)  # the version below is found, and its pictures are there already
    assert dataset.name == "caltech_birds2011" and dataset.root == prepared / "0.2.0"
    assert [len(dataset.of_split(split)) for split in ("train", "test")] == [4, 2]
    example = dataset.by_id["001.Black_footed_Albatross/train_2"]
    assert (example.class_id, example.class_name) == (0, "Black footed Albatross")
    assert example.box == (5, 10, 10, 20)
    pixels = np.random.default_rng([2, 5]).integers(0, 256, (22, 40, 3), np.uint8)
    out_bytes = io.BytesIO()
    Image.fromarray(pixels).save(out_bytes, "jpeg")
    assert example.image.read_bytes() == out_bytes.getvalue()  # not decoded and encoded again
    for e in dataset.examples:
        assert e.mask is not None
        mask = images.read_mask(e.mask, images.picture_size(e.image))
        rows, columns = np.nonzero(mask)
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == (5, 10, 10, 20) == e.box


def test_an_interrupted_unpacking_is_completed_and_a_whole_one_kept(prepared: Path) -> None:
    folder = prepared / "0.2.0" / "unpacked"
    image = folder / "images" / "002.Laysan_Albatross" / "train_1.jpg"
    index, before = (folder / "index.json").read_bytes(), image.stat().st_mtime_ns
    victim = read_dataset(prepared).examples[0].image
    data = victim.read_bytes()
    victim.unlink()
    (folder / "index.json").unlink()
    read_dataset(prepared)
    assert victim.read_bytes() == data and (folder / "index.json").read_bytes() == index
    assert image.stat().st_mtime_ns == before


def test_other_formats_and_missing_shards_are_refused(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "0.2.0"
    root.mkdir()
    for name in ("dataset_info.json", "features.json"):
        (root / name).write_text((prepared / "0.2.0" / name).read_text())
    with pytest.raises(UserError, match=r"train.array_record-00000-of-00001: no such shard"):
        read_dataset(root)
    info = json.loads((root / "dataset_info.json").read_text())
    (root / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="fileFormat: found 'tfrecord', expected 'array_record'.*--file_format"):
        read_dataset(root)


# --------------------------------------------------------------------------- iNaturalist 2021

BIRD = ("Animalia", "Chordata", "Aves", "Accipitriformes", "Accipitridae", "Accipiter", "cooperii")
GULL = ("Animalia", "Chordata", "Aves", "Charadriiformes", "Laridae", "Larus", "argentatus")
MOSS = ("Plantae", "Bryophyta", "Bryopsida", "Hypnales", "Hylocomiaceae", "Hylocomium", "splendens")


def write_inat21(root: Path) -> Path:
    """Three species; the pictures of the moss are not unpacked."""
    kinds = {7: ("Birds", BIRD), 12: ("Birds", GULL), 30: ("Plants", MOSS)}
    for split, numbers in (("train", range(6)), ("val", range(6, 9))):
        files = {}
        for n in numbers:
            c = sorted(kinds)[n % 3]
            folder = f"{split}/{c:05d}_{'_'.join(kinds[c][1])}"
            files[n] = (c, f"{folder}/pic{n}.jpg")
            if c != 30:
                save(root / folder / f"pic{n}.jpg", draw(n))
        listed: dict[str, Any] = {
            "info": {"year": 2021, "nested": [1, 2]},
            "images": [{"id": n, "width": 30, "height": 20, "file_name": file, "license": 0, "rights_holder": "Ann, B."}
                       for n, (_, file) in files.items()],
            "annotations": [{"id": n, "image_id": n, "category_id": c} for n, (c, _) in files.items()],
            "licenses": [{"id": 0, "name": "CC BY", "url": "http://creativecommons.org/licenses/by/4.0/"}],
            "categories": [
                {"id": c, "name": " ".join(r[5:]), "common_name": f"Name {c}", "supercategory": s, "kingdom": r[0],
                 "phylum": r[1], "class": r[2], "order": r[3], "family": r[4], "genus": r[5], "specific_epithet": r[6],
                 "image_dir_name": f"{c:05d}_{'_'.join(r)}"}
                for c, (s, r) in kinds.items()
            ],
        }  # fmt: skip
        (root / f"{split}.json").write_text(json.dumps(listed, indent=1 if split == "val" else None))
    return root


def test_inat21_is_restricted_to_a_taxon(tmp_path: Path) -> None:
    root = write_inat21(tmp_path)
    dataset = read_dataset(root)
    assert [e.id for e in dataset.examples] == ["pic0", "pic1", "pic3", "pic4", "pic6", "pic7"]
    hawk = dataset.by_id["pic0"]
    assert (hawk.class_id, hawk.class_name) == (7, "Accipiter cooperii")
    assert hawk.taxonomy == ("Aves", "Accipitriformes", "Accipitridae", "Accipiter", "Accipiter cooperii")
    assert (hawk.licence, hawk.credit) == ("http://creativecommons.org/licenses/by/4.0/", "Ann, B.")
    assert [len(dataset.of_split(split)) for split in ("train", "test")] == [4, 2]
    assert {e.class_id for e in read_dataset(root, taxon="Laridae").examples} == {12}
    assert len(read_dataset(root, taxon="Birds").examples) == 6
    with pytest.raises(UserError, match=r"picture train/00030_.*/pic2.jpg is missing; .*\(and 2 more"):
        read_dataset(root, taxon="")
    with pytest.raises(UserError, match="found no picture of Mammalia; set data.taxon"):
        read_dataset(root, taxon="Mammalia")


def test_inat21_folders_alone_say_the_same(tmp_path: Path) -> None:
    listed = read_dataset(write_inat21(tmp_path))
    for name in ("train.json", "val.json"):
        (tmp_path / name).unlink()
    found = read_dataset(tmp_path)
    keys = [(e.id, e.image, e.class_id, e.class_name, e.taxonomy, e.split) for e in listed.examples]
    assert sorted(keys) == sorted(
        (e.id, e.image, e.class_id, e.class_name, e.taxonomy, e.split) for e in found.examples
    )


def test_a_cut_list_is_named(tmp_path: Path) -> None:
    root = write_inat21(tmp_path)
    text = (root / "train.json").read_text()
    for cut in (len(text) // 3, len(text) - 1, 0):
        (root / "train.json").write_text(text[:cut])
        with pytest.raises(UserError, match="train.json: not a list of iNaturalist 2021"):
            read_dataset(root)


def test_streamed_items_equal_those_of_the_json_parser() -> None:
    value = {"a": [{"b": [1, "]"]}, {}], "c": {"d": []}, "e": [], "f": [{"g": "},{"}], "h": 1}
    expected = [(key, item) for key, items in value.items() if isinstance(items, list) for item in items]
    for indent in (None, 2):
        assert list(inat21.items(json.dumps(value, indent=indent))) == expected


# -------------------------------------------------------------------------------------- clips


def write_video(
    path: Path,
    frames: int,
    rate: int,
    size: tuple[int, int] = (32, 48),
    *,
    matrix: tuple[int, ...] | None = None,
    corner: int | None = None,
) -> None:
    """Frame n is of one grey, 5 n, but for the upper left corner, where one is given."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.set_display_matrix(matrix)
        for n in range(frames):
            pixels = np.full((*size, 3), 5 * n, np.uint8)
            if corner is not None:
                pixels[: size[0] // 2, : size[1] // 2] = corner
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def write_sequence(folder: Path, numbers: list[int]) -> None:
    for n in numbers:
        save(folder / f"frame_{n:05d}.jpg", np.full((16, 16, 3), 2 * n, np.uint8))


def test_frames_of_a_clip_are_the_gap_apart(tmp_path: Path) -> None:
    # 10 frames a second, with a hole: 0, 0.1, ... 1.4 s, then 3.0 and 3.2 s.
    write_sequence(tmp_path / "Cactus_Wren" / "nest", [*range(15), 30, 32])
    dataset = read_dataset(tmp_path, source="clips", frame_gap=0.5, frame_rate=10)
    assert [e.image.stem for e in dataset.examples] == [f"frame_{n:05d}" for n in (0, 5, 10, 30)]
    example = dataset.examples[0]
    assert example.species == "Cactus Wren" and example.individual == "Cactus_Wren/nest"
    assert example.taxonomy[-1] == example.class_name and example.taxonomy[1] == "Cactus Wren"
    with pytest.raises(UserError, match="found no frame rate, expected frames_per_second in clips.csv"):
        read_dataset(tmp_path, source="clips")


def test_a_video_is_decoded_once_at_the_gap(tmp_path: Path) -> None:
    write_video(tmp_path / "Wren" / "a.mp4", 40, 10)
    dataset = read_dataset(tmp_path, frame_gap=1.0)
    assert [e.image.name for e in dataset.examples] == [f"{1000 * n:09d}.png" for n in range(4)]
    for n, e in enumerate(dataset.examples):
        pixels = images.read_rgb(e.image)
        assert pixels.shape == (32, 48, 3) and abs(pixels.mean() - 50 * n) < 4
    times = [e.image.stat().st_mtime_ns for e in dataset.examples]
    assert [e.image.stat().st_mtime_ns for e in read_dataset(tmp_path).examples] == times
    assert len(read_dataset(tmp_path, frame_gap=0.5).examples) == 8
    (tmp_path / "Wren" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="b.mp4: cannot be decoded"):
        read_dataset(tmp_path)


def test_a_video_that_was_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    # (x, y) is shown at (-y, x): a quarter turn clockwise, in 16.16 fixed point.
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    write_video(tmp_path / "a.mov", 3, 1, matrix=quarter, corner=250)
    pixels = images.read_rgb(read_dataset(tmp_path).examples[0].image).astype(int)
    assert pixels.shape == (48, 32, 3)
    assert pixels[:20, 18:].min() > 200 and pixels[:20, :14].max() < 50 and pixels[28:].max() < 50


def test_pyav_is_asked_for_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a.mp4: videos are decoded by PyAV: pip install 'nabla_jax\[video\]'"):
        read_dataset(tmp_path)


def test_the_list_of_clips_joins_individuals(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "unlisted"):
        write_sequence(tmp_path / name, [0, 10, 20])
    (tmp_path / "clips.csv").write_text(
        "clip,species,individual,frames_per_second,split,licence\n"
        "one,Wren,Ann (red ring),10,test,CC0\ntwo,Wren,Ann (red ring),5,test,CC0\nthree,Wren,Bob,10,,\n"
    )
    dataset = read_dataset(tmp_path)
    assert len(dataset.examples) == 9 and len(dataset.classes) == 2
    assert {e.species for e in dataset.examples} == {"Wren"}
    assert [len(dataset.of_split(split)) for split in ("train", "test")] == [3, 6]
    # Every pair that a sampler draws is of one true individual.
    draw_pair = pairs.all_pairs(dataset.classes)
    for n in range(50):
        pair = draw_pair(0, n)
        assert dataset.examples[pair.subject].individual == dataset.examples[pair.target].individual
    found = clips.frame_pairs(dataset)
    assert [(p.subject_id, p.target_id) for p in pairs.benchmark_pairs(tmp_path, dataset)[::2]] == found
    assert len(found) == 3 + 1 and len({id for pair in found for id in pair}) == 8
    # As a benchmark: those pairs in both directions, unless a list names others.
    both = [(first, second) for pair in found for first, second in (pair, pair[::-1])]
    assert [(p.subject_id, p.target_id) for p in pairs.benchmark_pairs(tmp_path, dataset)] == both
    names = [dataset.by_id[id].image.relative_to(tmp_path) for id in found[0]]
    (tmp_path / "pairs.csv").write_text(f"image_1,image_2\n{names[0]},{names[1]}\n")
    assert [(p.subject_id, p.target_id) for p in pairs.benchmark_pairs(tmp_path, dataset)] == both[:2]
    (tmp_path / "pairs.csv").unlink()
    (tmp_path / "clips.csv").write_text("clip,frames_per_second\none,0\nnone,1\n")
    problems = Problems()
    scan_dataset(tmp_path, problems)
    assert [(p.line, p.what.split(":")[0]) for p in problems.errors] == [
        (2, "frames_per_second"),
        (3, f"found no clip {tmp_path / 'none'}"),
    ]


def test_auto_recognises_each_source(tmp_path: Path) -> None:
    root = write_nabirds(tmp_path / "nabirds")
    assert read_dataset(root) == read_dataset(root, source="nabirds")
    with pytest.raises(UserError, match="data.source: found 'birds', expected one of auto, manifest"):
        read_dataset(root, source="birds")
