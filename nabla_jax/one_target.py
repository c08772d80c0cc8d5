"""``generate`` for one target: the bird of one photo in its pose and place, or a plate of the birds of several."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax import config as configs
from nabla_jax import plates, runs
from nabla_jax.errors import UserError

if TYPE_CHECKING:
    from nabla_jax import api

Array = np.ndarray[Any, Any]
Load = Callable[[configs.Config, str, str | None], "api.Reposer"]
Settings = Callable[[configs.Config, "api.Reposer", str | None], dict[str, Any]]

PLATE = "plate.png"
MANIFEST = "manifest.jsonl"
_ONE = ("subject", "subject_mask", "target", "target_mask")
_TARGET = ("target", "target_mask")


def wanted(config: configs.Config, arguments: argparse.Namespace) -> bool:
    """Whether the arguments name one target; raises UserError where they name only part of what it takes."""
    given = [name for name in _ONE if getattr(arguments, name) is not None]
    if arguments.plate is None:
        if arguments.arrows is not None:
            raise UserError("--arrows: found a list of arrows, but no --plate to draw them on")
        needed: tuple[str, ...] = _ONE
        what = "one picture needs --subject, --subject_mask, --target and --target_mask"
        if not given:
            return False
    else:
        subject = [f"--{name}" for name in given if name not in _TARGET]
        if subject:
            raise UserError(f"--plate: its birds are in the list, found {', '.join(subject)} beside it")
        needed = _TARGET
        what = "a plate needs --target and --target_mask"
    missing = [f"--{name}" for name in needed if name not in given and not _extractable(config, name)]
    if missing:
        raise UserError(f"{what}; missing {', '.join(missing)}")
    return True


def make(config: configs.Config, arguments: argparse.Namespace, load: Load, settings: Settings) -> None:
    """Writes the picture, or the plate's folder; everything is read before ``load`` reads weights.

    Raises UserError for pictures, masks and lists that do not fit.
    """
    if arguments.plate is None:
        _make_picture(config, arguments, load)
    else:
        _make_plate(config, arguments, load, settings)


def _make_picture(config: configs.Config, arguments: argparse.Namespace, load: Load) -> None:
    from nabla_jax.images import write_image

    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out: found {arguments.out}, expected the name of a .png, .jpg or .webp file")
    target = _read_target(config, arguments)
    subject = _read_one(arguments.subject, arguments.subject_mask, config)
    with runs.writing(arguments.out.parent):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    reposer = load(config, arguments.adapter, arguments.control_adapter)
    write_image(_repose(reposer, *subject, target), arguments.out)
    print(arguments.out)


def _make_plate(config: configs.Config, arguments: argparse.Namespace, load: Load, settings: Settings) -> None:
    """The birds' pictures, one row each, and the page; what an earlier call made with the same settings is kept.

    All birds are drawn from the same noise, so that they differ by their photos alone.
    """
    from nabla_jax.hashing import file_sha256
    from nabla_jax.images import read_rgb, write_image

    out: Path = arguments.out
    if out.is_file():
        raise UserError(f"--out: found the file {out}, expected a folder for the plate")
    birds = plates.read_birds(arguments.plate)
    unmasked = [bird.label for bird in birds if bird.mask is None]
    if unmasked and not _extractable(config, "subject_mask"):
        raise UserError(f"{arguments.plate}: {unmasked[0]!r} has no mask; fill in the column mask")
    target = _read_target(config, arguments)
    height, width = target["target"].shape[:2]
    arrows = []
    if arguments.arrows is not None:
        arrows = plates.read_arrows(arguments.arrows, [bird.label for bird in birds], height, width)
    photos = [_read_one(bird.picture, bird.mask, config) for bird in birds]
    with runs.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with runs.lock(out / ".lock", f"--out {out}"):
        reposer = load(config, arguments.adapter, arguments.control_adapter)
        shared = settings(config, reposer, arguments.reference)
        shared |= {f"{name}_sha256": file_sha256(path) for name, path in _files(arguments).items()}
        if target["target_caption"]:
            shared["target_caption"] = target["target_caption"]
        rows = []
        for number, bird in enumerate(birds, 1):
            hashes = {"picture_sha256": file_sha256(bird.picture)}
            if bird.mask is not None:
                hashes["mask_sha256"] = file_sha256(bird.mask)
            file = f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', bird.label.lower()).strip('-')[:40]}.png"
            rows.append({"label": bird.label, "file": file, "picture": str(bird.picture), **hashes, **shared})
        made = runs.JsonLines(out / MANIFEST)
        made.keep(lambda row: row in rows and (out / row["file"]).is_file())
        done = [row["file"] for row in made.rows]
        with runs.progress(len(birds), "plate", done=len(done), unit="picture") as bar:
            for (pixels, mask), row in zip(photos, rows, strict=True):
                if row["file"] not in done:
                    write_image(_repose(reposer, pixels, mask, target), out / row["file"])
                    made.append(row)
                    bar.update(1)
        made.close()
    drawn = [
        plates.Drawn(bird.label, photo, read_rgb(out / row["file"]))
        for bird, (photo, _), row in zip(birds, photos, rows, strict=True)
    ]
    write_image(plates.compose(drawn, arrows, target["target"], target["target_mask"]), out / PLATE)
    print(out / PLATE)


def _repose(reposer: api.Reposer, pixels: Array, mask: Array, target: Mapping[str, Any]) -> Array:
    further = {name: value for name, value in target.items() if name not in _TARGET}
    return np.asarray(reposer.repose(pixels, target["target"], mask, target["target_mask"], **further))


def _files(arguments: argparse.Namespace) -> Mapping[str, Path]:
    """What the target is given by: name of the argument -> file."""
    names = ("target", "target_mask", "target_depth", "target_keypoints", "sibling", "sibling_mask")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _read_target(config: configs.Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``Reposer.repose`` that are the same for every subject."""
    from nabla_jax import extract
    from nabla_jax.data import controls

    needs = controls.find_control(config.conditioning.control).needs
    given = None if needs is None else getattr(arguments, f"target_{needs}")
    if needs is not None and given is None and not _extractable(config, f"target_{needs}"):
        raise UserError(f"control {config.conditioning.control}: missing --target_{needs}")
    described = config.conditioning.caption == "background"
    if described and not arguments.target_caption and not _extractable(config, "target_caption"):
        raise UserError("caption background: missing --target_caption")
    sibling = _read_sibling(config, arguments)
    pixels, mask = _read_one(arguments.target, arguments.target_mask, config)
    height, width = pixels.shape[:2]
    depth = keypoints = None
    if needs == "depth":
        depth = extract.depth(pixels, config.extract) if given is None else controls.read_depth(given, height, width)
    if needs == "keypoints":
        keypoints = (
            extract.keypoints(pixels, mask, config.extract)
            if given is None
            else controls.read_keypoints(given, height, width)
        )
    caption = arguments.target_caption
    if described and not caption:
        caption = extract.caption(pixels, settings=config.extract).text
    return {
        "target": pixels,
        "target_mask": mask,
        "target_depth": depth,
        "target_keypoints": keypoints,
        "target_caption": caption,
        "sibling": sibling and sibling[0],
        "sibling_mask": sibling and sibling[1],
    }


