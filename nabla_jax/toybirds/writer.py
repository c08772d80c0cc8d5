"""Write a world to disk in NABirds, iNaturalist and clip layouts: the same settings give the same bytes.

<out>/world.json, <out>/nabirds, <out>/inat/na, <out>/inat/unseen and <out>/clips. Everything is written to a
folder beside <out> that takes its name at the very end, so a stopped run leaves no half world.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nabla_jax.errors import UserError
from nabla_jax.toybirds import world as plan
from nabla_jax.toybirds.captions import background_caption, long_caption
from nabla_jax.toybirds.identity import draw_identity
from nabla_jax.toybirds.render import KEYPOINTS, Render, render
from nabla_jax.toybirds.world import Clip, NabirdsImage, Node, Observation, Picture, Settings, scene_of
from nabla_jax.untrusted import check, read_json


@dataclasses.dataclass(frozen=True)
class _Task:
    """A picture and the folders its three files go to."""

    settings: Settings
    picture: Picture
    root: str
    masks: str


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What the metadata files need to know about a picture that has been written."""

    box: tuple[float, float, float, float]
    keypoints: list[tuple[float, float, bool]]
    short: str
    long: str


def _save(task: _Task, shot: Render) -> None:
    target = Path(task.root, task.picture.path)
    control = Path(*target.relative_to(Path(task.root, "images")).parts).with_suffix(".png")
    for folder in (
        target.parent,
        Path(task.root, task.masks, control.parent),
        Path(task.root, "depth", control.parent),
    ):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shot.rgb).save(target, format="JPEG", quality=95, subsampling=0)
    Image.fromarray(shot.mask.astype(np.uint8) * 255).save(Path(task.root, task.masks, control))
    Image.fromarray((shot.depth * 255 + 0.5).astype(np.uint8)).save(Path(task.root, "depth", control))


def _take(task: _Task) -> _Taken:
    """Render one picture and write its JPEG, mask and depth."""
    identity, scene = draw_identity(*task.picture.identity), scene_of(task.settings, task.picture)
    shot = render(identity, scene)
    _save(task, shot)
    points = [(float(x), float(y), bool(v)) for x, y, v in shot.keypoints]
    # The short one is a prompt beside a subject: it must not say what the target's bird wears.
    return _Taken(shot.box, points, background_caption(identity, scene), long_caption(identity, scene))


def _die_with_parent() -> None:
    """Workers of a parent that was killed outright must not live on."""
    parent = multiprocessing.parent_process()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(tasks: list[_Task], workers: int) -> Iterator[_Taken]:
    """Results in the order of the tasks, whatever the number of workers."""
    if workers <= 1:
        yield from map(_take, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_die_with_parent) as pool:
        yield from pool.imap(_take, tasks, chunksize=8)


