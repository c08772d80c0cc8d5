"""The methods as pure functions: from VAE moments of what the model is shown to a loss or to a new picture.

``omini`` shows subject and control as tokens beside the noise, at time 0; ``native`` shows them in the noise's own
stream, at its time, as FLUX.1-Kontext's references; ``insert`` shows a diptych with a hole, and the hole's mask, as
further channels of the noise. All else is one and the same. Training, the samples drawn during training and generation
all run these functions. Letters in shapes: B batch, C latent channels, h w latent height and width (of the whole
diptych), N tokens (h/2 * w/2), T text tokens (of ``insert``: an empty text and the subject's Redux tokens).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nabla_jax import compiling, draws, flow
from nabla_jax.conditioning import diptych, omini
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers
from nabla_jax.models.attention import Implementation
from nabla_jax.models.autoencoder import AutoencoderKLConfig, sample_latents
from nabla_jax.models.lora import Adapter

Adapters = dict[str, Adapter]
Batch = Mapping[str, Any]
Name = Literal["omini", "native", "insert"]
Shown = Sequence[omini.Condition] | flux.Memory | diptych.Masked
"""What the model is shown beside noise and text: subject and control, what is remembered of them, or a hole."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything static about a forward pass.

    Attributes:
      transformer: graph of the FLUX transformer.
      vae: the autoencoder's configuration.
      adapter: name of the adapter on both conditions (omini) or on everything, or None for the bare base.
      control_adapter: name of the control's adapter where it is another than the subject's; None where it is not.
      kontext: whether the base knows a second picture, as FLUX.1-Kontext does (see ``omini.subject_ids``).
      name: omini; native, whose adapter acts on everything; or insert for the diptych, which has no conditions, and
        whose adapter acts on everything too.
      compact: subject and control have 1 / compact of the resolution of what is made.
      independent: conditions see themselves only; sampling then computes their keys and values once.
      guidance_embeds: whether the transformer takes a guidance scale.
      dtype: of matrix products.
      remat: what the backward pass keeps.
      attention: the kernel.
    """

    transformer: "nnx.GraphDef[flux.Flux]"
    vae: AutoencoderKLConfig
    adapter: str | None
    independent: bool
    guidance_embeds: bool
    dtype: str = "float32"
    remat: flux.Remat = "none"
    attention: Implementation = "auto"
    control_adapter: str | None = None
    kontext: bool = True
    name: Name = "omini"
    compact: int = 1

    @property
    def pictures(self) -> tuple[str, ...]:
        """The names, in a batch, of the moments that a picture is drawn from."""
        return ("masked",) if self.name == "insert" else ("subject", "control")

    def conditions(self, subject: jax.Array, control: jax.Array, grid: tuple[int, int]) -> list[omini.Condition]:
        """Subject and control, packed latents [B, N, 4C], on their own grid (height, width) in tokens.

        The control shares the noise's positions; only in the noise's own stream must it be told apart from the noise:
        there it is picture 2.
        """
        index = 2 if self.name == "native" else 0
        return [
            omini.Condition(subject, omini.subject_ids(*grid, kontext=self.kontext, scale=self.compact), self.adapter),
            omini.Condition(
                control, omini.grid_ids(*grid, index=index, scale=self.compact), self.control_adapter or self.adapter
            ),
        ]

    def latent_size(self, batch: Batch) -> tuple[int, int]:
        """(height, width) of the latents that are drawn when ``batch`` is what the model is shown, see ``sample``."""
        height, width = np.shape(batch[self.pictures[0]])[-2:]
        return height * self.compact, width * self.compact


def predict(
    method: Method,
    base: layers.Params,
    adapters: Adapters,
    noisy: jax.Array,
    time: jax.Array,
    shown: Shown,
    text: tuple[jax.Array, jax.Array],
    guidance: float | jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """The velocity at ``noisy``.

    Args:
      noisy: [B, N, 4C] packed latents.
      time: [B].
      shown: subject and control, or what ``remember`` returned for them; of a diptych its masked picture.
      text: prompt embeddings [B, T, E] and pooled vector [B, P].
      guidance: scale on text and noise; ignored by transformers without guidance embedding.
      grid: (height, width) in tokens, N = height * width.

    Returns:
      [B, N, 4C] float32.
    """
    scale = guidance if method.guidance_embeds else None
    memory = shown if isinstance(shown, flux.Memory) else None
    if isinstance(shown, diptych.Masked):
        branches = diptych.branches(
            *text, noisy, shown.tokens, shown.mask, grid, time, guidance=scale, adapter=shown.adapter
        )
    elif method.name == "native" and not isinstance(shown, flux.Memory):
        references = [(condition.tokens, np.asarray(condition.ids)) for condition in shown]
        branches = omini.native(
            *text, noisy, omini.grid_ids(*grid), time, guidance=scale, references=references, adapter=method.adapter
        )
    else:
        branches = omini.branches(
            *text,
            noisy,
            omini.grid_ids(*grid),
            time,
            guidance=scale,
            conditions=() if isinstance(shown, flux.Memory) else shown,
            independent=method.independent,
        )
    model = layers.bind(method.transformer, base)
    found = model(
        branches, adapters=adapters, memory=memory, dtype=jnp.dtype(method.dtype), implementation=method.attention,
        remat=method.remat,
    )  # fmt: skip
    # References in the noise's own stream have a velocity too, which belongs to nothing that is drawn.
    return found[:, : noisy.shape[1]] if method.name == "native" else found


def remember(
    method: Method, base: layers.Params, adapters: Adapters, conditions: Sequence[omini.Condition], pooled: jax.Array
) -> flux.Memory:
    """Keys and values of independent conditions, for ``predict``.

    Raises UserError for a method whose conditions are not independent: they were trained to see text and noise.
    """
    if method.name == "native":
        raise UserError(
            "condition cache: method native has its references in the noise's own stream, so that their keys and "
            "values change from step to step, expected none"
        )
    if not method.independent:
        raise UserError(
            "condition cache: found independent_conditions false, expected true: the adapter's conditions see text and "
            "noise, so that their keys and values change from step to step"
        )
    alone = omini.alone(conditions, pooled, guidance_embeds=method.guidance_embeds)
    model = layers.bind(method.transformer, base)
    return model.remember(alone, adapters=adapters, dtype=jnp.dtype(method.dtype), implementation=method.attention)


def condition_tokens(
    method: Method, subject: jax.Array, control: jax.Array, seed: int | jax.Array, numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws the latents of both conditions from their moments [B, 2C, h, w], packed: [B, N, 4C] each."""
    return (
        _tokens(method, subject, seed, numbers, draws.SUBJECT_LATENT),
        _tokens(method, control, seed, numbers, draws.CONTROL_LATENT),
    )


