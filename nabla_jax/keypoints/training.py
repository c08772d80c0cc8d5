"""Trains a keypoint head: annotated birds, cut out and varied, through the frozen DINOv2 into the head.

The loss of a picture is the sum of three means: over its visible parts, the cross-entropy of the heatmap with a normal
distribution round the part's place and the distance of the soft-argmax from it (over the crop's side); over all parts,
the cross-entropy of being visible. A part that a varied crop leaves out counts in none.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax.conditioning.geometry import Box
from nabla_jax.data.dataset import Example
from nabla_jax.errors import UserError
from nabla_jax.images import read_rgb
from nabla_jax.keypoints import crops
from nabla_jax.metrics.networks import Encoder, processor_at
from nabla_jax.metrics.pose import within
from nabla_jax.models import layers
from nabla_jax.models.keypoint_head import KeypointHeadConfig
from nabla_jax.pretrain.state import State, fit, make_update

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      steps: number of updates.
      batch: pictures per update.
      learning_rate: AdamW's, after the warm-up.
      warmup: steps of linear rise.
      decay: share of the steps, at the end, over which the learning rate falls linearly to zero.
      weight_decay: AdamW's.
      spread: standard deviation of the normal distribution that heatmaps learn, over the crop's side.
      distance_weight: of the distance in the loss.
      ema: decay of the averaged weights, which are the ones kept.
      validate: pictures of the test split that are measured on during training; all of them are at the end.
      every: steps between states saved and measured.
      threads: that read and vary pictures ahead.
      seed: of every random draw.
      variation: of the crops.
    """

    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    spread: float = 0.03
    distance_weight: float = 10.0
    ema: float = 0.998
    validate: int = 512
    every: int = 200
    threads: int = 4
    seed: int = 0
    variation: crops.Variation = crops.Variation()

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "learning_rate", "spread", "validate", "every", "threads")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"training.{name}: found {getattr(self, name)!r}, expected more than 0")
        for name in ("decay", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"training.{name}: found {getattr(self, name)!r}, expected a number from 0 to below 1")
        if self.variation.scale < 1:
            raise UserError(f"training.variation.scale: found {self.variation.scale!r}, expected at least 1")


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW, clipped, warmed up, decayed at the end; weights that are no matrices do not decay."""
    start = max(int(settings.steps * (1 - settings.decay)), settings.warmup + 1)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, settings.warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, max(settings.steps - start, 1)),
        ],
        [settings.warmup, start],
    )
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _matrices(params: layers.Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def loss(
    graphdef: Any,
    settings: Settings,
    params: layers.Params,
    patches: jax.Array,
    pixels: jax.Array,
    points: jax.Array,
    visible: jax.Array,
    counted: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective on one batch.

    Args:
      graphdef: of the head.
      settings: weights of its parts.
      params: of the head.
      patches: [B, N, D], features of the crops.
      pixels: [B, 3, S, S], the crops.
      points: [B, P, 2] (row, column), 0 to 1 in the crop.
      visible: [B, P] bool.
      counted: [B, P] bool; others have no part in the loss.
    """
    found = layers.bind(graphdef, params)(patches, pixels)
    size = found.heatmaps.shape[-1]
    grid = (jnp.arange(size) + 0.5) / size
    # The normal distribution over cells is a product of one over rows and one over columns.
    rows, columns = (jax.nn.softmax(-0.5 * ((grid - points[..., k, None]) / settings.spread) ** 2) for k in range(2))
    wanted = rows[..., :, None] * columns[..., None, :]
    logs = jax.nn.log_softmax(found.heatmaps.reshape(*found.heatmaps.shape[:2], -1)).reshape(found.heatmaps.shape)
    seen = (visible & counted).astype(jnp.float32)
    shares = seen / jnp.maximum(seen.sum(1, keepdims=True), 1.0)
    heat = -(wanted * logs).sum((-2, -1))
    apart = jnp.sqrt(((found.positions - points) ** 2).sum(-1) + 1e-8)
    there = optax.sigmoid_binary_cross_entropy(found.visible, visible.astype(jnp.float32)) * counted
    parts = {
        "heat": jnp.mean((heat * shares).sum(1)),
        "distance": jnp.mean((apart * shares).sum(1)),
        "visible": jnp.mean(there.sum(1) / jnp.maximum(counted.sum(1), 1)),
    }
    return parts["heat"] + settings.distance_weight * parts["distance"] + parts["visible"], parts


