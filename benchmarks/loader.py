"""Samples per second of the training loader at the real record size: ``python -m benchmarks.loader``.

Writes a prepared folder of random numbers in the shapes of ``configs/omk_fill.py`` (1024 pixels: one record of
[32, 128, 128] float16 for each of target, subject and control) and reads the same pairs, in turn, round after round:

- with the plain ArrayRecord reader: the bytes of the three records of each pair, one after the other, nothing else;
  those of a batch are held until the next one, as for every other reader
- with ``nabla_jax.data.loader``: decoded, compared with the manifest, in batches; by threads and by processes
- with ``torch.utils.data.DataLoader``: the same records, decoded, in batches of the same arrays

Prints each rate and the ratios of the loader to the others (median over the rounds), and how long a training step of
``--step`` seconds, during which a device works and this machine's cores do not, waits for its batch. ``--folder`` keeps
the folder for the next time.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax.config import load
from nabla_jax.data import pairs
from nabla_jax.data.loader import MANIFEST, SCHEMA, TEXT, Prepared, make_loader, open_prepared, shard_name
from nabla_jax.data.pictures import roles
from nabla_jax.data.records import encode_record, write_shard

ROLES = roles(("fill",))
PER_SHARD = 64  # pictures
SEED = 0


def write_folder(folder: Path, pictures: int, size: int) -> None:
    """A prepared folder of ``pictures`` pictures of 16 classes."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shape = (32, size // 8, size // 8)
    rng = np.random.default_rng(SEED)
    drawn = [rng.standard_normal(shape, np.float32).astype(np.float16) for _ in range(7)]
    mask = rng.integers(0, 256, shape[1:], dtype=np.uint8)
    starts = range(0, pictures, PER_SHARD)
    shards = []
    for number, first in enumerate(starts):
        held = range(first, min(first + PER_SHARD, pictures))
        path = folder / shard_name(number, len(starts))
        count = write_shard(path, (
            encode_record(
                {"id": str(i), "class_id": i % 16, "caption": 0, "index": i, "role": role, "made": "benchmark"},
                {"moments": drawn[(i + k) % 7]} | ({"mask": mask} if k == 0 else {}),
            )
            for i in held for k, role in enumerate(ROLES)
        ))  # fmt: skip
        shards.append(_entry(path) | {"pictures": len(held), "records": count})
    # Text is the same work for everyone and is left small.
    save_file({"prompt_embeds": np.zeros((1, 4, 4), np.float32), "pooled": np.zeros((1, 4), np.float32)}, folder / TEXT)
    manifest = {
        "schema": SCHEMA, "made": "benchmark", "roles": list(ROLES), "features": 0, "moments": list(shape),
        "shards": shards, "text": _entry(folder / TEXT), "settings": {},
        "classes": {str(i): {"taxonomy": [str(i)]} for i in range(min(pictures, 16))},
        "ids": [str(i) for i in range(pictures)], "class_ids": [i % 16 for i in range(pictures)],
        "captions": [0] * pictures,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def rate(batches: Iterator[Any], batch: int, warm: int, count: int) -> tuple[float, float]:
    """Samples per second, and milliseconds of this process's processor time a sample.

    Of ``count`` batches after ``warm`` ones, which are more than any of the readers has ready.
    """
    for _ in range(warm):
        next(batches)
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    samples = batch * count
    return samples / (time.perf_counter() - start), 1e3 * (time.process_time() - used) / samples


def waiting(batches: Iterator[Any], warm: int, count: int, step: float) -> list[float]:
    """Seconds that each of ``count`` steps of ``step`` seconds, after ``warm`` ones, waits for its batch."""
    waited = []
    for _ in range(warm + count):
        start = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - start)
        time.sleep(step)
    return waited[warm:]


def plain(prepared: Prepared, batch: int) -> Iterator[list[bytes]]:
    """Reads the bytes of the records that batches are made of."""
    draw = pairs.sampler("all_pairs", prepared.classes)
    held = len(ROLES)
    step = 0
    while True:
        read = []
        for n in range(step * batch, (step + 1) * batch):
            pair = draw(SEED, n)
            for record in (pair.target * held, pair.target * held + 2, pair.subject * held + 1):
                read.append(prepared.records[record])
        yield read
        step += 1