def shown(method: Method, batch: Batch, seed: int | jax.Array) -> Sequence[omini.Condition] | diptych.Masked:
    """What the model is shown, its latents drawn from the moments in ``batch``; see ``loss``."""
    numbers = batch["sample"]
    if method.name == "insert":
        tokens = _tokens(method, batch["masked"], seed, numbers, draws.MASKED_LATENT)
        return diptych.Masked(tokens, batch["repaint"], method.adapter)
    subject, control = condition_tokens(method, batch["subject"], batch["control"], seed, numbers)
    return method.conditions(subject, control, _grid(batch["control"]))


def _grid(moments: jax.Array) -> tuple[int, int]:
    """(height, width) in tokens of moments or latents [B, C, h, w]."""
    height, width = moments.shape[-2:]
    return height // flow.path.PATCH, width // flow.path.PATCH


def _tokens(method: Method, moments: jax.Array, seed: int | jax.Array, numbers: jax.Array, purpose: int) -> jax.Array:
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    eps = draws.normal(draws.keys(seed, numbers, purpose), shape)
    return flow.pack(sample_latents(moments.astype(jnp.float32), eps, method.vae))


def loss(
    method: Method, adapters: Adapters, base: layers.Params, batch: Batch, *, seed: int, guidance: float,
    time_mean: float = 0.0, foreground_weight: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Mean squared error of the velocity at a random point of each sample's path; float32 scalar.

    Args:
      batch: ``target`` and ``Method.pictures`` (``subject`` and ``control``, or ``masked``) VAE moments [B, 2C, h, w],
        of compact conditions [B, 2C, h / compact, w / compact]; of a diptych ``repaint`` [B, N, 4 factor**2], see
        ``diptych.fold_mask``; ``prompt_embeds`` [B, T, E]; ``pooled`` [B, P]; ``mask`` [B, h, w], the target's
        foreground coverage in [0, 1]; ``sample`` [B], the numbers that every draw is folded with.
      seed: of the run.
      guidance: scale on text and noise.
      time_mean: mean of the logit of the times; the reference system has 0.
      foreground_weight: weight of tokens that show the bird; the reference system has 1.
    """
    numbers = batch["sample"]
    x0 = _tokens(method, batch["target"], seed, numbers, draws.TARGET_LATENT)
    x1 = draws.normal(draws.keys(seed, numbers, draws.NOISE), x0.shape[1:])
    time = jax.vmap(lambda key: flow.logit_normal_time(key, mean=time_mean))(draws.keys(seed, numbers, draws.TIME))
    weight = None if foreground_weight == 1 else flow.foreground_weight(batch["mask"], foreground_weight)
    text = (batch["prompt_embeds"], batch["pooled"])
    pictures, grid = shown(method, batch, seed), _grid(batch["target"])
    return path_loss(method, base, adapters, (x0, x1), time, pictures, text, guidance, grid, weight)


def path_loss(
    method: Method,
    base: layers.Params,
    adapters: Adapters,
    ends: tuple[jax.Array, jax.Array],
    time: jax.Array,
    shown: Shown,
    text: tuple[jax.Array, jax.Array],
    guidance: float | jax.Array,
    grid: tuple[int, int],
    weight: jax.Array | None = None,
) -> jax.Array:
    """Mean squared error of the velocity between ``ends``, data and noise [B, N, 4C], at ``time`` [B]; a scalar.

    ``weight`` [B, N] weighs tokens, see ``flow.velocity_loss``; for the rest see ``predict``.
    """
    noisy = flow.interpolate(*ends, time)
    prediction = predict(method, base, adapters, noisy, time, shown, text, guidance, grid)
    return flow.velocity_loss(prediction, *ends, weight)


def sample(
    method: Method,
    base: layers.Params,
    adapters: Adapters,
    batch: Batch,
    sigmas: np.ndarray | jax.Array,
    guidance: jax.Array,
    seed: jax.Array,
    image_guidance: jax.Array | None = None,
    sibling_guidance: jax.Array | None = None,
    start: jax.Array | None = None,
) -> jax.Array:
    """Draws the latents of a batch of pictures by Euler's method, as one scan.

    Args:
      batch: as for ``loss``, without ``target`` and ``mask``; moments of the subject's size of black pictures,
        ``empty``, where image guidance is asked for, and of siblings' pictures, ``sibling``, where theirs is.
      sigmas: [steps + 1] noise levels from 1 down to 0.
      guidance: float32 scalar or [B].
      seed: integer scalar; with the number of a picture it fixes the picture.
      image_guidance: float32 scalar or None: how strongly the conditions are followed, against black pictures in
        their places; twice the work (see ``omini.image_guided``).
      sibling_guidance: float32 scalar or None: how strongly the subject is followed, against a sibling in its place
        and under the same control: at 0 the sibling is drawn, at 1 the subject, beyond 1 what tells it from the
        sibling is exaggerated. Twice the work.
      start: [B, C, h, w], what is there at ``sigmas[0]``; None for ``noise``.

    Returns:
      Scaled latents [B, C, h, w] float32.

    Raises:
      UserError: image or sibling guidance of a method without conditions, or both of them.
    """
    for name, guided in (("image_guidance", image_guidance), ("sibling_guidance", sibling_guidance)):
        if method.name == "insert" and guided is not None:
            raise UserError(f"{name}: method insert has no conditions to leave out, expected 1")
    if image_guidance is not None and sibling_guidance is not None:
        raise UserError("image_guidance, sibling_guidance: found both, expected 1 for one of them")
    numbers = batch["sample"]
    height, width = method.latent_size(batch)
    grid = (height // flow.path.PATCH, width // flow.path.PATCH)
    scale = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), numbers.shape)
    text = (batch["prompt_embeds"], batch["pooled"])

    def prepared(batch: Batch) -> Shown:
        pictures = shown(method, batch, seed)
        if isinstance(pictures, diptych.Masked) or not method.independent:
            return pictures
        return remember(method, base, adapters, pictures, text[1])

    guide = prepared(batch)
    instead, strength = None, sibling_guidance if image_guidance is None else image_guidance
    if image_guidance is not None:
        instead = prepared({**batch, "subject": batch["empty"], "control": batch["empty"]})
    elif sibling_guidance is not None:
        instead = prepared({**batch, "subject": batch["sibling"]})

    def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        time = jnp.full(numbers.shape, sigma)
        followed = predict(method, base, adapters, noisy, time, guide, text, scale, grid)
        if instead is None or strength is None:
            return followed
        without = predict(method, base, adapters, noisy, time, instead, text, scale, grid)
        return omini.image_guided(followed, without, strength)

    begun = flow.pack(noise(method, batch, seed) if start is None else start)
    return flow.unpack(flow.euler(velocity, begun, jnp.asarray(sigmas)), height, width)


def noise(method: Method, batch: Batch, seed: jax.Array) -> jax.Array:
    """What ``sample`` begins with: latents [B, C, h, w] that ``seed`` and the numbers of the pictures fix."""
    height, width = method.latent_size(batch)
    tokens = height * width // flow.path.PATCH**2
    channels = flow.path.PATCH**2 * method.vae.latent_channels
    drawn = draws.normal(draws.keys(seed, batch["sample"], draws.NOISE), (tokens, channels))
    return flow.unpack(drawn, height, width)


def make_sampler(method: Method) -> Callable[..., jax.Array]:
    """``sample`` compiled for one method: (base, adapters, batch, sigmas, guidance, seed[, and the rest in order])."""

    def draw(*arguments: Any) -> jax.Array:
        return sample(method, *arguments)

    return compiling.trimmed(jax.jit(draw, compiler_options=compiling.options()))
