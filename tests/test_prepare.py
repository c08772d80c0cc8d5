"""The prepare command on small NABirds folders; a linear stand-in replaces networks that do not matter."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from nabla_jax import prepare as prepare_module
from nabla_jax.checkpoints.pipeline import Component
from nabla_jax.config import Config, from_dict
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.loader import make_loader, open_prepared
from nabla_jax.errors import UserError
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from nabla_jax.prepare import Encoders, compile_encoder, prepare
from tests.checkpoints.pipeline_folder import write_pipeline
from tests.data.folders import LEAVES, file_of, write_nabirds

SIZE = 32


def config_for(root: Path, prepared: Path, **changes: object) -> Config:
    values = {
        "base": {"path": "unused"},
        "data": {"root": str(root), "prepared": str(prepared), "split": changes.pop("split", "train")},
        "conditioning": {"size": SIZE, "text_length": 4} | changes,
        "lora": {},
        "optim": {},
        "train": {"workdir": "unused", "steps": 1, "batch": 1},
    }
    return from_dict(values)


def pool(images: np.ndarray) -> np.ndarray:
    """[n, 3, H, W] uint8 -> [n, 6, H/8, W/8] float32: cell means in [-1, 1], then a constant log variance."""
    n, c, h, w = images.shape
    means = images.reshape(n, c, h // 8, 8, w // 8, 8).astype(np.float32).mean((3, 5)) / 127.5 - 1
    return np.concatenate([means, np.full_like(means, -8)], 1)


def encoders(weights: str = "a", images: object = pool) -> Encoders:
    def prompts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        seeds = [int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) for t in texts]
        rows = np.array([np.random.default_rng(s).normal(size=14) for s in seeds], np.float32)
        return rows[:, :12].reshape(-1, 4, 3), rows[:, 12:]

    return Encoders({"vae": weights}, 3, 8, images, prompts)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PICTURES_PER_SHARD", 3)
    monkeypatch.setattr(prepare_module, "PIXELS_PER_CALL", 2 * 3 * SIZE * SIZE)


def test_records_hold_the_encoded_canvases(root: Path, tmp_path: Path) -> None:
    folder = prepare(config_for(root, tmp_path / "out"), encoders())
    prepared = open_prepared(folder)
    dataset = read_dataset(root)
    assert prepared.manifest["ids"] == sorted(e.id for e in dataset.of_split("train"))
    counts = {"pictures": 8, "classes": 4, "captions": 1, "shards": 3, "records": 24}
    assert prepared.manifest["counts"] == counts
    for index, id in enumerate(prepared.manifest["ids"]):
        example = dataset.by_id[id]
        for k, role in enumerate(("target", "subject", "control_fill")):
            meta, _ = prepared.records.record(3 * index + k)
            made = prepared.manifest["made"]
            here = {"id": id, "class_id": example.class_id, "caption": 0, "index": index, "role": role, "made": made}
            assert meta == here
        arrays = prepared.read(index, ("target", "subject", "control_fill"))
        assert example.mask is not None
        image, mask = controls.read_pair(example.image, example.mask)
        canvases = {
            "target": controls.target_canvas(image, SIZE),
            "subject": controls.subject_canvas(image, mask, SIZE),
            "control_fill": controls.control_canvas("fill", image, mask, SIZE),
        }
        for role, canvas in canvases.items():
            expected = pool(canvas.pixels.transpose(2, 0, 1)[None])[0]
            np.testing.assert_array_equal(arrays[role], expected.astype(np.float16))
        np.testing.assert_array_equal(arrays["mask"], controls.latent_mask(mask, SIZE))
    embeds, pooled = encoders().prompts(["A photo of a bird."])
    np.testing.assert_array_equal(prepared.prompt_embeds, embeds)
    np.testing.assert_array_equal(prepared.pooled, pooled)


def test_manifest_has_a_class_index_and_training_reads_the_folder(root: Path, tmp_path: Path) -> None:
    folder = prepare(config_for(root, tmp_path / "out", split="all"), encoders())
    manifest = open_prepared(folder).manifest
    assert list(manifest["classes"]) == [str(c) for c in LEAVES]
    assert manifest["classes"]["295"]["name"] == "Blue-winged Teal (Male)"
    for c, entry in manifest["classes"].items():
        assert [manifest["class_ids"][p] for p in entry["positions"]] == [int(c)] * 4
    teal = ["Birds", "Ducks, Geese, and Swans", "Ducks and Geese", "Blue-winged Teal", "Blue-winged Teal (Male)"]
    assert manifest["classes"]["295"]["taxonomy"] == teal
    for shard in manifest["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    batch = next(make_loader(folder, "class_uniform", 4, seed=0))
    assert batch["target"].shape == (4, 6, SIZE // 8, SIZE // 8)
    assert batch["prompt_embeds"].shape == (4, 4, 3)


def test_every_call_of_the_encoder_has_one_shape(root: Path, tmp_path: Path) -> None:
    shapes = set()

    def spy(images: np.ndarray) -> np.ndarray:
        shapes.add((images.shape, str(images.dtype)))
        return pool(images)

    prepare(config_for(root, tmp_path / "out", split="all"), encoders(images=spy))
    assert shapes == {((6, 3, SIZE, SIZE), "uint8")}


def test_large_pictures_are_encoded_one_by_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(prepare(config_for(root, tmp_path / "out"), encoders()))
    monkeypatch.setattr(prepare_module, "PIXELS_PER_CALL", SIZE * SIZE)
    shapes = set()

    def spy(images: np.ndarray) -> np.ndarray:
        shapes.add(images.shape)
        return pool(images)

    assert contents(prepare(config_for(root, tmp_path / "other"), encoders(images=spy))) == whole
    assert shapes == {(1, 3, SIZE, SIZE)}


def test_the_order_of_the_lists_does_not_matter(root: Path, tmp_path: Path) -> None:
    first = contents(prepare(config_for(root, tmp_path / "a"), encoders()))
    for name in ("images.txt", "image_class_labels.txt"):
        rows = (root / name).read_text().strip().split("\n")
        (root / name).write_text("\n".join(reversed(rows)) + "\n")
    assert contents(prepare(config_for(root, tmp_path / "b"), encoders())) == first


# ---------------------------------------------------------------------- continuing, refusing


def refuse(_: object) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("encoded again")


def test_a_finished_folder_is_left_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(root, tmp_path / "out")
    before = contents(prepare(config, encoders()))
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard*")}
    prepare(config, encoders(images=refuse))
    assert "already prepared" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard*")} == times


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_continues_and_keeps_whole_shards(root: Path, tmp_path: Path, after: int) -> None:
    expected = contents(prepare(config_for(root, tmp_path / "whole"), encoders()))
    calls = 0

    def stops(images: np.ndarray) -> np.ndarray:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return pool(images)

    config = config_for(root, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, encoders(images=stops))
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard*")}
    assert len(kept) == after // 2  # two calls of six canvases for a shard of three pictures
    assert contents(prepare(config, encoders())) == expected
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


SLOW_RUN = """
import sys, time
from pathlib import Path
from nabla_jax import prepare as module
from tests import test_prepare as t
module.PICTURES_PER_SHARD, module.PIXELS_PER_CALL = 3, 2 * 3 * t.SIZE**2
def slow(images):
    print("call", flush=True)
    time.sleep(0.2)
    return t.pool(images)
