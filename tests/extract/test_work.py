"""Whole folders: where files go, provenance, shards, resumption. A stand-in replaces the networks where they do not
matter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import prepare as prepare_module
from nabla_jax.config import Config, from_dict
from nabla_jax.data import controls, read_dataset
from nabla_jax.errors import UserError
from nabla_jax.extract import __main__ as command
from nabla_jax.extract import captions, depths, segmentation, work
from nabla_jax.extract.work import Folder, Shard, extract
from nabla_jax.images import read_grey, read_rgb
from tests.data.folders import write_inat, write_nabirds
from tests.extract.checkpoints import sam2, settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A NABirds folder without masks, depth maps and captions."""
    root = write_nabirds(tmp_path / "nabirds")
    for name in ("masks", "depth"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "captions.json").unlink(missing_ok=True)
    return root


@pytest.fixture(autouse=True)
def small_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that need no time: the mask is the box, depth the mean colour. Their folders must exist all the same."""

    def find(image: np.ndarray, prompt: object, _: object) -> segmentation.Found:
        mask = np.zeros(image.shape[:2], bool)
        box = (1, 2, 9, 8) if isinstance(prompt, str) else prompt
        mask[box[0] : box[2], box[1] : box[3]] = True
        return segmentation.Found(mask, box, 0.5, 0.75 if isinstance(prompt, str) else None)

    monkeypatch.setattr(segmentation, "find", find)
    monkeypatch.setattr(depths, "estimate", lambda image, _: image.mean(axis=2))
    monkeypatch.setattr(
        captions, "describe", lambda image, wording, _, seed: captions.Caption(f"A bird on {image.shape}, {seed}.", 1)
    )
    for name in ("sam2", "grounding_dino", "depth_anything", "captioner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"which": name}))


def chosen(tmp_path: Path, **changes: object) -> object:
    names = ("sam2", "grounding_dino", "depth_anything", "captioner")
    return settings(**{name: str(tmp_path / name) for name in names} | changes)


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def test_everything_for_a_nabirds_folder(root: Path, tmp_path: Path) -> None:
    for what in ("masks", "depth", "captions"):
        assert extract(Folder.open(root), what, chosen(tmp_path)) == {"kept": 0, "made": 16, "failed": 0}
    for example in read_dataset(root).examples:
        size = controls.picture_size(example.image)
        expected = np.zeros(size, bool)
        top, left, bottom, right = example.box
        expected[top:bottom, left:right] = True
        np.testing.assert_array_equal(controls.read_mask(example.mask, *size), expected)
        grey = read_rgb(example.image).mean(axis=2)
        np.testing.assert_array_equal(read_grey(example.depth, size), depths.to_grey(grey))
        assert example.mask == root / "masks" / example.image.parent.name / f"{example.image.stem}.png"
        assert example.caption.startswith(f"A bird on {(*size, 3)}")
    sidecar = json.loads((root / "extraction" / "masks.json").read_text())
    assert sidecar["checkpoints"]["sam2"]["name"] == "sam2" and len(sidecar["checkpoints"]["sam2"]["sha256"]) == 64
    # Every box is known: Grounding DINO and its settings have no part in these masks.
    assert set(sidecar["checkpoints"]) == {"sam2"} and sidecar["settings"] == {}
    assert "torch" in sidecar["environment"]["torch"]
    sidecar = json.loads((root / "extraction" / "captions.json").read_text())
    assert set(sidecar["settings"]) == {"caption_prompt", "caption_tokens", "caption_retries"}


def test_an_inaturalist_folder(tmp_path: Path) -> None:
    """Words instead of boxes; the official names mask/ and captions_short.json; a folder above is called images."""
    root = write_inat(tmp_path / "images" / "inat")
    shutil.rmtree(root / "mask")
    for what in ("masks", "captions"):
        extract(Folder.open(root), what, chosen(tmp_path))
    dataset = read_dataset(root)
    assert all(e.mask is not None and "mask" in e.mask.relative_to(root).parts for e in dataset.examples)
    assert dataset.by_id["222_photo_2"].caption == "A bird on flax."  # it was there
    assert all(e.caption.startswith("A bird on") for e in dataset.examples)
    rows = work._rows(root / "extraction", "masks")
    assert {tuple(row["box"]) for row in rows} == {(1, 2, 9, 8)} and {row["score"] for row in rows} == {0.75}
    assert json.loads((root / "extraction" / "masks.json").read_text())["settings"]["text"] == "a bird."


def test_frames_of_clips_keep_the_folder_of_their_species(tmp_path: Path) -> None:
    root = tmp_path / "clips"
    for species in ("Wren", "Robin"):
        for frame in range(3):
            image = root / species / "one" / f"{frame:03d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((12, 16, 3), 9 * frame, np.uint8)).save(image)
    (root / "clips.csv").write_text("clip,frames_per_second\nWren/one,1\nRobin/one,1\n")
    assert extract(Folder.open(root), "masks", chosen(tmp_path)) == {"kept": 0, "made": 6, "failed": 0}
    assert all(e.mask is not None and e.species in e.mask.parts for e in read_dataset(root).examples)


def test_the_command_takes_the_folders_of_lists_and_leaves_out_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_inat(tmp_path / "unseen")
    (root / "part.csv").write_text((root / "final_pairs.csv").read_text(encoding="utf-8"), encoding="utf-8")
    config = config_for(tmp_path / "birds", tmp_path)
    config.benchmarks.update(whole=str(root), part=str(root / "part.csv"), clips=str(tmp_path / "clips"))
    assert command._roots(config) == [str(tmp_path / "birds"), str(root)]
    assert capsys.readouterr().out == f"{tmp_path / 'clips'}: not there, left out\n"


def test_files_that_were_there_stay(root: Path, tmp_path: Path) -> None:
    example = read_dataset(root).examples[3]
    path = Folder.open(root).file("masks", example)
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full(controls.picture_size(example.image), 255, np.uint8)).save(path)
    before = path.read_bytes()
    assert extract(Folder.open(root), "masks", chosen(tmp_path)) == {"kept": 1, "made": 15, "failed": 0}
    other = chosen(tmp_path, sam2=str(tmp_path / "depth_anything"))
    assert extract(Folder.open(root), "masks", other, overwrite=True) == {"kept": 1, "made": 15, "failed": 0}
    assert path.read_bytes() == before
    assert example.id not in {row["id"] for row in work._rows(root / "extraction", "masks")}


@pytest.mark.parametrize("count", [1, 3])
def test_shards_make_the_same_files_as_one_process(root: Path, tmp_path: Path, count: int) -> None:
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    for what in ("masks", "captions"):
        extract(Folder.open(whole), what, chosen(tmp_path))
        made = [extract(Folder.open(root), what, chosen(tmp_path), Shard(i, count))["made"] for i in range(count)]
        assert sum(made) == 16 and max(made) - min(made) <= 1
    assert files(root) == files(whole)
    assert (root / "captions.json").read_bytes() == (whole / "captions.json").read_bytes()


@pytest.mark.parametrize("what", ["masks", "captions"])
def test_a_run_that_dies_is_continued(
    root: Path, tmp_path: Path, what: work.What, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    extract(Folder.open(whole), what, chosen(tmp_path))
    module, name = {"masks": (segmentation, "find"), "captions": (captions, "describe")}[what]
    real, calls = getattr(module, name), []

    def dying(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(KeyboardInterrupt):
            extract(Folder.open(root), what, chosen(tmp_path))
    # Killed between a row and its file, and within a row.
    log = root / "extraction" / f"{what}-0-of-1.jsonl"
    with log.open("a") as file:
        if what == "masks":
            missing = Folder.open(root).missing("masks")[0]
            file.write(json.dumps({"id": missing.id, "file": "masks/none.png", "sha256": ""}) + "\n")
        file.write('{"id": "ha')
    assert extract(Folder.open(root), what, chosen(tmp_path))["made"] == 11
    assert files(root) == files(whole)
    assert what == "masks" or (root / "captions.json").read_bytes() == (whole / "captions.json").read_bytes()
    assert extract(Folder.open(root), what, chosen(tmp_path))["made"] == 0


def test_other_settings_are_refused_and_overwritten_on_demand(root: Path, tmp_path: Path) -> None:
    extract(Folder.open(root), "captions", chosen(tmp_path))
    extract(Folder.open(root), "masks", chosen(tmp_path))
    (tmp_path / "sam2" / "config.json").write_text("{}")
    work.checkpoints.identity.cache_clear()
    with pytest.raises(UserError, match=r"masks.json: masks were made with other settings \(checkpoint sam2: .* there"):
        extract(Folder.open(root), "masks", chosen(tmp_path))
    other = chosen(tmp_path, caption_tokens=7)
    with pytest.raises(UserError, match="caption_tokens: 12 there, 7 here"):
        extract(Folder.open(root), "captions", other)
    with pytest.raises(UserError, match="found shard 0/2, expected a single process"):
        extract(Folder.open(root), "captions", other, Shard(0, 2), overwrite=True)
    captions_file = root / "captions.json"
    first = read_dataset(root).examples[0].id
    captions_file.write_text(json.dumps(json.loads(captions_file.read_text()) | {first: "Written by hand."}))
    assert extract(Folder.open(root), "captions", other, overwrite=True) == {"kept": 1, "made": 15, "failed": 0}
    assert json.loads(captions_file.read_text())[first] == "Written by hand."


def test_a_moved_checkpoint_is_the_same(root: Path, tmp_path: Path) -> None:
    extract(Folder.open(root), "masks", chosen(tmp_path))
    moved = shutil.copytree(tmp_path / "sam2", tmp_path / "elsewhere")
    extract(Folder.open(root), "masks", chosen(tmp_path, sam2=str(moved)))


def test_what_cannot_be_made_is_listed_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = sorted(read_dataset(root).examples, key=lambda e: e.id)
    examples[0].image.write_bytes(b"no picture")
    real = segmentation.find

    def find(image: np.ndarray, prompt: object, given: object) -> segmentation.Found:
        if prompt == examples[1].box and image.shape[:2] == controls.picture_size(examples[1].image):
            raise segmentation.NotFound("nothing there")
        return real(image, prompt, given)

    monkeypatch.setattr(segmentation, "find", find)
    made = extract(Folder.open(root), "masks", chosen(tmp_path))
    assert made["failed"] >= 2 and made["made"] + made["failed"] == 16
    reasons = {row["id"]: row["reason"] for row in work._rows(root / "extraction", "masks") if "reason" in row}
    assert reasons[examples[0].id].endswith("not a picture in a known format")
    assert reasons[examples[1].id] == "nothing there"
    assert extract(Folder.open(root), "masks", chosen(tmp_path))["made"] == 0


def test_one_process_a_shard(root: Path, tmp_path: Path) -> None:
    with (
        work.runs.lock(root / "extraction" / ".masks-0-of-1.jsonl.lock", "test"),
        pytest.raises(UserError, match="shard 0/1 of masks: another process is working in it"),
    ):
        extract(Folder.open(root), "masks", chosen(tmp_path))
    for text in ("1", "2/2", "-1/2", "a/b"):
        with pytest.raises(UserError, match="expected i/n"):
            Shard.parse(text)
    assert Shard.parse("1/2") == Shard(1, 2)
    assert command.shard_of({"NABLA_PROCESS_INDEX": "2", "NABLA_PROCESS_COUNT": "4"}) == Shard(2, 4)
    assert command.shard_of({}) == Shard()


def test_clips_are_made_whole(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def of_clip(frames: list[np.ndarray], _: object) -> list[np.ndarray]:
        seen.append([frame.shape for frame in frames])
        return [np.full(frame.shape[:2], 10 * i, np.uint8) for i, frame in enumerate(frames)]

    monkeypatch.setattr(depths, "of_clip", of_clip)
    with pytest.raises(UserError, match="no command in extract.clip_depth"):
        extract(Folder.open(root), "depth", chosen(tmp_path), clips=True)
    given = chosen(tmp_path, clip_depth="run {frames} {output}", depth_anything="nowhere")
    for index in range(2):
        extract(Folder.open(root), "depth", given, Shard(index, 2), clips=True)
    assert sorted(len(clip) for clip in seen) == [4, 4, 4, 4]
    for folder in sorted((root / "depth").iterdir()):
        levels = [int(read_grey(path).max()) for path in sorted(folder.iterdir())]
        assert levels == [0, 10, 20, 30]


def config_for(root: Path, tmp_path: Path, **conditioning: object) -> Config:
    return from_dict(
        {
            "base": {"path": "unused"},
            "data": {"root": str(root), "prepared": str(tmp_path / "prepared")},
            "conditioning": {"size": 32} | conditioning,
            "lora": {},
            "optim": {},
            "train": {"workdir": "unused", "steps": 1, "batch": 1},
            "extract": {"sam2": str(tmp_path / "sam2"), "depth_anything": str(tmp_path / "depth_anything")},
        }
    )


def test_prepare_makes_what_its_control_needs(root: Path, tmp_path: Path) -> None:
    config = config_for(root, tmp_path, control="depth")
    assert work.needed(config) == ("masks", "depth")
    prepare_module.complete(config)
    assert all(e.mask is not None and e.depth is not None for e in read_dataset(root).examples)
    assert not (root / "captions.json").exists()


def test_prepare_without_checkpoints_tells_the_command(root: Path, tmp_path: Path) -> None:
    for name in ("sam2", "depth_anything"):
        (tmp_path / name / "config.json").unlink()
    prepare_module.complete(config_for(root, tmp_path))
    with pytest.raises(UserError, match=r"has no mask; 16 of 16 pictures have none.*python -m nabla_jax.extract"):
        controls.require(read_dataset(root).examples, "fill")


def test_the_command_with_the_real_network(tmp_path: Path) -> None:
    """Two processes, each with its shard, SAM 2's real class."""
    root = write_nabirds(tmp_path / "data")
    shutil.rmtree(root / "masks")
    file = tmp_path / "config.py"
    values = {
        "base": {"path": "unused"}, "data": {"root": str(root), "prepared": "unused"}, "conditioning": {"size": 32},
        "lora": {}, "optim": {}, "train": {"workdir": "unused", "steps": 1, "batch": 1},
        "extract": {"sam2": str(sam2()), "device": "cpu"},
    }  # fmt: skip
    file.write_text(f"def get_config(arg=''):\n    return {values!r}\n")
    start = [sys.executable, "-m", "nabla_jax.extract", "--config", str(file), "--what", "masks", "--shard"]
    running = [
        subprocess.Popen([*start, f"{i}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    results = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert all("masks: 8 made, 0 were there" in out for out, _ in results)
    for example in read_dataset(root).examples:
        mask = controls.images.read_mask(example.mask, controls.picture_size(example.image))
        np.testing.assert_array_equal(
            mask, segmentation.segment(read_rgb(example.image), example.box, settings("sam2"))[0]
        )
    refused = subprocess.run([*start[:-1], "--what", "shapes"], capture_output=True, text=True, check=False)
    assert (
        refused.returncode == 2 and "--what: found 'shapes', expected one of masks, depth, captions" in refused.stderr
    )
