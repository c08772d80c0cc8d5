"""Linear stand-ins for the frozen networks, light enough for processes that are started to be killed.

As a program, ``python -m tests.stand_ins ROOT OUT [N]`` prepares ROOT into OUT with them and prints how many lines of
nabla_jax its main thread ran; with N it kills itself with SIGKILL before the N-th.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from nabla_jax import prepare as prepare_module
from nabla_jax.config import Config, from_dict
from nabla_jax.prepare import Encoders, Vision, prepare

SIZE = 32


def config_for(root: Path, prepared: Path, **changes: Any) -> Config:
    data = {"root": str(root), "prepared": str(prepared), "split": changes.pop("split", "train")}
    values = {
        "base": {"path": "unused"},
        "data": data | {name: changes.pop(name) for name in ("controls", "vision") if name in changes},
        "conditioning": {"size": SIZE, "text_length": 4} | changes,
        "lora": {},
        "optim": {},
        "train": {"workdir": "unused", "steps": 1, "batch": 1},
    }
    return from_dict(values)


def pool(images: np.ndarray) -> np.ndarray:
    """[n, 3, H, W] uint8 -> [n, 6, H/8, W/8] float32: cell means in [-1, 1], then a constant log variance."""
    n, c, h, w = images.shape
    means = images.reshape(n, c, h // 8, 8, w // 8, 8).astype(np.float32).mean((3, 5)) / 127.5 - 1
    return np.concatenate([means, np.full_like(means, -8)], 1)


def encoders(weights: str = "a", images: Any = pool, vision: Vision | None = None) -> Encoders:
    def prompts(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        seeds = [int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) for t in texts]
        rows = np.array([np.random.default_rng(s).normal(size=14) for s in seeds], np.float32)
        return rows[:, :12].reshape(-1, 4, 3), rows[:, 12:]

    return Encoders({"vae": weights}, 3, 8, images, prompts, vision=vision)


def colours(weights: str = "v") -> Vision:
    """A vision network that sees the mean colour of what is shown."""
    return Vision(weights, 3, lambda look: look.transpose(2, 0, 1).astype(np.float32), lambda x: x.mean((2, 3)))


def small_shards() -> None:
    prepare_module.PICTURES_PER_SHARD = 3
    prepare_module.PIXELS_PER_CALL = 2 * 3 * SIZE * SIZE


def _main(root: str, out: str, last: int = sys.maxsize) -> None:
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if "nabla_jax" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count >= last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    small_shards()
    config = config_for(Path(root), Path(out))
    sys.settrace(trace)
    prepare(config, encoders())
    sys.settrace(None)
    print(count)


if __name__ == "__main__":
    _main(*sys.argv[1:3], *map(int, sys.argv[3:]))
