"""Trains small vision networks from scratch to tell individuals apart: the networks that judge generated pictures.

A batch holds families of sibling species, one individual each, photographed in the same scenes. The network gets
what a metric gets: birds on black ground through the checkpoint's own image processor, now and then soft, noisy or with
a mask that is off by a pixel. Two pictures of one individual must be more alike than any two others; the hardest others
are siblings in the very same scene. Two objectives:

- ``softmax``: the other picture of the individual among all pictures of the batch (Chen et al. 2020, eq. 1), hence the
  views per individual are two.
- ``sigmoid``: every pair on its own, same or not, with a learned scale and bias (Zhai et al. 2023, eq. 1).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax.errors import UserError
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.metrics.statistics import auc
from nabla_jax.models import layers
from nabla_jax.models.layers import Params
from nabla_jax.pretrain.pictures import Families
from nabla_jax.pretrain.state import State, fit, make_update, muon

HELD_OUT = 100
"""Families that are measured on, never trained on."""
OBJECTIVES = ("softmax", "sigmoid")
Embed = Callable[[Params, jax.Array], jax.Array]
"""(parameters, pixels [B, 3, H, W]) -> vectors [B, D]."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      steps: number of updates.
      families: families per update; each gives species x 2 pictures.
      learning_rate: of Muon for the matrices inside layers and of AdamW for the rest.
      objective: see the module.
      temperature: of ``softmax``.
      masked: share of pictures on black ground; the others keep their background.
      soft: share of blurred pictures.
      warmup: steps of linear warm-up.
      decay: share of the steps, at the end, over which the learning rate falls linearly to zero.
      weight_decay: of matrices inside layers.
      ema: decay of the averaged weights, which are the ones kept.
      seed: of every random draw.
    """

    steps: int
    families: int
    learning_rate: float
    objective: str
    temperature: float = 0.1
    masked: float = 1.0
    soft: float = 0.5
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.05
    ema: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective: found {self.objective!r}, expected {' or '.join(OBJECTIVES)}")


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """See ``state.muon``, which here updates the matrices of stacked layers."""

    def dimensions(params: Params) -> Any:
        def spec(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            stacked = leaf.ndim == 3 and {"layer", "layers"} & {key.key for key in path}
            return optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1) if stacked else None

        return jax.tree_util.tree_map_with_path(spec, params)

    return muon(
        settings.learning_rate, settings.steps, settings.warmup, settings.decay, settings.weight_decay, dimensions
    )


def softmax_loss(vectors: jax.Array, individuals: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of finding an individual's other picture: unit vectors [B, D], int [B] -> mean over pictures.

    Every individual has exactly two pictures. Chen et al. 2020, eq. 1.
    """
    logits = vectors @ vectors.T / temperature
    itself = jnp.eye(len(vectors), dtype=bool)
    logits = jnp.where(itself, -jnp.inf, logits)
    other = (individuals[:, None] == individuals[None]) & ~itself
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(jnp.where(other, logits, 0.0), axis=1))


def sigmoid_loss(vectors: jax.Array, individuals: jax.Array, log_scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Every pair of different pictures judged on its own: unit vectors [B, D], int [B] -> mean over pictures.

    Zhai et al. 2023, eq. 1, with pictures on both sides: sum over pairs of -log sigmoid(+-(scale * cosine + bias)).
    """
    logits = jnp.exp(log_scale) * (vectors @ vectors.T) + bias
    sign = jnp.where(individuals[:, None] == individuals[None], 1.0, -1.0)
    losses = jnp.where(jnp.eye(len(vectors), dtype=bool), 0.0, jax.nn.log_sigmoid(sign * logits))
    return -jnp.sum(losses) / len(vectors)


def loss(
    embed: Embed, settings: Settings, params: Params, pixels: jax.Array, individuals: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective on one batch: parameters {"network", "scale", "bias"}, [B, 3, H, W], int [B]."""
    vectors = embed(params["network"], pixels)
    vectors = vectors / jnp.sqrt(jnp.sum(vectors**2, axis=1, keepdims=True) + 1e-12)
    if settings.objective == "softmax":
        return softmax_loss(vectors, individuals, settings.temperature), {}
    return sigmoid_loss(vectors, individuals, params["scale"], params["bias"]), {}


def degrade(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, soft: float) -> tuple[Any, Any]:
    """What generated pictures suffer from: blur, noise, a mask off by a pixel; and a change of exposure.

    Args:
      rng: of the draws.
      picture: uint8 [H, W, 3].
      mask: bool [H, W].
      soft: chance of blur.

    Returns:
      New picture and mask of the same shapes.
    """
    from PIL import Image, ImageFilter

    if rng.random() < soft:
        radius = rng.uniform(0.2, 1.2) * len(picture) / 48
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
    if rng.random() < 0.5:
        values = picture * np.float32(rng.uniform(0.94, 1.06))
        values += rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0, 8))
        picture = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        mask = np.roll(mask, rng.integers(-1, 2, size=2), axis=(0, 1))
    return picture, mask


