"""A base's first weights from another base's: as the published FLUX.1 models all descend from one.

Trees are those of ``models.flux.Flux`` and ``models.clip.CLIPText``; weights are [out, in].
"""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.pipeline import Component, TextEncoders
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers
from nabla_jax.models.clip import CLIPText
from nabla_jax.models.layers import Params

SHARED = ("vae", "tokenizer", "tokenizer_2")
"""Folders that a descendant takes over as they are."""


def copy_shared(start: Path, output: Path) -> None:
    """``SHARED`` of one pipeline folder for another, over what is there: copies, but links to weights of a sibling."""
    for name in SHARED:
        (output / name).mkdir(parents=True, exist_ok=True)
        for file in (start / name).iterdir():
            made = output / name / file.name
            if not link_weights(start, file, output, made):
                made.unlink(missing_ok=True)
                shutil.copyfile(file, made)


def link_weights(start: Path, file: Path, output: Path, made: Path) -> bool:
    """Makes ``made`` in ``output``, over what is there, a link to ``file`` in the folder ``start``.

    Returns False, with nothing done, if the folders do not lie side by side or the file is no safetensors file.
    """
    if start.resolve().parent != output.resolve().parent or file.suffix != ".safetensors" or not file.is_file():
        return False
    made.unlink(missing_ok=True)
    made.symlink_to(os.path.relpath(file.absolute(), made.parent.absolute()))
    return True


def embedded_guidance(params: Params, scale: float) -> jax.Array:
    """What the transformer adds to the time's embedding at a guidance scale: [D]."""
    guidance = params["time_text_embed"]["guidance_embedder"]
    hidden = flux.sinusoid(jnp.array([scale], jnp.float32))[0] @ guidance["linear_1"]["weight"].T
    hidden = jax.nn.silu(hidden + guidance["linear_1"]["bias"])
    constant: jax.Array = hidden @ guidance["linear_2"]["weight"].T + guidance["linear_2"]["bias"]
    return constant


def drop_guidance(params: Params, scale: float) -> Params:
    """The transformer's weights for a configuration without guidance embedding.

    The embedded guidance ``scale`` is a constant vector, added to the time's; it goes into the bias of the time's last
    layer, so that the smaller model computes what the larger one does at this scale.
    """
    constant = embedded_guidance(params, scale)
    embed = {name: part for name, part in params["time_text_embed"].items() if name != "guidance_embedder"}
    time = embed["timestep_embedder"]
    last = {**time["linear_2"], "bias": time["linear_2"]["bias"] + constant}
    embed["timestep_embedder"] = {**time, "linear_2": last}
    return {**params, "time_text_embed": embed}


def flatten_guidance(params: Params, scale: float) -> Params:
    """The transformer's weights with every guidance embedded as ``scale`` is: a start for a wider range of them.

    Scales that a model has never seen lead it far away: its error was some thousand times larger at 30 after a
    training with 1 to 5.
    """
    embed = params["time_text_embed"]
    guidance = embed["guidance_embedder"]
    flat = {"weight": jnp.zeros_like(guidance["linear_2"]["weight"]), "bias": embedded_guidance(params, scale)}
    return {**params, "time_text_embed": {**embed, "guidance_embedder": {**guidance, "linear_2": flat}}}


def widen_input(params: Params, channels: int) -> Params:
    """The transformer's weights for ``channels`` input channels: the new ones come last and are not looked at yet."""
    weight = params["x_embedder"]["weight"]
    more = jnp.zeros((weight.shape[0], channels - weight.shape[1]), weight.dtype)
    return {**params, "x_embedder": {**params["x_embedder"], "weight": jnp.concatenate([weight, more], axis=1)}}


def transformer(start: Path, config: flux.FluxConfig, scale: float) -> Params:
    """The weights of the transformer in the pipeline folder ``start``, for ``config``.

    Args:
      start: pipeline folder.
      config: may lack the guidance embedding of the other and may have more input channels.
      scale: guidance that is built in where its embedding is dropped.

    Raises:
      UserError: the configurations differ in anything else.
    """
    found = pipeline.load_transformer(start)
    params = found.params
    same = dataclasses.replace(
        found.config,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        guidance_embeds=config.guidance_embeds,
    )
    fits = same == config and found.config.velocity_channels == config.velocity_channels
    if not fits or config.in_channels < found.config.in_channels or config.guidance_embeds > same.guidance_embeds:
        raise UserError(f"{start}: transformer_model: found {found.config}, expected one that {config} can start from")
    if found.config.guidance_embeds and not config.guidance_embeds:
        params = drop_guidance(params, scale)
    if config.in_channels > found.config.in_channels:
        params = widen_input(params, config.in_channels)
    return params


def narrow_clip(clip: Component, width: int) -> Component:
    """The CLIP text encoder with ``width`` hidden units per feed-forward layer, those of the largest effect.

    A unit's effect is estimated by the product of the norms of its incoming and outgoing weights.
    """

    def narrow(mlp: Params) -> Params:
        first, second = mlp["fc1"], mlp["fc2"]
        effect = jnp.linalg.norm(first["weight"], axis=1) * jnp.linalg.norm(second["weight"], axis=0)
        kept = jnp.sort(jnp.argsort(-effect)[:width])
        return {
            "fc1": {"weight": first["weight"][kept], "bias": first["bias"][kept]},
            "fc2": {"weight": second["weight"][:, kept], "bias": second["bias"]},
        }

    model = clip.params["text_model"]
    blocks = {name: {**block, "mlp": narrow(block["mlp"])} for name, block in model["encoder"]["layers"].items()}
    config = dataclasses.replace(clip.config, intermediate_size=width)
    graphdef, _ = layers.abstract(lambda rngs: CLIPText(config, rngs=rngs))
    return Component(config, graphdef, {"text_model": {**model, "encoder": {"layers": blocks}}})


def text_encoders(start: Path, clip_width: int | None = None) -> TextEncoders:
    """The text encoders of the pipeline folder ``start``, float32; CLIP narrowed to ``clip_width`` if it is given."""
    found = pipeline.load_text_encoders(start)
    return found if clip_width is None else dataclasses.replace(found, clip=narrow_clip(found.clip, clip_width))