def torch_batches(folder: Path, batch: int, workers: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """The same pairs through torch's loader."""
    from torch.utils.data import DataLoader, Dataset

    class Pairs(Dataset[Any]):
        def __init__(self) -> None:
            self.prepared: Prepared | None = None
            self.draw = pairs.sampler("all_pairs", open_prepared(folder).classes)

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, n: int) -> dict[str, Any]:
            if self.prepared is None:  # every worker opens its own files
                self.prepared = open_prepared(folder)
            pair = self.draw(SEED, n)
            target = self.prepared.read(pair.target, ("target", "control_fill"))
            subject = self.prepared.read(pair.subject, ("subject",))
            return {
                "target": target["target"], "control": target["control_fill"], "subject": subject["subject"],
                "mask": target["mask"].astype(np.float32) / 255,
                "sample": n, "subject_index": pair.subject, "target_index": pair.target, "level": 1, "caption": 0,
            }  # fmt: skip

    loader = DataLoader(Pairs(), batch_size=batch, num_workers=workers, prefetch_factor=2 if workers else None)
    for found in loader:
        yield {name: tensor.numpy() for name, tensor in found.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to keep the data; by default a temporary folder")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2, help="threads, or processes, of each loader")
    parser.add_argument("--batches", type=int, default=40, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", type=float, default=0.5, help="seconds of the step that must not wait")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config = load("configs/omk_fill.py")
    batch, workers = config.train.batch, options.workers

    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / MANIFEST).is_file():
            write_folder(folder, options.pictures, config.conditioning.size)
        prepared = open_prepared(folder)
        record = len(prepared.records[0])
        print(
            f"records of {record / 2**20:.2f} MiB, batches of {batch} pairs, {workers} workers, {os.cpu_count()} cores"
        )

        def ours(**how: int) -> Iterator[Any]:
            return stack.enter_context(
                contextlib.closing(make_loader(prepared, "all_pairs", batch, SEED, **how))  # type: ignore[arg-type]
            )

        first = {k: v for k, v in next(ours(threads=0)).items() if k not in ("prompt_embeds", "pooled")}
        other = next(torch_batches(folder, batch, 0))
        if {k: v.tobytes() for k, v in first.items()} != {k: v.tobytes() for k, v in other.items()}:
            raise SystemExit("the two loaders give different batches")

        # Torch forks its workers, so they come before any thread. All stay until the end, idle once their queues are
        # full, so that no round pays for starting processes.
        readers: dict[str, Iterator[Any]] = {"torch DataLoader": torch_batches(folder, batch, workers)}
        next(readers["torch DataLoader"])
        readers |= {"plain reader": plain(prepared, batch)}
        readers |= {"loader, threads": ours(threads=workers), "loader, processes": ours(workers=workers)}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name, batches in readers.items():
                measured[name].append(rate(batches, batch, 2 * workers + 4, options.batches))
        rates = {name: [each for each, _ in found] for name, found in measured.items()}
        for name, found in rates.items():
            used = statistics.median(each for _, each in measured[name])
            print(
                f"{name:20} {statistics.median(found):7.1f} samples/s ({min(found):.1f} to {max(found):.1f}), "
                f"{used:.2f} ms of this process a sample"
            )
        for name in ("loader, threads", "loader, processes"):
            for against in ("plain reader", "torch DataLoader"):
                ratios = [a / b for a, b in zip(rates[name], rates[against], strict=True)]
                print(f"{name} / {against}: {statistics.median(ratios):.2f}")
        for name in ("loader, threads", "loader, processes"):
            waited = waiting(readers[name], 2, options.steps, options.step)
            print(
                f"{name}: a step of {options.step:g} s waited {1e3 * statistics.median(waited):.1f} ms for its batch, "
                f"{1e3 * max(waited):.1f} at most, {sum(waited) / (options.steps * options.step):.1%} of the time"
            )


if __name__ == "__main__":
    main()
