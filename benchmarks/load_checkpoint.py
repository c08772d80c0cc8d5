"""From the start of a process to its first forward pass: ``python -m benchmarks.load_checkpoint``.

Writes a random FLUX transformer as a diffusers folder (shards and index, at least 2 GB), then alternates fresh
processes that load it and run one forward pass: this package on one side, diffusers and torch on the other, same dtype,
same inputs, no compilation cache. Prints both times, their ratio, and how much anonymous memory the loader took beyond
the finished parameters, against twice the largest leaf.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import anonymous_memory, event

TEXT, GRID = 32, 8
# Full depth, so that stacks and compile time are those of the real model; a third of its width.
CONFIG = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
SHARD = 500 * 2**20


def main() -> None:
    """The command; the hidden option ``--child`` is one measured process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--heads", type=int, default=CONFIG["num_attention_heads"], help="width / 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here and use it again")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child](options.folder, options.dtype)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "transformer" / "config.json").is_file():
            write_checkpoint(folder / "transformer", CONFIG | {"num_attention_heads": options.heads}, options.dtype)
        size = sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB, {options.dtype}", flush=True)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CHILDREN}
        for number in range(options.rounds):
            for name in CHILDREN:
                runs[name].append(measure(name, folder, options.dtype))
                print(f"round {number + 1}: {name}: {describe(runs[name][-1])}", flush=True)
        report(runs, largest_leaf(folder, options.dtype))


# ------------------------------------------------------------------------------------------------- checkpoint


