"""The networks and the state of a run as shapes: configurations are read, weights are not, and nothing is allocated.

Where ``base.path`` or ``base.redux`` does not exist yet, the published configuration that its name tells takes its
place, so that a run can be planned before anything is downloaded.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nabla_jax import api, assets, optim, reposing, training
from nabla_jax.checkpoints import adapters as adapter_files
from nabla_jax.checkpoints import pipeline, transformers_folder
from nabla_jax.config import Config, resolve_base
from nabla_jax.errors import UserError
from nabla_jax.models import clip, flux, layers, lora, quantised, redux, t5
from nabla_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig

Shape = jax.ShapeDtypeStruct

PUBLISHED = {
    "schnell": flux.FluxConfig.schnell,
    "kontext": flux.FluxConfig.kontext,
    "fill": flux.FluxConfig.fill,
    "dev": flux.FluxConfig.dev,
}
"""What the name of a base that is not there must contain, the first that fits, and what is then planned with."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of every network that a run touches.

    Attributes:
      redux: None where the method reads none.
      kontext: whether the base knows a second picture.
      published: names of the folders that are not there and whose published configuration was taken.
    """

    transformer: flux.FluxConfig
    vae: AutoencoderKLConfig
    clip: clip.CLIPTextConfig
    t5: t5.T5Config
    redux: redux.ReduxConfig | None
    kontext: bool
    published: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Networks:
    """Every tree of a run as shapes.

    Attributes:
      method: the static part of the training step's forward pass.
      base: the frozen transformer in ``train.dtype``, its blocks in the format of ``base.quantise``.
      vae: its graph and its parameters in float32, as training and sampling hold it.
      clip, t5: bfloat16, as accelerators hold them.
      redux: in ``train.dtype``, or None.
      state: what a checkpoint holds, see ``training.make_step``.
      frozen: adapters beneath the trained one, see ``training.load_frozen``.
      optimizer: that the state's is the state of.
    """

    architecture: Architecture
    method: reposing.Method
    base: layers.Params
    vae: pipeline.Component
    clip: layers.Params
    t5: layers.Params
    redux: layers.Params | None
    state: training.State
    frozen: dict[str, lora.Adapter]
    optimizer: Any


def read_architecture(config: Config) -> Architecture:
    """The configurations of the folders that are there, and the published ones of those that are not.

    Raises UserError for a folder that is not there and whose name tells no published model, and for a base that is
    not what the method takes.
    """
    folder, wanted = resolve_base(config), config.conditioning.method == "insert"
    published: tuple[str, ...] = ()
    if (folder / "model_index.json").is_file():
        parts = {name: part.config.from_json(folder / name / "config.json") for name, part in pipeline.PARTS.items()}
        found = Architecture(
            parts["transformer"], parts["vae"], parts["text_encoder"], parts["text_encoder_2"], None,
            pipeline.is_kontext(folder),
        )  # fmt: skip
    else:
        name = next((name for name in PUBLISHED if name in folder.name.lower()), None)
        if name is None:
            raise UserError(
                f"base.path: found nothing at {folder}, and its name tells no published model: expected a "
                f"diffusers-layout folder, or a name with one of {', '.join(PUBLISHED)} in it"
            )
        published = (str(folder),)
        found = Architecture(
            PUBLISHED[name](), AutoencoderKLConfig.flux(), clip.CLIPTextConfig.large(), t5.T5Config.xxl(), None,
            name == "kontext",
        )  # fmt: skip
    image_prompts = None
    if wanted:
        image_prompts = _redux(assets.resolve(config.base.redux))
        published += () if _has_redux(assets.resolve(config.base.redux)) else (config.base.redux,)
    latents = 4 * found.vae.latent_channels
    expected = 2 * latents + 4 * found.vae.factor**2 if wanted else latents
    if found.transformer.in_channels != expected:
        raise UserError(
            f"base.path: {folder}: found {found.transformer.in_channels} channels a token, expected {expected} for "
            f"method {config.conditioning.method}"
        )
    return dataclasses.replace(found, redux=image_prompts, published=published)


def _has_redux(folder: Path) -> bool:
    return (folder / "image_encoder" / "config.json").is_file()


def _redux(folder: Path) -> redux.ReduxConfig:
    if not _has_redux(folder):
        return redux.ReduxConfig()
    parts = {
        name: part.config.from_json(folder / name / "config.json") for name, part in transformers_folder.REDUX.items()
    }
    return redux.ReduxConfig(**parts)


def make(config: Config, architecture: Architecture) -> Networks:
    """All trees of a run.

    Raises UserError for a frozen adapter that cannot be read, and for a quantised format that the widths do not fit.
    """
    found, dtype = architecture, jnp.dtype(config.train.dtype)
    graphdef, base = _abstract(flux.Flux, found.transformer, dtype)
    if config.base.quantise != "none":
        base = quantised.abstract(base, quantised.find_format(config.base.quantise), flux.STACKED)
    component = pipeline.Component(found.transformer, graphdef, base)
    method = api.make_method(
        component, found.vae, config.conditioning, config.lora.name, config.train.dtype,
        cast(flux.Remat, config.train.remat), kontext=found.kontext,
    )  # fmt: skip
    optimizer = optim.make(config.optim, config.lora.dtype)

    def initial_state() -> training.State:
        rank, alpha = config.lora.rank, config.lora.alpha
        start = lora.initialize(jax.random.key(0), base, rank=rank, alpha=alpha, stacked=flux.STACKED).params
        return training.initial_state({config.lora.name: start}, optimizer, config)

    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    return Networks(
        architecture=found,
        method=method,
        base=base,
        vae=pipeline.Component(found.vae, *_abstract(AutoencoderKL, found.vae, single)),
        clip=_abstract(clip.CLIPText, found.clip, half)[1],
        t5=_abstract(t5.T5Encoder, found.t5, half)[1],
        redux=_abstract(redux.Redux, found.redux, dtype)[1] if found.redux else None,
        state=jax.eval_shape(initial_state),
        frozen=_frozen(config, base),
        optimizer=optimizer,
    )


@functools.cache
def _abstract(model: Callable[..., Any], config: Any, dtype: np.dtype[Any]) -> tuple[Any, layers.Params]:
    """The graph and the parameters' shapes of a network, traced once; nobody writes into them."""
    return layers.abstract(lambda rngs: model(config, rngs=rngs, dtype=dtype))


