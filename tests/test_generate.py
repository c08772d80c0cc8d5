"""Pictures of benchmarks and single pictures, on a tiny random base and a small world."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nabla_jax import api, generate, runs
from nabla_jax.data import read_dataset
from nabla_jax.data.pairs import benchmark_pairs, spread
from nabla_jax.errors import UserError
from nabla_jax.metrics.oracle import open_oracle
from tests import fixtures

FIELDS = {
    "pair", "subject_id", "target_id", "subject_used", "file", "height", "width", "seed", "steps", "guidance",
    "adapter", "adapter_sha256", "base_sha256", "placement",
}  # fmt: skip


def run(tmp_path: Path, *words: str, out: str = "pictures", **overrides: Any) -> Path:
    config = fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **overrides)
    generate.main(["--config", str(config), "--out", str(tmp_path / out), *words])
    return tmp_path / out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["pair"]: row for row in runs.read_rows(folder / "manifest.jsonl")}


def test_a_benchmark_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = str(fixtures.trained_run())
    begun: list[int] = []
    repose_batch = api.Reposer.repose_batch

    def noting(*args: Any) -> Any:
        begun.append(len(compiled))
        return repose_batch(*args)

    monkeypatch.setattr(api.Reposer, "repose_batch", noting)
    with fixtures.compilations() as compiled:
        out = run(tmp_path, "--adapter", trained, "--limit", "5")
    monkeypatch.undo()
    # Two batches for each of right and shuffled, the second of them filled up: one program serves them all.
    assert len(begun) == 4 and compiled.count("jit(draw)") == 1
    assert compiled[begun[1] :] == []
    root = fixtures.prepared_root() / "world" / "nabirds"
    dataset, pairs = read_dataset(root), spread(benchmark_pairs(root), 5)
    for kind in ("right", "shuffled"):
        found = rows(out / "nabla" / kind)
        assert list(found) == [pair.key for pair in pairs]
        for pair in pairs:
            row = found[pair.key]
            assert row.keys() == FIELDS
            target = np.asarray(Image.open(dataset.by_id[pair.target_id].image))
            made = Image.open(out / "nabla" / kind / row["file"])
            assert (row["height"], row["width"]) == target.shape[:2] == (made.height, made.width)
            assert (row["subject_id"], row["target_id"]) == (pair.subject_id, pair.target_id)
            used = dataset.by_id[row["subject_used"]]
            own = dataset.by_id[pair.subject_id]
            assert (used.id == own.id) if kind == "right" else (used.species != own.species)

    # The same command changes nothing; without some pictures it makes these again, bit for bit.
    before = contents(out)
    run(tmp_path, "--adapter", trained, "--limit", "5")
    assert contents(out) == before
    (out / "nabla" / "right" / f"{pairs[1].key}.png").unlink()
    manifest = out / "nabla" / "shuffled" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:3]) + '{"pai')
    run(tmp_path, "--adapter", trained, "--limit", "5")
    after = contents(out)
    pictures = [name for name in before if name.endswith(".png")]
    assert {name: after[name] for name in pictures} == {name: before[name] for name in pictures}
    for kind in ("right", "shuffled"):
        stored = [json.loads(line) for line in before[f"nabla/{kind}/manifest.jsonl"].splitlines()]
        assert rows(out / "nabla" / kind) == {row["pair"]: row for row in stored}

    # Other settings do not mix into the folder.
    with pytest.raises(UserError, match="other settings .*steps: 2 there, 3 here"):
        run(tmp_path, "--adapter", trained, "--limit", "5", sample__steps=3)
    with pytest.raises(UserError, match="other settings .*adapter_sha256"):
        run(tmp_path, "--limit", "5")

    # A part of the benchmark, in other batches, gives the same pictures to rounding.
    part = run(tmp_path, "--adapter", trained, "--limit", "2", out="part", sample__batch=1)
    for name in contents(part):
        if name.endswith(".png"):
            ours, theirs = np.asarray(Image.open(part / name)), np.asarray(Image.open(out / name))
            assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_interrupted_generation_leaves_whole_pictures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path, "--limit", "4", "--subjects", "right", out="whole")
    original = runs.JsonLines.append

    def append(self: runs.JsonLines, row: dict[str, Any]) -> None:
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        original(self, row)

    monkeypatch.setattr(runs.JsonLines, "append", append)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--limit", "4", "--subjects", "right")
    monkeypatch.undo()
    out = run(tmp_path, "--limit", "4", "--subjects", "right")
    assert contents(out) == contents(whole)


def test_autoencoder_ceiling_is_the_oracles_answer_through_the_autoencoder(tmp_path: Path) -> None:
    out = run(tmp_path, "--reference", "autoencoder-ceiling", "--limit", "2")
    oracle = open_oracle(fixtures.prepared_root() / "world" / "nabirds")
    assert oracle is not None
    for kind in ("right", "shuffled"):
        for row in rows(out / "nabla" / kind).values():
            answer = oracle.right(row["subject_used"], row["target_id"])
            made = np.asarray(Image.open(out / "nabla" / kind / row["file"]))
            assert made.shape == answer.shape
            assert row["adapter"] == "autoencoder-ceiling"


def test_one_picture(tmp_path: Path) -> None:
    a, b = np.full((40, 61, 3), 90, np.uint8), np.full((33, 70, 3), 200, np.uint8)
    paths = {}
    for name, image in {"subject": a, "target": b}.items():
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[8:20, 10:30] = 255
        for key, pixels in {name: image, f"{name}_mask": mask}.items():
            paths[key] = tmp_path / f"{key}.png"
            Image.fromarray(pixels).save(paths[key])
    words = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    made = Image.open(run(tmp_path, *words, out="new/c.png"))
    assert (made.height, made.width, made.mode) == (33, 70, "RGB")
    with pytest.raises(UserError, match="missing --target_mask"):
        run(tmp_path, *words[:-2], out="d.png")
    with pytest.raises(UserError, match=r"--out: found .*d\.txt"):
        run(tmp_path, *words, out="d.txt")
    Image.fromarray(np.zeros((40, 61), np.uint8)).save(paths["subject_mask"])
    with pytest.raises(UserError, match=r"subject_mask\.png: mask is empty"):
        run(tmp_path, *words, out="d.png")
    Image.fromarray(np.full((40, 60), 255, np.uint8)).save(paths["subject_mask"])
    with pytest.raises(UserError, match=r"subject_mask\.png: mask is 40x60"):
        run(tmp_path, *words, out="d.png")


def test_wrong_words_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--subjects: found 'left'"):
        run(tmp_path, "--subjects", "left")
    with pytest.raises(UserError, match="unknown benchmark zoo, configured are nabla"):
        run(tmp_path, "--benchmark", "zoo")
    with pytest.raises(UserError, match="found nothing at"):
        run(tmp_path, benchmarks__nabla=str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path, out="file/pictures")
