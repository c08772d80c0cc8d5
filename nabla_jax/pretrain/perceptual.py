"""Fits LPIPS to its two parts: features by telling individuals apart, weights by ordering distortions.

Zhang et al. 2018 take features of a classifier and fit non-negative weights per channel to people's judgements of
which of two distorted pictures is nearer to a third. Here the judge is the strength of the distortion, which is known:
of two pictures distorted in one way the stronger one is farther away.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import lpips_pixels
from nabla_jax.models import layers
from nabla_jax.models.layers import Params
from nabla_jax.models.lpips import DEPTHS, Lpips, LpipsConfig
from nabla_jax.pretrain.pictures import Families
from nabla_jax.pretrain.vision import Embed
from nabla_jax.runs import track

Array = np.ndarray[Any, Any]
KINDS = ("blur", "noise", "hue", "colour", "coat")
_BATCH = 100


@dataclasses.dataclass(frozen=True)
class Judgements:
    """How the weights per channel are fitted.

    Attributes:
      count: pairs of distorted pictures.
      steps: updates of all weights on all pairs.
      learning_rate: of Adam.
      prior: how strongly equal weights are preferred; channels that no pair speaks of keep some weight.
      seed: of every random draw.
    """

    count: int = 5000
    steps: int = 500
    learning_rate: float = 0.05
    prior: float = 0.01
    seed: int = 0


def initialize(config: LpipsConfig, side: int, width: int, seed: int) -> tuple[Any, Params]:
    """Graph of LPIPS and parameters {"lpips", "projection"} to train features with.

    Convolutions start with the variance that keeps activations alive without norms (He et al. 2015, eq. 10), the
    weights per channel at 1. ``projection`` [width, inputs] maps the last level of pictures of ``side`` pixels to the
    vectors that are compared; it is not part of the metric.
    """
    graphdef, params = layers.initialize(lambda rngs: Lpips(config, rngs=rngs), jax.random.key(seed))

    def start(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[0] != "features":
            return jnp.ones_like(leaf)
        return jnp.zeros_like(leaf) if names[-1] == "bias" else 6**0.5 * leaf

    inputs = config.channels[-1] * (side // 2 ** (len(DEPTHS) - 1)) ** 2
    projection = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (width, inputs)) * inputs**-0.5
    params = jax.jit(lambda p: jax.tree_util.tree_map_with_path(start, p))(params)
    return graphdef, {"lpips": params, "projection": projection}


def features(graphdef: Any) -> Embed:
    """The vectors that train the features: the last level, all places, projected."""

    def embed(params: Params, pixels: jax.Array) -> jax.Array:
        last = layers.bind(graphdef, params["lpips"]).levels(pixels)[-1]
        vectors: jax.Array = last.reshape(len(last), -1) @ params["projection"].T
        return vectors

    return embed


def distort(rng: np.random.Generator, picture: Array, kind: str, strength: float, other: Array | None = None) -> Array:
    """A picture changed in one way.

    Args:
      rng: for what the kind leaves open: the noise, and which colours shift.
      picture: uint8 [H, W, 3].
      kind: ``blur`` (Gaussian, up to 2 pixels of a picture of 48), ``noise`` (normal, up to a deviation of 64),
        ``hue`` (turned by up to 180 degrees), ``colour`` (channels shifted by up to 80), ``coat`` (mixed with
        ``other``).
      strength: 0 (nothing) to 1.
      other: uint8 [H, W, 3], what ``coat`` leads to.

    Raises:
      UserError: another kind.
    """
    from PIL import Image, ImageFilter

    if kind == "blur":
        radius = float(2 * strength * max(picture.shape) / 48)
        return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
    if kind == "hue":
        hsv = np.array(Image.fromarray(picture).convert("HSV"))
        hsv[..., 0] += np.uint8(round(127 * strength))  # wraps round, as hues do
        return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    values = picture.astype(np.float32)
    if kind == "noise":
        values += 64 * strength * rng.standard_normal(picture.shape, np.float32)
    elif kind == "colour":
        shift = rng.standard_normal(3)
        values += (80 * strength * shift / np.linalg.norm(shift)).astype(np.float32)
    elif kind == "coat" and other is not None:
        values += strength * (other.astype(np.float32) - values)
    else:
        raise UserError(f"distortion: found {kind!r}, expected {', '.join(KINDS)}; coat needs another picture")
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def draw_judgements(families: Families, count: int, seed: int) -> tuple[Array, Array, Array]:
    """Pictures and two distortions of each, the first milder, all on black ground.

    The kinds take turns. The stronger one has strength 0.15 to 1, the milder one up to 0.85 times that; both share
    all random choices.

    Returns:
      Three times uint8 [count, S, S, 3].
    """
    rng = np.random.default_rng((seed, count))
    n, species, views = families.pictures.shape[:3]
    rows = []
    for index in range(count):
        family, view = rng.integers(n), rng.integers(views)
        bird, sibling = rng.choice(species, 2, replace=False)
        picture, other = families.pictures[family, bird, view], families.pictures[family, sibling, view]
        strong = rng.uniform(0.15, 1)
        choices = int(rng.integers(2**31))
        made = [
            distort(np.random.default_rng(choices), picture, KINDS[index % len(KINDS)], s, other)
            for s in (strong * rng.uniform(0, 0.85), strong)
        ]
        rows.append([np.where(families.masks[family, view][..., None], p, np.uint8(0)) for p in (picture, *made)])
    pictures, mild, strong_ones = np.stack(rows, axis=1)
    return pictures, mild, strong_ones


Differences = Callable[[Params, jax.Array, jax.Array], jax.Array]
"""(parameters, pixels [B, 3, H, W], the same) -> what the weights weigh, all levels side by side, [B, channels]."""


def compile_differences(graphdef: Any) -> Differences:
    """The compiled function; one for all calls, so that it is compiled once for each size of a batch."""

    def run(params: Params, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate(layers.bind(graphdef, params).channels(a, b), axis=1)

    return jax.jit(run)


def channel_differences(measure: Differences, params: Params, a: Array, b: Array, what: str) -> Array:
    """What the weights weigh of pairs of pictures, uint8 [pairs, H, W, 3] -> [pairs, channels] float32.

    ``what`` is shown beside the progress.
    """

    def part(start: int) -> Array:
        first, second = (jnp.asarray(lpips_pixels(list(x[start : start + _BATCH]))) for x in (a, b))
        return np.asarray(measure(params, first, second))

    return np.concatenate([part(start) for start in track(range(0, len(a), _BATCH), what, unit="batch")])


def fit_weights(mild: Array, strong: Array, unrelated: Array, how: Judgements) -> tuple[Array, float]:
    """Non-negative weights under which stronger distortions are farther away.

    Minimises ``softplus(-s log(d_strong / d_mild))`` with a learned s, plus the prior: which of two is farther must not
    depend on how far both are. The weights are then scaled so that unrelated pictures are 1 apart on average.

    Args:
      mild: [K, C] differences of every channel between a picture and its milder distortion.
      strong: [K, C].
      unrelated: [P, C] of pictures that have nothing in common.
      how: steps, learning rate and prior.

    Returns:
      Weights [C] float32, and the share of pairs in the right order.
    """
    scale = unrelated.mean(0) + 1e-6  # so that one step moves all channels by their share of a distance
    milds, strongs = jnp.asarray(mild / scale), jnp.asarray(strong / scale)

    def objective(values: dict[str, jax.Array]) -> jax.Array:
        weights = jax.nn.softplus(values["weights"])
        ratio = jnp.log(strongs @ weights + 1e-6) - jnp.log(milds @ weights + 1e-6)
        wrong = jax.nn.softplus(-jnp.exp(values["sharpness"]) * ratio)
        return jnp.mean(wrong) + how.prior * jnp.mean(values["weights"] ** 2)

    tx = optax.adam(how.learning_rate)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        values, state = carry
        value, grads = jax.value_and_grad(objective)(values)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(values, updates), state), value

    values = {"weights": jnp.zeros(mild.shape[1]), "sharpness": jnp.zeros(())}
    (values, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, how.steps))((values, tx.init(values)))
    weights = np.asarray(jax.nn.softplus(values["weights"])) / scale
    weights = (weights / (unrelated @ weights).mean()).astype(np.float32)
    return weights, float(np.mean(strong @ weights > mild @ weights))


def with_weights(params: Params, weights: Array) -> Params:
    """LPIPS parameters with the weights [C] of all levels side by side put in."""
    params = dict(params)
    start = 0
    for level in range(len(DEPTHS)):
        old = params[f"lin{level}"]["model"]["1"]["weight"]
        part = jnp.asarray(weights[start : start + old.size]).reshape(old.shape)
        params[f"lin{level}"] = {"model": {"1": {"weight": part}}}
        start += old.size
    return params


def fit_judgements(
    graphdef: Any, params: Params, families: Families, held_out: int, how: Judgements
) -> tuple[Params, dict[str, float]]:
    """Fits the weights per channel of LPIPS parameters on all families but the last ``held_out``.

    Returns:
      The parameters with their weights, and the share of pairs in the right order: {fitted, held_out}.
    """

    measure = compile_differences(graphdef)

    def differences(part: slice, count: int, seed: int) -> tuple[Array, Array]:
        some = Families(families.pictures[part], families.masks[part], families.canvases[part])
        pictures, mild, strong = draw_judgements(some, count, seed)
        a = channel_differences(measure, params, pictures, mild, "mild")
        return a, channel_differences(measure, params, pictures, strong, "strong")

    count = len(families.pictures) - held_out
    mild, strong = differences(slice(0, count), how.count, how.seed)
    n = min(count // 2, how.count)
    birds = np.where(families.masks[: 2 * n, 0, :, :, None], families.pictures[: 2 * n, 0, 0], np.uint8(0))
    unrelated = channel_differences(measure, params, birds[:n], birds[n:], "unrelated")
    weights, fitted = fit_weights(mild, strong, unrelated, how)
    mild, strong = differences(slice(count, None), how.count // 5, how.seed + 1)
    return with_weights(params, weights), {
        "fitted": fitted,
        "held_out": float(np.mean(strong @ weights > mild @ weights)),
    }
