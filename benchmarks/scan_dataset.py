"""Scan, validate and index a folder of NABirds' size: ``python -m benchmarks.scan_dataset``.

Generates all lists at full size (48,562 pictures, 1,011 classes of which 555 are leaves with 13 to 120 pictures) with
tiny pictures, then prints for fresh processes the seconds and the peak memory of reading it, of validating its lists,
and of validating it with every picture opened, and the number of ordered pairs, counted without making one.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PICTURES, CLASSES, LEAVES, PARTS = 48_562, 1_011, 555, 11
TRAIN = 23_929
SIZE = (12, 16)


def main() -> None:
    """The command; the hidden option ``--child`` is one measured process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the generated folder here and use it again")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "nabirds"
        if not (folder / "images.txt").is_file():
            write_folder(folder)
        for name in list(CHILDREN) * options.rounds:
            command = [sys.executable, "-m", "benchmarks.scan_dataset", "--child", name, "--folder", str(folder)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(out.splitlines()[-1])
            seconds, cpu, megabytes = (result.pop(key) for key in ("seconds", "cpu", "megabytes"))
            print(f"{name:>9}: {seconds:.2f} s ({cpu:.2f} s of CPU), {megabytes:.0f} MB, {result}", flush=True)


def write_folder(root: Path, pictures: int = PICTURES) -> None:
    """A NABirds folder of ``pictures`` with all ten lists, the same tiny JPEG under every name."""
    from io import BytesIO

    from PIL import Image

    rng = np.random.default_rng(0)
    buffer = BytesIO()
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(buffer, "jpeg")
    leaves = list(range(CLASSES - LEAVES, CLASSES))
    links = [(c, (c - 1) // 4) for c in range(1, CLASSES - LEAVES)]
    inner = [c for c in range(CLASSES - LEAVES) if c > (CLASSES - LEAVES) // 4]
    links += [(leaf, inner[i % len(inner)]) for i, leaf in enumerate(leaves)]
    sizes = np.clip(rng.normal(87.5, 25, LEAVES), 13, 120)
    labels = np.sort(rng.choice(leaves, pictures, p=sizes / sizes.sum()))
    ids = sorted(str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(pictures))
    height, width = SIZE
    train = rng.permutation(pictures) < TRAIN * pictures // PICTURES
    files = [f"{c:04d}/{id.replace('-', '')}.jpg" for id, c in zip(ids, labels, strict=True)]
    lists: dict[str, Any] = {
        "images.txt": (f"{id} {file}" for id, file in zip(ids, files, strict=True)),
        "image_class_labels.txt": (f"{id} {c}" for id, c in zip(ids, labels, strict=True)),
        "train_test_split.txt": (f"{id} {int(t)}" for id, t in zip(ids, train, strict=True)),
        "bounding_boxes.txt": (f"{id} 1 2 {width + n % 2 - 2} {height - 2}" for n, id in enumerate(ids)),
        "sizes.txt": (f"{id} {width} {height}" for id in ids),
        "photographers.txt": (f"{id} Ann  Photographer {n % 1031}" for n, id in enumerate(ids)),
        "classes.txt": (f"{c} Class  {c}" + (" (Adult male )" if c % 2 else "") for c in range(CLASSES)),
        "hierarchy.txt": (f"{child} {parent}" for child, parent in links),
        "parts/parts.txt": (f"{p} part {p}" for p in range(PARTS)),
        "parts/part_locs.txt": (f"{id} {p} {p} {p} {p % 2}" for id in ids for p in range(PARTS)),
    }
    (root / "parts").mkdir(parents=True)
    for c in set(labels):
        (root / "images" / f"{c:04d}").mkdir(parents=True)
    for file in files:
        (root / "images" / file).write_bytes(buffer.getvalue())
    # The list that marks a finished folder comes last.
    for name in reversed(lists):
        (root / name).write_text("\n".join(lists[name]) + "\n")


def measure(name: str, folder: Path) -> None:
    """Runs one child and prints its seconds, peak memory and findings as JSON."""
    start = time.perf_counter()
    found = CHILDREN[name](folder)
    seconds, cpu = time.perf_counter() - start, time.process_time()
    # Linux counts kilobytes.
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": megabytes} | found))


def read(folder: Path) -> dict[str, Any]:
    from nabla_jax.data import read_dataset

    dataset = read_dataset(folder)
    train = [sum(dataset.examples[i].split == "train" for i in positions) for positions in dataset.classes.values()]
    return {
        "pictures": len(dataset.examples),
        "classes": len(dataset.classes),
        "training pairs": sum(n * (n - 1) for n in train),
    }


def validate(folder: Path, *, pictures: bool) -> dict[str, Any]:
    from nabla_jax.data.problems import Problems
    from nabla_jax.data.validate import check_folder

    problems = Problems()
    check_folder(str(folder), problems, pictures=pictures)
    return {"errors": len(problems.errors), "warnings": len(problems) - len(problems.errors)}


CHILDREN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "read": read,
    "lists": lambda folder: validate(folder, pictures=False),
    "pictures": lambda folder: validate(folder, pictures=True),
}


if __name__ == "__main__":
    main()
