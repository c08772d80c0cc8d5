"""Configurations, run folders, lists and pictures that were found to raise something else than a UserError."""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nabla_jax import api, evaluate, flow, images, plates, prepare, runs
from nabla_jax import config as configs
from nabla_jax.checkpoints import pipeline
from nabla_jax.extract import work
from nabla_jax.hashing import file_sha256
from nabla_jax.metrics import summary
from nabla_jax.report import pages, reading
from nabla_jax.toybirds import write_world
from tests.data import folders
from tests.fuzz import mutate, parsers
from tests.refusals import refused

# ------------------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample.guidance", "nan"),
        ("sample.guidance", "inf"),
        ("train.foreground_weight", "inf"),
        ("optim.betas", "0.9,nan"),
        ("conditioning.expansion", "1,inf"),
        ("train.steps", "9" * 4000),
    ],
)
def test_numbers_that_are_none(key: str, value: str) -> None:
    refused(lambda: configs.load("configs/omk_fill.py:toy", {key: value}), "configs/omk_fill.py:toy: ", key)


@pytest.mark.parametrize("content", ["None", "3", "[]", "{'data': 3}", "{'lora': {'alpha': 10 ** 400}}"])
def test_what_get_config_may_not_give(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(f"def get_config(arg=''):\n    return {content}\n")
    refused(lambda: configs.load(str(path), {"data.root": "x"}), str(path))


# ------------------------------------------------------------------------------------------------------------
# Run folders, results
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["3", "null", "[]", '"x"', '{"a":' * 50_000, "9" * 5000])
def test_lines_that_are_no_object(line: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    refused(lambda: runs.read_rows(tmp_path / "f.jsonl"), "f.jsonl: line 2 is no JSON object")


def test_rows_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"pair": "1"}\n')
    refused(lambda: runs.read_rows(tmp_path / "f.jsonl", runs.PictureRow), "f.jsonl: line 1: missing subject_id")


@pytest.mark.parametrize("text", ["step_²", "step_" + "9" * 5000, "step_-1", "12", "", "step_1\nstep_2"])
def test_last_steps_that_are_none(text: str, tmp_path: Path) -> None:
    runs.write_atomic(runs.RunFolder(tmp_path).last, text)
    refused(runs.RunFolder(tmp_path).last_step, "expected step_N")


@pytest.mark.parametrize("text", ["3", "[]", '{"a":' * 50_000])
def test_configurations_of_other_versions(text: str, tmp_path: Path) -> None:
    content = configs.read_values("configs/omk_fill.py:toy")
    content["train"]["workdir"] = str(tmp_path)
    (tmp_path / "config.json").write_text(text)

    def opened() -> None:
        with runs.open_run(configs.from_dict(content)):
            pass

    refused(opened, str(tmp_path / "config.json"))


