"""From a small FLUX.1-Kontext to a small FLUX.1-Fill and FLUX.1-Redux, in their published layouts."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_jax import assets
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.transformers_folder import load_siglip, save_redux, write_redux_index
from nabla_jax.conditioning.text import embed
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import layers
from nabla_jax.models.flux import FluxConfig
from nabla_jax.models.redux import ReduxConfig, ReduxEmbedder, ReduxEmbedderConfig
from nabla_jax.pretrain import fill, latents, pictures, start, text
from nabla_jax.pretrain.latents import report_to
from nabla_jax.pretrain.state import State
from nabla_jax.runs import read_rows, write_atomic, write_json

_GUIDANCE = 2.5
"""A scale that every start has seen."""


@dataclasses.dataclass(frozen=True)
class FillConfig:
    """Everything a FLUX.1-Fill with its FLUX.1-Redux is made of.

    Attributes:
      folder: where pictures, latents and training states are kept.
      output: the pipeline folder to write.
      redux: the FLUX.1-Redux folder to write.
      start: the pipeline folder to start from, which gives autoencoder and tokenizers.
      vision: the SigLIP folder whose network becomes the Redux folder's.
      size: side of the square pictures, pixels.
      prompt: the plain caption.
      text_length: T5 tokens.
      clip_width: hidden units that CLIP's feed-forward layers keep.
      pictures: what to draw.
      diptychs: what to show.
      training: how to train.
      transformer_model: sizes of the transformer.
      source: the configuration file, filled in when it is read.
    """

    folder: str
    output: str
    redux: str
    start: str
    vision: str
    size: int
    prompt: str
    text_length: int
    clip_width: int
    pictures: pictures.PictureConfig
    training: fill.Settings
    transformer_model: FluxConfig
    diptychs: fill.DiptychConfig = fill.DiptychConfig()
    source: str = ""


def make(config: FillConfig, workers: int, seconds: float | None) -> None:
    """Draws, encodes, trains and writes both folders; every part continues where it stopped."""
    folder, output, origin = Path(config.folder), Path(config.output), assets.resolve(config.start)
    drawn = pictures.render(config.pictures, folder / "pictures", workers)
    start.copy_shared(origin, output)
    seen = assets.resolve(config.vision)
    vae, vision = pipeline.load_vae(origin), load_siglip(seen)
    processor = ImageProcessor.from_json(seen / "preprocessor_config.json")
    tokenizers = pipeline.load_tokenizers(origin)
    encoded = latents.encode(
        drawn, vae, tokenizers, folder / "latents", size=config.size, prompt=config.prompt,
        text_length=config.text_length, clip_length=tokenizers.clip.model_max_length,
    )  # fmt: skip
    shown = fill.encode(drawn, vae, vision, processor, config.diptychs, folder / "diptychs", size=config.size)

    encoders = start.text_encoders(origin, config.clip_width)
    model = config.transformer_model
    embedder = ReduxEmbedderConfig(vision.config.hidden_size, model.joint_attention_dim)
    graph, redux = layers.initialize(lambda r: ReduxEmbedder(embedder, rngs=r), jax.random.key(config.training.seed))
    params = {
        "transformer": start.flatten_guidance(start.transformer(origin, model, _GUIDANCE), _GUIDANCE),
        "text": {"clip": encoders.clip.params, "t5": encoders.t5.params},
        "redux": redux,
    }

    def encode_text(params: layers.Params, t5: jax.Array, clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        return embed(encoders, params["clip"], params["t5"], clip, t5)

    abstract, _ = layers.abstract(lambda rngs: pipeline.PARTS["transformer"].model(model, rngs=rngs))
    networks = fill.Networks(abstract, graph, encode_text, config.text_length, model.pooled_projection_dim)
    state = fill.train(
        networks, params, shown, encoded, config.training, checkpoint=folder / "fill.safetensors",
        report=report_to(folder / "fill.jsonl"), seconds=seconds,
    )  # fmt: skip

    write_atomic(output / "README.md", fill_card(config, state, read_rows(folder / "fill.jsonl")))
    pipeline.save_part(output, "transformer", model, state.ema["transformer"], dtype=jnp.bfloat16)
    text.save_text_encoders(output, text.with_params(encoders, state.ema["text"]), dtype=jnp.bfloat16)
    pipeline.write_index(output, "FluxFillPipeline")

    both = {"image_encoder": vision.params, "image_embedder": state.ema["redux"]}
    target = Path(config.redux)
    save_redux(target, ReduxConfig(vision.config, embedder), both, dtype=jnp.bfloat16)
    weights = Path("model.safetensors")
    start.link_weights(seen, seen / weights, target, target / "image_encoder" / weights)
    write_json(target / "feature_extractor" / "preprocessor_config.json", processor.to_json())
    write_redux_index(target)
    write_atomic(target / "README.md", redux_card(config, state))
    print(f"{output}, {target}: {state.step} steps")


def _made_by(config: FillConfig) -> str:
    return f"`python -m nabla_jax.pretrain --config {config.source}`; Apache-2.0. It knows the birds of"


def fill_card(config: FillConfig, state: State, reports: list[dict[str, Any]]) -> str:
    """How the pipeline folder was made: seeds, settings, sizes, losses."""
    training, drawn, shown = config.training, config.pictures, config.diptychs
    last = reports[-1]
    policies = ", ".join(f"{name} {share:g}" for name, share in shown.masks)
    given = (
        "masked picture and caption",
        "masked picture and its own Redux tokens",
        "side by side, reference left, masked target right, and a caption",
    )
    tasks = "; ".join(f"{task} ({share:g} of the steps)" for task, share in zip(given, training.tasks, strict=True))
    lines = [
        f"# {Path(config.output).name}",
        "",
        f"A small checkpoint in the layout and architecture of FLUX.1-Fill, made from `{config.start}` by",
        _made_by(config),
        f"`{drawn.world}` only.",
        "",
        f"- Pictures: {drawn.identities} fresh individuals, two views each, {drawn.size} x {drawn.size} pixels, seed "
        f"{drawn.seed} of `{drawn.world}`: no benchmark's world.",
        "- Autoencoder and tokenizers: those of the start. Transformer: its weights, new input channels at zero. Text "
        f"encoders: its weights, CLIP's feed-forward layer narrowed to {config.clip_width} hidden units.",
        f"- Transformer, text encoders and the Redux embedder, trained together: {state.step} steps of "
        f"{training.batch} ({state.step * training.batch:,} samples), seed {training.seed}, guidance drawn from "
        f"{training.guidance[0]:g} to {training.guidance[1]:g}. Tasks: {tasks}. "
        "The reference is another view of the same individual, at first often the target's own view. "
        f"Masks: {policies}. Never Redux tokens of another picture, never a silhouette.",
        f"- Mean over the last steps: loss {last['loss']:.4f}, error on repainted tokens {last['hole']:.4f}.",
        "- Weights: the running average, bfloat16.",
        "",
    ]
    return "\n".join(lines)


def redux_card(config: FillConfig, state: State) -> str:
    """How the Redux folder was made."""
    lines = [
        f"# {Path(config.redux).name}",
        "",
        "A small checkpoint in the layout and architecture of FLUX.1-Redux, made by",
        _made_by(config),
        f"`{config.pictures.world}` only.",
        "",
        f"- `image_encoder`, `feature_extractor`: `{config.vision}` as it is.",
        f"- `image_embedder`: from nothing, trained together with `{Path(config.output).name}` for {state.step} steps "
        f"of {config.training.batch}; see there. Weights: the running average, bfloat16.",
        "",
    ]
    return "\n".join(lines)