def write_checkpoint(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """A sharded diffusers folder of small normal numbers; memory holds one shard."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from nabla_jax.checkpoints.safetensors_io import file_tensors
    from nabla_jax.models import flux, layers

    kind = jnp.dtype(dtype)
    parsed = flux.FluxConfig.from_json(config)
    _, abstract = layers.abstract(lambda rngs: flux.Flux(parsed, rngs=rngs, dtype=dtype))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for tensor, _ in file_tensors(abstract, stacked=flux.STACKED):
        bytes_ = int(np.prod(tensor.shape)) * kind.itemsize
        if shards[-1] and size + bytes_ > SHARD:
            shards.append({})
            size = 0
        shards[-1][tensor.name] = tensor.shape
        size += bytes_
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        values = {n: (0.02 * rng.standard_normal(s, np.float32)).astype(kind) for n, s in shard.items()}
        save_file(values, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(parsed.to_json()))


def largest_leaf(folder: Path, dtype: str) -> int:
    """Bytes of the largest leaf of the parameter tree."""
    import jax

    from nabla_jax.checkpoints import pipeline
    from nabla_jax.models import flux, layers

    config = pipeline.transformer_config(folder)
    _, abstract = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs, dtype=dtype))
    return max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


# --------------------------------------------------------------------------------------------------- children


def inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """One sample of normal draws, float32."""
    rng = np.random.default_rng(1)
    shapes = {
        "tokens": (1, GRID * GRID, config["in_channels"]),
        "prompt": (1, TEXT, config["joint_attention_dim"]),
        "pooled": (1, config["pooled_projection_dim"]),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def run_ours(folder: Path, dtype: str) -> None:
    """Loads and runs with this package."""
    import jax
    import jax.numpy as jnp

    from nabla_jax.checkpoints import pipeline
    from nabla_jax.conditioning import omini
    from nabla_jax.models import layers

    jax.devices()
    event("imported")
    model = pipeline.load_transformer(folder, dtype=dtype)
    jax.block_until_ready(model.params)
    event("loaded", parameters=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))

    @jax.jit
    def forward(params: layers.Params, data: dict[str, jax.Array]) -> jax.Array:
        branches = omini.branches(
            data["prompt"], data["pooled"], data["tokens"], omini.grid_ids(GRID, GRID), jnp.full(1, 0.5), guidance=3.5
        )
        return layers.bind(model.graphdef, params)(branches, dtype=dtype)

    out = jax.block_until_ready(forward(model.params, inputs(model.config.to_json())))
    event("forward", mean=float(jnp.abs(out).mean()))


def run_torch(folder: Path, dtype: str) -> None:
    """Loads and runs with diffusers."""
    import torch
    from diffusers import FluxTransformer2DModel

    event("imported")
    kind = getattr(torch, dtype)
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=kind)
    event("loaded", parameters=sum(p.nbytes for p in model.parameters()))
    data = {name: torch.from_numpy(value).to(kind) for name, value in inputs(model.config).items()}
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    with torch.no_grad():
        out = model(
            hidden_states=data["tokens"],
            encoder_hidden_states=data["prompt"],
            pooled_projections=data["pooled"],
            timestep=torch.full((1,), 0.5, dtype=kind),
            guidance=torch.full((1,), 3.5),
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
            txt_ids=torch.zeros(TEXT, 3),
        ).sample
    event("forward", mean=float(out.float().abs().mean()))


CHILDREN: dict[str, Callable[[Path, str], None]] = {"nabla_jax": run_ours, "diffusers": run_torch}


# ------------------------------------------------------------------------------------------------ measurement


def measure(name: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds of each phase, mean of the output, bytes of parameters and of the loader's extra memory."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    command = [sys.executable, "-m", "benchmarks.load_checkpoint", "--child", name, "--dtype", dtype]
    begun = time.monotonic()
    process = subprocess.Popen(
        [*command, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        text=True,
    )
    samples: list[tuple[float, int]] = []
    watcher = threading.Thread(target=lambda: samples.extend(anonymous_memory(process)))
    watcher.start()
    assert process.stdout is not None
    events = {e["event"]: e for e in (json.loads(line) for line in process.stdout if line.startswith('{"event"'))}
    watcher.join()
    if process.wait() or "forward" not in events:
        raise SystemExit(f"load_checkpoint: the process of {name} ended with {process.returncode}")
    imported, loaded, forward = (events[k]["time"] for k in ("imported", "loaded", "forward"))
    before = max(value for when, value in samples if when <= imported)
    peak = max(value for when, value in samples if imported <= when <= loaded)
    peak_forward = max(value for when, value in samples if imported <= when <= forward)
    parameters = events["loaded"]["parameters"]
    return {
        "import": imported - begun,
        "load": loaded - imported,
        "forward": forward - loaded,
        "total": forward - begun,
        "cpu": events["forward"]["cpu"],
        "cpu_import": events["imported"]["cpu"],
        "cpu_load": events["loaded"]["cpu"] - events["imported"]["cpu"],
        "mean": events["forward"]["mean"],
        "extra": peak - before - parameters,
        "extra_forward": peak_forward - before - parameters,
    }


def describe(run: dict[str, float]) -> str:
    """One line."""
    return (
        f"{run['total']:.1f} s (import {run['import']:.1f}, load {run['load']:.1f}, forward {run['forward']:.1f}; "
        f"processor {run['cpu']:.1f} s, import {run['cpu_import']:.1f}, load {run['cpu_load']:.1f}), "
        f"anonymous memory beyond the parameters {run['extra'] / 1e6:.0f} MB loading, "
        f"{run['extra_forward'] / 1e6:.0f} MB in all, mean output {run['mean']:.4f}"
    )


def report(runs: dict[str, list[dict[str, float]]], largest: int) -> None:
    """Medians, ratio and the two goals."""
    totals = {name: statistics.median(run["total"] for run in found) for name, found in runs.items()}
    ratio = totals["nabla_jax"] / totals["diffusers"]
    extra = max(run["extra"] for run in runs["nabla_jax"])
    print(f"median: nabla_jax {totals['nabla_jax']:.1f} s, diffusers {totals['diffusers']:.1f} s")
    print(f"ratio {ratio:.2f} (goal: at most 1.3): {'met' if ratio <= 1.3 else 'MISSED'}")
    goal = "met" if extra < 2 * largest else "MISSED"
    print(f"extra memory {extra / 1e6:.0f} MB (goal: below {2 * largest / 1e6:.0f} MB, twice the largest leaf): {goal}")


if __name__ == "__main__":
    main()
