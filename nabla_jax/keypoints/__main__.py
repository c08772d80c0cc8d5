"""Trains a keypoint head on a frozen DINOv2 and writes its folder.

    python -m nabla_jax.keypoints --config configs/keypoints.py

Any dataset folder with annotated parts will do (NABirds, a manifest with keypoints); its training pictures train, its
test pictures measure. The same command continues an interrupted training. Writes the head (``config.json``,
``model.safetensors``, ``README.md``) to ``output``; ``folder`` keeps the training's state, ``metrics.jsonl`` with a row
for every measurement, and ``validation.json`` with the last one over all test pictures.
"""

import argparse
import dataclasses
import functools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nabla_jax import assets, runs
from nabla_jax import config as configs
from nabla_jax.checkpoints import transformers_folder
from nabla_jax.conditioning.geometry import Box
from nabla_jax.data import keypoint_file, read_dataset, skeleton
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.errors import UserError
from nabla_jax.keypoints import crops, training
from nabla_jax.metrics import networks as nets
from nabla_jax.models import layers
from nabla_jax.models.dinov2 import Dinov2Config
from nabla_jax.models.keypoint_head import KeypointHead, KeypointHeadConfig
from nabla_jax.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """Sizes of the head; see ``KeypointHeadConfig``."""

    image_size: int
    margin: float = 1.25
    hidden_size: int = 256
    fine_size: int = 64
    num_blocks: int = 3
    upsample: int = 2


@dataclasses.dataclass(frozen=True)
class KeypointsConfig:
    """Everything a head is made of.

    Attributes:
      output: the folder to write.
      folder: where the training's state and measurements are kept.
      root: dataset folder with annotated parts.
      dinov2: the frozen backbone's folder, or asset:NAME.
      head: sizes.
      training: how to train.
      obtain: told to a user who lacks ``root`` or ``dinov2``.
      source: the configuration file, filled in when it is read.
    """

    output: str
    folder: str
    root: str
    dinov2: str
    head: HeadSizes
    training: training.Settings
    obtain: str = ""
    source: str = ""


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Trains a keypoint head on a frozen DINOv2.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="for example configs/keypoints.py")
    file = parser.parse_args(argv).config
    found = make(dataclasses.replace(configs.load_as(KeypointsConfig, file), source=file))
    print(table(found), end="")


def make(config: KeypointsConfig) -> dict[str, Any]:
    """Trains and writes the head unless it is there; returns its measurement over all test pictures.

    Raises UserError for a configuration, dataset or DINOv2 that does not fit, before anything is loaded.
    """
    folder, output = Path(config.folder), Path(config.output)
    with runs.lock(folder / ".lock", f"folder {folder}"):
        dataset, head = check(config)
        _claim(config, folder)
        if (output / "config.json").is_file() and (folder / "validation.json").is_file():
            done: dict[str, Any] = runs.read_json(folder / "validation.json")
            return done
        mesh = meshes.data_mesh(jax.local_devices()[:1])
        encoder = nets.load_encoder(assets.resolve(config.dinov2), "dinov2", mesh)
        graphdef, params = layers.initialize(
            lambda rngs: KeypointHead(head, rngs=rngs), jax.random.key(config.training.seed)
        )
        find = nets.finder(graphdef, encoder)

        def validate(examples: Sequence[Example], boxes: Sequence[Box], params: layers.Params) -> dict[str, Any]:
            batch = config.training.batch
            run = functools.partial(find, params)
            detector = nets.Detector(run, nets.processor_at(encoder, head), head, batch)
            return training.measure(detector, examples, boxes, head.parts, batch)

        trained, tested = (_annotated(dataset, split) for split in ("train", "test"))
        boxes, test_boxes = ([crops.bird_box(example) for example in part] for part in (trained, tested))
        shown = np.random.default_rng(0).permutation(len(tested))[: config.training.validate]
        some = [tested[i] for i in shown], [test_boxes[i] for i in shown]
        batches = training.Batches(trained, boxes, encoder, head, config.training)
        try:
            params = training.train(
                graphdef, params, batches, config.training, functools.partial(validate, *some),
                checkpoint=folder / "state.safetensors", report=functools.partial(_report, folder / "metrics.jsonl"),
            )  # fmt: skip
        finally:
            batches.close()
        # What is measured is what is kept: weights in half the bits.
        transformers_folder.save_network(folder / "head", "keypoints", head, params, dtype="bfloat16")
        kept = transformers_folder.load_keypoint_head(folder / "head", assets.resolve(config.dinov2)).params
        found = validate(tested, test_boxes, kept)
        runs.write_json(folder / "validation.json", found)
        runs.write_atomic(output / "README.md", card(config, dataset, len(trained), found, kept))
        transformers_folder.save_network(output, "keypoints", head, kept, dtype="bfloat16")
    return found


