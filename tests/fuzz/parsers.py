"""Every reader of files and words from outside, with seeds by the product's own writers and checks by other readers."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from PIL import Image

from nabla_jax import config as configs
from nabla_jax import evaluate, fetch, flow, images, plates, runs
from nabla_jax.checkpoints import adapters, pipeline, safetensors_io
from nabla_jax.checkpoints.adapter_formats import Pair
from nabla_jax.curation import verdicts
from nabla_jax.data import (
    Dataset,
    clips,
    inat21,
    keypoint_file,
    loader,
    manifest,
    nabirds,
    pair_lists,
    pairs,
    read_dataset,
    records,
    tfds,
    unpack,
    validate,
)
from nabla_jax.data.problems import Problems
from nabla_jax.download import Answer, Unobtained, retry_after
from nabla_jax.errors import UserError
from nabla_jax.metrics import summary
from nabla_jax.metrics.oracle import open_oracle
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import autoencoder, clip, dinov2, flux, keypoint_head, lpips, redux, siglip, t5
from nabla_jax.report import pages, reading
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.oracle import Oracle
from tests.data import folders, pair_files
from tests.fuzz import mutate
from tests.fuzz.engine import Parser

Read = Callable[[bytes], object]


def parsers(root: Path) -> list[Parser]:
    """All of them; their files lie below ``root``."""
    made: list[Parser] = []
    for group in (_configurations, _lists, _folders, _lines, _runs, _pictures, _records, _tensors, _networks, _answers):
        folder = root / group.__name__.strip("_")
        folder.mkdir()
        made += group(folder)
    return made


def _file(path: Path, read: Callable[[Path], object]) -> Read:
    """Writes the input to ``path``, then reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def written(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return written


def write_table(path: Path, *rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _seeded(path: Path, mutation: Any, read: Callable[[Path], object], **fields: Any) -> Parser:
    """A parser of one file of a folder that is whole: the file as it is there is the seed."""
    return Parser(fields.pop("name", path.name), [path.read_bytes()], mutation, _file(path, read), **fields)


def _rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV list as the standard library reads it, texts without outer spaces."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(line for line in file if line.strip())
        names = [name.strip() for name in table.fieldnames or []]
        return [dict(zip(names, (str(v).strip() for v in row.values()), strict=False)) for row in table]


def _check_inside(dataset: Dataset, root: Path) -> None:
    for example in dataset.examples:
        for path in (example.image, example.mask, example.depth):
            if path is not None:
                assert os.path.normpath(path).startswith(f"{root}{os.sep}"), path
                assert path.is_file(), path


# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------

FILE = "configs/omk_fill.py"


def _configurations(folder: Path) -> list[Parser]:
    keys = list(configs.flatten(configs.to_dict(configs.load(f"{FILE}:toy"))))
    content = configs.read_values(f"{FILE}:toy")
    plain = folder / "plain.py"
    plain.write_text(f"def get_config(arg=''):\n    return {content!r}\n")

    def words(rng: random.Random, _: Sequence[bytes]) -> bytes:
        plainly = ("toy", "steps=3", "lr=0.5", "toyy", "", "=", "steps=", "a=b=c", *mutate.TEXTS[:40])
        odd = (*mutate.NUMBERS, *mutate.TEXTS)
        items = rng.choices(plainly, k=rng.randrange(4))
        items += [f"{rng.choice(keys)}={rng.choice(odd)}" for _ in range(rng.randrange(2))]
        file = rng.choice((*[str(plain)] * 3, FILE, "", "/", "configs", "README.md"))
        found = [f"--config={file}:{','.join(items)}"]
        for _ in range(rng.randrange(4)):
            key, value = rng.choice(keys), rng.choice((*odd, "true", "1,2", "(0.9, 0.99)", "fill"))
            if rng.random() < 0.1:
                key = rng.choice((key[:-1], key + ".x", key.split(".")[0], "", ".", "a.b.c", rng.choice(mutate.TEXTS)))
            found += [f"--config.{key}={value}"] if rng.random() < 0.8 else [f"--config.{key}", value]
        return "\x1f".join(found[: rng.randrange(1, 9)]).encode("utf-8", "surrogatepass")

    def command(data: bytes) -> None:
        argv = data.decode("utf-8", "surrogatepass").split("\x1f")
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                config, _ = configs.parse_command(argv, "fuzz")
        except SystemExit as end:  # how argparse refuses, having said why
            assert end.code == 2, end.code
            raise UserError(" ".join(said.getvalue().split())) from None
        _check_config(config)

    def values(data: bytes) -> None:
        _check_config(configs.from_dict(json.loads(data), "configuration"))

    seed = "\x1f".join(
        ["--config", f"{plain}:steps=3", "--config.data.root=x", "--config.benchmarks.a.b", "y"]
    ).encode()
    return [
        Parser("command line", [seed], words, command, weight=0.5),
        Parser("configuration", [json.dumps(content).encode()], _valid(mutate.objects), values, weight=2),
    ]


def _valid(change: Any) -> Any:
    """Only what is JSON still: the reader takes values, not text."""

    def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        while True:
            data: bytes = change(rng, seeds)
            try:
                json.loads(data)
            except (ValueError, RecursionError):
                continue
            return data

    return mutated


def _check_config(config: configs.Config) -> None:
    plain = configs.to_dict(config)
    for key, value in configs.flatten(plain).items():
        for number in value if isinstance(value, tuple) else (value,):
            assert not isinstance(number, float) or math.isfinite(number), key
    assert configs.from_dict(json.loads(json.dumps(plain))) == config


# ------------------------------------------------------------------------------------------------------------
# Lists
# ------------------------------------------------------------------------------------------------------------


def _lists(folder: Path) -> list[Parser]:
    pair_files.write_seen(folder / "seen.csv", 8, 5)
    pair_files.write_unseen(folder / "unseen.csv", 24)
    dataset = nabirds.read(folders.write_nabirds(folder / "nabirds"))

    def report(path: Path) -> None:
        problems = Problems()
        (found,) = pair_lists.report_all([path], problems, dataset)
        pair_lists.describe(found)
        if not problems.errors:
            assert found.rows == len(_rows_of(path))
            assert found.rows == found.unique + len(found.exact) + len(found.mirrored)
        problems.refuse()

    def wanted(path: Path) -> None:
        for photo in fetch.wanted(path, fetch.read_list(path)):
            assert os.path.normpath(f"/out/{photo.path}").startswith("/out/images/"), photo.path
            assert photo.observation.isascii() and (photo.id is None) != (photo.position is None)

    def benchmark(path: Path) -> None:
        assert len(pairs.benchmark_pairs(path, dataset)) == 2 * len(_rows_of(path))

    lists = [(folder / f"{name}.csv").read_bytes() for name in ("nabirds/pairs", "seen", "unseen")]
    commas = mutate.text(",")
    found = [
        Parser("pair lists", lists, commas, _file(folder / "any.csv", report), weight=2),
        Parser("lists to fetch", lists[1:], commas, _file(folder / "fetch.csv", wanted)),
        _seeded(folder / "nabirds" / "pairs.csv", commas, benchmark, name="benchmark's pairs"),
    ]

    first, second = dataset.examples[0], dataset.examples[1]
    sides = [example.image.relative_to(dataset.root).as_posix() for example in (first, second)]
    judged = [(first.class_id, *sides, name, said) for name, said in (("Ann", "accept"), ("Bo", "reject"))]
    write_table(folder / "verdicts.csv", verdicts.COLUMNS, *judged)

    def judgements(path: Path) -> None:
        said = {(v.reviewer, v.verdict) for v in verdicts.read([path], dataset)}
        assert said == {(row["reviewer"], row["verdict"]) for row in _rows_of(path)}

    found.append(_seeded(folder / "verdicts.csv", commas, judgements))

    Image.new("RGB", (8, 6)).save(folder / "a.png")
    Image.new("L", (8, 6)).save(folder / "mask.png")
    (folder.parent / "secret.png").write_bytes((folder / "a.png").read_bytes())
    write_table(
        folder / "birds.csv", (*plates.BIRDS, "mask"), ("Teal", "a.png", "mask.png"), ("Crow, big", "./a.png", "")
    )
    write_table(folder / "arrows.csv", plates.ARROWS, ("Teal", 5, 7, "white, bar"), ("*", 0, 0, ""))

    def birds(path: Path) -> None:
        for bird, row in zip(plates.read_birds(path), _rows_of(path), strict=True):
            assert bird.label == row["label"]
            for file in (bird.picture, bird.mask):
                assert file is None or os.path.normpath(file).startswith(f"{folder}{os.sep}")

    def arrows(path: Path) -> None:
        for arrow, row in zip(plates.read_arrows(path, ("Teal",), 6, 8), _rows_of(path), strict=True):
            assert 0 <= arrow.row < 6 and 0 <= arrow.column < 8
            assert (arrow.label, arrow.row, arrow.column) == (row["label"], int(row["row"]), int(row["column"]))

    scores = [
        summary.PairScore("1_1in2", "a", "b", 3, "Ducks", "Teal, blue", "", 99, rmse=12.25, rank=1, lineup=10),
        summary.PairScore("1_2in1", "b", "a", 3, "Ducks", "Teal, blue", "male", 7, ssim=-0.5, excluded="no mask"),
    ]
    (folder / "scores.csv").write_text(summary.to_csv(scores))

    def scored(path: Path) -> None:
        found = summary.from_csv(path)
        assert [score.pair.strip() for score in found] == [row["pair"] for row in _rows_of(path)]

    found += [
        _seeded(folder / "birds.csv", commas, birds),
        _seeded(folder / "arrows.csv", commas, arrows),
        _seeded(folder / "scores.csv", commas, scored, name="scores of pairs"),
    ]
    return found


# ------------------------------------------------------------------------------------------------------------
# Data folders
# ------------------------------------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Parser]:
    (folder / "secret.jpg").write_bytes(b"\xff\xd8")
    found = _nabirds(folder / "nabirds")

    root = folders.write_inat(folder / "inat")

    def inat(path: Path) -> None:
        dataset = read_dataset(path.parent)
        _check_inside(dataset, path.parent)

    photo = {"image": "images/Cactus_Wren/111/9001.jpg", "license_code": "cc-by", "attribution": "(c) Ann"}
    (root / "manifest.jsonl").write_text(json.dumps(photo) + "\n")
    found += [
        _restoring(root / "final_pairs.csv", mutate.text(","), inat),
        _restoring(root / "captions_short.json", mutate.objects, inat, weight=0.5),
        _restoring(root / "manifest.jsonl", mutate.rows, inat, name="fetched photos", weight=0.5),
    ]

    root = folder / "manifest"
    for name in ("images/a.png", "images/b.png", "masks/a.png", "c.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(root / name)
    spots = "1 2 1; 3 4 0"
    lists = [
        ("image", "class", "id", "split", "taxonomy", "box", "mask", "depth", "keypoints", "caption"),
        (
            "images/a.png",
            "Teal (male)",
            "a",
            "train",
            "Birds > Ducks",
            "1 1 4 5",
            "",
            "c.png",
            spots,
            "A teal, swimming",
        ),
        ("images/b.png", "Teal (male)", "b", "test", "Birds > Ducks", "", "masks/a.png", "", spots, ""),
        ("c.png", "Crow", "", "", "", "", "", "", "", ""),
    ]
    write_table(root / "manifest.csv", *lists)

    def listed(path: Path) -> None:
        dataset = read_dataset(path.parent)
        _check_inside(dataset, path.parent)
        rows = _rows_of(path)
        assert [e.image for e in dataset.examples] == [path.parent / row["image"] for row in rows]
        assert [e.class_name for e in dataset.examples] == [manifest.normalise_name(row["class"]) for row in rows]
        for example, row in zip(dataset.examples, rows, strict=True):
            if example.keypoints is not None:
                numbers = [int(word) for word in row["keypoints"].replace(";", " ").split()]
                assert example.keypoints[:, [1, 0, 2]].reshape(-1).tolist() == numbers

    found.append(_seeded(root / "manifest.csv", mutate.text(","), listed, weight=2))

    ids = {"a": [[i, 2 * i, 1] for i in range(11)], "b": [[0, 0, 0]] * 11}
    (root / "manifest.csv").write_text("image,class,id\nimages/a.png,Teal,a\nimages/b.png,Crow,b\n")
    keypoint_file.write(folder / "keypoints.json", ids)

    def keypoints(path: Path) -> None:
        dataset = keypoint_file.add(manifest.read(path.parent), problems := Problems())
        problems.refuse()
        stored = json.loads(path.read_text(encoding="utf-8"))
        for example in dataset.examples:
            if example.id in stored:
                assert example.keypoints is not None
                assert example.keypoints[:, [1, 0, 2]].tolist() == stored[example.id]

    own = folder / "keypoints"
    own.mkdir()
    for name in ("manifest.csv", "images"):
        (own / name).symlink_to(root / name)
    (own / "keypoints.json").write_bytes((folder / "keypoints.json").read_bytes())
    # The list above is exchanged while it is tested itself: this folder has a copy.
    (own / "manifest.csv").unlink()
    (own / "manifest.csv").write_text("image,class,id\nimages/a.png,Teal,a\nimages/b.png,Crow,b\n")
    found.append(_seeded(own / "keypoints.json", mutate.objects, keypoints))
    found += _inat21(folder / "inat21") + _clips(folder / "clips") + _tfds(folder / "tfds")
    return found


def _nabirds(root: Path) -> list[Parser]:
    folders.write_nabirds(root, per_class=2)

    def read(path: Path) -> None:
        problems = Problems()
        dataset = nabirds.scan(root, problems)
        _check_inside(dataset, root)
        problems.refuse()
        sizes = nabirds.read_sizes(root)
        for example in dataset.examples:
            if example.box is not None and example.id in sizes:
                (height, width), (top, left, bottom, right) = sizes[example.id][1], example.box
                assert 0 <= top < bottom <= height and 0 <= left < right <= width
        if path.name == "part_locs.txt":
            _check_parts(path, dataset)

    found = []
    for name in (*nabirds.REQUIRED, "bounding_boxes.txt", "sizes.txt", "photographers.txt", "parts/part_locs.txt"):
        found.append(_restoring(root / name, mutate.text(" "), read, weight=0.5))
    found.append(_restoring(root / "captions.json", mutate.objects, read, weight=0.5))
    return found


def _restoring(path: Path, mutation: Any, read: Callable[[Path], object], **fields: Any) -> Parser:
    """Like ``_seeded`` for a folder in which other files are read too: the file is whole again afterwards."""
    whole = path.read_bytes()
    inner = _seeded(path, mutation, read, **fields)

    def restored(data: bytes) -> None:
        try:
            inner.read(data)
        finally:
            path.write_bytes(whole)

    return dataclasses.replace(inner, read=restored)


def _check_parts(path: Path, dataset: Dataset) -> None:
    stored: dict[str, dict[int, list[int]]] = {}
    for line in path.read_bytes().decode("utf-8-sig").split("\n"):
        if line.split():
            id, part, *numbers = line.split()
            stored.setdefault(id, {})[int(float(part))] = [int(float(n)) for n in numbers]
    parts = sorted({part for rows in stored.values() for part in rows})
    for example in dataset.examples:
        if example.keypoints is not None:
            expected = [stored[example.id].get(part, [0, 0, 0]) for part in parts]
            assert example.keypoints[:, [1, 0, 2]].tolist() == expected


def _inat21(root: Path) -> list[Parser]:
    ranks = dict(
        zip(inat21.RANKS, ("Animalia", "Chordata", "Aves", "Anseriformes", "Anatidae", "Anas", "crecca"), strict=True)
    )
    name = "00001_Animalia_Chordata_Aves_Anseriformes_Anatidae_Anas_crecca"
    for file in ("a.jpg", "b.jpg"):
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        (root / "train" / name / file).write_bytes(b"\xff\xd8")
    content = {
        "info": {"year": 2021},
        "images": [
            {"id": i, "file_name": f"train/{name}/{file}", "license": 1, "rights_holder": "Ann"}
            for i, file in enumerate(("a.jpg", "b.jpg"))
        ],
        "categories": [{"id": 5, "name": "Anas crecca", "supercategory": "Birds", **ranks}],
        "annotations": [{"id": 9 + i, "image_id": i, "category_id": 5} for i in range(2)],
        "licenses": [{"id": 1, "name": "cc-by", "url": "http://x"}],
    }
    (root / "train.json").write_text(json.dumps(content))

    def read(path: Path) -> None:
        _check_inside(read_dataset(path.parent, source="inat21"), root)

    return [_seeded(root / "train.json", mutate.objects, read, name="iNaturalist 2021's lists")]


def _clips(root: Path) -> list[Parser]:
    for name in ("Blue_Tit/walk", "Blue_Tit/fly"):
        (root / name).mkdir(parents=True)
        for number in (1, 31, 62):
            (root / name / f"{number:06d}.jpg").write_bytes(b"\xff\xd8")
    columns = ("clip", "species", "individual", "frames_per_second", "split", "credit")
    write_table(
        root / "clips.csv",
        columns,
        ("Blue_Tit/walk", "", "one", 30, "train", "A, B"),
        ("Blue_Tit/fly", "Tit", "", 25.5, "", ""),
    )

    def read(path: Path) -> None:
        dataset = clips.read(path.parent)
        _check_inside(dataset, root)
        clips.frame_pairs(dataset)

    return [_seeded(root / "clips.csv", mutate.text(","), read, name="clips.csv")]


def _tfds(root: Path) -> list[Parser]:
    """The files beside the shards, and the index of what was unpacked from them."""
    info = {
        "name": "birds", "version": "1.0.0", "fileFormat": "array_record",
        "splits": [{
            "name": "train", "shardLengths": ["2"], "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }],
    }  # fmt: skip
    (root / "unpacked" / "images").mkdir(parents=True)
    (root / "dataset_info.json").write_text(json.dumps(info))
    (root / "features.json").write_text(json.dumps({"featuresDict": {"features": {"image": {}, "label": {}}}}))
    (root / "birds-train.array_record-00000-of-00001").write_bytes(b"shard")
    rows = [
        {"id": n, "image": f"images/{n}.jpg", "class_id": 1, "class_name": "Tit", "split": "train", "box": [0, 0, 4, 5]}
        for n in "ab"
    ]
    for row in rows:
        (root / "unpacked" / str(row["image"])).write_bytes(b"\xff\xd8")
    made_from = {"name": "birds", "version": "1.0.0", "shards": {"birds-train.array_record-00000-of-00001": 5}}
    runs.write_json(root / "unpacked" / "index.json", {"made_from": made_from, "rows": rows})

    def read(path: Path) -> None:
        _check_inside(tfds.read(root), root)

    def indexed(path: Path) -> None:
        # A changed "made_from" means that the shards are read again, which is TFDS' own matter.
        def make(_: Path) -> list[dict[str, Any]]:
            raise UserError("made again")

        for row in unpack.rows(path.parent, made_from, make, tfds._Picture, ("image", "mask")):
            assert isinstance(row, dict)
        tfds.read(root)
        _check_inside(tfds.read(root), root)

    def shards(path: Path) -> None:
        problems = Problems()
        found = tfds._json(path, tfds._Info, problems)
        problems.refuse()
        assert found is not None
        if all(map(tfds.is_file_name, tfds._shards(found))):
            return
        tfds.scan(root, problems)
        assert problems.errors

    return [
        _restoring(root / "dataset_info.json", mutate.objects, shards, name="TFDS' dataset_info.json", weight=0.5),
        _restoring(root / "unpacked" / "index.json", mutate.objects, indexed, name="index of unpacked pictures"),
    ]


# ------------------------------------------------------------------------------------------------------------
# JSON lines, runs, prepared folders, results
# ------------------------------------------------------------------------------------------------------------


def _lines(folder: Path) -> list[Parser]:
    file = runs.JsonLines(folder / "seed.jsonl")
    file.extend([{"step": n, "loss": 0.5 / n, "id": "ä", "more": [n, None, {"x": 1.5}]} for n in (1, 2, 3)])
    file.close()

    def read(path: Path) -> None:
        log = runs.JsonLines(path)
        expected = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        log.append({"step": 4})
        log.close()
        assert repr(runs.read_rows(path)) == repr([*expected, {"step": 4}])
        assert all(isinstance(row, dict) for row in expected)

    return [
        Parser(
            "JSON lines",
            [(folder / "seed.jsonl").read_bytes()],
            mutate.rows,
            _file(folder / "any.jsonl", read),
            weight=2,
        )
    ]


def _runs(folder: Path) -> list[Parser]:
    content = configs.read_values(f"{FILE}:toy")
    content["train"]["workdir"] = str(folder / "run")
    config = configs.from_dict(content)
    with runs.open_run(config) as run:
        runs.write_environment(run.environment)
        runs.write_atomic(run.last, "step_12")

    def reopened(path: Path) -> None:
        written = path.read_bytes()
        with runs.open_run(config) as again:
            before, now = json.loads(written), json.loads(again.config.read_bytes())
        for key in ("conditioning", "lora", "optim"):
            assert all(now[key][name] == value for name, value in before.get(key, {}).items() if name in now[key])

    def environment(path: Path) -> None:
        runs.write_environment(path)
        path.write_bytes(b"")

    def last(path: Path) -> None:
        step = run.last_step()
        assert step is not None and path.read_text().strip().removeprefix("step_").lstrip("0") in (str(step), "")

    found = [
        _seeded(run.config, mutate.objects, reopened, name="run folders", weight=0.5),
        _seeded(run.environment, mutate.objects, environment, name="environment.json", weight=0.25),
        _seeded(run.last, mutate.text("_"), last, name="last step", weight=0.25),
    ]
    return found + _prepared(folder / "prepared") + _results(folder / "results")


def _prepared(folder: Path) -> list[Parser]:
    folder.mkdir()
    made = "f" * 64

    def record(index: int, role: str) -> bytes:
        moments = np.full((2, 2, 2), index, np.float16)
        arrays = {"moments": moments} | ({"mask": np.ones((2, 2), np.uint8)} if role == "target" else {})
        return records.encode_record({"made": made, "index": index, "role": role}, arrays)

    name = loader.shard_name(0, 1)
    records.write_shard(folder / name, [record(i, role) for i in range(3) for role in ("target", "subject")])
    text = {"prompt_embeds": np.ones((2, 4, 3), np.float32), "pooled": np.zeros((2, 3), np.float32)}
    safetensors_io.save_tree(text, folder / loader.TEXT)
    content = {
        "schema": loader.SCHEMA, "settings": {"size": 16}, "made": made, "counts": {"pictures": 3},
        "roles": ["target", "subject"], "features": 0, "moments": [2, 2, 2],
        "shards": [
            {"file": name, "pictures": 3, "records": 6, "bytes": (folder / name).stat().st_size, "sha256": "0" * 64},
        ],
        "text": {"file": loader.TEXT, "bytes": (folder / loader.TEXT).stat().st_size, "sha256": "1" * 64},
        "ids": ["a", "b", "c"], "class_ids": [4, 4, 9], "captions": [0, 1, 0],
        "classes": {
            "4": {"name": "Tit", "taxonomy": ["Birds", "Tit"], "positions": [0, 1]},
            "9": {"name": "Crow", "taxonomy": ["Birds", "Crow"], "positions": [2]},
        },
    }  # fmt: skip
    runs.write_json(folder / loader.MANIFEST, content)

    def read(path: Path) -> None:
        opened = loader.open_prepared(path.parent)
        try:
            assert all(os.path.dirname(os.path.normpath(p)) == str(folder) for p in opened.records.paths)
            classes = opened.classes
            assert sum(map(len, classes.values())) == len(opened.ids) == len(opened.captions)
            assert set(classes) <= set(opened.taxonomy)
            for position in range(len(opened.ids)):
                found = opened.read(position, opened.manifest["roles"])
                assert found["target"].dtype == np.float16
                opened.prompt_embeds[opened.captions[position]]
        finally:
            opened.records.close()

    return [
        _restoring(folder / loader.MANIFEST, mutate.objects, read, name="prepared folders"),
        _restoring(folder / loader.TEXT, mutate.safetensors, read, name="text embeddings", weight=0.5),
    ]


def _results(folder: Path) -> list[Parser]:
    """What evaluate wrote, as the report reads it."""
    scores = [
        summary.PairScore(f"{n}_1in2", "a", "b", n, "Ducks", "Teal", "", 9, rmse=10.0 + n, ssim=0.5) for n in range(4)
    ]
    rows = summary.rows("toy", "nabla", scores)
    about = {
        "nabla_jax": "0.1", "version": 3, "seed": 0, "references": ["copy"], "missing": [],
        "benchmarks": [{
            "name": "nabla", "root": "data/x", "list": None, "pairs": 4, "classes": 4, "excluded": {}, "duplicates": 0,
            "fingerprint": "abc", "oracle": None,
        }],
        "sets": [{
            "model": "toy", "benchmark": "nabla", "pictures": 4, "shuffled": 0, "fingerprint": "x", "files": {},
            "seed": [1],
        }],
    }  # fmt: skip
    (folder / "pairs" / "nabla").mkdir(parents=True)
    for model in ("toy", "copy"):
        (folder / "pairs" / "nabla" / f"{model}.csv").write_text(summary.to_csv(scores))
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 4, "clusters": 4, "method": "t", "reason": ""}
    head = {"model": "toy", "benchmark": "nabla", "metric": "rmse"}
    runs.write_json(folder / "summary.json", rows)
    runs.write_json(folder / "breakdown.json", [head | {"group": "order", "value": "Ducks"} | interval])
    runs.write_json(
        folder / "comparisons.json", [head | {"baseline": "copy", "relative": 0.1, "p": 0.5, "p_holm": 1.0} | interval]
    )
    runs.write_json(folder / "evaluation.json", about)

    def read(path: Path) -> None:
        found = reading.read({"one": path.parent})
        found.metrics, found.of_kind("model"), found.find("toy", "nabla", "rmse")

    names = ("evaluation.json", "summary.json", "comparisons.json", "breakdown.json")
    found = [_restoring(folder / name, mutate.objects, read, weight=0.5) for name in names]
    return found + _made(folder / "out")


def _made(out: Path) -> list[Parser]:
    """Lists of generated pictures, and the log of a run, as evaluate and the report read them."""
    root = folders.write_nabirds(out / "data")
    (out / "secret.png").write_bytes(b"picture")
    dataset = nabirds.read(root)
    listed = pairs.benchmark_pairs(root, dataset)
    benchmark = evaluate.Benchmark(root, dataset, tuple(listed), None, "x")
    place = out / "set" / "nabla" / "right"
    place.mkdir(parents=True)
    log = runs.JsonLines(place / "manifest.jsonl")
    for pair in listed[:3]:
        (place / f"{pair.key}.png").write_bytes(b"picture")
        ids = {"subject_id": pair.subject_id, "target_id": pair.target_id, "subject_used": pair.subject_id}
        log.append({"pair": pair.key, **ids, "file": f"{pair.key}.png", "seed": 3})
    log.close()
    run = runs.JsonLines(out / "run" / "metrics.jsonl")
    run.extend([{"step": n, "loss": 1 / n} for n in range(1, 5)])
    run.close()

    def read(path: Path) -> None:
        for row in evaluate.read_set(path.parent.parent, benchmark).right.values():
            assert os.path.normpath(row["file"]).startswith(f"{out / 'set'}{os.sep}")

    def curve(path: Path) -> None:
        assert pages.loss_curve(path.parent).count("<svg") == 1

    return [
        _restoring(place / "manifest.jsonl", mutate.rows, read, name="lists of generated pictures", weight=0.5),
        _restoring(out / "run" / "metrics.jsonl", mutate.rows, curve, name="metrics of a run", weight=0.5),
    ]


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------


def _encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def picture_seeds() -> list[bytes]:
    """Small pictures of every kind that a data set may hold and that is read."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (24, 32), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)) for _ in range(3)]
    return [
        _encoded(rgb, "JPEG"),
        _encoded(rgb, "JPEG", exif=turned),
        _encoded(rgb, "JPEG", progressive=True),
        _encoded(rgb.convert("CMYK"), "JPEG"),
        _encoded(grey, "JPEG"),
        _encoded(rgb, "PNG"),
        _encoded(rgb.convert("P"), "PNG", transparency=3),
        _encoded(rgb.convert("RGBA"), "PNG", exif=turned),
        _encoded(grey.convert("1"), "PNG"),
        _encoded(grey.convert("LA"), "PNG"),
        _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        _encoded(rgb, "WEBP"),
        _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        _encoded(rgb, "TIFF"),
        _encoded(rgb, "BMP"),
        _encoded(Image.new("RGB", (1, 1)), "PNG"),
        _encoded(Image.new("RGB", (3, 2000)), "PNG"),
    ]


def _pictures(folder: Path) -> list[Parser]:
    seeds = picture_seeds()

    def read(path: Path) -> None:
        size = images.picture_size(path)
        pixels = images.read_rgb(path)
        assert pixels.dtype == np.uint8 and pixels.shape == (*size, 3) and min(size) > 0
        assert math.prod(size) <= images.MAX_PIXELS
        assert validate._plain_jpeg_size(path) in (None, size)

    def mask(path: Path) -> None:
        found = images.read_mask(path)
        assert found.dtype == np.bool_ and found.ndim == 2 and found.size
        assert images.read_grey(path, found.shape).shape == found.shape

    def header(path: Path) -> None:
        images.picture_size(path)

    def downloaded(data: bytes) -> None:
        fields = fetch.check_picture(Answer("https://x/1.jpg", "image/jpeg", data))
        assert fields["bytes"] == len(data) and fields["height"] > 0 < fields["width"]

    def huge(rng: random.Random, _: Sequence[bytes]) -> bytes:
        """A PNG of a few bytes that says it is very large."""
        height, width = rng.choice((1, 20_000, 70_000, 2**31 - 1)), rng.choice((1, 3, 20_000, 70_000, 2**31 - 1))
        data = bytearray(seeds[5])
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        return mutate.with_checksums(bytes(data))

    return [
        Parser("pictures", seeds, mutate.png, _file(folder / "picture", read), weight=6),
        Parser("masks", seeds, mutate.png, _file(folder / "mask", mask), weight=2),
        Parser("headers of pictures", seeds, huge, _file(folder / "header", header), weight=0.2),
        Parser("downloaded photos", seeds[:8], mutate.png, downloaded, (Unobtained,)),
    ]


# ------------------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[Parser]:
    rng = np.random.default_rng(1)
    seeds = [
        records.encode_record({"id": "a", "class_id": 7}, {"target": rng.normal(size=(4, 3)).astype(np.float16)}),
        records.encode_record({}, {"mask": np.ones((2, 5), np.uint8), "box": np.arange(4), "none": np.zeros((0, 3))}),
    ]

    def sign(header: bytes, body: bytes) -> bytes:
        checks = records._header_checksum(header), records.zlib.crc32(body)
        return records._PREFIX.pack(records.MAGIC, len(header), *checks) + header + body

    def read(data: bytes) -> None:
        meta, arrays = records.decode_record(data)
        again, same = records.decode_record(records.encode_record(meta, arrays))
        assert repr(again) == repr(meta) and list(same) == list(arrays)
        for name, array in arrays.items():
            assert array.nbytes <= len(data)
            assert array.tobytes() == same[name].tobytes() and array.shape == same[name].shape

    path = folder / "shard.array_record"
    records.write_shard(path, [*seeds, *seeds])

    def shard(path: Path) -> None:
        reader = records.RecordReader([path])
        try:
            assert len(reader) < 2**20
            for index in range(len(reader)):
                _, arrays = reader.record(index)
                assert sum(a.nbytes for a in arrays.values()) < 2**20
        finally:
            reader.close()

    checked = mutate.signed(records._PREFIX, sign)
    return [
        Parser("records", seeds, checked, read, (records.RecordError,), weight=3),
        _seeded(path, mutate.flip, shard, name="shards of records"),
    ]


# ------------------------------------------------------------------------------------------------------------
# Tensors
# ------------------------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> list[Parser]:
    rng = np.random.default_rng(2)
    tree = {
        "a": {"weight": rng.normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(4, np.float16)},
        "b": {"count": np.arange(6, dtype=np.int64), "scale": np.float32(2), "none": np.zeros((0, 5), np.float32)},
    }
    safetensors_io.save_tree(tree, folder / "tree.safetensors", {"note": "ä", "json": '{"x": [1, 2]}'})

    def header(path: Path) -> None:
        found = safetensors_io.read_header(path)
        data = path.read_bytes()
        with safetensors.safe_open(path, framework="numpy") as file:
            assert sorted(file.keys()) == sorted(found.tensors)
            for name, entry in found.tensors.items():
                if entry.dtype in safetensors_io.DTYPES and math.prod(entry.shape) < 2**20:
                    kind = safetensors_io.DTYPES[entry.dtype]
                    size = math.prod(entry.shape) * kind.itemsize
                    assert entry.offset + size <= len(data)
                    if kind.name != "bfloat16" and size:
                        assert file.get_tensor(name).tobytes() == data[entry.offset : entry.offset + size]

    found = [_seeded(folder / "tree.safetensors", mutate.safetensors, header, name="safetensors files", weight=4)]

    shards = folder / "shards"
    for number, part in enumerate(tree.values(), 1):
        safetensors_io.save_tree(part, shards / f"model-{number:05d}-of-00002.safetensors")
    secret = folder / "secret.safetensors"
    safetensors_io.save_tree({"weight": np.zeros((4, 3), np.float32)}, secret)
    weight_map = {
        name: f"model-{i:05d}-of-00002.safetensors" for i, part in enumerate(tree.values(), 1) for name in part
    }
    runs.write_json(shards / "model.safetensors.index.json", {"metadata": {"total_size": 3}, "weight_map": weight_map})

    def sharded(path: Path) -> None:
        for file in safetensors_io.read_header(path.parent).files:
            assert os.path.normpath(file).startswith(f"{shards}{os.sep}"), file

    found.append(_seeded(shards / "model.safetensors.index.json", mutate.objects, sharded, name="indices of shards"))
    return found + _adapters(folder / "adapters")


def _adapters(folder: Path) -> list[Parser]:
    rng = np.random.default_rng(3)

    def pair(inner: int, outer: int) -> Pair:
        return Pair(rng.normal(size=(2, inner)).astype(np.float32), rng.normal(size=(outer, 2)).astype(np.float32))

    attention = [f"transformer_blocks.0.attn.to_{k}" for k in "qkv"]
    modules = {name: pair(8, 8) for name in attention} | {"x_embedder": pair(4, 8), "norm_out.linear": pair(8, 16)}
    metadata = adapters.AdapterMetadata(rank=2, alpha=4.0, base="flux", control="fill", size=64, mask_policies=("box",))
    for style in ("peft", "kohya", "comfyui"):
        adapters.write_adapter(folder / f"{style}.safetensors", modules, metadata, format=style)  # type: ignore[arg-type]
    foreign = {
        f"transformer.{name}.lora_{side}.weight": matrix
        for name, p in modules.items()
        for side, matrix in zip("AB", p, strict=True)
    }
    theirs = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.use_dora": False}
        )
    }
    safetensors_io.save_tree(foreign, folder / "diffusers.safetensors", theirs)
    seeds = [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]

    def read(path: Path) -> None:
        found = adapters.read_adapter(path)
        assert math.isfinite(found.metadata.scale) and found.metadata.rank > 0
        _check_metadata(found.metadata)
        for matrices in found.modules.values():
            assert matrices.lora_A.shape[0] == matrices.lora_B.shape[1] == found.metadata.rank or found.format in (
                "kohya",
                "comfyui",
            )
            assert all(np.isfinite(np.asarray(matrix, np.float32)).all() for matrix in matrices)

    def described(path: Path) -> None:
        found = adapters.read_metadata(path)
        assert math.isfinite(found.scale)
        _check_metadata(found)

    return [
        Parser("adapters", seeds, mutate.safetensors, _file(folder / "any" / "adapter.safetensors", read), weight=4),
        Parser(
            "metadata of adapters", seeds, mutate.safetensors, _file(folder / "head" / "adapter.safetensors", described)
        ),
    ]


def _check_metadata(metadata: adapters.AdapterMetadata) -> None:
    for field in dataclasses.fields(metadata):
        value, default = getattr(metadata, field.name), field.default
        if default is not dataclasses.MISSING:
            assert isinstance(value, int | float if isinstance(default, float) else type(default)), field.name
        assert not isinstance(value, float) or math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------
# Models' folders
# ------------------------------------------------------------------------------------------------------------


def _networks(folder: Path) -> list[Parser]:
    picture = np.zeros((16, 16, 3), np.uint8)
    kinds = {
        "transformer": flux.FluxConfig.dev(),
        "autoencoder": autoencoder.AutoencoderKLConfig(),
        "CLIP": clip.CLIPTextConfig(),
        "T5": t5.T5Config(),
        "SigLIP": siglip.SiglipVisionConfig(),
        "DINOv2": dinov2.Dinov2Config(),
        "LPIPS": lpips.LpipsConfig(),
        "Redux": redux.ReduxEmbedderConfig(),
        "keypoint head": keypoint_head.KeypointHeadConfig(("bill", "tail"), 8, 14, "0" * 64, 224),
    }
    found = []
    for name, config in kinds.items():
        path = folder / f"{name.replace(' ', '_')}.json"
        pipeline.write_json(path, config.to_json())

        def read(file: Path, config: Any = config) -> None:
            kind = type(config)
            made = kind.from_json(file)
            assert kind.from_json(made.to_json()) == made
            for field in dataclasses.fields(made):
                value = getattr(made, field.name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    assert math.isfinite(value) and abs(value) < 2**31, field.name

        found.append(_seeded(path, mutate.objects, read, name=f"config.json of {name}", weight=0.4))

    pipeline.write_index(folder)

    def index(path: Path) -> None:
        pipeline.is_kontext(path.parent)

    found.append(_seeded(folder / "model_index.json", mutate.objects, index, weight=0.25))

    def levels(path: Path) -> None:
        found = flow.sigmas(pipeline.scheduler(path.parent.parent), 4, 1024)
        assert found.shape == (5,) and found[-1] == 0 and np.isfinite(found).all() and (np.diff(found) <= 0).all()

    schedule = folder / "scheduler" / "scheduler_config.json"
    found.append(_seeded(schedule, mutate.objects, levels, weight=0.5))
    for name in ("siglip", "dinov2"):
        path = folder / f"{name}_processor.json"
        pipeline.write_json(path, getattr(ImageProcessor, name)().to_json())

        def processor(file: Path) -> None:
            made = ImageProcessor.from_json(file)
            assert ImageProcessor.from_json(made.to_json()) == made
            sides = made(picture[None]).shape[2:] if max(made.crop or (0, 0)) < 64 else (1, 1)
            assert min(sides) > 0

        found.append(_seeded(path, mutate.objects, processor, name=f"image processor of {name}", weight=0.4))
    return found


# ------------------------------------------------------------------------------------------------------------
# What servers say; worlds
# ------------------------------------------------------------------------------------------------------------


def _answers(folder: Path) -> list[Parser]:
    options = fetch.Options(contact="a@b.org")

    def entry(id: int, position: int) -> dict[str, Any]:
        url = f"{fetch.MEDIA[0]}/photos/{id}/square.jpeg?17"
        return {
            "id": id + 7,
            "position": position,
            "photo": {"id": id, "license_code": "cc-by", "url": url, "attribution": "(c) ü"},
        }

    answer = {
        "total_results": 2,
        "results": [{"id": 11, "observation_photos": [entry(5, 1), entry(4, 0)]}, {"id": 12, "observation_photos": []}],
    }

    def api(data: bytes) -> None:
        found = fetch.parse_observations(Answer("https://x", "application/json", data), ["11", "12", "13"])
        assert [row["observation"] for row in found] == ["11", "12", "13"]
        json.dumps(found)
        photo = fetch.Photo("images/a/5.jpg", "11", "5", None, None)
        source = fetch.locate(photo, found[0], options)
        assert fetch.origin(source.url) in fetch.media_origins(options)
        assert source.url.startswith(fetch.MEDIA) and "/photos/5/original." in source.url

    def waits(data: bytes) -> None:
        first, _, second = data.decode("latin-1").partition("\n")
        seconds = retry_after(first, second, 1.7e9)
        assert seconds is None or 0 <= seconds < math.inf

    dates = b"Wed, 21 Oct 2026 07:28:00 GMT\nWed, 21 Oct 2026 07:27:00 GMT"
    world = dataclasses.asdict(plan.Settings())
    world |= {"world": plan.WORLD, "version": plan.VERSION, "dataset": "nabirds", "images": {"a": {"class_id": 1}}}

    def oracle(path: Path) -> None:
        open_oracle(path.parent)
        Oracle(path.parent)

    pipeline.write_json(folder / "oracle.json", world)
    return [
        _seeded(folder / "oracle.json", mutate.objects, oracle, weight=0.25),
        Parser("answers of iNaturalist", [json.dumps(answer).encode()], mutate.objects, api, (Unobtained,), weight=2),
        Parser("Retry-After", [b"30\n", dates], mutate.text(" "), waits, weight=0.5),
    ]
