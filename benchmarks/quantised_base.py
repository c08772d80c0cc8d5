"""What a quantised base saves and costs: ``python -m benchmarks.quantised_base --data data/toybirds/nabirds``.

A trained base with a trained adapter on real pairs, once for each format and dtype of products: bytes of the
transformer's parameters, seconds for a velocity (compiled, median of rounds in turn), the error of the velocity
against plain float32 and plain bfloat16 (root mean square of the difference over that of the velocity), and the
velocity's own squared error, which is what training minimises. With --pictures also how far pictures drawn from the
same noise lie from those of the plain base, grey levels 0 to 255. The data is a folder with a pair list, such as
``python -m nabla_jax.toybirds`` writes.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import api, draws, flow, reposing
from nabla_jax.data import controls, read_dataset
from nabla_jax.data.pairs import benchmark_pairs, spread
from nabla_jax.models import layers
from nabla_jax.models.quantised import FORMATS

TIMES = (0.2, 0.5, 0.8, 0.95)
SEED = 0
Row = tuple[str, str]  # format, dtype of products
Points = list[tuple[jax.Array, jax.Array, jax.Array]]  # noisy tokens, times, the velocity there


def read_jobs(root: str, count: int, control: str) -> list[api.Job]:
    """Pairs of a benchmark folder, spread over its classes."""
    dataset, jobs = read_dataset(root), []
    for pair in spread(benchmark_pairs(root, dataset), count):
        subject = controls.read_view(dataset.by_id[pair.subject_id], "fill")
        target = controls.read_view(dataset.by_id[pair.target_id], control)
        jobs.append(
            api.Job(pair.key, subject.image, subject.mask, target.image, target.mask, target.depth, target.keypoints)
        )
    return jobs


def encode(reposer: api.Reposer, jobs: Sequence[api.Job]) -> dict[str, jax.Array]:
    """Moments of target, subject and control, the prompt, and sample numbers."""
    assert isinstance(reposer.text, tuple)
    conditioning = reposer.conditioning
    placed = [controls.target_placement(job.target_mask, conditioning.size, 0) for job in jobs]
    canvases = {
        "target": [controls.target_canvas(j.target, conditioning.size, p) for j, p in zip(jobs, placed, strict=True)],
        "subject": [controls.subject_canvas(j.subject, j.subject_mask, conditioning.condition_size) for j in jobs],
        "control": [controls.control_canvas(j.target_view, conditioning) for j in jobs],
    }
    batch = {
        name: reposer.encode(reposer.vae.params, jnp.asarray(api.to_images(np.stack([c.pixels for c in column]))))
        for name, column in canvases.items()
    }
    embeds, pooled = (jnp.asarray(np.repeat(array, len(jobs), axis=0)) for array in reposer.text)
    numbers = jnp.arange(len(jobs), dtype=jnp.uint32)
    return {**batch, "prompt_embeds": embeds, "pooled": pooled, "sample": numbers}


def points(reposer: api.Reposer, batch: dict[str, jax.Array]) -> Points:
    """Points of every pair's path, the same for all formats."""
    vae = reposer.method.vae
    x0 = flow.pack((jnp.split(batch["target"], 2, axis=1)[0] - vae.shift_factor) * vae.scaling_factor)
    x1 = draws.normal(draws.keys(SEED, batch["sample"], draws.NOISE), x0.shape[1:])
    times = [jnp.full(len(x0), t, jnp.float32) for t in TIMES]
    return [(flow.interpolate(x0, x1, t), t, flow.velocity(x0, x1)) for t in times]


def compile_velocity(
    reposer: api.Reposer, batch: dict[str, jax.Array], some: Points
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Compiled: noisy tokens [B, N, C] and times [B] -> velocities."""
    method, height = reposer.method, batch["target"].shape[-2] // flow.path.PATCH
    grid = (height, batch["target"].shape[-1] // flow.path.PATCH)

    @jax.jit
    def run(base: layers.Params, noisy: jax.Array, time: jax.Array) -> jax.Array:
        shown, text = reposing.shown(method, batch, SEED), (batch["prompt_embeds"], batch["pooled"])
        guidance = reposer.defaults.guidance
        return reposing.predict(method, base, reposer.adapters, noisy, time, shown, text, guidance, grid)

    compiled = run.lower(reposer.base, *some[0][:2]).compile()
    return functools.partial(compiled, reposer.base)


def rms(array: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="asset:toy-flux-kontext")
    parser.add_argument("--adapter", default="asset:toy-omk-fill")
    parser.add_argument("--data", required=True, help="folder with a pair list")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pictures", type=int, default=0, help="so many pictures by each row; 0: none")
    options = parser.parse_args()

    rows: list[Row] = [(kind, dtype) for dtype in options.dtypes for kind in ("none", *FORMATS)]
    load = functools.partial(api.load, options.base, options.adapter)
    reposers = {row: load(quantise=row[0], dtype=row[1]) for row in rows}
    first = next(iter(reposers.values()))
    jobs = read_jobs(options.data, max(options.pairs, options.pictures), first.conditioning.control)
    batch = encode(first, jobs[: options.pairs])
    some = points(first, batch)
    runs = {row: compile_velocity(reposer, batch, some) for row, reposer in reposers.items()}
    print(f"compiled {len(runs)} programs", flush=True)

    seconds: dict[Row, list[float]] = {row: [] for row in rows}
    found: dict[Row, np.ndarray] = {}
    for number in range(options.rounds):
        # Each row is the first one in every other round.
        for row in rows[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            found[row] = np.stack([np.asarray(runs[row](noisy, t)) for noisy, t, _ in some])
            seconds[row].append((time.perf_counter() - start) / len(some))

    truth = np.stack([np.asarray(velocity) for *_, velocity in some])
    plain = [("none", dtype) for dtype in options.dtypes]
    against = " | ".join(f"error against plain {dtype}" for dtype in options.dtypes)
    device = jax.devices()[0].device_kind
    print(f"{options.base}, {options.adapter}, {len(batch['sample'])} pairs, times {TIMES}, {device}")
    print(f"| base | products | bytes | seconds | {against} | squared error of the velocity |")
    print("|---|---|---|---|" + "---|" * (len(plain) + 1))
    for row in rows:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(reposers[row].base))
        errors = " | ".join(f"{rms(found[row] - found[other]) / rms(found[other]):.4f}" for other in plain)
        loss = np.mean((found[row] - truth) ** 2)
        print(f"| {' | '.join(row)} | {held:,} | {np.median(seconds[row]):.3f} | {errors} | {loss:.5f} |")

    if options.pictures:
        sample = dataclasses.replace(first.defaults, batch=options.pictures)
        drawn = {row: reposers[row].repose_batch(jobs[: options.pictures], sample) for row in rows}
        for row in rows:
            pairs = zip(drawn[row], drawn[plain[0]], strict=True)
            distances = [rms(image.astype(np.float32) - other.astype(np.float32)) for (image, _), (other, _) in pairs]
            mean = np.mean(distances)
            print(f"{' '.join(row)}: RMSE to plain {plain[0][1]}, mean of {len(distances)} pictures {mean:.3f}")


if __name__ == "__main__":
    main()