class Batches:
    """The crops of any step, from its number alone; the next ones are made meanwhile by threads."""

    def __init__(
        self,
        examples: Sequence[Example],
        boxes: Sequence[Box],
        encoder: Encoder,
        config: KeypointHeadConfig,
        settings: Settings,
    ) -> None:
        self.examples, self.boxes = examples, boxes
        self.encoder, self.processor = encoder, processor_at(encoder, config)
        self.config, self.settings = config, settings
        self.order = crops.mirror_order(config.parts)
        self._pool = concurrent.futures.ThreadPoolExecutor(settings.threads)
        self._ahead: dict[int, list[concurrent.futures.Future[tuple[Array, Array, Array]]]] = {}

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def draw(self, step: int) -> tuple[Any, ...]:
        """(patches, pixels, points, visible, counted) of a step; see ``loss``."""
        for number in range(step, min(step + 3, self.settings.steps)):
            if number not in self._ahead:
                rng = np.random.default_rng((self.settings.seed, number))
                chosen = rng.choice(len(self.examples), self.settings.batch, len(self.examples) < self.settings.batch)
                self._ahead[number] = [
                    self._pool.submit(self.one, int(i), (self.settings.seed, number, place))
                    for place, i in enumerate(chosen)
                ]
        made = [future.result() for future in self._ahead.pop(step)]
        images, points, visible = zip(*made, strict=True)
        pixels = self.processor([*images])
        places, shown = np.stack(points).astype(np.float32), np.stack(visible)
        counted = ~shown | ((places >= 0) & (places <= 1)).all(-1)
        return self.encoder.run(pixels)[1], pixels, places, shown, counted

    def one(self, i: int, seed: tuple[int, ...]) -> tuple[Array, Array, Array]:
        """A varied crop [S, S, 3] uint8 of example ``i``, its points [P, 2] (0 to 1) and which are visible [P] bool."""
        example, variation = self.examples[i], self.settings.variation
        assert example.keypoints is not None
        rng = np.random.default_rng(seed)
        image = read_rgb(example.image)
        box, factor = crops.vary_place(rng, self.boxes[i], variation)
        margin = max(self.config.margin * factor, 1.0)
        placement = crops.place(box, image.shape[0], image.shape[1], margin, self.config.image_size)
        crop = crops.vary_colour(rng, crops.cut(image, placement), variation)
        points, visible = crops.to_crop(example.keypoints[:, :2], placement), example.keypoints[:, 2] != 0
        if rng.random() < variation.flip:
            crop, points, visible = crops.mirror(crop, points, visible, self.order)
        return np.ascontiguousarray(crop), points, visible


def measure(
    detect: Callable[[Sequence[Array], Sequence[Box]], Array],
    examples: Sequence[Example],
    boxes: Sequence[Box],
    parts: Sequence[str],
    batch: int,
) -> dict[str, Any]:
    """How well a head finds annotated keypoints.

    Args:
      detect: pictures and boxes -> [n, P, 3] (row, column, probability of being visible).
      examples: with keypoints.
      boxes: their birds.
      parts: names.
      batch: pictures held at a time.

    Returns:
      ``pck``, the share of visible keypoints found within a tenth of the box's longer side; ``distance``, their mean
      distance over that side; ``visibility``, how often visible and hidden is told right; ``parts``, the PCK of each,
      None where it is never visible; ``pictures``.
    """
    found = []
    for start in range(0, len(examples), batch):
        part = slice(start, start + batch)
        found.append(detect([read_rgb(example.image) for example in examples[part]], boxes[part]))
    points = np.concatenate(found)
    true = np.stack([example.keypoints for example in examples if example.keypoints is not None])
    sides = np.array([max(box[2] - box[0], box[3] - box[1]) for box in boxes])
    seen = true[..., 2] != 0
    distances = np.linalg.norm(points[..., :2] - true[..., :2], axis=-1) / sides[:, None]
    hits = within(distances)
    counts = seen.sum(0)
    return {
        "pck": float(hits[seen].mean()),
        "distance": float(distances[seen].mean()),
        "visibility": float(((points[..., 2] > 0.5) == seen).mean()),
        "parts": {name: float(hits[:, k][seen[:, k]].mean()) if counts[k] else None for k, name in enumerate(parts)},
        "pictures": len(examples),
    }


def train(
    graphdef: Any,
    params: layers.Params,
    batches: Batches,
    settings: Settings,
    validate: Callable[[layers.Params], dict[str, Any]],
    *,
    checkpoint: Path,
    report: Callable[[dict[str, Any]], None],
) -> layers.Params:
    """Trains to ``settings.steps``, continuing from ``checkpoint`` if it exists; returns the averaged parameters.

    ``report`` receives {step, steps_per_second, losses, and what ``validate`` says} every ``settings.every`` steps.
    Raises UserError for a checkpoint of another head.
    """
    tx = optimizer(settings)
    update = make_update(lambda values, _, *batch: loss(graphdef, settings, values, *batch), tx, settings.ema)

    def tell(state: State, row: dict[str, float]) -> None:
        report({"step": state.step, **row, **validate(state.ema)})

    state = fit(
        params, tx, update, batches.draw,
        steps=settings.steps, name="keypoints", checkpoint=checkpoint, report=tell, every=settings.every,
    )  # fmt: skip
    trained: layers.Params = state.ema
    return trained
