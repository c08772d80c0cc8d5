"""The verbs as jobs small enough to be killed a hundred times, and what must be the same afterwards."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nabla_jax import config as configs
from nabla_jax import evaluate, fetch, generate, prepare, runs, train
from nabla_jax.data import loader as loaders
from nabla_jax.data.pairs import Pair
from tests import fixtures, stand_ins
from tests.fake_inaturalist import serve

TIMES = ("seconds", "data_seconds", "samples_per_second")
LIMIT = 12  # pictures that generate makes and evaluate scores


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a job made: files by name, and rows, each with what tells it from the others, by the file they are in."""

    files: Mapping[str, bytes]
    rows: Mapping[str, Sequence[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """A verb: ``run`` works on a folder and continues it, ``read`` tells what is in it."""

    name: str
    run: Callable[[Path], None]
    read: Callable[[Path], Contents]
    steps: bool = False  # whether it logs its steps, see ``taken``


def taken(out: Path) -> list[dict[str, Any]]:
    """Every batch that a training run read, in the order of time: its number and its pairs."""
    return runs.read_rows(out.with_name(f"{out.name}.taken"))


def _log_batches(out: Path) -> None:
    """Makes this process write down what its loaders give."""
    read = loaders.Loader.__next__
    log = os.open(out.with_name(f"{out.name}.taken"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def logged(self: loaders.Loader) -> Any:
        number = self.get_state()["step"]
        batch = read(self)
        pairs = {name: batch[name].tolist() for name in ("sample", "subject_index", "target_index")}
        if os.environ.get("NABLA_PROCESS_INDEX", "0") == "0":
            os.write(log, (json.dumps({"batch": number, **pairs}) + "\n").encode())
        return batch

    loaders.Loader.__next__ = logged  # type: ignore[method-assign]


def train_job(root: Path, steps: int = 8, **settings: Any) -> Job:
    """Training with a checkpoint after every second step."""

    def run(out: Path) -> None:
        _log_batches(out)
        overrides = {"train__workdir": str(out), "train__steps": steps, "data__threads": 1, **settings}
        train.main(["--config", str(fixtures.write_config(root, out.with_suffix(f".{os.getpid()}.py"), **overrides))])

    def read(out: Path) -> Contents:
        files = [p for p in out.glob("adapters/**/*") if p.is_file() and not p.name.startswith(".")]
        measured = [{k: v for k, v in row.items() if k not in TIMES} for row in runs.read_rows(out / "metrics.jsonl")]
        # A step that was lost with its process is taken again; it must be the very same.
        batches = {json.dumps(row): row["batch"] for row in taken(out)}
        return Contents(
            {str(p.relative_to(out)): p.read_bytes() for p in files},
            {
                "metrics.jsonl": [(str(row["step"]), json.dumps(row)) for row in measured],
                "pairs": sorted(((str(number), row) for row, number in batches.items()), key=lambda row: int(row[0])),
            },
        )

    return Job("train", run, read, steps=True)


def prepare_job(root: Path) -> Job:
    """Encoding with linear networks."""

    def run(out: Path) -> None:
        stand_ins.small_shards()
        prepare.prepare(stand_ins.config_for(root / "world" / "nabirds", out), stand_ins.encoders())

    return Job("prepare", run, lambda out: Contents(_files(out), {}))


def generate_job(root: Path) -> Job:
    """Pictures that a model of noise draws."""

    def paint(pairs: Sequence[Pair]) -> list[generate.Made]:
        time.sleep(0.01)
        seeds = [int(hashlib.sha256(pair.key.encode()).hexdigest()[:8], 16) for pair in pairs]
        return [(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8), {}) for seed in seeds]

    def run(out: Path) -> None:
        config = fixtures.config(root)
        settings = {"seed": 0, "adapter": "none", "adapter_sha256": None}
        with runs.lock(out / ".lock", f"--out {out}"):
            for work in generate.read_works(config, list(config.benchmarks), generate.KINDS, out, LIMIT):
                generate.make(work, settings, 2, paint)

    def read(out: Path) -> Contents:
        lists = {str(p.relative_to(out)): runs.read_rows(p) for p in sorted(out.rglob(generate.MANIFEST))}
        files = {name: data for name, data in _files(out).items() if name not in lists}
        return Contents(files, {k: [(row["pair"], json.dumps(row)) for row in rows] for k, rows in lists.items()})

    return Job("generate", run, read)


def evaluate_job(root: Path, pictures: Path) -> Job:
    """Scores of the pictures in ``pictures``."""

    def run(out: Path) -> None:
        evaluate.evaluate(
            {"noise": pictures}, {k: Path(v) for k, v in fixtures.config(root).benchmarks.items()}, out,
            workers=0, limit=LIMIT,
        )  # fmt: skip

    def read(out: Path) -> Contents:
        return Contents({k: v for k, v in _files(out).items() if k.endswith((".csv", "summary.json"))}, {})

    return Job("evaluate", run, read)


def fetch_job(url: str, pairs: Path) -> Job:
    """Photos from the site at ``url``."""

    def run(out: Path) -> None:
        words = ["--pairs", str(pairs), "--out", str(out), "--contact", "me@example.org"]
        fetch.main([*words, "--api", url, "--media", url])

    return Job("fetch", run, lambda out: Contents(_files(out), {}))


@contextmanager
def site(folder: Path, rows: int = 8) -> Iterator[tuple[str, Path]]:
    """A photo site in a process of its own: its address, and a list of pairs on it."""
    pairs = folder / "pairs.csv"
    lines = ["observation_id,common_name,relative_path,photo_count,user_login,image_1,image_2"]
    lines += [f"{i + 500},Bird {i},images/B_{i}/{i + 500},2,u,{2 * i + 10}.jpg,photo_2.jpg" for i in range(rows)]
    pairs.write_text("\n".join(lines) + "\n")
    out, into = os.pipe()
    if not (pid := os.fork()):
        with serve() as there:
            for i in range(rows):
                there.add(i + 500, 2 * i + 10, 2 * i + 11)
            os.write(into, there.url.encode())
            while os.getppid() != 1:
                time.sleep(0.5)
        os._exit(0)
    try:
        yield os.read(out, 200).decode(), pairs
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def write_root(root: Path) -> None:
    """What the jobs work on: a base, a world and its prepared pictures, as ``fixtures.prepared_root`` has them."""
    fixtures.write_base(root / "base", blocks=1)
    fixtures.write_small_world(root / "world")
    made: configs.Config = fixtures.config(root)
    prepare.prepare(made, prepare.load_encoders(made))


def _files(out: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}
