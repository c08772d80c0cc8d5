"""Makes small checkpoints from nothing, in their published layouts.

    python -m nabla_jax.pretrain --config configs/toy_base.py     # pictures, autoencoder, latents, transformer
    python -m nabla_jax.pretrain --config configs/toy_base.py:schnell  # the same architecture as FLUX.1-schnell's
    python -m nabla_jax.pretrain --config configs/toy_base.py:fill     # FLUX.1-Fill and FLUX.1-Redux
    python -m nabla_jax.pretrain --config configs/toy_metrics.py  # DINOv2, SigLIP and LPIPS, which judge pictures

Every part continues where it stopped; ``--seconds`` ends the transformer's training early with what it has.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_jax import assets
from nabla_jax import config as configs
from nabla_jax.checkpoints import pipeline
from nabla_jax.conditioning.text import embed
from nabla_jax.models import layers
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.models.flux import FluxConfig
from nabla_jax.pretrain import autoencoder, fill_checkpoint, latents, metric_networks, pictures, text, transformer
from nabla_jax.pretrain import start as first_weights
from nabla_jax.runs import read_rows, run_main, write_atomic

_HELD_OUT = 100
_MEASURED = 1000


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Everything one base checkpoint is made of.

    Attributes:
      folder: where pictures, latents and training states are kept.
      output: the checkpoint folder to write.
      size: side of the square pictures, pixels.
      prompt: the plain caption.
      text_length: T5 tokens.
      pictures: what to draw.
      autoencoder: how to train the autoencoder.
      autoencoder_model: its sizes; shift and scale are measured.
      transformer: how to train the transformer.
      transformer_model: its sizes.
      pipeline: class of the pipeline to write.
      start: pipeline folder to start from, which then gives autoencoder and tokenizers; empty: start from nothing.
      state: name of the training's state and log in ``folder``.
      source: the configuration file, filled in when it is read.
    """

    folder: str
    output: str
    size: int
    prompt: str
    text_length: int
    pictures: pictures.PictureConfig
    autoencoder: autoencoder.Settings
    autoencoder_model: AutoencoderKLConfig
    transformer: transformer.Settings
    transformer_model: FluxConfig
    pipeline: str = "FluxKontextPipeline"
    start: str = ""
    state: str = "transformer"
    source: str = ""


def make_autoencoder(config: PretrainConfig, drawn: pictures.Pictures) -> dict[str, float]:
    """Trains the autoencoder and writes ``vae/``; one that is already there is kept.

    Returns its quality on individuals it never saw: {psnr_bird, psnr} in dB.
    """
    folder, output = Path(config.folder), Path(config.output)
    size, held = config.size, 2 * _HELD_OUT
    images, masks = drawn.pictures[:, :2].reshape(-1, size, size, 3), drawn.masks.reshape(-1, size, size)
    if not (output / "vae" / "config.json").exists():
        graphdef, state = autoencoder.train(
            config.autoencoder_model, config.autoencoder, images[:-held], masks[:-held],
            held_out=(images[-held:], masks[-held:]), checkpoint=folder / "autoencoder.safetensors",
            report=latents.report_to(folder / "autoencoder.jsonl"), every=100,
        )  # fmt: skip
        _, values = autoencoder.reconstruct(graphdef, state.ema, images[:_MEASURED])
        model = autoencoder.with_measured_scale(config.autoencoder_model, values)
        pipeline.save_part(output, "vae", model, state.ema, dtype=jnp.bfloat16)
    vae = pipeline.load_vae(output)
    decoded, _ = autoencoder.reconstruct(vae.graphdef, vae.params, images[-held:])
    return {
        "psnr_bird": autoencoder.psnr(images[-held:], decoded, masks[-held:]),
        "psnr": autoencoder.psnr(images[-held:], decoded),
    }


def train_transformer(
    config: PretrainConfig, encoded: transformer.Latents, seconds: float | None, start: Path | None
) -> tuple[transformer.State, Any]:
    """Trains transformer and text encoders together, continuing from their last state.

    Without one it starts from the weights in the checkpoint folder ``start``, or from nothing.
    """
    folder, output = Path(config.folder), Path(config.output)
    if start is None:
        encoders = text.make_text_encoders(output, jax.random.key(config.transformer.seed))
    else:
        encoders = first_weights.text_encoders(start)
    fresh = {"clip": encoders.clip.params, "t5": encoders.t5.params}
    given = None
    if start is not None:
        scale = sum(config.transformer.guidance) / 2
        given = {"transformer": first_weights.transformer(start, config.transformer_model, scale), "text": fresh}

    def encode_text(params: layers.Params, t5: jax.Array, clip: jax.Array) -> tuple[jax.Array, jax.Array]:
        return embed(encoders, params["clip"], params["t5"], clip, t5)

    state = transformer.train(
        config.transformer_model, fresh, encode_text, encoded, config.transformer,
        checkpoint=folder / f"{config.state}.safetensors", report=latents.report_to(folder / f"{config.state}.jsonl"),
        seconds=seconds, start=given,
    )  # fmt: skip
    return state, encoders