@pytest.mark.parametrize("text", ["3", '"x"', "{}"])
def test_lists_of_starts(text: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(text)
    refused(lambda: runs.write_environment(tmp_path / "environment.json"), "environment.json: content: found")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("evaluation", lambda c: c.pop("benchmarks"), "missing benchmarks"),
        ("evaluation", lambda c: c.update(version={}), "version: found {}"),
        ("evaluation", lambda c: c["benchmarks"][0].update(name="../x"), "found the name '../x'"),
        ("evaluation", lambda c: c["benchmarks"][0].update(fingerprint="../../x"), "found the name '../../x'"),
        ("evaluation", lambda c: c["sets"][0].update(model="a/b"), "found the name 'a/b'"),
        ("evaluation", lambda c: c["sets"][0].update(benchmark="other"), "toy on other is not in evaluation.json"),
        ("summary", lambda c: c.append(3), "found 3, expected an object"),
        ("summary", lambda c: c[0].update(model=[]), "0.model: found [], expected a text"),
        ("summary", lambda c: c[0].update(model="other"), "other on nabla is not in evaluation.json"),
        ("comparisons", lambda c: c[0].update(baseline="other"), "toy on nabla is not in evaluation.json"),
        ("breakdown", lambda c: c[0].pop("group"), "0: missing group"),
    ],
)
def test_results_of_other_versions(file: str, change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    parsers._results(tmp_path)
    path = tmp_path / f"{file}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(lambda: reading.read({"one": tmp_path}), f"{file}.json: ", told)


@pytest.mark.parametrize("file", ["../../../secret.png", "/etc/hostname", "é" * 200, "a/" * 3000, "a\0b"])
def test_lists_of_pictures_stay_in_their_folder(file: str, tmp_path: Path) -> None:
    parsers._made(tmp_path / "out")
    root = tmp_path / "out" / "data"
    dataset = folders_dataset(root)
    benchmark = evaluate.Benchmark(root, dataset, tuple(evaluate.benchmark_pairs(root, dataset)), None, "x")
    folder = tmp_path / "out" / "set" / "nabla"
    assert len(evaluate.read_set(folder, benchmark).right) == 3
    path = folder / "right" / "manifest.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(row | {"file": file}) + "\n")
    refused(lambda: evaluate.read_set(folder, benchmark), "manifest.jsonl: pair", "leaves")


def folders_dataset(root: Path) -> Any:
    from nabla_jax.data import read_dataset

    return read_dataset(root)


def test_scores_that_are_no_csv(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("pair\n" + "x" * 140_000)
    refused(lambda: summary.from_csv(tmp_path / "s.csv"), "s.csv: damaged")


def test_metrics_without_numbers(tmp_path: Path) -> None:
    rows = [{"step": "1", "loss": 1.0}, {"step": 1, "loss": True}, {"step": 1e400, "loss": 1.0}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(lambda: pages.loss_curve(tmp_path), "metrics.jsonl: found no row with step and loss")


def test_overwriting_deletes_nothing_outside(tmp_path: Path) -> None:
    """A data folder may come with a list that names files elsewhere, with their very hashes."""
    root = folders.write_nabirds(tmp_path / "nabirds", per_class=2)
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"mine")
    own = next((root / "masks").rglob("*.png"))
    rows = [
        {"id": "a", "file": own.relative_to(root).as_posix(), "sha256": file_sha256(own)},
        {"id": "b", "file": "../mine.txt", "sha256": file_sha256(mine)},
    ]
    runs.write_atomic(root / work.FOLDER / "masks-0-of-1.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    refused(lambda: work._delete(work.Folder.open(root), "masks"), "'../mine.txt' leaves", "nothing is deleted")
    assert mine.is_file() and own.is_file()
    runs.write_atomic(root / work.FOLDER / "masks-0-of-1.jsonl", json.dumps(rows[0]) + "\n")
    work._delete(work.Folder.open(root), "masks")
    assert not own.is_file()


# ------------------------------------------------------------------------------------------------------------
# Schedules, plates
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"shift": "3"},
        {"use_dynamic_shifting": False, "shift": -5.0},
        {"use_dynamic_shifting": False, "shift": 0.0},
        {"use_dynamic_shifting": False, "shift": float("nan")},
        {"max_shift": 10**18},
        {"max_image_seq_len": 256},
        {"use_dynamic_shifting": 1},
    ],
    ids=str,
)
def test_schedules_that_do_not_fall(change: dict[str, Any]) -> None:
    assert flow.sigmas(pipeline.SCHEDULER, 4, 1024)[0] == 1
    refused(lambda: flow.sigmas(pipeline.SCHEDULER | change, 4, 1024), "scheduler_config.json: ")


@pytest.mark.parametrize("text", ["3", "[" * 50_000])
def test_schedules_that_are_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    refused(lambda: pipeline.scheduler(tmp_path), "scheduler_config.json: ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_of_damaged_weights(value: float) -> None:
    drawn = np.zeros((1, 3, 2, 2), np.float32)
    assert api.to_pixels(drawn).tolist() == np.full((1, 2, 2, 3), 128).tolist()
    drawn[0, 1, 1, 0] = value
    refused(lambda: api.to_pixels(drawn), "NaN or infinity")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "x" * 300, "x/" * 3000])
def test_plates_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    parsers.write_table(tmp_path / "list" / "birds.csv", plates.BIRDS, ("Teal", name))
    refused(lambda: plates.read_birds(tmp_path / "list" / "birds.csv"), "birds.csv:2: picture: ", "leaves the list's")


