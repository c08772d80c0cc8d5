"""A report of many pairs that share a few pictures, with markup wherever text comes from outside."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from nabla_jax import report
from nabla_jax.data import read_dataset
from nabla_jax.images import write_image
from nabla_jax.metrics import summary
from nabla_jax.metrics.summary import PairScore
from tests import fake_world

MARKUP = "<img src=x onerror=window.broken=1>"
SETS = ("untuned", "demo", MARKUP, "autoencoder-ceiling")
BENCHMARKS = ("nabla", "inat-seen")
ORDERS = ("Passerines", "Owls & " + MARKUP, "Gulls")


@dataclasses.dataclass(frozen=True)
class Many:
    page: Path
    pairs: int
    scores: dict  # (benchmark, set) -> list[PairScore]
    class_of: dict  # picture id -> class name


def write(folder, pairs):
    world = fake_world.write_world(folder / "birds", oracle=False)
    classes = world / "classes.txt"
    classes.write_text(classes.read_text().replace("Bird 5", f"Bird 5 {MARKUP}"))
    dataset = read_dataset(world)
    ids = [example.id for example in dataset.examples]
    (world / "photographers.txt").write_text("".join(f"{i} Ann {MARKUP} O'Hara\n" for i in ids))
    dataset = read_dataset(world)
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(6):
        pictures.append(folder / "pictures" / f"{number}.png")
        write_image(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8), pictures[-1])
    evaluation = folder / "evaluation"
    scores, rows, breakdown, comparisons = {}, [], [], []
    for benchmark in BENCHMARKS:
        for s, name in enumerate((*SETS, "copy-target")):
            found = []
            for n in range(pairs if benchmark == BENCHMARKS[0] else 50):
                subject, target = ids[n % 28], ids[(n * 5 + 1) % 28]
                example = dataset.by_id[target]
                value = float(rng.gamma(20, 3 + s))
                found.append(
                    PairScore(
                        pair=f"{n // 2}_{'1in2' if n % 2 == 0 else '2in1'}",
                        subject_id=subject,
                        target_id=target,
                        class_id=example.class_id,
                        order=ORDERS[example.class_id % 3],
                        species=example.species,
                        qualifier="",
                        pixels=500 + n % 37,
                        rmse=value,
                        # Some pairs have no SSIM.
                        ssim=None if n % 11 == 0 else 1 / value,
                        right_error=value,
                        shuffled_error=value + 20,
                        sibling_error=60.0,
                        rank=1 + n % 4,
                        lineup=10,
                    )
                )
            scores[benchmark, name] = found
            path = evaluation / "pairs" / benchmark / f"{name}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(summary.to_csv(found))
            rows += summary.rows(name, benchmark, found)
            breakdown += summary.breakdown(name, benchmark, found)
            if name not in ("untuned", "copy-target"):
                comparisons += summary.compare(name, "untuned", benchmark, found, scores[benchmark, "untuned"])
    about = {
        "version": 1,
        "nabla_jax": "0",
        "seed": 0,
        "references": ["copy-target"],
        "missing": [],
        "benchmarks": [
            {
                "name": name,
                "root": str(world),
                "list": None,
                "fingerprint": "0" * 16,
                "pairs": len(scores[name, "untuned"]),
                "classes": 7,
                "duplicates": 0,
                "excluded": {},
                "oracle": None,
            }
            for name in BENCHMARKS
        ],
        "sets": [
            {
                "model": name,
                "benchmark": benchmark,
                "fingerprint": "1" * 16,
                "pictures": len(scores[benchmark, name]),
                "shuffled": 0,
                "files": {s.pair: str(pictures[n % 6]) for n, s in enumerate(scores[benchmark, name])},
                "seed": [42],
                "adapter": [MARKUP],
                "adapter_sha256": ["ab" * 32],
            }
            for name in SETS
            for benchmark in BENCHMARKS
        ],
    }
    for name, value in (
        ("summary", rows),
        ("breakdown", breakdown),
        ("comparisons", summary.correct(comparisons)),
        ("evaluation", about),
    ):
        (evaluation / f"{name}.json").write_text(json.dumps(value))
    (evaluation / "summary.md").write_text("")
    page = report.write(evaluation, folder / "report")
    return Many(page, pairs, scores, {e.id: e.class_name for e in dataset.examples})
