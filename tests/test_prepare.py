"""The prepare command on small NABirds folders; a linear stand-in replaces networks that do not matter."""

import hashlib
import json
import os
import shutil
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
import transformers
from PIL import Image

from nabla_jax import prepare as prepare_module
from nabla_jax.checkpoints import transformers_folder
from nabla_jax.checkpoints.pipeline import Component
from nabla_jax.config import Conditioning
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.loader import make_loader, open_prepared
from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from nabla_jax.models.dinov2 import Dinov2, Dinov2Config
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import processes
from nabla_jax.prepare import compile_encoder, estimate, prepare
from tests import stand_ins
from tests.checkpoints.pipeline_folder import write_pipeline
from tests.data.folders import LEAVES, file_of, write_nabirds
from tests.fixtures import fake_devices, free_address
from tests.stand_ins import SIZE, config_for, encoders, pool


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PICTURES_PER_SHARD", "PIXELS_PER_CALL"):
        monkeypatch.setattr(prepare_module, name, getattr(prepare_module, name))  # put back in the end
    stand_ins.small_shards()


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
            "control_fill": controls.control_canvas(controls.View(image, mask), Conditioning(SIZE)),
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


def test_several_controls_are_encoded_at_once(root: Path, tmp_path: Path) -> None:
    alone = open_prepared(prepare(config_for(root, tmp_path / "alone"), encoders()))
    folder = tmp_path / "both"
    both = open_prepared(prepare(config_for(root, folder, controls=["keypoints", "depth"]), encoders()))
    kinds = ("depth", "fill", "keypoints")
    assert both.manifest["roles"] == ["target", "subject", *(f"control_{kind}" for kind in kinds)]
    dataset = read_dataset(root)
    for position, id in enumerate(both.manifest["ids"]):
        found = both.read(position, both.manifest["roles"])
        for role, array in alone.read(position, alone.manifest["roles"]).items():
            np.testing.assert_array_equal(found[role], array)
        view = controls.read_view(dataset.by_id[id], *kinds)
        for kind in kinds:
            canvas = controls.control_canvas(view, Conditioning(SIZE, kind))
            stored = pool(canvas.pixels.transpose(2, 0, 1)[None])[0].astype(np.float16)
            np.testing.assert_array_equal(found[f"control_{kind}"], stored)
    # Whichever of them a run trains with, the folder is the same.
    prepare(config_for(root, folder, control="depth", controls=["fill", "keypoints"]), encoders(images=refuse))


def test_features_see_the_bird_and_not_its_surroundings(root: Path, tmp_path: Path) -> None:
    config = config_for(root, tmp_path / "out")
    prepared = open_prepared(prepare(config, encoders(vision=stand_ins.colours())))
    assert (prepared.manifest["features"], prepared.manifest["counts"]["records"]) == (3, 32)
    assert prepared.features is not None
    found = prepared.features()
    dataset = read_dataset(root)
    for row, id in enumerate(prepared.manifest["ids"]):
        example = dataset.by_id[id]
        assert example.mask is not None
        image, mask = controls.read_pair(example.image, example.mask)
        # Each bird is of one colour, and the rest of the box round it is black.
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        covered = mask.sum() / max(box.shape) ** 2
        np.testing.assert_allclose(found[row], covered * image[mask].mean(0), atol=4)
    batch = next(make_loader(prepared, "mined", 8, seed=0, similarity=0.5))
    assert (batch["subject_index"] != batch["target_index"]).all()
    with pytest.raises(UserError, match="vision: v there, "):
        prepare(config, encoders())


def test_without_features_there_are_no_look_alikes(root: Path, tmp_path: Path) -> None:
    folder = prepare(config_for(root, tmp_path / "out"), encoders())
    with pytest.raises(UserError, match="train.sampler: mined needs features"):
        make_loader(folder, "mined", 8, seed=0)


def test_a_dry_run_says_what_a_run_would_write(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "none" / "out"
    said = estimate(config_for(root, out), encoders(vision=stand_ins.colours()))
    assert not out.parent.exists()
    folder = prepare(config_for(root, tmp_path / "out"), encoders(vision=stand_ins.colours()))
    manifest = open_prepared(folder).manifest
    counts = {k: manifest["counts"][k] for k in ("pictures", "classes", "captions", "shards")}
    assert {k: getattr(said, k) for k in counts} == counts
    records = open_prepared(folder).records
    assert said.bytes == pytest.approx(sum(len(records[i]) for i in range(len(records))), rel=0.02)
    assert said.seconds > 0 and said.measured == 4 and "measured on 4 pictures" in str(said)


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


def stand_in_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.stand_ins", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def test_kill_9_at_ten_random_moments_leaves_folders_that_end_byte_identical(root: Path, tmp_path: Path) -> None:
    """A moment is a line of the program: also those between writing, renaming, hashing and the manifest."""
    expected = contents(prepare(config_for(root, tmp_path / "whole"), encoders()))
    counted = stand_in_run(root, tmp_path / "counted")
    assert counted.returncode == 0, counted.stderr
    assert contents(tmp_path / "counted") == expected
    lines = int(counted.stdout.splitlines()[-1])
    moments = np.random.default_rng(9).integers(1, lines, 10)
    shards = set()
    for moment in moments:
        out = tmp_path / str(moment)
        assert stand_in_run(root, out, moment).returncode == -signal.SIGKILL
        shards.add(len(list(out.glob("shard*.array_record"))))
        assert contents(prepare(config_for(root, out), encoders())) == expected
    assert len(shards) > 1  # the moments were of different kinds


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


def test_check_names_a_changed_shard_and_prepare_makes_it_anew(
    root: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepare(config_for(root, tmp_path / "out"), encoders()))
    arguments = [*command(root, base, tmp_path / "out"), "--check"]
    prepare_module.main(arguments)
    assert "4 files are as the manifest says" in capsys.readouterr().out
    shard = tmp_path / "out" / "shard-00002-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name}: corrupt: found sha256 .* delete what is named"):
        prepare_module.main(arguments)
    shard.unlink()
    assert contents(prepare(config_for(root, tmp_path / "out"), encoders())) == before


