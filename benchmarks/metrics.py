"""Pictures scored per second beside the PyTorch metric code in one run: ``python -m benchmarks.metrics``.

    scripts/keep_buffers.sh python -m benchmarks.metrics --sizes toy base --pictures 500
    python -m benchmarks.metrics --values --world data/toybirds/nabirds --pairs 200

Both sides get the same pairs (a generated picture, a target, a mask; two pictures a pair) and the same weights, and
take turns batch by batch after one batch each that is not counted. They compute what the published evaluation does:
masked DINOv2, SigLIP, LPIPS and RMSE. ``base`` are DINOv2-base, SigLIP-base/16 and VGG16 with random weights.
``--values`` compares values instead: pairs of a world, the generated picture being the subject's, stretched.
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.torch_metrics import Pair, TorchMetrics
from nabla_jax import assets
from nabla_jax.checkpoints.transformers_folder import NETWORKS, save_network
from nabla_jax.config import Metrics
from nabla_jax.data import read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from nabla_jax.images import read_mask, read_rgb
from nabla_jax.metrics import networks as nets
from nabla_jax.metrics.birds import masked_pair
from nabla_jax.metrics.pixels import masked_rmse
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.metrics.references import stretch
from nabla_jax.models import layers
from nabla_jax.models.dinov2 import Dinov2Config
from nabla_jax.models.lpips import LpipsConfig
from nabla_jax.models.siglip import SiglipVisionConfig

SIZES = ("toy", "base")
BASE = {
    "dinov2": (Dinov2Config.base(), ImageProcessor.dinov2()),
    "siglip": (SiglipVisionConfig.base(), ImageProcessor.siglip()),
    "lpips": (LpipsConfig(), None),
}


def folders_of(size: str, scratch: Path) -> Metrics:
    """The embedded networks, or networks of base size with random weights written below ``scratch``."""
    if size == "toy":
        return Metrics(dinov2="asset:toy-dinov2", siglip="asset:toy-siglip", lpips="asset:toy-lpips", box=32)
    for number, (name, (config, processor)) in enumerate(BASE.items()):
        save_network(scratch / name, name, config, _random_weights(name, config, jax.random.key(number)))
        if processor is not None:
            (scratch / name / "preprocessor_config.json").write_text(json.dumps(processor.to_json()))
    return Metrics(dinov2=str(scratch / "dinov2"), siglip=str(scratch / "siglip"), lpips=str(scratch / "lpips"))


def _random_weights(name: str, config: Any, key: jax.Array) -> layers.Params:
    return layers.initialize(lambda rngs: NETWORKS[name].model(config, rngs=rngs), key)[1]


def random_pairs(count: int, side: int) -> list[Pair]:
    """Pictures of smooth colours, mask an ellipse; sizes vary as photographs' do."""
    pairs = []
    for number in range(count):
        rng = np.random.default_rng(number)
        height, width = ((side, side * 3 // 4), (side * 3 // 4, side), (side, side))[number % 3]
        y, x = np.mgrid[:height, :width]
        mask = ((y - height / 2) / (height * 0.3)) ** 2 + ((x - width / 2) / (width * 0.4)) ** 2 < 1
        sides = [stretch(rng.integers(0, 256, (6, 6, 3), np.uint8), height, width) for _ in range(2)]
        pairs.append((*sides, mask))
    return pairs


def ours(networks: nets.Networks, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """The published four numbers by this package, [pairs] each."""
    birds = [masked_pair(*pair) for pair in pairs]
    a, b = [bird for bird, _ in birds], [bird for _, bird in birds]
    described = nets.describe(networks, [*a, *b], nets.WHOLE)
    halves = list(zip(described[: len(a)], described[len(a) :], strict=True))
    found = {name: np.array([x[name] @ y[name] for x, y in halves]) for name in nets.WHOLE}
    found["lpips"] = nets.whole_distances(networks, a, b)
    found["rmse"] = np.array([masked_rmse(*pair) for pair in pairs])
    return found


@dataclasses.dataclass
class Clock:
    """What one side took: wall-clock and processor seconds, the latter of all threads."""

    wall: float = 0.0
    processor: float = 0.0

    def add(self, run: Callable[[], object]) -> None:
        """Runs and counts it."""
        began = time.perf_counter(), time.process_time()
        run()
        self.wall += time.perf_counter() - began[0]
        self.processor += time.process_time() - began[1]


def race(sides: dict[str, Callable[[Sequence[Pair]], object]], pairs: Sequence[Pair], batch: int) -> str:
    """Both sides over all pairs: batches take turns after one each that does not count. A line of results."""
    for run in sides.values():
        run(pairs[:batch])
    clocks = {name: Clock() for name in sides}
    line = ""
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        order = list(sides.items())
        for name, run in order if start // batch % 2 else order[::-1]:
            clocks[name].add(functools.partial(run, part))
        done = 2 * (start + len(part))
        rates = [
            f"{n} {done / c.wall:.2f} pictures/s ({done / c.processor:.2f} a processor second)"
            for n, c in clocks.items()
        ]
        mine, theirs = clocks.values()
        ratio = f"ratio {theirs.wall / mine.wall:.2f} ({theirs.processor / mine.processor:.2f})"
        line = f"{done} pictures: {', '.join(rates)}, {ratio}"
        print(line, flush=True)
    return line


def world_pairs(root: Path, count: int) -> list[Pair]:
    """The first pairs of a world: the subject's picture stretched to the target's size, the target, its mask."""
    dataset = read_dataset(root)
    found = []
    for pair in benchmark_pairs(root, dataset)[:count]:
        target = dataset.by_id[pair.target_id]
        picture = read_rgb(target.image)
        assert target.mask is not None
        mask = read_mask(target.mask, picture.shape[:2])
        found.append((stretch(read_rgb(dataset.by_id[pair.subject_id].image), *mask.shape), picture, mask))
    return found


def load(metrics: Metrics, batch: int) -> tuple[nets.Networks, TorchMetrics]:
    """Both sides."""
    networks = nets.load_networks(dataclasses.replace(metrics, batch=batch))
    assert networks is not None
    return networks, TorchMetrics(**{name: assets.resolve(path) for name, path in metrics.folders.items()})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--batch", type=int, default=10, help="pairs at a time")
    parser.add_argument("--side", type=int, default=224, help="longer side of the pictures of base size in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--values", action="store_true", help="compare values instead of speed")
    parser.add_argument("--world", type=Path, default=Path("data/toybirds/nabirds"), help="for --values")
    parser.add_argument("--pairs", type=int, default=200, help="for --values")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if options.values:
            networks, published = load(folders_of("toy", Path(scratch)), options.batch)
            pairs = world_pairs(options.world, options.pairs)
            mine, theirs = ours(networks, pairs), published(pairs)
            for name, expected in theirs.items():
                largest = np.abs(mine[name] - expected).max()
                print(f"{name}: {len(pairs)} pairs, mean {expected.mean():.4f}, largest difference {largest:.2e}")
            return
        for size in options.sizes:
            networks, published = load(folders_of(size, Path(scratch)), options.batch)
            pairs = random_pairs(options.pictures // 2, 48 if size == "toy" else options.side)
            sides: dict[str, Callable[[Sequence[Pair]], object]] = {
                "nabla_jax": functools.partial(ours, networks),
                "PyTorch": published,
            }
            print(f"{size}: {race(sides, pairs, options.batch)}", flush=True)


if __name__ == "__main__":
    main()