def _read_sibling(config: configs.Config, arguments: argparse.Namespace) -> tuple[Array, Array] | None:
    """The picture and silhouette that sibling guidance needs, None where there is none."""
    if config.sample.sibling_guidance == 1:
        if arguments.sibling is not None or arguments.sibling_mask is not None:
            raise UserError("--sibling: found a picture, but sample.sibling_guidance is 1, which needs none")
        return None
    masked = arguments.sibling_mask is not None or _extractable(config, "sibling_mask")
    missing = [] if arguments.sibling is not None else ["--sibling"]
    missing += [] if masked else ["--sibling_mask"]
    if missing:
        raise UserError(f"sample.sibling_guidance {config.sample.sibling_guidance:g}: missing {', '.join(missing)}")
    return _read_one(arguments.sibling, arguments.sibling_mask, config)


def _read_one(image: Path, mask: Path | None, config: configs.Config) -> tuple[Array, Array]:
    """A picture and the silhouette in its mask's file, or else the one that is found in it."""
    from nabla_jax import extract
    from nabla_jax.data import controls

    if mask is not None:
        return controls.read_pair(image, mask)
    pixels = controls.read_image(image)
    return pixels, extract.mask(pixels, config.extract.text, config.extract)


def _extractable(config: configs.Config, name: str) -> bool:
    """Whether there are checkpoints that make what the argument ``name`` would give."""
    masks = ("sam2", "grounding_dino")
    used: dict[str, tuple[str, ...]] = {
        "subject_mask": masks,
        "target_mask": masks,
        "sibling_mask": masks,
        "target_depth": ("depth_anything",),
        "target_caption": ("captioner",),
        "target_keypoints": ("keypoints", "dinov2"),
    }
    from nabla_jax.extract import checkpoints

    return name in used and checkpoints.is_there(config.extract, *used[name])