def test_a_shard_of_other_settings_is_written_again(root: Path, tmp_path: Path) -> None:
    before = contents(prepare(config_for(root, tmp_path / "out"), encoders()))
    foreign = prepare(config_for(root, tmp_path / "foreign"), encoders("b"))
    shutil.copy(foreign / "shard-00001-of-00003.array_record", tmp_path / "out")
    assert contents(prepare(config_for(root, tmp_path / "out"), encoders())) == before


TWO_PROCESSES = """
import sys
from pathlib import Path
from nabla_jax.parallel import processes
from nabla_jax.prepare import prepare
from tests import stand_ins

processes.initialize()
stand_ins.small_shards()
calls = 0
def counting(images):
    global calls
    calls += 1
    return stand_ins.pool(images)
config = stand_ins.config_for(Path(sys.argv[1]), Path(sys.argv[2]))
prepare(config, stand_ins.encoders(images=counting), part=processes.part())
print(calls)
"""


def test_two_processes_write_one_folder(root: Path, tmp_path: Path) -> None:
    expected = contents(prepare(config_for(root, tmp_path / "whole"), encoders()))
    address = free_address()
    settings = {processes.COORDINATOR: address, processes.COUNT: "2", "PYTHONPATH": "."}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(root), str(tmp_path / "out")],
            env=os.environ | settings | {processes.INDEX: str(index)}, cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    calls = []
    for process in running:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        calls.append(int(out.splitlines()[-1]))
    assert calls == [3, 2]  # shards of 3 and 2 pictures take two calls and one, a shard of 3 two
    assert contents(tmp_path / "out").keys() - expected.keys() == {".lock-1"}
    assert {k: v for k, v in contents(tmp_path / "out").items() if k != ".lock-1"} == expected


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


FOUR_DEVICES = """
import json, jax, numpy as np
from nabla_jax.metrics.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from nabla_jax.checkpoints.pipeline import Component
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import processes
from nabla_jax.prepare import compile_encoder
mesh = meshes.data_mesh()
config = AutoencoderKLConfig(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_num_groups=2)
graphdef, abstract = layers.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)
images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
alone = compile_encoder(Component(config, graphdef, params))(images)
shared = compile_encoder(Component(config, graphdef, jax.device_put(params, meshes.replicated(mesh))), mesh)(images)
print(mesh.size, float(np.abs(alone - shared).max()), float(np.abs(alone).max()))
"""


def test_the_encoder_is_cut_over_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": fake_devices(4), "PYTHONPATH": "."},
    )  # fmt: skip
    devices, difference, largest = map(float, done.stdout.split())
    assert devices == 4 and difference < 1e-5 < largest


def test_the_vision_folder_gives_the_published_features(tmp_path: Path) -> None:
    """Through prepare's own loading, padding and compiled call, against transformers on the same pictures."""
    config = Dinov2Config(16, 2, 2, 2, 28, 14)
    graphdef, abstract = layers.abstract(lambda rngs: Dinov2(config, rngs=rngs))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)
    transformers_folder.save_network(tmp_path / "vision", "dinov2", config, params)
    processor = ImageProcessor(32, (28, 28), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(processor.to_json()))
    vision = prepare_module.load_vision(tmp_path / "vision", meshes.data_mesh(jax.devices()[:1]))
    looks = rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    pixels = np.stack([vision.pixels(look) for look in looks])
    published = transformers.Dinov2Model.from_pretrained(tmp_path / "vision").eval()
    pictures = transformers.BitImageProcessorPil.from_pretrained(tmp_path / "vision")(
        [Image.fromarray(look) for look in looks], return_tensors="pt"
    )["pixel_values"]
    np.testing.assert_allclose(pixels, pictures.numpy(), atol=1e-5)
    with torch.no_grad():
        expected = published(pictures).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(vision.features(pixels), expected, atol=1e-4)
    assert vision.width == 16


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
        "control_fill": controls.control_canvas(controls.View(image, mask), Conditioning(SIZE)),
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
