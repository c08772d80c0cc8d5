"""The Python interface: ``birds = nabla_jax.load(…)``, ``birds.repose(…)`` and ``birds.evaluate(…)``.

``generate``, the samples drawn during training and notebooks all come through here. Pictures are uint8 RGB
of any size, masks bool or grey pictures of the size of their picture.

Evaluation is a method because ``nabla_jax.evaluate`` is the module of ``python -m nabla_jax.evaluate``, whose function
``nabla_jax.evaluate.evaluate`` scores pictures that are drawn already, without a model.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from nabla_jax import assets, diptychs, draws, flow, reposing, runs
from nabla_jax import config as configs
from nabla_jax.checkpoints import adapters as adapter_files
from nabla_jax.checkpoints import pipeline
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.masks import repaint_mask
from nabla_jax.conditioning.text import PromptEncoder, encode_prompts, load_text_stack, make_prompt_encoder
from nabla_jax.config import Conditioning, Config, Sample
from nabla_jax.config import Mesh as MeshSizes
from nabla_jax.data import controls
from nabla_jax.diptychs import DiptychEncoder
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.models import flux, layers
from nabla_jax.models.attention import Implementation, choose
from nabla_jax.models.autoencoder import unscale
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import rules

Array = np.ndarray[Any, Any]
Picture = Array | Image.Image | str | os.PathLike[str]
NO_ADAPTER = "none"
NO_NETWORKS = configs.Metrics()
APPLIES_TO: dict[str, Literal["condition", "all"]] = {"omini": "condition", "native": "all", "insert": "all"}
"""By method, the tokens that its adapters act on."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to make.

    Attributes:
      key: names the pair and its direction; every random draw is folded with it.
      subject, target: [H, W, 3] uint8, of any two sizes.
      subject_mask, target_mask: [H, W] bool, of the size of their picture.
      target_depth: [H, W] uint8, near is bright; only control depth needs it.
      target_keypoints: [parts, 3] int (row, column, visible); only control keypoints needs it.
      target_caption: only caption policy background needs it.
      sibling, sibling_mask: picture [H, W, 3] uint8 of a related bird and its mask [H, W]; only sibling guidance needs
        them.
    """

    key: str
    subject: Array
    subject_mask: Array
    target: Array
    target_mask: Array
    target_depth: Array | None = None
    target_keypoints: Array | None = None
    target_caption: str | None = None
    sibling: Array | None = None
    sibling_mask: Array | None = None

    @property
    def target_view(self) -> controls.View:
        """What the control is made from."""
        return controls.View(self.target, self.target_mask, self.target_depth, self.target_keypoints)


@dataclasses.dataclass(frozen=True)
class Reposer:
    """A loaded base with an adapter, with one each for subject and control, or with none; made by ``load``.

    Method insert has ``diptychs`` and no ``text``: the subject's picture takes its place.
    """

    conditioning: Conditioning
    defaults: Sample
    method: reposing.Method
    base: layers.Params
    adapters: reposing.Adapters
    vae: pipeline.Component
    schedule: dict[str, Any]
    text: tuple[Array, Array] | PromptEncoder | None  # of the one prompt, or for the captions of background
    mesh: Mesh
    base_path: Path
    base_sha256: str
    adapter_path: Path | None
    adapter_sha256: str | None
    sampler: Callable[..., jax.Array]
    encode: Callable[[layers.Params, jax.Array], jax.Array]
    decode: Callable[[layers.Params, jax.Array], jax.Array]
    control_path: Path | None = None
    control_sha256: str | None = None
    diptychs: DiptychEncoder | None = None
    quantise: str = "none"
    on_step: Callable[[int], None] | None = None  # see repose

    def repose(
        self,
        subject: Picture,
        target: Picture,
        subject_mask: Picture,
        target_mask: Picture,
        *,
        target_depth: Picture | None = None,
        target_keypoints: Array | str | os.PathLike[str] | None = None,
        target_caption: str | None = None,
        sibling: Picture | None = None,
        sibling_mask: Picture | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sibling_guidance: float | None = None,
        key: str = "",
        on_step: Callable[[int], None] | None = None,
    ) -> Image.Image:
        """The subject's bird in the target's pose and surroundings, at the target's size.

        Args:
          subject, target: pictures (arrays, PIL images or paths).
          subject_mask, target_mask: silhouettes of their birds.
          target_depth: grey picture of the target's size, near is bright; for adapters with control depth.
          target_keypoints: [11, 3] (row, column, visible) or a file (see ``controls.read_keypoints``); for adapters
            with control keypoints.
          target_caption: what is to be seen round the bird; for adapters with caption policy background.
          sibling, sibling_mask: a bird of a related species and its silhouette, for sibling guidance.
          seed: with ``key`` it fixes the result; default as configured.
          steps: Euler steps; default as configured.
          guidance: scale; default as configured.
          sibling_guidance: how strongly the subject is followed, against the sibling; default as configured. 1 needs no
            sibling, anything else takes twice the time.
          on_step: called with the number of steps taken, after each. Sampling then runs one program per step, which
            serves every number of steps; independent conditions are computed at every step instead of once.

        Raises UserError for a picture that cannot be read, a mask of another size, an empty mask, and sibling guidance
        without a sibling.
        """
        subject_pixels, target_pixels = _pixels(subject, "subject"), _pixels(target, "target")
        if (sibling is None) != (sibling_mask is None):
            raise UserError("sibling: found one of sibling and sibling_mask, expected both or none")
        sibling_pixels = sibling_silhouette = None
        if sibling is not None and sibling_mask is not None:
            sibling_pixels = _pixels(sibling, "sibling")
            sibling_silhouette = _mask(sibling_mask, sibling_pixels, "sibling_mask")
        job = Job(
            key,
            subject_pixels,
            _mask(subject_mask, subject_pixels, "subject_mask"),
            target_pixels,
            _mask(target_mask, target_pixels, "target_mask"),
            None if target_depth is None else _depth(target_depth, target_pixels, "target_depth"),
            None if target_keypoints is None else _keypoints(target_keypoints, target_pixels, "target_keypoints"),
            target_caption,
            sibling_pixels,
            sibling_silhouette,
        )
        sample = self.sample_settings(seed, steps, guidance, sibling_guidance)
        told = self if on_step is None else dataclasses.replace(self, on_step=on_step)
        (result, _), *_ = told.repose_batch([job], dataclasses.replace(sample, batch=meshes.batch_parts(self.mesh)))
        return Image.fromarray(result)

    def evaluate(
        self,
        benchmarks: Mapping[str, str | os.PathLike[str]],
        out: str | os.PathLike[str],
        *,
        name: str | None = None,
        beside: Mapping[str, str | os.PathLike[str]] | None = None,
        limit: int | None = None,
        subjects: Sequence[Literal["right", "shuffled"]] = ("right", "shuffled"),
        networks: configs.Metrics = NO_NETWORKS,
        batch: int | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> list[dict[str, Any]]:
        """Draws the pairs of benchmarks, scores the pictures, and writes tables and the report.

        The same as the commands ``generate`` and ``evaluate --report`` with the default settings of sampling. What an
        interrupted call left is continued, and a second call on the same inputs draws and scores nothing.

        Args:
          benchmarks: name -> data folder, or pair list in one.
          out: folder; pictures go to ``out/pictures/NAME``, the report is ``out/index.html``.
          name: of this model's pictures; default the adapter's, or ``untuned`` for the bare base. Differences are from
            the set ``untuned`` where there is one.
          beside: name -> folder of pictures that are drawn already, such as ``out/pictures/untuned`` of an earlier
            call, to stand in the same tables.
          limit: only so many pairs of each benchmark, spread over its classes; default all.
          subjects: right, and shuffled for the picture of another species, which a model must follow as well.
          networks: those that judge, as in ``config.metrics``; metrics of networks that are not named are left out.
          batch: pictures drawn at once, more on larger devices; default that of the settings of sampling.
          seed: of the bootstrap and of drawn reference points; pictures depend on the seed of sampling.
          workers: processes that score; 0 works in this one, which notebooks and scripts without a main guard need.

        Returns the rows of ``out/summary.json``: model, benchmark, metric, mean, low, high, n and more.

        Raises UserError for a benchmark or network that is not there, pictures without a mask or what the control is
        made of, a name that is taken, and for an ``out`` that holds pictures made with other settings.
        """
        # The verbs draw through this module.
        from nabla_jax import evaluate, generate, report

        config = configs.Config(
            configs.Base(str(self.base_path), quantise=self.quantise),
            configs.Data("", ""),
            self.conditioning,
            configs.Lora(),
            configs.Optim(),
            configs.Train("", 1, 1),
            sample=dataclasses.replace(self.defaults, batch=batch or self.defaults.batch),
            benchmarks={name: os.fspath(root) for name, root in benchmarks.items()},
            metrics=networks,
        )
        configs.check_inputs(config, "evaluate")
        out, beside = Path(out), beside or {}
        name = name or (evaluate.BASELINE if self.adapter_path is None else self.adapter_path.stem)
        taken = [given for given in (name, *beside) if given in evaluate.REFERENCES or "/" in given or name in beside]
        if taken:
            raise UserError(f"evaluate: a set of pictures cannot be called {taken[0]!r}, expected a name of its own")
        sets = {name: out / "pictures" / name, **{name: Path(folder) for name, folder in beside.items()}}
        generate.draw_benchmarks(config, self, sets[name], subjects, limit)
        rows = evaluate.evaluate(
            sets,
            {name: Path(root) for name, root in benchmarks.items()},
            out,
            seed=seed,
            shuffle_seed=self.defaults.seed,
            workers=workers,
            limit=limit,
            networks=networks,
        )
        report.write(out, out)
        return rows

    def sample_settings(
        self,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sibling_guidance: float | None = None,
    ) -> Sample:
        """The configured settings with those that are given replaced."""
        default = self.defaults
        return dataclasses.replace(
            default,
            seed=default.seed if seed is None else seed,
            steps=default.steps if steps is None else steps,
            guidance=default.guidance if guidance is None else guidance,
            sibling_guidance=default.sibling_guidance if sibling_guidance is None else sibling_guidance,
        )

    def repose_batch(self, jobs: Sequence[Job], sample: Sample) -> list[tuple[Array, Placement]]:
        """One picture per job at its target's size, and how its target lay on the canvas.

        With method insert the target lies there with a window round its bird; the rest of the picture stays as it is.
        Runs one compiled program for batches of ``sample.batch``: shorter lists are padded by repeating the
        last job. The order of the jobs does not matter. Raises UserError for sibling guidance of a job without a
        sibling.
        """
        if not 0 < len(jobs) <= sample.batch:
            raise ValueError(f"{len(jobs)} jobs, expected 1 to {sample.batch}")
        meshes.check_batch(sample.batch, self.mesh, "sample.batch")
        # A place in a batch is seen in the last bit of a result.
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].key)
        chosen = [jobs[i] for i in order]
        if self.diptychs is not None:
            made = self._repose_diptychs(chosen, sample, self.diptychs)
        else:
            made = self._repose_conditions(chosen, sample)
        return [made[order.index(i)] for i in range(len(jobs))]

    def _repose_conditions(self, jobs: Sequence[Job], sample: Sample) -> list[tuple[Array, Placement]]:
        canvases = []
        for job in jobs:
            subject = controls.subject_canvas(job.subject, job.subject_mask, self.conditioning.condition_size)
            control = controls.control_canvas(job.target_view, self.conditioning)
            placement = controls.target_placement(job.target_mask, self.conditioning.size, 0)
            canvases.append((subject.pixels, control.pixels, placement))
        padded = [*canvases, *canvases[-1:] * (sample.batch - len(canvases))]
        embeds, pooled = self._text(jobs, sample.batch)
        batch = {
            "subject": self._moments([c[0] for c in padded]),
            "control": self._moments([c[1] for c in padded]),
            "sample": _numbers(jobs, sample.batch),
            "prompt_embeds": embeds,
            "pooled": pooled,
        }
        if sample.sibling_guidance != 1:
            siblings = [self._sibling_pixels(job) for job in jobs]
            batch["sibling"] = self._moments([*siblings, *siblings[-1:] * (sample.batch - len(siblings))])
        images = self.draw(batch, sample)
        return [(c[2].invert(image), c[2]) for image, c in zip(images, canvases, strict=False)]

    def _sibling_pixels(self, job: Job) -> Array:
        if job.sibling is None or job.sibling_mask is None:
            raise UserError("sibling_guidance: found no sibling, expected the picture and mask of a related bird")
        return controls.subject_canvas(job.sibling, job.sibling_mask, self.conditioning.condition_size).pixels

    def _repose_diptychs(
        self, jobs: Sequence[Job], sample: Sample, encoder: DiptychEncoder
    ) -> list[tuple[Array, Placement]]:
        size, numbers = self.conditioning.size, _numbers(jobs, sample.batch)
        halves, placements, masks = [], [], []
        for job, number in zip(jobs, numbers, strict=False):
            rng = draws.generator(sample.seed, int(number), draws.REPAINT_MASK)
            mask = repaint_mask(job.target_mask, sample.mask_policy, rng)
            placement = controls.target_placement(job.target_mask, size, sample.window)
            subject = controls.subject_canvas(job.subject, job.subject_mask, size, sample.expansion)
            target = controls.target_canvas(job.target, size, placement)
            pictures = (np.moveaxis(canvas.pixels, -1, 0) for canvas in (subject, target))
            halves.append((*pictures, controls.repaint_canvas(mask, placement)))
            placements.append(placement)
            masks.append(mask)
        columns = zip(*halves, *[halves[-1]] * (sample.batch - len(halves)), strict=True)
        batch = dict(zip(("subject", "target", "repaint"), map(np.stack, columns), strict=True))
        images = self.draw(encoder({**batch, "sample": numbers}), sample)[:, :, size:]
        rows = zip(images, jobs, placements, masks, strict=False)
        return [(p.paste(image, job.target, sample.feather, mask), p) for image, job, p, mask in rows]

    def draw(self, batch: reposing.Batch, sample: Sample) -> Array:
        """Pictures [B, size, size, 3] uint8, or diptychs twice as wide; for ``batch`` see ``reposing.sample``."""
        height, width = self.method.latent_size(batch)
        levels = flow.sigmas(self.schedule, sample.steps, height * width // flow.path.PATCH**2)
        with jax.set_mesh(self.mesh):
            inputs = {name: value for name, value in batch.items() if name not in ("target", "mask")}
            image_guidance = sibling_guidance = None
            if sample.image_guidance != 1:
                size = self.conditioning.condition_size
                inputs["empty"] = self._moments([np.zeros((size, size, 3), np.uint8)] * len(inputs["sample"]))
                image_guidance = jnp.float32(sample.image_guidance)
            if sample.sibling_guidance != 1:
                sibling_guidance = jnp.float32(sample.sibling_guidance)
            latents = self._sample(
                meshes.put_batch(inputs, self.mesh),
                jnp.asarray(levels),
                jnp.float32(sample.guidance),
                jnp.uint32(sample.seed),
                image_guidance,
                sibling_guidance,
            )
            return to_pixels(meshes.to_host(self.decode(self.vae.params, latents), self.mesh))

    def _sample(self, batch: reposing.Batch, levels: jax.Array, *further: jax.Array | None) -> jax.Array:
        """``reposing.sample`` at once, or a step at a time where someone wants to know."""
        if self.on_step is None:
            return self.sampler(self.base, self.adapters, batch, levels, *further)
        _, seed, *_ = further
        assert seed is not None
        latents = reposing.noise(self.method, batch, seed)
        for step in range(len(levels) - 1):
            latents = self.sampler(self.base, self.adapters, batch, levels[step : step + 2], *further, latents)
            jax.block_until_ready(latents)
            self.on_step(step + 1)
        return latents

    def reconstruct(self, images: Sequence[Array], batch: int) -> list[Array]:
        """Pictures of any size through placement, autoencoder (its mean) and back: an upper bound."""
        canvases = [controls.target_canvas(image, self.conditioning.size) for image in images]
        pixels = [c.pixels for c in canvases] + [canvases[-1].pixels] * (batch - len(canvases))
        moments = self._moments(pixels)
        mean = jnp.split(moments, 2, axis=1)[0]
        scaled = (mean - self.method.vae.shift_factor) * self.method.vae.scaling_factor
        results = to_pixels(self.decode(self.vae.params, scaled))
        return [c.placement.invert(image) for image, c in zip(results, canvases, strict=False)]

    def _text(self, jobs: Sequence[Job], count: int) -> tuple[Array, Array]:
        """Prompt embeddings [count, T, D] and pooled vectors [count, P]; the last job fills up."""
        assert self.text is not None
        if not callable(self.text):
            embeds, pooled = self.text
            return np.repeat(embeds, count, axis=0), np.repeat(pooled, count, axis=0)
        captions = [job.target_caption or "" for job in jobs]
        if not all(caption.strip() for caption in captions):
            raise UserError("caption background: the target has no caption, expected what is to be seen round the bird")
        return self.text([*captions, *captions[-1:] * (count - len(captions))])

    def _moments(self, pixels: Sequence[Array]) -> jax.Array:
        return self.encode(self.vae.params, meshes.put_batch(to_images(np.stack(pixels)), self.mesh))


def load(
    base: str | os.PathLike[str] = assets.DEFAULT_BASE,
    adapter: str | os.PathLike[str] | None = None,
    *,
    control_adapter: str | os.PathLike[str] | None = None,
    cache: bool | None = None,
    conditioning: Conditioning | None = None,
    sample: Sample | None = None,
    dtype: str | None = None,
    redux: str | os.PathLike[str] | None = None,
    quantise: str | None = None,
    attention: str = "auto",
    mesh: MeshSizes | None = None,
) -> Reposer:
    """Loads a base and, on it, an adapter.

    Args:
      base: diffusers-layout folder or ``asset:NAME``.
      adapter: a safetensors file, a training run's folder (its newest adapter), ``asset:NAME``, or None for
        the bare base.
      control_adapter: the control's own adapter, if ``adapter`` is the subject's alone.
      cache: whether the conditions' keys and values are computed once and serve all steps. None: exactly when the
        adapter was trained with independent conditions; True asks for it.
      conditioning: how conditions are made; default from the adapter's metadata. What the two disagree on
        is an error.
      sample: default settings of sampling; otherwise from the adapter's metadata.
      dtype: float32 or bfloat16; default bfloat16 on accelerators and float32 on CPU.
      redux: the FLUX.1-Redux folder of method insert, or ``asset:NAME``; default from the adapter's metadata.
      quantise: none, int8, fp8 or nf4: how the weights of the transformer's blocks are kept; default from the
        adapter's metadata. An adapter may be used on another one than it was trained on.
      attention: the transformer's attention kernel, as ``base.attention`` of a configuration.
      mesh: how this process's devices are arranged; default: each has the whole base and a part of every batch.

    Raises UserError when something is missing, the package of a control included, the adapter belongs to another base,
    or the cache is asked for with an adapter whose conditions see text and noise.
    """
    folder = assets.resolve(base)
    pipeline.check_folder(folder)
    adapter_path = None if adapter is None else find_adapter(adapter)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    base_sha256 = pipeline.folder_hash(folder / "transformer")
    metadata = None
    if adapter_path is not None:
        metadata = adapter_files.read_metadata(adapter_path)
        check_adapter(adapter_path, metadata, folder, base_sha256, conditioning)
    conditioning = conditioning or conditioning_of(metadata, adapter_path)
    controls.find_control(conditioning.control)
    pipeline.check_channels(folder, method_name(conditioning))
    pipeline.check_sides(folder, conditioning.size, conditioning.compact)
    quantise = quantise or (metadata.quantise if metadata else "none")
    pipeline.check_quantised(folder, quantise)
    redux_path = find_redux(redux, metadata, adapter_path) if conditioning.method == "insert" else None
    if conditioning.method != "omini" and control_adapter is not None:
        raise UserError(
            f"{control_adapter}: method {conditioning.method} has no control with an adapter of its own, expected none"
        )
    control_path = None if control_adapter is None else find_adapter(control_adapter)
    if control_path is not None:
        if adapter_path is None:
            raise UserError(f"{control_path}: the control's adapter needs the subject's beside it, found none")
        control_metadata = adapter_files.read_metadata(control_path)
        check_adapter(control_path, control_metadata, folder, base_sha256, conditioning)
        check_reads(control_path, control_metadata, ("both", "control"), "control_adapter")
    if metadata is not None and adapter_path is not None:
        allowed = ("both",) if control_path is None else ("both", "subject")
        check_reads(
            adapter_path, metadata, allowed, "adapter without a control_adapter" if len(allowed) == 1 else "adapter"
        )
    check_cache(cache, conditioning, adapter_path)
    sample = sample or _sample(metadata)

    # Each of several processes draws pictures of its own.
    devices = meshes.make_mesh(dataclasses.asdict(mesh or MeshSizes()), jax.local_devices())
    model = pipeline.transformer_config(folder)
    rules.check_heads(model.num_attention_heads, devices, folder)
    kernel = choose(attention, model.attention_head_dim)
    sharding = meshes.replicated(devices)
    place = functools.partial(rules.shardings, mesh=devices)
    vae = pipeline.load_vae(folder, sharding=sharding)
    text: tuple[Array, Array] | PromptEncoder | None = None
    encoder = None
    if redux_path is not None:
        encoder = diptychs.load_encoder(folder, redux_path, conditioning.text_length, devices, dtype, vae)
    elif conditioning.caption == "background":
        text = make_prompt_encoder(load_text_stack(folder), conditioning.text_length)
    else:
        # Before the transformer, and freed again: a small device holds one of them at a time.
        text = encode_prompts(folder, [conditioning.prompt], conditioning.text_length)
    transformer = pipeline.load_transformer(folder, dtype=jnp.dtype(dtype), sharding=place, quantise=quantise)
    adapters: reposing.Adapters = {}
    if adapter_path is not None:
        loaded, _ = adapter_files.load_adapter(adapter_path, transformer.params, stacked=flux.STACKED)
        adapters = {adapter_path.stem: jax.device_put(loaded, place(loaded))}
    control_name = None
    if control_path is not None:
        # Two files of one name are two adapters.
        control_name = f"{control_path.stem} (control)"
        loaded, _ = adapter_files.load_adapter(control_path, transformer.params, stacked=flux.STACKED)
        adapters[control_name] = jax.device_put(loaded, place(loaded))
    name = adapter_path.stem if adapter_path else None
    method = make_method(
        transformer,
        vae.config,
        conditioning,
        name,
        dtype,
        attention=kernel,
        control_adapter=control_name,
        kontext=pipeline.is_kontext(folder),
    )
    return Reposer(
        conditioning=conditioning,
        defaults=sample,
        method=method,
        base=transformer.params,
        adapters=adapters,
        vae=vae,
        schedule=pipeline.scheduler(folder),
        text=text,
        mesh=devices,
        base_path=folder,
        base_sha256=base_sha256,
        adapter_path=adapter_path,
        adapter_sha256=file_sha256(adapter_path) if adapter_path else None,
        sampler=reposing.make_sampler(method),
        encode=make_encoder(vae),
        decode=make_decoder(vae),
        control_path=control_path,
        control_sha256=file_sha256(control_path) if control_path else None,
        diptychs=encoder,
        quantise=quantise,
    )


def make_method(
    transformer: pipeline.Component,
    vae_config: Any,
    conditioning: Conditioning,
    adapter: str | None,
    dtype: str,
    remat: flux.Remat = "none",
    *,
    attention: Implementation = "auto",
    control_adapter: str | None = None,
    kontext: bool = True,
) -> reposing.Method:
    """The static part of the forward pass of a loaded base."""
    return reposing.Method(
        transformer=transformer.graphdef,
        vae=vae_config,
        adapter=adapter,
        independent=conditioning.independent_conditions,
        guidance_embeds=transformer.config.guidance_embeds,
        dtype=dtype,
        remat=remat,
        attention=attention,
        control_adapter=control_adapter,
        kontext=kontext,
        name=method_name(conditioning),
        compact=conditioning.compact,
    )


def method_name(conditioning: Conditioning) -> reposing.Name:
    """``conditioning.method``. Raises UserError for an unknown one, and for one that cannot have the rest."""
    names: dict[str, reposing.Name] = {"omini": "omini", "native": "native", "insert": "insert"}
    if conditioning.method not in names:
        raise UserError(f"conditioning.method: found {conditioning.method!r}, expected {' or '.join(names)}")
    if conditioning.method != "omini" and conditioning.independent_conditions:
        raise UserError(
            f"independent_conditions: found true, expected false for method {conditioning.method}: only omini's "
            "conditions are streams of their own"
        )
    if conditioning.method == "insert" and conditioning.compact != 1:
        raise UserError(f"compact: found {conditioning.compact}, expected 1 for method insert: it has no conditions")
    return names[conditioning.method]


def make_encoder(vae: pipeline.Component) -> Callable[[layers.Params, jax.Array], jax.Array]:
    """Compiled: pictures [B, 3, H, W] in [-1, 1] -> moments [B, 2C, h, w]."""
    return jax.jit(lambda params, images: layers.bind(vae.graphdef, params).encode(images))


def make_decoder(vae: pipeline.Component) -> Callable[[layers.Params, jax.Array], jax.Array]:
    """Compiled: scaled latents [B, C, h, w] -> pictures [B, 3, H, W], nominally in [-1, 1]."""
    return jax.jit(lambda params, x: layers.bind(vae.graphdef, params).decode(unscale(x, vae.config)))


def to_images(pixels: Array) -> Array:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1]."""
    return np.moveaxis(pixels, -1, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_pixels(images: jax.Array) -> Array:
    """[B, 3, H, W] nominally in [-1, 1] -> [B, H, W, 3] uint8, rounded and clipped.

    Raises UserError for NaN and infinity, which would become some grey: numbers of damaged weights end here.
    """
    grey = (np.asarray(images, np.float32) + np.float32(1)) * np.float32(127.5)
    if not np.isfinite(grey).all():
        raise UserError(
            "the drawn picture holds NaN or infinity, expected numbers: the weights of the base or of the adapter are "
            "damaged, or of another model"
        )
    return np.moveaxis(np.clip(np.rint(grey), 0, 255).astype(np.uint8), 1, -1)


# ----------------------------------------------------------------------------------------------------------
# Adapters: finding and checking
# ----------------------------------------------------------------------------------------------------------


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """The safetensors file meant by a file, a training run's folder, a folder holding one file, or
    ``asset:NAME``.

    Raises UserError when there is none or more than one.
    """
    found = assets.resolve(path)
    if found.is_file():
        return found
    if not found.is_dir():
        raise UserError(f"adapter: found nothing at {found}, expected a safetensors file or a training run's folder")
    run = runs.RunFolder(found)
    step = run.last_step()
    folder = found if step is None else run.last.parent / f"step_{step}"
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise UserError(f"adapter: {folder}: expected one safetensors file, found {names}")
    return files[0]


def check_adapter(
    path: Path,
    metadata: adapter_files.AdapterMetadata,
    base: Path,
    base_sha256: str,
    conditioning: Conditioning | None,
) -> None:
    """Raises UserError if the adapter was trained on another base or under other conditions."""
    check_method(path, metadata, conditioning.method if conditioning else metadata.method)
    check_base(path, metadata, base, base_sha256)
    if conditioning is None or not metadata.size:
        return
    if metadata.method == "insert":
        fields = ["text_length", "size", "mask_policies", "expansion", "window"]
    else:
        fields = ["control", "caption", "prompt", "text_length", "size", "independent_conditions", "compact"]
    if metadata.control == "keypoints":
        fields += ["skeleton", "dot", "line"]
    for field in fields:
        trained, asked = getattr(metadata, field), getattr(conditioning, field)
        if trained != asked:
            raise UserError(f"{path}: trained with {field} {trained!r}, the configuration asks for {asked!r}")


def check_base(path: Path, metadata: adapter_files.AdapterMetadata, base: Path, base_sha256: str) -> None:
    """Raises UserError if the adapter was trained on another base."""
    if metadata.base_sha256 and metadata.base_sha256 != base_sha256:
        raise UserError(
            f"{path}: adapter for another base: trained on {metadata.base or 'unnamed'} (transformer sha256 "
            f"{metadata.base_sha256[:12]}), found {base} ({base_sha256[:12]})"
        )


def check_method(path: Path, metadata: adapter_files.AdapterMetadata, method: str) -> None:
    """Raises UserError if the adapter was trained by another method than ``method``.

    A file of another tool does not say on which tokens it acts, and is taken as it is.
    """
    if metadata.size and metadata.method != method:
        raise UserError(f"{path}: adapter of another method: found {metadata.method!r}, expected {method!r}")
    if metadata.applies_to not in (APPLIES_TO[method], "unknown"):
        found, expected = metadata.applies_to, APPLIES_TO[method]
        raise UserError(f"{path}: applies_to: found {found!r}, expected {expected!r} for method {method}")


def find_redux(
    redux: str | os.PathLike[str] | None, metadata: adapter_files.AdapterMetadata | None, path: Path | None
) -> Path:
    """The FLUX.1-Redux folder that is given, or else the one that the adapter at ``path`` was trained with.

    Raises UserError where there is none, and for other weights than the adapter was trained with.
    """
    name = redux or (metadata.redux if metadata else "")
    if not name:
        raise UserError("redux: method insert needs a FLUX.1-Redux folder, found none; give redux=...")
    folder = assets.resolve(name)
    if not (folder / "image_encoder" / "config.json").is_file():
        raise UserError(f"redux: found no {folder}/image_encoder/config.json, expected a FLUX.1-Redux folder")
    found = diptychs.weights_hash(folder)
    if metadata is not None and metadata.redux_sha256 not in ("", found):
        raise UserError(
            f"{path}: adapter for another FLUX.1-Redux: trained with {metadata.redux} ({metadata.redux_sha256[:12]}), "
            f"found {folder} ({found[:12]})"
        )
    return folder


def diptych_metadata(config: Config) -> dict[str, Any]:
    """The fields of an adapter's metadata that method insert has."""
    conditioning, sample = config.conditioning, config.sample
    return {
        "redux": config.base.redux,
        "redux_sha256": diptychs.weights_hash(assets.resolve(config.base.redux)),
        "mask_policies": conditioning.mask_policies,
        "expansion": conditioning.expansion,
        "window": conditioning.window,
        "sample_mask_policy": sample.mask_policy,
        "sample_expansion": sample.expansion,
        "sample_window": sample.window,
        "sample_feather": sample.feather,
    }


def check_reads(path: Path, metadata: adapter_files.AdapterMetadata, allowed: Sequence[str], what: str) -> None:
    """Raises UserError if an adapter that was trained for one of the conditions is given for another."""
    if metadata.reads not in allowed:
        raise UserError(f"{path}: reads {metadata.reads}, expected {' or '.join(allowed)} for {what}")


def check_cache(cache: bool | None, conditioning: Conditioning, path: Path | None) -> None:
    """Raises UserError if the condition cache is asked for, or refused, against what the adapter was trained with."""
    if cache is None or cache == conditioning.independent_conditions:
        return
    if conditioning.method != "omini":
        raise UserError(
            f"{path or 'the bare base'}: condition cache: method {conditioning.method} has no conditions apart from "
            "what is made, so that nothing stays the same from step to step; expected no cache"
        )
    found = "true" if conditioning.independent_conditions else "false"
    reason = (
        "its conditions see text and noise, so that their keys and values change from step to step"
        if cache
        else "its conditions see themselves only, and then the cache is always used: it changes nothing but the time"
    )
    raise UserError(
        f"{path or 'the bare base'}: condition cache: found independent_conditions {found}, expected "
        f"{str(cache).lower()} for cache={cache}: {reason}"
    )


def conditioning_of(metadata: adapter_files.AdapterMetadata | None, path: Path | None) -> Conditioning:
    """What the adapter at ``path`` was trained with. Raises UserError where nothing says so."""
    if metadata is None or not metadata.size:
        what = "no adapter is given" if path is None else f"{path} has no metadata"
        raise UserError(
            f"conditioning: {what}, so size and prompt are unknown; give conditioning=Conditioning(size=...)"
        )
    insert = metadata.method == "insert"
    return Conditioning(
        size=metadata.size,
        control=metadata.control,
        skeleton=metadata.skeleton,
        dot=metadata.dot,
        line=metadata.line,
        caption=metadata.caption,
        prompt=metadata.prompt,
        text_length=metadata.text_length,
        independent_conditions=metadata.independent_conditions,
        compact=metadata.compact,
        method=metadata.method,
        **({name: getattr(metadata, name) for name in ("mask_policies", "expansion", "window")} if insert else {}),
    )


def _sample(metadata: adapter_files.AdapterMetadata | None) -> Sample:
    if metadata is None:
        return Sample()
    sample = Sample(steps=metadata.sample_steps, guidance=metadata.sample_guidance)
    if metadata.method != "insert":
        return sample
    return dataclasses.replace(
        sample,
        mask_policy=metadata.sample_mask_policy,
        expansion=metadata.sample_expansion,
        window=metadata.sample_window,
        feather=metadata.sample_feather,
    )


def _numbers(jobs: Sequence[Job], count: int) -> Array:
    """The numbers [count] of jobs, which their draws are folded with; the last one fills up."""
    numbers = [draws.number(job.key) for job in jobs]
    return np.asarray([*numbers, *numbers[-1:] * (count - len(jobs))], np.uint32)


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def _pixels(picture: Picture, what: str) -> Array:
    if isinstance(picture, str | os.PathLike):
        return controls.read_image(picture)
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise UserError(f"{what}: found {picture.dtype} of shape {picture.shape}, expected uint8 [height, width, 3]")
    return picture


def _mask(mask: Picture, picture: Array, what: str) -> Array:
    height, width = picture.shape[:2]
    if isinstance(mask, str | os.PathLike):
        return controls.read_mask(mask, height, width)
    pixels = np.asarray(mask.convert("L")) if isinstance(mask, Image.Image) else mask
    pixels = pixels if pixels.dtype == bool else pixels > 127
    if pixels.shape != (height, width):
        raise UserError(f"{what}: found shape {pixels.shape}, expected ({height}, {width}), the size of its picture")
    if not pixels.any():
        raise UserError(f"{what}: the mask is empty, expected foreground pixels")
    return pixels


def _depth(depth: Picture, picture: Array, what: str) -> Array:
    size = picture.shape[0], picture.shape[1]
    if isinstance(depth, str | os.PathLike):
        return controls.read_depth(depth, *size)
    pixels = np.asarray(depth.convert("L")) if isinstance(depth, Image.Image) else depth
    if pixels.shape != size or pixels.dtype != np.uint8:
        raise UserError(f"{what}: found {pixels.dtype} of shape {pixels.shape}, expected uint8 {size}, as its picture")
    return pixels


def _keypoints(keypoints: Array | str | os.PathLike[str], picture: Array, what: str) -> Array:
    size = picture.shape[0], picture.shape[1]
    if isinstance(keypoints, str | os.PathLike):
        return controls.read_keypoints(keypoints, *size)
    controls.check_keypoints(keypoints, *size, what)
    return keypoints