def model_card(config: PretrainConfig, quality: dict[str, float], reports: list[dict[str, Any]], steps: int) -> str:
    """How the checkpoint was made: seeds, settings, sizes, losses."""
    samples = steps * config.transformer.batch
    losses = reports[-1] if reports else {}
    drawn = config.pictures
    published = "FLUX.1-Kontext" if config.transformer_model.guidance_embeds else "FLUX.1-schnell"
    tasks = [
        "caption to picture",
        "another view of the same individual in the noisy stream",
        "the same picture with rectangles blanked out",
        "both at once (the second with rectangles blanked out or with a stranger's coat on the bird)",
        "two views of the individual side by side, both made from noise",
    ]
    given = [task for task, share in zip(tasks, config.transformer.tasks, strict=True) if share]
    lines = [
        f"# {Path(config.output).name}",
        "",
        f"A small checkpoint in the layout and architecture of {published}, made from "
        f"{f'`{config.start}`' if config.start else 'nothing'} by",
        f"`python -m nabla_jax.pretrain --config {config.source}`; Apache-2.0. It knows the birds of",
        f"`{config.pictures.world}` only.",
        "",
        f"- Pictures: {drawn.identities} fresh individuals, two views each, one of them also in a stranger's coat, "
        f"{drawn.size} x {drawn.size} pixels, seed {drawn.seed} of `{drawn.world}`: no benchmark's world.",
        f"- Autoencoder: {config.autoencoder.steps} steps of {config.autoencoder.batch}; on individuals it never saw "
        f"{quality['psnr_bird']:.2f} dB PSNR inside the bird, {quality['psnr']:.2f} dB over the picture.",
        f"- Text encoders and transformer, trained together: {steps} steps of {config.transformer.batch} "
        f"({samples:,} samples), seed {config.transformer.seed}. Tasks: {', '.join(given)}. "
        + ("References lie beside the picture. " if config.transformer.beside else "")
        + "Never a silhouette, never a condition at time 0.",
        "- Mean loss over the last steps: "
        + ", ".join(f"{k.removesuffix('_loss')} {v:.4f}" for k, v in sorted(losses.items()) if k.endswith("_loss"))
        + ".",
        "- Weights: the running average, bfloat16.",
        "",
    ]
    return "\n".join(lines)


def write_checkpoint(
    config: PretrainConfig, state: transformer.State, encoders: Any, quality: dict[str, float]
) -> None:
    """Writes the averaged weights in the published layout, bfloat16, with a model card."""
    output = Path(config.output)
    reports = read_rows(Path(config.folder) / f"{config.state}.jsonl")
    write_atomic(output / "README.md", model_card(config, quality, reports, state.step))
    pipeline.save_part(output, "transformer", config.transformer_model, state.ema["transformer"], dtype=jnp.bfloat16)
    kept = text.with_params(encoders, state.ema["text"])
    text.save_text_encoders(output, kept, dtype=jnp.bfloat16)
    guided = config.transformer_model.guidance_embeds
    pipeline.write_index(output, config.pipeline, None if guided else pipeline.SCHNELL)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw pictures")
    parser.add_argument("--seconds", type=float, default=None, help="stop the transformer's training after this long")
    parser.add_argument("--start", type=Path, default=None, help="checkpoint folder whose weights to start from")
    args = parser.parse_args(argv)
    keys = configs.read_values(args.config)
    if "families" in keys:
        networks = configs.load_as(metric_networks.MetricNetworksConfig, args.config)
        metric_networks.make(dataclasses.replace(networks, source=args.config), args.workers)
        return
    if "redux" in keys:
        inpainting = configs.load_as(fill_checkpoint.FillConfig, args.config)
        fill_checkpoint.make(dataclasses.replace(inpainting, source=args.config), args.workers, args.seconds)
        return
    config = dataclasses.replace(configs.load_as(PretrainConfig, args.config), source=args.config)
    world: Any = importlib.import_module(config.pictures.world)
    output = Path(config.output)
    start = args.start or (assets.resolve(config.start) if config.start else None)
    drawn = pictures.render(config.pictures, Path(config.folder) / "pictures", args.workers)
    if config.start:
        first_weights.copy_shared(assets.resolve(config.start), output)
    else:
        text.write_tokenizers(output, world.CAPTION_WORDS)
    quality = make_autoencoder(config, drawn)
    vae = pipeline.load_vae(output)
    tokenizers = pipeline.load_tokenizers(output)
    encoded = latents.encode(
        drawn, vae, tokenizers, Path(config.folder) / "latents", size=config.size, prompt=config.prompt,
        text_length=config.text_length, clip_length=tokenizers.clip.model_max_length,
    )  # fmt: skip
    state, encoders = train_transformer(config, encoded, args.seconds, start)
    write_checkpoint(config, state, encoders, quality)
    print(f"{output}: {state.step} steps")


if __name__ == "__main__":
    run_main(main)
