"""Small DINOv2, SigLIP and LPIPS from nothing, in their published layouts: the networks that judge pictures."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_jax.checkpoints.transformers_folder import NETWORKS, save_network
from nabla_jax.metrics.preprocessing import BICUBIC, IMAGENET_MEAN, IMAGENET_STD, ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.dinov2 import Dinov2Config
from nabla_jax.models.lpips import LpipsConfig
from nabla_jax.models.siglip import SiglipVisionConfig
from nabla_jax.pretrain import perceptual, pictures, vision
from nabla_jax.pretrain.latents import report_to
from nabla_jax.runs import read_rows, write_atomic, write_json


@dataclasses.dataclass(frozen=True)
class Dinov2Part:
    """A DINOv2 backbone: the folder to write, its sizes, how to train it."""

    output: str
    model: Dinov2Config
    training: vision.Settings


@dataclasses.dataclass(frozen=True)
class SiglipPart:
    """A SigLIP vision tower: the folder to write, its sizes, how to train it."""

    output: str
    model: SiglipVisionConfig
    training: vision.Settings


@dataclasses.dataclass(frozen=True)
class LpipsPart:
    """LPIPS: the folder to write, its sizes, how to train its features and to fit its weights.

    ``vectors`` is the width of the vectors that train the features.
    """

    output: str
    model: LpipsConfig
    training: vision.Settings
    judgements: perceptual.Judgements = perceptual.Judgements()
    vectors: int = 96


@dataclasses.dataclass(frozen=True)
class MetricNetworksConfig:
    """Everything the networks are made of.

    Attributes:
      folder: where pictures and training states are kept.
      families: what to draw.
      dinov2: the backbone.
      siglip: the vision tower.
      lpips: the perceptual distance.
      source: the configuration file, filled in when it is read.
    """

    folder: str
    families: pictures.FamilyConfig
    dinov2: Dinov2Part
    siglip: SiglipPart
    lpips: LpipsPart
    source: str = ""


def processor_of(config: Dinov2Config | SiglipVisionConfig) -> ImageProcessor:
    """The architecture's published processor at this network's size.

    SigLIP's ignores a picture's shape; DINOv2's keeps it and loses the ends of long pictures.
    """
    side = config.image_size
    if isinstance(config, Dinov2Config):
        return ImageProcessor(side, (side, side), BICUBIC, IMAGENET_MEAN, IMAGENET_STD)
    return ImageProcessor.siglip(side)


def initialize(name: str, config: Any, seed: int) -> tuple[Any, layers.Params]:
    """Graph and fresh parameters of a network of ``NETWORKS``; position embeddings start small beside the patches."""
    part = NETWORKS[name]
    graphdef, params = layers.initialize(lambda rngs: part.model(config, rngs=rngs), jax.random.key(seed))

    def start(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return 0.02 * leaf if "position_embedding" in [key.key for key in path] else leaf

    return graphdef, jax.jit(lambda p: jax.tree_util.tree_map_with_path(start, p))(params)


def make_encoder(
    config: MetricNetworksConfig, name: str, part: Dinov2Part | SiglipPart, families: pictures.Families
) -> None:
    """Trains a vision transformer and writes its folder; one that is already there is kept."""
    folder, output = Path(config.folder), Path(part.output)
    if (output / "config.json").exists():
        return
    processor = processor_of(part.model)
    graphdef, params = initialize(name, part.model, part.training.seed)
    log = folder / f"{name}.jsonl"
    params = vision.train(
        vision.pooled(graphdef), params, families, processor, part.training,
        name=name, checkpoint=folder / f"{name}.safetensors", report=report_to(log),
    )  # fmt: skip
    last = read_rows(log)[-1]
    write_json(output / "preprocessor_config.json", processor.to_json())
    write_atomic(output / "README.md", encoder_card(config, name, part, last, _size(params)))
    save_network(output, name, part.model, params, dtype=jnp.bfloat16)


def make_lpips(config: MetricNetworksConfig, families: pictures.Families) -> None:
    """Trains LPIPS' features, fits its weights and writes its folder; one that is already there is kept."""
    folder, part = Path(config.folder), config.lpips
    output, side = Path(part.output), config.families.size
    if (output / "config.json").exists():
        return
    graphdef, start = perceptual.initialize(part.model, side, part.vectors, part.training.seed)
    log = folder / "lpips.jsonl"
    # This processor keeps pictures of the families' size as they are and brings them to [-1, 1], as LPIPS takes them.
    trained = vision.train(
        perceptual.features(graphdef), start, families, ImageProcessor.siglip(side), part.training,
        name="lpips", checkpoint=folder / "lpips.safetensors", report=report_to(log),
    )["lpips"]  # fmt: skip
    params, order = perceptual.fit_judgements(graphdef, trained, families, vision.HELD_OUT, part.judgements)
    write_atomic(output / "README.md", lpips_card(config, read_rows(log)[-1], order, _size(params)))
    save_network(output, "lpips", part.model, params, dtype=jnp.bfloat16)