# ---------------------------------------------------------------- metadata files


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _write_json(path: Path, value: object) -> None:
    path.write_text(
        json.dumps(value, ensure_ascii=False, indent=0, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
    )


def _write_csv(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _oracle_json(settings: Settings, dataset: str, pictures: Iterable[Picture]) -> dict[str, object]:
    """What `oracle.Oracle` needs to rebuild who is in each picture and how it was taken."""
    images = {
        p.image_id: {
            "identity": list(p.identity[1:]),
            "scene": p.scene_key[1],
            "canvas": list(p.canvas),
            "fill": p.fill,
        }
        for p in pictures
    }
    return {**settings.to_json(), "dataset": dataset, "images": images}


def _box(image: NabirdsImage, taken: _Taken) -> tuple[int, int, int, int]:
    """The annotator's box (x, y, width, height): the bird's extent plus a margin; it may pass the border."""
    x, y, w, h = taken.box
    left, top, right, bottom = image.box_margin
    height, width = image.picture.canvas
    x0, y0 = max(int(x) - left, 0), max(int(y) - top, 0)
    x1, y1 = int(x + w) + 1 + right, int(y + h) + 1 + bottom
    if image.picture.fill is None:
        x1, y1 = min(x1, width), min(y1, height)
    return x0, y0, x1 - x0, y1 - y0


def _write_nabirds(
    root: Path, settings: Settings, nodes: list[Node], images: list[NabirdsImage], taken: list[_Taken]
) -> None:
    ids = [image.picture.image_id for image in images]
    _write_lines(root / "classes.txt", (f"{n.class_id} {n.name}" for n in nodes))
    _write_lines(root / "hierarchy.txt", (f"{n.class_id} {n.parent}" for n in nodes if n.parent is not None))
    _write_lines(
        root / "images.txt",
        (f"{i.picture.image_id} {i.picture.path.removeprefix('images/')}" for i in images),
    )
    _write_lines(root / "image_class_labels.txt", (f"{i.picture.image_id} {i.class_id}" for i in images))
    _write_lines(root / "train_test_split.txt", (f"{i.picture.image_id} {int(i.train)}" for i in images))
    _write_lines(root / "photographers.txt", (f"{i.picture.image_id} {i.photographer}" for i in images))
    _write_lines(
        root / "sizes.txt",
        (f"{i.picture.image_id} {i.picture.canvas[1]} {i.picture.canvas[0]}" for i in images),
    )
    boxes = (_box(image, t) for image, t in zip(images, taken, strict=True))
    _write_lines(
        root / "bounding_boxes.txt",
        (f"{i} {x} {y} {w} {h}" for i, (x, y, w, h) in zip(ids, boxes, strict=True)),
    )
    _write_lines(root / "parts" / "parts.txt", (f"{k} {name}" for k, name in enumerate(KEYPOINTS)))
    _write_lines(
        root / "parts" / "part_locs.txt",
        (
            f"{i} {k} {int(x)} {int(y)} 1" if visible else f"{i} {k} 0 0 0"
            for i, t in zip(ids, taken, strict=True)
            for k, (x, y, visible) in enumerate(t.keypoints)
        ),
    )
    _write_json(root / "captions.json", {i: t.short for i, t in zip(ids, taken, strict=True)})
    _write_json(root / "captions_long.json", {i: t.long for i, t in zip(ids, taken, strict=True)})
    pairs = plan.look_alike_pairs(settings, images)
    _write_csv(root / "pairs.csv", ["class_id", "image_1", "image_2"], ([f"{c:04d}", a, b] for c, a, b in pairs))
    _write_json(root / "oracle.json", _oracle_json(settings, "nabirds", (i.picture for i in images)))


def _write_inat(root: Path, settings: Settings, subset: str, observed: list[Observation], taken: list[_Taken]) -> None:
    pictures = [p for o in observed for p in o.pictures]
    header = list(observed[0].row)
    _write_csv(root / "final_pairs.csv", header, (list(o.row.values()) for o in observed))
    if subset == "unseen":
        strict = (list(o.row.values()) for o in observed if not o.seen)
        _write_csv(root / "strict_unseen.csv", header, strict)
    _write_json(root / "captions_short.json", {p.image_id: t.short for p, t in zip(pictures, taken, strict=True)})
    _write_json(root / "captions_long.json", {p.image_id: t.long for p, t in zip(pictures, taken, strict=True)})
    _write_json(root / "oracle.json", _oracle_json(settings, f"inat/{subset}", pictures))


def _write_clips(root: Path, settings: Settings, recorded: list[Clip]) -> None:
    _write_csv(root / "clips.csv", list(recorded[0].row), (list(clip.row.values()) for clip in recorded))
    _write_json(root / "oracle.json", _oracle_json(settings, plan.CLIPS, (p for c in recorded for p in c.pictures)))


# ---------------------------------------------------------------- the whole world


def _is_written(out: Path, settings: Settings) -> bool:
    """True when `out` holds this very world; UserError when it holds anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out}: found a file, expected a folder to write the world to")
    if not any(out.iterdir()):
        return False
    marker = out / "world.json"
    if not marker.is_file():
        raise UserError(f"{out}: found a folder without world.json, expected an empty or missing folder")
    found = read_json(marker)
    check(found, dict[str, Any], str(marker))
    wanted = settings.to_json()
    if found != wanted:
        names = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
        told = ", ".join(f"{k}: found {found.get(k)}, expected {wanted.get(k)}" for k in names)
        raise UserError(f"{out}: made with other settings ({told}); choose another folder or delete it")
    return True


def _remove_leftovers(out: Path) -> None:
    """Delete the working folders of runs that were killed (their process is gone)."""
    for folder in out.parent.glob(f".{out.name}.partial.*"):
        pid = folder.suffix.removeprefix(".")
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def write_world(
    out: str | Path,
    seed: int = 0,
    size: int = 48,
    images: int = 1600,
    workers: int = 2,
    orders: int = 4,
    pose: str = "photo",
    pose_range: float = 1.0,
    progress: bool = True,
) -> Path:
    """Write the world of `seed` to the folder `out` and return it; a finished world is left as it is.

    `size`: long side of the pictures in pixels; `images`: pictures in nabirds/; `orders`: 1 to 6 (4 gives 78
    leaf classes, 24 unseen species and 24 clips; 1 is handy for tests). Bytes do not depend on `workers`. Raises
    UserError for bad settings, a folder with other contents, or a disk that cannot be written.
    """
    settings = Settings(seed, size, images, orders, pose, pose_range)
    settings.check()
    out = Path(out).absolute()
    if _is_written(out, settings):
        return out
    partial = out.parent / f".{out.name}.partial.{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        shutil.rmtree(partial, ignore_errors=True)
        _write_all(partial, settings, workers, progress)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write the world ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_all(root: Path, settings: Settings, workers: int, progress: bool) -> None:
    from tqdm import tqdm

    nodes = plan.hierarchy(settings)
    images = plan.nabirds_images(settings, nodes)
    observed = {subset: plan.observations(settings, subset) for subset in ("na", "unseen")}
    tasks = [_Task(settings, i.picture, str(root / "nabirds"), "masks") for i in images]
    for subset, rows in observed.items():
        tasks += [_Task(settings, p, str(root / "inat" / subset), "mask") for o in rows for p in o.pictures]
    recorded = plan.clips(settings)
    tasks += [_Task(settings, p, str(root / "clips"), "masks") for clip in recorded for p in clip.pictures]
    results = _run(tasks, workers)
    taken = list(tqdm(results, total=len(tasks), desc="toybirds", unit="picture", disable=not progress))
    _write_nabirds(root / "nabirds", settings, nodes, images, taken[: len(images)])
    start = len(images)
    for subset, rows in observed.items():
        _write_inat(root / "inat" / subset, settings, subset, rows, taken[start : start + 2 * len(rows)])
        start += 2 * len(rows)
    _write_clips(root / "clips", settings, recorded)
    _write_json(root / "world.json", settings.to_json())
