"""Floating-point operations of one sample by formula; a multiplication with an addition is two.

Counted are matrix products, the only ones that matter: the blocks' linears, attention, low-rank adapters, and the
embedders, modulations and output layer around the blocks. S tokens, K keys that they see, D width, r rank.

A token takes ``24 D^2`` in the linears of a block of either kind: four square matrices' worth for attention and eight
for the MLP. Attention takes ``4 S K D``. The base is frozen: its backward pass takes the gradient by the input alone,
once the forward pass; attention's takes twice it, an adapter's twice it. ``Training.model`` is that and nothing else;
``Training.hardware`` adds what is computed again in the backward pass.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from nabla_jax.config import Config
from nabla_jax.models.flux import FluxConfig, Remat
from nabla_jax.plan.networks import Architecture, text_tokens

Kernel = Literal["flash", "blocked", "xla"]
"""How attention is computed: by a kernel of the platform's, in blocks of queries, or with all scores in memory."""

_SINUSOID = 256  # channels that a time or a guidance scale enters with


@dataclasses.dataclass(frozen=True)
class Stream:
    """One branch of a forward pass, see ``models.flux.Branch``.

    Attributes:
      tokens: of one sample.
      keys: that its queries see, of all branches together.
      text: whether its tokens are a text's; else a picture's.
      rank: of the adapter that acts on it, 0 where none does.
      condition: whether it is a picture at time 0, with a modulation of its own.
    """

    tokens: int
    keys: int
    text: bool = False
    rank: int = 0
    condition: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one forward pass of one sample.

    Attributes:
      linear: the frozen linears of all blocks.
      closing: the part of ``linear`` that only makes a block's output, which no gradient reads.
      attention: of all blocks.
      closing_attention: the part of ``attention`` that only a closing frozen linear reads.
      adapter: low-rank products.
      ends: embedders, modulations and output layer.
      output: the part of ``ends`` that a gradient passes through.
    """

    linear: float = 0.0
    closing: float = 0.0
    attention: float = 0.0
    closing_attention: float = 0.0
    adapter: float = 0.0
    ends: float = 0.0
    output: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.linear + self.attention + self.adapter + self.ends


@dataclasses.dataclass(frozen=True)
class Training:
    """Operations of one sample of a training step: what learning takes, and what is computed twice to save memory."""

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.model + self.recomputed


def streams(config: Config, architecture: Architecture) -> tuple[Stream, ...]:
    """The branches of one sample, in the order of ``reposing.predict``."""
    settings, rank = config.conditioning, config.lora.rank
    token = 2 * architecture.vae.factor
    text, picture = text_tokens(config, architecture), (settings.size // token) ** 2
    if settings.method == "insert":
        return joined(text, 2 * picture, rank)
    condition = (settings.condition_size // token) ** 2
    if settings.method == "native":
        return joined(text, picture + 2 * condition, rank)
    return conditioned(text, picture, (condition, condition), rank, independent=settings.independent_conditions)


def joined(text: int, picture: int, rank: int) -> tuple[Stream, ...]:
    """Text and one stream of picture tokens that all see each other, an adapter on both."""
    return (Stream(text, text + picture, text=True, rank=rank), Stream(picture, text + picture, rank=rank))


def conditioned(
    text: int, picture: int, conditions: Sequence[int], rank: int, *, independent: bool
) -> tuple[Stream, ...]:
    """Text and noise that see everything, and conditions with an adapter that do not see each other.

    Conditions see text, noise and themselves; ``independent`` ones themselves alone.
    """
    own, everything = text + picture, text + picture + sum(conditions)
    seen = 0 if independent else own
    return (
        Stream(text, everything, text=True),
        Stream(picture, everything),
        *(Stream(tokens, seen + tokens, rank=rank, condition=True) for tokens in conditions),
    )


def forward(config: FluxConfig, found: Sequence[Stream], output: int = 1) -> Work:
    """One forward pass; ``output`` is the index of the stream whose velocity is made, -1 for none (``remember``)."""
    width, double, single = config.width, config.num_layers, config.num_single_layers
    work = Work()
    for stream in found:
        n, attention = stream.tokens, 4.0 * stream.tokens * stream.keys * width
        square, alone = 2.0 * n * width**2, not stream.rank
        work = _add(
            work,
            linear=12 * square * (double + single),
            # The MLP's second linear; of single blocks the one linear behind attention and MLP. Where their gate is
            # adapted, its gradient reads what they give.
            closing=square * (4 * double * (alone or stream.text) + 5 * single * alone),
            attention=attention * (double + single),
            closing_attention=attention * single * alone,
            adapter=_adapter(config, stream),
            ends=2.0 * n * width * (config.joint_attention_dim if stream.text else config.in_channels),
        )
    # Streams of one time and adapter share a modulation: text and noise, and all conditions.
    shared = [[s for s in found if s.condition is condition] for condition in (False, True)]
    for group in (group for group in shared if group):
        embedders = 2 if config.guidance_embeds else 1
        vector = embedders * (_SINUSOID * width + width**2) + config.pooled_projection_dim * width + width**2
        kinds, ranks = len({s.text for s in group}), {s.rank for s in group}
        vector += width**2 * (6 * kinds * double + 3 * len(ranks) * single)
        # One row a sample through the adapted modulations: the pictures' of double blocks, all of single ones.
        rows = (7 * double + 4 * single) * width
        work = _add(work, ends=2.0 * vector, adapter=2.0 * sum(ranks) * rows)
    if output >= 0:
        last = 2.0 * found[output].tokens * width * config.velocity_channels
        work = _add(work, ends=last + 4.0 * width**2, output=last)
    return work


def _add(work: Work, **more: float) -> Work:
    return dataclasses.replace(work, **{name: getattr(work, name) + value for name, value in more.items()})


def _adapter(config: FluxConfig, stream: Stream) -> float:
    """Low-rank products of one stream: of a matrix [out, in], 2 r (in + out) a token; see ``lora.FLUX_TARGETS``."""
    width, double, single = config.width, config.num_layers, config.num_single_layers
    # Queries, keys, values, MLP, output.
    sides = single * (3 * 2 + 5 + 6) * width
    if not stream.text:
        # Queries, keys, values, output and the MLP's second linear; the pictures' alone are adapted.
        sides += double * (4 * 2 + 5) * width + config.in_channels + width
    return 2.0 * stream.rank * stream.tokens * sides


def training(work: Work, remat: Remat, kernel: Kernel = "flash") -> Training:
    """A training step of one sample.

    Of a block that is not kept, everything is computed again that its gradient reads: not a closing linear, nor, with
    ``save_attention`` and ``offload``, attention. In any case a kernel that keeps no scores makes them again, half of
    its forward pass; and one of the platform's runs as a whole, for what else it hands to its own backward pass,
    except with ``save_attention``, which keeps that too (so does ``offload`` of a TPU's).
    """
    backward = work.linear + 2 * work.attention + 2 * work.adapter + work.output
    if remat == "none":
        return Training(work.total, backward, 0.0 if kernel == "xla" else 0.5 * work.attention)
    read = work.attention - work.closing_attention if remat == "full" else 0.0
    attention = {
        "flash": (0.5 if remat == "save_attention" else 1.5) * work.attention,
        "blocked": 0.5 * work.attention + read,
        "xla": 0.5 * work.attention + 0.5 * read,
    }
    return Training(work.total, backward, work.linear - work.closing + work.adapter + attention[kernel])


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Operations of one picture.

    Attributes:
      step: one step of the sampler.
      once: what is computed before the first step; the conditions, where they are remembered.
      steps: how many.
    """

    step: float
    once: float
    steps: int

    @property
    def total(self) -> float:
        """Of the whole picture, without the autoencoder's and the text encoders' share."""
        return self.once + self.steps * self.step


def sampling(config: Config, architecture: Architecture, *, cache: bool | None = None) -> Sampling:
    """Drawing one picture with ``sample``'s settings.

    ``cache``: whether conditions are remembered; None: exactly when they are independent, as ``reposing.sample`` does.
    """
    found, model = streams(config, architecture), architecture.transformer
    cache = config.conditioning.independent_conditions if cache is None else cache
    # Guidance by pictures runs the model a second time, with other pictures.
    runs = 1 if config.sample.image_guidance == config.sample.sibling_guidance == 1 else 2
    if not cache:
        return Sampling(runs * forward(model, found).total, 0.0, config.sample.steps)
    own = [stream for stream in found if not stream.condition]
    conditions = [stream for stream in found if stream.condition]
    once = forward(model, conditions, output=-1).total
    return Sampling(runs * forward(model, own).total, runs * once, config.sample.steps)