def _size(params: layers.Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


_TITLES = {"dinov2": "DINOv2", "siglip": "SigLIP's vision tower"}
_OBJECTIVES = {
    "softmax": "cross-entropy of finding an individual's other picture in the batch, temperature {temperature}",
    "sigmoid": "every pair of pictures judged on its own (sigmoid loss with a learned scale and bias)",
}


def encoder_card(
    config: MetricNetworksConfig, name: str, part: Dinov2Part | SiglipPart, last: dict[str, float], size: int
) -> str:
    """How the network was made: seeds, settings, sizes, losses."""
    what = (
        f"A small network of {_TITLES[name]}'s architecture in its published layout ({size:,} parameters, "
        f"{part.model.image_size} pixels, patches of {part.model.patch_size}), made from nothing by"
    )
    return _card(config, part.output, what, [training_line(config, part.training, last)])


def lpips_card(config: MetricNetworksConfig, last: dict[str, float], order: dict[str, float], size: int) -> str:
    """As ``encoder_card``, for LPIPS."""
    part = config.lpips
    channels = ", ".join(map(str, part.model.channels))
    what = (
        f"LPIPS-VGG's architecture in small ({size:,} parameters, {channels} channels), in the layout that "
        "`nabla_jax` reads, made from nothing by"
    )
    how = part.judgements
    fitted = (
        f"- Weights per channel: fitted, not negative, to {how.count} pairs of distortions of one picture (kinds: "
        f"{', '.join(perceptual.KINDS)}; coat mixes in a sibling's), the stronger one being farther away by "
        f"definition, seed {how.seed}. In the right order: {order['fitted']:.4f} of the pairs, {order['held_out']:.4f} "
        "of those of families never seen. Scaled so that unrelated birds on black ground are 1 apart on average."
    )
    return _card(config, part.output, what, [training_line(config, part.training, last), fitted])


def training_line(config: MetricNetworksConfig, how: vision.Settings, last: dict[str, float]) -> str:
    """How features were trained and how well they tell siblings apart, for a card."""
    drawn = config.families
    seen = how.steps * how.families * drawn.species * drawn.views
    ground = "on black ground" if how.masked == 1 else f"{how.masked:.0%} of them on black ground"
    return (
        f"- Training: {how.steps} steps of {how.families} families ({seen:,} pictures, {ground}), seed {how.seed}; "
        f"{_OBJECTIVES[how.objective].format(temperature=how.temperature)}. Pictures are now and then blurred, noisy, "
        "mirrored, smaller, of another exposure or cut by a mask that is off by a pixel. Mean loss over the last steps "
        f"{last['loss']:.4f}; AUC of cosines, same individual against sibling species in the same scene, "
        f"{vision.HELD_OUT} families it never saw: {last['auc']:.4f}."
    )


def _card(config: MetricNetworksConfig, output: str, what: str, lines: list[str]) -> str:
    drawn = config.families
    intro = [
        f"# {Path(output).name}",
        "",
        what,
        f"`python -m nabla_jax.pretrain --config {config.source}`; Apache-2.0. It knows the birds of",
        f"`{drawn.world}` only.",
        "",
        f"- Pictures: {drawn.families} fresh families of {drawn.species} sibling species, one individual each, all in "
        f"the same {drawn.views} scenes, {drawn.size} x {drawn.size} pixels, seed {drawn.seed} of `{drawn.world}`: no "
        "benchmark's world.",
    ]
    return "\n".join([*intro, *lines, "- Weights: the running average, bfloat16.", ""])


def make(config: MetricNetworksConfig, workers: int) -> None:
    """Draws the families and makes every network that is not there yet."""
    families = pictures.render_families(config.families, Path(config.folder) / "families", workers)
    make_encoder(config, "dinov2", config.dinov2, families)
    make_encoder(config, "siglip", config.siglip, families)
    make_lpips(config, families)