module.prepare(t.config_for(Path(sys.argv[1]), Path(sys.argv[2])), t.encoders(images=slow))
"""


@pytest.mark.parametrize("calls", [1, 4])
def test_kill_9_leaves_a_folder_that_ends_byte_identical(root: Path, tmp_path: Path, calls: int) -> None:
    expected = contents(prepare(config_for(root, tmp_path / "whole"), encoders()))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(root), str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=Path(__file__).parent.parent, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(calls):
        assert "call" in process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert contents(prepare(config_for(root, tmp_path / "out"), encoders())) == expected


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"size": 16}, "a", "conditioning.size: 32 there, 16 here"),
        ({"text_length": 5}, "a", "conditioning.text_length: 4 there, 5 here"),
        ({"prompt": "A bird."}, "a", "captions"),
        ({"split": "all"}, "a", "split: train there, all here"),
        ({}, "b", "weights.vae: a there, b here"),
    ],
)
def test_other_settings_are_refused_not_mixed(
    root: Path, tmp_path: Path, changes: dict[str, object], weights: str, message: str
) -> None:
    before = contents(prepare(config_for(root, tmp_path / "out"), encoders()))
    other = config_for(root, tmp_path / "out", **dict(changes))
    with pytest.raises(UserError, match=message):
        prepare(other, encoders(weights))
    assert contents(tmp_path / "out") == before
    prepare(other, encoders(weights), overwrite=True)
    alone = config_for(root, tmp_path / "alone", **dict(changes))
    assert contents(tmp_path / "out") == contents(prepare(alone, encoders(weights)))


def test_changed_pictures_are_noticed(root: Path, tmp_path: Path) -> None:
    config = config_for(root, tmp_path / "out")
    prepare(config, encoders())
    path = root / "images" / file_of(295, 0)
    image = np.asarray(Image.open(path))
    Image.fromarray(255 - image).save(path, quality=95)
    with pytest.raises(UserError, match="prepared with other settings .data: "):
        prepare(config, encoders())


def test_a_damaged_shard_is_written_again(root: Path, tmp_path: Path) -> None:
    config = config_for(root, tmp_path / "out")
    before = contents(prepare(config, encoders()))
    shard = tmp_path / "out" / "shard-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert contents(prepare(config, encoders())) == before


def test_a_folder_of_something_else_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds thesis.tex, which prepare did not write"):
            prepare(config_for(root, tmp_path / "out"), encoders(), overwrite=overwrite)
    assert contents(tmp_path / "out").keys() - {".lock"} == {"thesis.tex"}


# ---------------------------------------------------------------------------------- mistakes


def test_mistakes_in_the_data_are_found_before_anything_is_encoded(root: Path, tmp_path: Path) -> None:
    config = config_for(root, tmp_path / "out")
    guarded = encoders(images=refuse)
    mask = (root / "masks" / file_of(295, 0)).with_suffix(".png")
    original = mask.read_bytes()
    shape = np.asarray(Image.open(mask)).shape

    Image.fromarray(np.zeros(shape, np.uint8)).save(mask)
    with pytest.raises(UserError, match=rf"{mask.name}: mask is empty"):
        prepare(config, guarded)
    Image.fromarray(np.full(shape[::-1], 255, np.uint8)).save(mask)
    with pytest.raises(
        UserError, match=rf"{mask.name}: mask is {shape[1]}x{shape[0]} .*expected {shape[0]}x{shape[1]}"
    ):
        prepare(config, guarded)
    mask.unlink()
    with pytest.raises(UserError, match="has no mask; 1 of 8 pictures have none"):
        prepare(config, guarded)
    mask.write_bytes(original)
    for n in range(2):
        image = root / "images" / file_of(817, n)
        image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"truncated or damaged picture .*and 1 more like it"):
        prepare(config, guarded)
    assert not list((tmp_path / "out").glob("shard*"))


def test_values_beyond_float16_are_an_error(root: Path, tmp_path: Path) -> None:
    broken = encoders(images=lambda images: pool(images) * np.nan)
    with pytest.raises(UserError, match="float16 cannot hold"):
        prepare(config_for(root, tmp_path / "out"), broken)
    assert not list((tmp_path / "out").glob("shard*"))


def test_an_unwritable_output_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        prepare(config_for(root, tmp_path / "file" / "out"), encoders(images=refuse))


def test_a_full_disk_is_found_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match="disk too full: 8 pictures need"):
        prepare(config_for(root, tmp_path / "out"), encoders(images=refuse))


class Usage:
    free = 100


# ------------------------------------------------------------------------ the real networks


def test_the_compiled_encoder_is_the_autoencoder() -> None:
    config = AutoencoderKLConfig(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_num_groups=2)
    graphdef, abstract = layers.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    found = compile_encoder(Component(config, graphdef, params))(images)
    normalised = images.astype(np.float32) / 127.5 - 1
    expected = jax.jit(lambda p, x: layers.bind(graphdef, p).encode(x))(params, normalised)
    assert found.shape == (2, 4, 8, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_pipeline(folder)
    return folder


def command(root: Path, base: Path, out: Path) -> list[str]:
    settings = {
        "base.path": base,
        "data.root": root,
        "data.prepared": out,
        "conditioning.size": SIZE,
        "conditioning.text_length": 6,
    }
    return [
        "--config",
        "configs/omk_fill.py:toy",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def test_the_command_stores_what_the_published_encoder_gives(root: Path, base: Path, tmp_path: Path) -> None:
    prepare_module.main(command(root, base, tmp_path / "out"))
    prepared = open_prepared(tmp_path / "out")
    assert len(prepared.records) == 24
    assert set(prepared.manifest["settings"]["weights"]) == {
        "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    }  # fmt: skip
    assert prepared.prompt_embeds.shape == (1, 6, 64) and prepared.pooled.shape == (1, 64)
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae").eval()
    example = read_dataset(root).by_id[prepared.manifest["ids"][5]]
    assert example.mask is not None
    image, mask = controls.read_pair(example.image, example.mask)
    canvases = {
        "target": controls.target_canvas(image, SIZE),
        "subject": controls.subject_canvas(image, mask, SIZE),
        "control_fill": controls.control_canvas("fill", image, mask, SIZE),
    }
    arrays = prepared.read(5, tuple(canvases))
    for role, canvas in canvases.items():
        pixels = torch.from_numpy(canvas.pixels.transpose(2, 0, 1)[None] / np.float32(127.5) - 1)
        with torch.no_grad():
            expected = vae.encode(pixels.float()).latent_dist.parameters[0].numpy()
        np.testing.assert_allclose(arrays[role], expected, rtol=2e-3, atol=2e-3)


def test_sigint_stops_with_one_line_and_the_command_continues(
    root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the other process has shards of the real size
    arguments = command(root, base, tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "nabla_jax.prepare", *arguments],
        cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not (tmp_path / "out" / "settings.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip().split("\n")[-1].endswith("the same command continues")
    assert "Traceback" not in errors
    prepare_module.main(arguments)
    prepare_module.main(command(root, base, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command_says_what_is_missing_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nabla_jax.prepare", "--config", "configs/omk_fill.py",
         f"--config.data.root={tmp_path / 'none'}"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.count("\n") == 1 and "prepare is missing" in done.stderr and str(tmp_path / "none") in done.stderr
    )


def test_an_interrupt_does_not_wait_for_the_queue() -> None:
    started = []

    def work(item: int) -> None:
        started.append(item)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt), prepare_module._thread_pool() as pool:
        futures = [pool.submit(work, i) for i in range(500)]
        futures[0].result()
        raise KeyboardInterrupt
    assert len(started) < 100