def check(config: KeypointsConfig) -> tuple[Dataset, KeypointHeadConfig]:
    """The dataset's lists and the head's configuration. Raises UserError for what is missing or does not fit."""
    obtain = f": {config.obtain}" if config.obtain else ""
    backbone = assets.resolve(config.dinov2)
    if not (backbone / "config.json").is_file():
        raise UserError(f"{config.source}: dinov2: found no {backbone / 'config.json'}, expected a DINOv2{obtain}")
    if not Path(config.root).is_dir():
        raise UserError(f"{config.source}: root: found nothing at {config.root}, expected a dataset folder{obtain}")
    transformers_folder.check_network(backbone, "dinov2")
    known = Dinov2Config.from_json(backbone / "config.json")
    dataset = read_dataset(config.root)
    parts = dataset.parts or skeleton.PARTS
    for split in ("train", "test"):
        keypoints = _annotated(dataset, split)[0].keypoints
        assert keypoints is not None
        if len(keypoints) != len(parts):
            raise UserError(f"{config.root}: found {len(keypoints)} keypoints without names, expected {len(parts)}")
    crops.mirror_order(parts)
    head = KeypointHeadConfig(
        parts=parts,
        feature_size=known.hidden_size,
        patch_size=known.patch_size,
        dinov2_sha256=transformers_folder.weights_sha256(backbone),
        **dataclasses.asdict(config.head),
    )
    head.check(f"{config.source}: head")
    return dataset, head


def _annotated(dataset: Dataset, split: str) -> list[Example]:
    """The examples of a split on which a part was annotated as visible. Raises UserError if there are none.

    What a head found before (keypoints.json) is no annotation: a head must not learn its own mistakes.
    """
    guessed = keypoint_file.read(dataset.root / keypoint_file.FILE)
    found = [
        example
        for example in dataset.of_split(split)
        if example.keypoints is not None
        and example.keypoints[:, 2].any()
        and not (
            example.id in guessed and np.array_equal(keypoint_file.from_rows(guessed[example.id]), example.keypoints)
        )
    ]
    if not found:
        raise UserError(f"{dataset.root}: found no picture of split {split} with an annotated keypoint, expected some")
    return sorted(found, key=lambda e: e.id)


def _claim(config: KeypointsConfig, folder: Path) -> None:
    """Makes ``folder`` this configuration's, or refuses one that another configuration has begun."""
    names = ("root", "dinov2", "head", "training")
    free = ("validate", "every", "threads")
    wanted = json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k in names}))
    wanted["training"] = {k: v for k, v in wanted["training"].items() if k not in free}
    path = folder / "config.json"
    if not path.is_file():
        runs.write_json(path, wanted)
        return
    before, now = configs.flatten(runs.read_json(path)), configs.flatten(wanted)
    differing = [f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in now if before.get(k) != now[k]]
    if differing:
        raise UserError(f"{folder}: begun with other settings ({'; '.join(differing)}); choose another or delete it")


def _report(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    numbers = ("heat", "distance", "visible", "pck", "visibility", "steps_per_second")
    print(f"step {row['step']}: " + ", ".join(f"{name} {row[name]:.4f}" for name in numbers), flush=True)


def table(found: dict[str, Any]) -> str:
    """A measurement as lines of text."""
    lines = [f"{found['pictures']} test pictures, keypoints within 0.1 of the box's longer side:"]
    lines += [f"  {name:<12}{'-' if value is None else f'{value:.3f}':>7}" for name, value in found["parts"].items()]
    lines += [f"  {'all':<12}{found['pck']:>7.3f}", f"mean distance {found['distance']:.4f} of that side"]
    lines += [f"visible or hidden told right {found['visibility']:.3f}"]
    return "\n".join(lines) + "\n"


def card(config: KeypointsConfig, dataset: Dataset, pictures: int, found: dict[str, Any], params: layers.Params) -> str:
    """How the head was made, and what it is worth."""
    size, how = sum(leaf.size for leaf in jax.tree.leaves(params)), config.training
    each = ", ".join(f"{name} {value:.3f}" for name, value in found["parts"].items() if value is not None)
    what = (
        f"A keypoint head ({size:,} parameters) on the patch features of `{config.dinov2}`, of use with these very "
        f"weights only. Made by `python -m nabla_jax.keypoints --config {config.source}`; Apache-2.0."
    )
    lines = (
        f"Pictures: {pictures} training pictures of `{dataset.root}`, crops of {config.head.image_size} pixels, "
        f"{config.head.margin:g} times the longer side of the bird's box.",
        f"Training: {how.steps} steps of {how.batch} crops, varied in place, size, colour and sharpness, half of them "
        f"mirrored with left and right parts exchanged; AdamW, learning rate {how.learning_rate:g}, seed {how.seed}.",
        f"On {found['pictures']} test pictures: {found['pck']:.3f} of the visible keypoints within a tenth of the "
        f"longer side of the box (mean distance {found['distance']:.4f}); visible or hidden is told right in "
        f"{found['visibility']:.3f}. By part: {each}.",
        "Weights: the running average, bfloat16.",
    )
    wrapped = (textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)
    return "\n".join([f"# {Path(config.output).name}", "", textwrap.fill(what, 120), "", *wrapped, ""])


if __name__ == "__main__":
    runs.run_main(main)