@pytest.mark.parametrize("row", ["²", "9" * 5000])
def test_tips_of_arrows(row: str, tmp_path: Path) -> None:
    parsers.write_table(tmp_path / "a.csv", plates.ARROWS, ("*", row, "0", ""))
    refused(lambda: plates.read_arrows(tmp_path / "a.csv", (), 6, 8), "a.csv:2: row: found")


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------

KINDS = (
    "jpeg", "turned jpeg", "progressive jpeg", "cmyk jpeg", "grey jpeg", "png", "palette png", "rgba png", "1-bit png",
    "grey and alpha png", "animated png", "gif", "webp", "animated webp", "tiff", "bmp", "one pixel", "3 x 2000",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "data"), zip(KINDS, parsers.picture_seeds(), strict=True), ids=KINDS)
def test_kinds_of_pictures(kind: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(data)
    pixels = images.read_rgb(tmp_path / "p")
    expected = {"turned jpeg": (32, 24), "rgba png": (32, 24), "one pixel": (1, 1), "3 x 2000": (2000, 3)}
    assert pixels.shape == (*expected.get(kind, (24, 32)), 3) and pixels.dtype == np.uint8
    assert images.picture_size(tmp_path / "p") == pixels.shape[:2] == images.read_mask(tmp_path / "p").shape


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 5), colour) for colour in ((200, 10, 30), (0, 255, 0))]
    for format in ("PNG", "GIF", "TIFF"):
        (tmp_path / "p").write_bytes(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert images.read_rgb(tmp_path / "p").reshape(-1, 3).tolist() == [[200, 10, 30]] * 45


def test_sixteen_bits(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((5, 9), 40_000, np.uint16))
    (tmp_path / "p").write_bytes(encoded(grey, "PNG"))
    refused(lambda: images.read_mask(tmp_path / "p"), "more than 8 bits")
    refused(lambda: images.read_rgb(tmp_path / "p"), "more than 8 bits")


@pytest.mark.parametrize(("height", "width"), [(20_000, 20_000), (2**31 - 1, 1), (0, 9), (9, 0)])
def test_pictures_of_no_size_or_too_large(height: int, width: int, tmp_path: Path) -> None:
    data = bytearray(encoded(Image.new("RGB", (9, 5)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    (tmp_path / "p").write_bytes(mutate.with_checksums(bytes(data)))
    refused(lambda: images.read_rgb(tmp_path / "p"), f"{tmp_path / 'p'}: ")
    refused(lambda: images.picture_size(tmp_path / "p"), f"{tmp_path / 'p'}: ")


def test_a_long_thin_picture_is_read(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(encoded(Image.new("RGB", (3, 20_000), (1, 2, 3)), "PNG"))
    assert images.read_rgb(tmp_path / "p").shape == (20_000, 3, 3)


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n", encoded(Image.new("RGB", (9, 5)), "ICNS")])
def test_formats_that_no_photo_has_are_not_opened(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(data)
    refused(lambda: images.read_rgb(tmp_path / "p"), "not a picture in a known format")


# ------------------------------------------------------------------------------------------------------------
# What commands left in their folders
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3", "[]", '{"schema": 1}', '{"a":' * 50_000])
def test_sidecars_of_other_versions(text: str, tmp_path: Path) -> None:
    root = folders.write_nabirds(tmp_path / "nabirds", per_class=2)
    runs.write_atomic(root / work.FOLDER / "masks.json", text)
    wanted = {"schema": 1, "settings": {}, "checkpoints": {}}
    call = functools.partial(work._claim, work.Folder.open(root), "masks", wanted, False, work.Shard())
    refused(call, "masks.json: ")


@pytest.mark.parametrize("text", ["3", "[]", "[" * 50_000])
def test_settings_of_other_versions(text: str, tmp_path: Path) -> None:
    (tmp_path / prepare.SETTINGS).write_text(text)
    refused(lambda: prepare._claim(tmp_path, {"a": 1}, False), f"{prepare.SETTINGS}: ")
    refused(lambda: prepare._joined(tmp_path, {"a": 1}), f"{prepare.SETTINGS}: ")
    (tmp_path / "world.json").write_text(text)
    refused(lambda: write_world(tmp_path, progress=False), "world.json: ")
