"""The seven configurations from the first command to the last, at both sizes, with no further settings than sizes.

The working folder holds what ``obtain`` tells a user to get, under its names and in its structure: random weights of a
very small width, a small world for the data, the embedded networks for the published ones that judge pictures.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nabla_jax import assets, evaluate, generate, prepare, runs, train
from nabla_jax import config as configs
from nabla_jax.checkpoints import adapters
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from tests import fixtures

FOLDER = Path(__file__).resolve().parent.parent / "configs"
NAMES = (*(f"{base}_{control}" for base in ("omk", "oms") for control in ("fill", "depth", "keypoints")), "insert_fill")
# Everything else is the file's own.
TINY = {
    "conditioning.size": fixtures.SIZE,
    "conditioning.text_length": 8,
    "conditioning.dot": 3,
    "conditioning.line": 1,
}
SMALL = {
    "train.steps": 1, "train.batch": 2, "train.sample_every": 0,
    "sample.batch": 1, "metrics.batch": 4, "metrics.box": 32,
    "lora.name": "adapter",  # one name, so that one compiled step serves all controls
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder. Tests write runs, prepared data and pictures into it, each its own."""
    root = tmp_path_factory.mktemp("everything")
    checkpoints, data = root / "checkpoints", root / "data"
    fixtures.write_base(checkpoints / "FLUX.1-Kontext-dev", blocks=1)
    fixtures.write_base(checkpoints / "FLUX.1-schnell", blocks=1, schnell=True)
    fixtures.write_base(checkpoints / "FLUX.1-Fill-dev", blocks=1, fill=True)
    fixtures.write_redux(checkpoints / "FLUX.1-Redux-dev")
    insert = configs.load(str(FOLDER / "insert_fill.py"))
    published = adapters.AdapterMetadata(insert.lora.rank, insert.lora.alpha)
    start = fixtures.write_adapter(root / insert.lora.start, root / insert.base.path, published)
    save_file(load_file(start), start)  # the published one says nothing of itself
    networks = {
        "dinov2-base": "dinov2", "siglip-base-patch16-224": "siglip", "siglip2-base-patch16-224": "siglip",
        "lpips-vgg16": "lpips",
    }  # fmt: skip
    for name, asset in networks.items():
        (checkpoints / name).symlink_to(assets.resolve(f"asset:toy-{asset}"))
    world = fixtures.write_small_world(root / "world", images=76)
    data.mkdir()
    for folder in world.iterdir():
        (data / folder.name).symlink_to(folder)
    (data / "toybirds").symlink_to(world)
    return root


def shrunk(name: str, size: str, **further: Any) -> tuple[configs.Config, list[str]]:
    """A configuration that takes a few seconds, and the command line for it."""
    values = {key: str(value) for key, value in (SMALL | ({} if size else TINY) | further).items()}
    file = f"{FOLDER / name}.py{size}"
    return configs.load(file, values), ["--config", file, *(f"--config.{key}={text}" for key, text in values.items())]


def check_start(config: configs.Config, words: list[str], adapter: Path) -> None:
    """Prodigy's first step is too small to see: training began at the given file. It is not needed for going on."""
    start, trained = Path(config.lora.start), load_file(adapter)
    given = load_file(start)
    assert trained.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_allclose(trained[name], array, rtol=0, atol=1e-5, err_msg=name)
        assert array.any()
    start.unlink()
    with pytest.raises(UserError, match=r"lora\.start: found nothing at .*pytorch_lora_weights.*accept the licences"):
        train.main([*words, "--config.train.workdir=runs/other"])
    train.main([*words, "--config.train.steps=2"])
    assert runs.RunFolder(Path(config.train.workdir)).last_step() == 2


@pytest.mark.parametrize("size", ["", ":toy"])
@pytest.mark.parametrize("name", NAMES)
def test_train_generate_evaluate(name: str, size: str, everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(everything)
    config, words = shrunk(name, size)
    if config.data.mode == "precomputed":
        prepare.main(words)
    train.main(words)
    folder = runs.RunFolder(Path(config.train.workdir))
    (row,) = runs.read_rows(folder.metrics)
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    adapter = folder.last_adapter(config.lora.name)
    if config.lora.start:
        check_start(config, words, adapter)
        adapter = folder.last_adapter(config.lora.name)
    metadata = adapters.read_metadata(adapter)
    for field in ("method", "control", "skeleton", "dot", "line", "caption", "prompt", "text_length", "size"):
        assert getattr(metadata, field) == getattr(config.conditioning, field)
    chosen = (metadata.rank, metadata.sample_steps, metadata.sample_guidance, metadata.guidance)
    assert chosen == (config.lora.rank, config.sample.steps, config.sample.guidance, config.train.guidance)
    assert metadata.applies_to == ("all" if name.startswith("insert") else "condition")

    # Nobody annotated the keypoints of the others.
    benchmark = next(name for name, root in config.benchmarks.items() if root == config.data.root)
    out = Path("pictures") / folder.path.name
    quick = ["--benchmark", benchmark, "--limit", "1"]
    generate.main([*words, "--adapter", str(folder.path), "--out", str(out), *quick, "--subjects", "right"])
    (made,) = runs.read_rows(out / benchmark / "right" / generate.MANIFEST)
    assert (made["steps"], made["guidance"]) == (config.sample.steps, config.sample.guidance)
    assert made["adapter_sha256"] == file_sha256(adapter)

    report = Path("reports") / folder.path.name
    evaluate.main([*words, "--pictures", f"{name}={out}", "--out", str(report), *quick, "--workers", "0"])
    summary = {row["metric"]: row for row in json.loads((report / "summary.json").read_text()) if row["model"] == name}
    assert all(row["n"] == 1 and np.isfinite(row["mean"]) for row in summary.values())
    assert {"rmse", "dinov2", "siglip", "lpips", "normalised_identity"} <= set(summary)
    # What pictures were drawn with is in the evaluation, too, each value once.
    sets = json.loads((report / "evaluation.json").read_text())["sets"]
    (about,) = [found for found in sets if found["model"] == name]
    if config.conditioning.method == "insert":
        for field in ("mask_policy", "expansion", "window", "feather"):
            assert about[field] == [getattr(config.sample, field)]
    assert about["steps"] == [config.sample.steps]
