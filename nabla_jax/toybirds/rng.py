"""Seeded draws. Only `Generator.random` is used: its stream is fixed by the bit generator, while the
algorithms behind `normal`, `choice` or `permutation` may change between NumPy releases."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def generator(*path: int | str) -> np.random.Generator:
    """A generator that depends on the path alone, e.g. `generator(seed, "family", 3, 1)`."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) & 0xFFFFFFFFFFFFFFFF for p in path]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One float in [low, high)."""
    return low + (high - low) * float(rng.random())


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the given probability."""
    return float(rng.random()) < probability


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[min(int(rng.random() * len(options)), len(options) - 1)]


def order(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random order of 0..n-1."""
    return np.argsort(rng.random(n), kind="stable")