def _frozen(config: Config, base: layers.Params) -> dict[str, lora.Adapter]:
    if not config.lora.frozen:
        return {}
    metadata = adapter_files.read_metadata(api.find_adapter(config.lora.frozen))

    def fresh() -> lora.Adapter:
        # What acts is float32, whatever the file holds.
        key = jax.random.key(0)
        return lora.initialize(key, base, rank=metadata.rank, alpha=metadata.alpha, stacked=flux.STACKED)

    return {config.lora.name: jax.eval_shape(fresh)}


def latent_side(config: Config, architecture: Architecture) -> tuple[int, int]:
    """Side of a picture's latents, and of a condition's, in latent positions."""
    factor = architecture.vae.factor
    return config.conditioning.size // factor, config.conditioning.condition_size // factor


def batch_shapes(config: Config, architecture: Architecture, rows: int) -> dict[str, Shape]:
    """What the compiled step reads of a batch of ``rows`` samples, see ``reposing.loss``, in the loader's dtypes."""
    side, condition = latent_side(config, architecture)
    moments = 2 * architecture.vae.latent_channels
    text, width = text_tokens(config, architecture), architecture.transformer.joint_attention_dim
    shapes = {
        "prompt_embeds": Shape((rows, text, width), jnp.float32),
        "pooled": Shape((rows, architecture.transformer.pooled_projection_dim), jnp.float32),
        "sample": Shape((rows,), jnp.uint32),
    }
    if config.conditioning.method == "insert":
        tokens, channels = 2 * (side // 2) ** 2, 4 * architecture.vae.factor**2
        whole = Shape((rows, moments, side, 2 * side), jnp.float32)
        return shapes | {
            "target": whole,
            "masked": whole,
            "repaint": Shape((rows, tokens, channels), jnp.float32),
            "mask": Shape((rows, side, 2 * side), jnp.float32),
        }
    return shapes | {
        "target": Shape((rows, moments, side, side), jnp.float16),
        "subject": Shape((rows, moments, condition, condition), jnp.float16),
        "control": Shape((rows, moments, condition, condition), jnp.float16),
        "mask": Shape((rows, side, side), jnp.float32),
    }


def text_tokens(config: Config, architecture: Architecture) -> int:
    """Tokens of the prompt: the text's, and Redux's where the method reads a picture in its place."""
    prompts = architecture.redux
    return config.conditioning.text_length + (prompts.image_encoder.grid**2 if prompts else 0)
