"""What the benchmarks of training and sampling run: cases at four sizes, with weights and inputs for any framework.

Weights and inputs are numpy arrays that depend on their names and shapes alone, so that two processes that share
nothing have the same numbers. Nothing here imports jax or torch.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Name = Literal["plain", "om", "om-independent", "insert"]
NAMES: tuple[Name, ...] = ("plain", "om", "om-independent", "insert")
MASK_CHANNELS = 256
"""Of FLUX.1-Fill, beside the channels of the noise and of the masked picture."""
ADAPTER = "adapter"
GUIDANCE = 2.5
LEARNING_RATE = 1e-4
CLIP = 1.0
_POOL = 4_194_301
"""Normal numbers that all weights are cut from; a prime, so that rows of a matrix do not repeat."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the transformer and of its inputs.

    Attributes:
      text: tokens of a text. redux: of the subject, which take the place of the words where the base is Fill.
      grid: tokens along one side of a picture.
      rank: of the adapter; of the diptych's.
    """

    heads: int
    head: int
    axes: tuple[int, int, int]
    double: int
    single: int
    joint: int
    pooled: int
    text: int
    redux: int
    grid: int
    channels: int = 64
    rank: int = 16
    diptych_rank: int = 64

    @property
    def width(self) -> int:
        """Of the token stream."""
        return self.heads * self.head


SIZES = {
    "tiny": Size(2, 16, (4, 6, 6), 1, 2, 24, 16, 4, 3, 4, channels=16, rank=2, diptych_rank=4),
    "toy": Size(4, 32, (8, 12, 12), 2, 4, 64, 64, 16, 9, 6, rank=8, diptych_rank=16),
    # A third of the width, 12 of 57 blocks, a quarter of the tokens.
    "middle": Size(8, 128, (16, 56, 56), 4, 8, 1024, 768, 128, 182, 32),
    "full": Size(24, 128, (16, 56, 56), 19, 38, 4096, 768, 512, 729, 64, diptych_rank=256),
    # The real width and the real tokens, few blocks: what float32 and both frameworks fit on one device.
    "shallow": Size(24, 128, (16, 56, 56), 2, 2, 4096, 768, 512, 729, 64, diptych_rank=256),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of showing pictures to the transformer, at one size.

    ``plain``: text and noise. ``om``: conditions beside them that see text and noise; ``om-independent``: conditions
    that see themselves alone. ``insert``: a diptych on FLUX.1-Fill. The adapter is on the conditions where there are
    any, else on everything.
    """

    name: Name
    size: Size

    @property
    def conditions(self) -> int:
        """How many pictures stand beside the noise."""
        return 2 if self.name.startswith("om") else 0

    @property
    def independent(self) -> bool:
        """Whether the conditions see themselves alone."""
        return self.name == "om-independent"

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens of what is drawn."""
        side = self.size.grid
        return (side, 2 * side) if self.name == "insert" else (side, side)

    @property
    def text(self) -> int:
        """Tokens of the text."""
        return self.size.text + (self.size.redux if self.name == "insert" else 0)

    @property
    def rank(self) -> int:
        """Of the adapter."""
        return self.size.diptych_rank if self.name == "insert" else self.size.rank

    @property
    def transformer(self) -> dict[str, Any]:
        """The keys of a published ``config.json``."""
        size = self.size
        fill = self.name == "insert"
        return {
            "in_channels": size.channels * 2 + MASK_CHANNELS if fill else size.channels,
            "out_channels": size.channels if fill else None,
            "num_layers": size.double,
            "num_single_layers": size.single,
            "attention_head_dim": size.head,
            "num_attention_heads": size.heads,
            "joint_attention_dim": size.joint,
            "pooled_projection_dim": size.pooled,
            "guidance_embeds": True,
            "axes_dims_rope": list(size.axes),
        }


def weight(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """The parameter of a published name, in ``dtype``: small enough that streams neither vanish nor explode."""
    mean, scale = (1.0, 0.1) if "norm_" in name and name.endswith(".weight") and len(shape) == 1 else (0.0, 0.02)
    if len(shape) == 2:
        scale = 0.5 * shape[1] ** -0.5
    if ".lora_A" in name:
        scale = shape[1] ** -0.5
    pool = _pool(mean, scale, np.dtype(dtype))
    count, start = int(np.prod(shape)), zlib.crc32(name.encode()) % _POOL
    out = np.empty(count, dtype)
    done = 0
    while done < count:
        part = min(count - done, _POOL - start)
        out[done : done + part] = pool[start : start + part]
        done, start = done + part, 0
    return out.reshape(shape)


@functools.lru_cache(maxsize=4)
def _pool(mean: float, scale: float, dtype: np.dtype[Any]) -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    return (mean + scale * drawn).astype(dtype)


def inputs(case: Case, batch: int) -> dict[str, np.ndarray]:
    """Normal draws, float32: what one training step or one run of the sampler reads.

    ``x0``, ``x1`` [B, N, C] data and noise; ``condition_0``, ``condition_1`` [B, N', C]; ``masked`` [B, N, C] and
    ``mask`` [B, N, 256] of 0 and 1; ``prompt`` [B, T, E]; ``pooled`` [B, P]; ``time`` [B].
    """
    size, tokens = case.size, case.grid[0] * case.grid[1]
    shapes: dict[str, tuple[int, ...]] = {
        "x0": (batch, tokens, size.channels),
        "x1": (batch, tokens, size.channels),
        "prompt": (batch, case.text, size.joint),
        "pooled": (batch, size.pooled),
    }
    shapes |= {f"condition_{i}": (batch, tokens, size.channels) for i in range(case.conditions)}
    if case.name == "insert":
        shapes["masked"] = (batch, tokens, size.channels)
    rng = np.random.default_rng(1)
    data = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if case.name == "insert":
        data["mask"] = rng.integers(0, 2, (batch, tokens, MASK_CHANNELS)).astype(np.float32)
    return data | {"time": np.linspace(0.3, 0.7, batch, dtype=np.float32)}


def levels(steps: int) -> np.ndarray:
    """Noise levels [steps + 1] from 1 to 0."""
    return np.linspace(1, 0, steps + 1, dtype=np.float32)


def matrices(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, np.ndarray]:
    """An adapter: ``NAME.lora_A`` [r, in] and ``NAME.lora_B`` [out, r] of linears {NAME: (out, in)}; none is zero."""
    made = {}
    for name, (outputs, width) in shapes.items():
        made[f"{name}.lora_A"] = weight(f"{name}.lora_A", (rank, width))
        made[f"{name}.lora_B"] = weight(f"{name}.lora_B", (outputs, rank)) * np.float32(0.1)
    return made