def frame(rng: np.random.Generator, picture: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """A picture padded to a square [S, S, 3] as one of the shapes that a metric meets.

    Half keep the square, the others are cut back to their canvas (height, width); some get a black border, by which the
    bird becomes smaller, and half are mirrored.
    """
    side = len(picture)
    if rng.random() < 0.5:
        top, left = (side - canvas[0]) // 2, (side - canvas[1]) // 2
        picture = picture[top : top + canvas[0], left : left + canvas[1]]
    if rng.random() < 0.3:
        top, bottom, left, right = rng.integers(0, side // 8 + 1, size=4)
        picture = np.pad(picture, ((top, bottom), (left, right), (0, 0)))
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def draw_batch(
    families: Families, processor: ImageProcessor, settings: Settings, count: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one step from the first ``count`` families.

    Returns:
      Network input [B, 3, h, w] float32 with B = families x species x views, and which individual, int32 [B].
    """
    rng = np.random.default_rng((settings.seed, step))
    chosen = rng.choice(count, settings.families, replace=False)
    _, species, views = families.pictures.shape[:3]
    images = []
    for family in chosen:
        for bird in range(species):
            for view in range(views):
                given = families.pictures[family, bird, view], families.masks[family, view]
                picture, mask = degrade(rng, *given, settings.soft)
                if rng.random() < settings.masked:
                    picture = np.where(mask[..., None], picture, np.uint8(0))
                images.append(np.ascontiguousarray(frame(rng, picture, families.canvases[family, view])))
    individuals = np.repeat(np.arange(settings.families * species, dtype=np.int32), views)
    return processor(images), individuals


def measure(embed: Any, params: Params, processor: ImageProcessor, families: Families, held: slice) -> float:
    """AUC of same individual (other scene) against sibling (other scene) in the families ``held``, birds on black."""
    pictures, masks = families.pictures[held], families.masks[held]
    n, species, views = pictures.shape[:3]
    masked = np.where(masks[:, None, :, :, :, None], pictures, np.uint8(0)).reshape(-1, *pictures.shape[3:])
    vectors = np.concatenate([np.asarray(embed(params, processor(list(part)))) for part in np.array_split(masked, n)])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).reshape(n, species, views, -1)
    cosines = np.einsum("nid,njd->nij", vectors[:, :, 0], vectors[:, :, 1])
    same = np.eye(species, dtype=bool)
    return auc(cosines[:, same].ravel(), cosines[:, ~same].ravel())


def train(
    embed: Embed, params: Params, families: Families, processor: ImageProcessor, settings: Settings, *,
    name: str, checkpoint: Path, report: Callable[[dict[str, float]], None], every: int = 100, held_out: int = HELD_OUT,
) -> Params:  # fmt: skip
    """Trains to ``settings.steps``, continuing from ``checkpoint`` if it exists.

    Args:
      embed: the network's vectors.
      params: its initial parameters.
      families: pictures; the last ``held_out`` families are measured on and never trained on.
      processor: from pictures to the network's input.
      settings: how to train.
      name: what the progress bar says.
      checkpoint: file to continue from and to write every ``every`` steps.
      report: receives {step, steps_per_second, loss, auc} every ``every`` steps.

    Returns:
      The averaged parameters.

    Raises:
      UserError: fewer families than asked for, or not two views of each.
    """
    count = len(families.pictures) - held_out
    if count < settings.families or families.pictures.shape[2] != 2:
        raise UserError(
            f"{name}: found {len(families.pictures)} families of {families.pictures.shape[2]} views, expected at least "
            f"{settings.families + held_out} of 2"
        )
    # exp(scale) = 10, and a bias at which all pairs look different at first, as they nearly all are.
    start = {"network": params, "scale": jnp.log(jnp.float32(10.0)), "bias": jnp.float32(-10.0)}
    tx = optimizer(settings)
    update = make_update(lambda values, _, *batch: loss(embed, settings, values, *batch), tx, settings.ema)
    compiled = jax.jit(embed)

    def tell(state: State, row: dict[str, float]) -> None:
        found = measure(compiled, state.ema["network"], processor, families, slice(count, None))
        report({"step": state.step, **row, "auc": found})

    state = fit(
        start, tx, update, lambda step: draw_batch(families, processor, settings, count, step),
        steps=settings.steps, name=name, checkpoint=checkpoint, report=tell, every=every,
    )  # fmt: skip
    network: Params = state.ema["network"]
    return network


def pooled(graphdef: Any) -> Embed:
    """The vectors of a network whose output has ``pooled``: DINOv2's class token, SigLIP's pooling head."""

    def embed(params: Params, pixels: jax.Array) -> jax.Array:
        vectors: jax.Array = layers.bind(graphdef, params)(pixels).pooled
        return vectors

    return embed
