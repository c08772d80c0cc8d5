"""What the golden tests of the transformer share: weights by the production loader, and intermediates."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax.checkpoints.safetensors_io import load_tree
from nabla_jax.models import flux, layers
from nabla_jax.models.flux import Branch, Flux, FluxConfig
from tests.golden import golden

# Tolerances with our own sinusoid frequencies: the argument 1000 * value * frequency is rounded to float32,
# and one unit in the last place of it moves the output by this much (for guidance up to 1, 3.5 and 30).
ATOL = {1.0: 2e-5, 3.5: 3e-4, 30.0: 2e-3}
# With the reference's frequencies handed in only the rounding of the sums remains.
TIGHT = 1e-5


def atol(guidance: np.ndarray | float | None) -> float:
    """The tolerance for a guidance scale."""
    largest = 0.0 if guidance is None else float(np.max(guidance))
    return next(value for limit, value in ATOL.items() if largest <= limit)


def load(path: Path, config: dict[str, Any]) -> tuple[Any, layers.Params]:
    """(graphdef, float32 parameters) of a golden transformer."""
    parsed = FluxConfig.from_json(config)
    graphdef, abstract = layers.abstract(lambda rngs: Flux(parsed, rngs=rngs))
    return graphdef, load_tree(path, abstract, stacked=flux.STACKED, dtype=jnp.float32)


@contextlib.contextmanager
def reference_frequencies() -> Iterator[None]:
    """The model with the frequency table of the system the goldens were made with."""
    table = golden.case("flux_base").tensors("sinusoid_freqs")
    (frequencies,) = table.values()
    with mock.patch.object(flux, "sinusoid_frequencies", lambda: frequencies):
        yield


@dataclasses.dataclass
class Trace:
    """What passed through the blocks of one forward pass, per branch."""

    embed: list[jax.Array] = dataclasses.field(default_factory=list)
    temb: list[jax.Array] = dataclasses.field(default_factory=list)
    cos: list[np.ndarray] = dataclasses.field(default_factory=list)
    sin: list[np.ndarray] = dataclasses.field(default_factory=list)
    double: list[list[jax.Array]] = dataclasses.field(default_factory=list)
    single: list[list[jax.Array]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Records the intermediates of a forward pass that runs outside ``jit`` with ``scan=False``."""
    trace = Trace()

    def recording(call: Callable[..., Any], double: bool) -> Callable[..., Any]:
        def wrapped(self: Any, x: Any, tembs: Any, tables: Any, layout: Any, *rest: Any) -> Any:
            groups = layout.double if double else layout.single
            if double and not trace.double:
                trace.embed = layout.split(groups, x)
                owner = {m: g for g, group in enumerate(groups) for m in group.members}
                trace.temb = [tembs[owner[m]] for m in range(len(layout.lengths))]
                # Layout.split divides axis 1; the tables have their tokens on axis 0.
                trace.cos, trace.sin = (
                    [t[0] for t in layout.split(groups, [jnp.asarray(table[i])[None] for table in tables])]
                    for i in range(2)
                )
            out, keys_and_values = call(self, x, tembs, tables, layout, *rest)
            (trace.double if double else trace.single).append(layout.split(groups, out))
            return out, keys_and_values

        return wrapped

    with (
        mock.patch.object(flux.DoubleBlock, "__call__", recording(flux.DoubleBlock.__call__, True)),
        mock.patch.object(flux.SingleBlock, "__call__", recording(flux.SingleBlock.__call__, False)),
    ):
        yield trace


def velocity(graphdef: Any, params: layers.Params, branches: list[Branch], **options: Any) -> jax.Array:
    """The velocity of the noise branch."""
    return layers.bind(graphdef, params)(branches, **options)
