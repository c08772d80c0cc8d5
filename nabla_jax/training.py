"""The parts that ``train`` puts in order: loading, the compiled step, metrics, exports, samples."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nabla_jax import api, compiling, diptychs, draws, optim, reposing, runs, untrusted
from nabla_jax.checkpoints import adapters as adapter_files
from nabla_jax.checkpoints import pipeline
from nabla_jax.config import Config, resolve_base
from nabla_jax.data import loader as loaders
from nabla_jax.data.pictures import captions_sha256
from nabla_jax.diptychs import DiptychEncoder
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.images import write_image
from nabla_jax.models import attention, flux, layers, lora
from nabla_jax.models.autoencoder import AutoencoderKLConfig
from nabla_jax.models.lora import Adapter
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import processes, rules
from nabla_jax.prepare import captions_of, load_encoders, pictures_per_call, pictures_source, stored_moments

State = dict[str, Any]
Values = dict[str, jax.Array]
# What the compiled step reads of a batch; the rest stays on the host.
BATCH_KEYS = ("target", "subject", "control", "mask", "prompt_embeds", "pooled", "sample")


def load_method(config: Config, mesh: Mesh) -> tuple[reposing.Method, layers.Params]:
    """The frozen transformer on the mesh and the static part of its forward pass.

    Raises UserError for weights that do not fit their configuration, heads that do not fit the mesh, and an attention
    kernel that cannot run here.
    """
    folder = resolve_base(config)
    model = pipeline.transformer_config(folder)
    rules.check_heads(model.num_attention_heads, mesh, folder)
    kernel = attention.choose(config.base.attention, model.attention_head_dim)
    place = functools.partial(rules.shardings, mesh=mesh)
    transformer = pipeline.load_transformer(
        folder, dtype=jnp.dtype(config.train.dtype), sharding=place, quantise=config.base.quantise
    )
    vae_config = AutoencoderKLConfig.from_json(folder / "vae" / "config.json")
    method = api.make_method(
        transformer,
        vae_config,
        config.conditioning,
        config.lora.name,
        config.train.dtype,
        _remat(config),
        attention=kernel,
        kontext=pipeline.is_kontext(folder),
    )
    return method, transformer.params


class _Settings(TypedDict):
    """What is read of a prepared folder's settings."""

    conditioning: dict[str, Any]
    split: str
    captions: str
    weights: dict[str, str]


def check_prepared(config: Config) -> None:
    """Checks that ``data.prepared``, if it is read, is whole and was made for this configuration and base.

    Raises UserError naming what differs.
    """
    if config.data.mode != "precomputed":
        return
    folder = Path(config.data.prepared)
    prepared = loaders.open_prepared(folder)
    made = prepared.manifest.get("settings")
    untrusted.check(made, _Settings, str(folder / loaders.MANIFEST), "settings")
    assert isinstance(made, dict)
    base = resolve_base(config)
    vae = AutoencoderKLConfig.from_json(base / "vae" / "config.json")
    side = config.conditioning.size // vae.factor
    # A folder of whole conditions does not name compact.
    conditioning = {"compact": 1} | made["conditioning"]
    pairs = [(f"conditioning.{k}", v, getattr(config.conditioning, k, None)) for k, v in conditioning.items()]
    pairs.append(("data.split", made["split"], config.data.split))
    pairs.append(("moments", prepared.manifest.get("moments"), [2 * vae.latent_channels, side, side]))
    if config.conditioning.caption == "fixed":
        captions, _ = captions_of(config, [])
        pairs.append(("conditioning.prompt", made["captions"][:12], captions_sha256(captions)[:12]))
    for part, sha in made["weights"].items():
        if not untrusted.is_file_name(part):
            raise UserError(f"{folder / loaders.MANIFEST}: settings.weights: found {part[:100]!r}, expected a part")
        pairs.append((f"weights of {part}", sha[:12], pipeline.folder_hash(base / part, everything=True)[:12]))
    differing = [f"{what}: {there!r} there, {here!r} here" for what, there, here in pairs if there != here]
    if differing:
        raise UserError(
            f"{folder}: was prepared with other settings ({'; '.join(differing)}); choose another "
            f"data.prepared or run python -m nabla_jax.prepare --config {config.source} --overwrite"
        )


@dataclasses.dataclass(frozen=True)
class Input:
    """Where a run's pairs come from: a prepared folder, or pictures and the encoder for them.

    ``encode`` encodes single pictures, for the loader; ``diptychs`` whole batches of pairs, after it.
    """

    config: Config
    source: loaders.Source
    encode: loaders.Encode | None = None
    diptychs: DiptychEncoder | None = None

    def batches(self, batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> loaders.Loader:
        """Batches of ``batch`` pairs, of which process i of ``part`` = (i, n) gets its share."""
        data = self.config.data
        return loaders.make_loader(
            self.source, self.config.train.sampler, batch // part[1], seed, part,
            control=self.config.conditioning.control, levels=data.levels, similarity=data.similarity,
            per_class=data.per_class, threads=data.threads, workers=data.workers, encode=self.encode,
        )  # fmt: skip


def open_input(config: Config, mesh: Mesh) -> Input:
    """Opens what ``data.mode`` names.

    With ``on_the_fly`` the autoencoder and the text encoders are loaded; for method insert the autoencoder and Redux,
    onto ``mesh``. Raises UserError for data that cannot be read.
    """
    if config.data.mode == "precomputed":
        return Input(config, loaders.open_prepared(config.data.prepared))
    if config.conditioning.method == "insert":
        folder = resolve_base(config)
        source = pictures_source(config, _no_text, pipeline.vae_config(folder).factor)
        vae = pipeline.load_vae(folder, sharding=meshes.replicated(mesh))
        text_length = config.conditioning.text_length
        encoder = diptychs.load_encoder(folder, config.base.redux, text_length, mesh, config.train.dtype, vae)
        return Input(config, source, diptychs=encoder)
    encoders = load_encoders(dataclasses.replace(config, data=dataclasses.replace(config.data, vision="")))
    per_call = pictures_per_call(config.conditioning.size, encoders.devices)
    encode = functools.partial(stored_moments, encoders.images, per_call=per_call)
    return Input(config, pictures_source(config, encoders.prompts, encoders.factor), encode)


def _no_text(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of no tokens: of method insert the text is made with the subject's picture."""
    return np.zeros((len(captions), 0, 0), np.float32), np.zeros((len(captions), 0), np.float32)


def run_batches(inputs: Input, mesh: Mesh) -> loaders.Loader:
    """This process's batches of a run."""
    return inputs.batches(inputs.config.train.batch, inputs.config.train.seed, meshes.batch_share(mesh))


def _remat(config: Config) -> flux.Remat:
    choices: dict[str, flux.Remat] = {
        "none": "none",
        "full": "full",
        "save_attention": "save_attention",
        "offload": "offload",
    }
    return choices[config.train.remat]


def initial_adapter_scale(config: Config) -> float:
    """What an adapter's contribution is multiplied by."""
    return config.lora.alpha / config.lora.rank


def load_start(config: Config) -> layers.Params | None:
    """The adapter that ``lora.start`` names, on the host's first device, or None for a fresh one.

    Raises UserError, before the base's weights are read, for a file that does not fit the base, the method, or the
    adapter that is to be trained (its rank, its alpha / rank, its linears).
    """
    if not config.lora.start:
        return None
    path, folder = api.find_adapter(config.lora.start), resolve_base(config)
    metadata = adapter_files.read_metadata(path)
    api.check_method(path, metadata, config.conditioning.method)
    if metadata.base_sha256:
        api.check_base(path, metadata, folder, pipeline.folder_hash(folder / "transformer"))
    pairs = (
        ("rank", metadata.rank, config.lora.rank),
        ("alpha / rank", metadata.scale, initial_adapter_scale(config)),
    )
    for what, found, expected in pairs:
        if not np.isclose(found, expected, rtol=4e-3):  # alpha is stored in as few as 8 bits
            raise UserError(f"lora.start: {path}: {what}: found {found:g}, expected {expected:g}, as lora says")
    return _load_adapter("lora.start", path, folder).params


def load_frozen(config: Config) -> dict[str, Adapter]:
    """The adapter that ``lora.frozen`` names, on the host's first device, under the name of the one trained on it.

    Empty where there is none. Raises UserError, before the base's weights are read, for a file that was made for
    another base, method or conditioning than this run's, or has other linears.
    """
    if not config.lora.frozen:
        return {}
    path, folder = api.find_adapter(config.lora.frozen), resolve_base(config)
    metadata = adapter_files.read_metadata(path)
    # Both act on the same tokens of the same sequence: what one was shown the other must be.
    api.check_adapter(path, metadata, folder, pipeline.folder_hash(folder / "transformer"), config.conditioning)
    api.check_reads(path, metadata, ("both",), "lora.frozen")
    if config.conditioning.method == "insert":
        api.find_redux(config.base.redux, metadata, path)
    return {config.lora.name: _load_adapter("lora.frozen", path, folder)}


def frozen_sha256(config: Config) -> dict[str, str]:
    """The hash of the adapter that ``lora.frozen`` names, for ``runs.open_run``; empty where there is none."""
    return {"lora.frozen": file_sha256(api.find_adapter(config.lora.frozen))} if config.lora.frozen else {}


def _load_adapter(key: str, path: Path, folder: Path) -> Adapter:
    """An adapter for the base in ``folder``. Raises UserError for other linears than are trained."""
    model = flux.FluxConfig.from_json(folder / "transformer" / "config.json")
    _, shapes = layers.abstract(lambda rngs: flux.Flux(model, rngs=rngs))
    adapter, _ = adapter_files.load_adapter(path, shapes, stacked=flux.STACKED)
    linears = _linears(adapter.params)
    wanted = {".".join(where) for where in lora.targets(shapes, lora.FLUX_TARGETS, flux.STACKED)}
    if linears != wanted:
        differing = [f"{name} is missing" for name in sorted(wanted - linears)]
        differing += [f"{name} is not trained" for name in sorted(linears - wanted)]
        raise UserError(f"{key}: {path}: another set of linears: {', '.join(differing)}")
    return adapter


def _linears(tree: layers.Params, where: tuple[str, ...] = ()) -> set[str]:
    """Names of the linears of an adapter's tree."""
    if "lora_A" in tree:
        return {".".join(where)}
    return set().union(*(_linears(child, (*where, name)) for name, child in tree.items()))


def composed(
    trees: Mapping[str, layers.Params], config: Config, frozen: Mapping[str, Adapter] | None = None
) -> dict[str, Adapter]:
    """What acts while ``trees`` {name: tree} are trained: each, added to the ``frozen`` adapter of its name."""
    scale = initial_adapter_scale(config)
    trained = {name: Adapter(tree, scale) for name, tree in trees.items()}
    return trained if not frozen else {name: lora.add(frozen[name], one) for name, one in trained.items()}


def objective(method: reposing.Method, config: Config) -> Callable[..., jax.Array]:
    """What is minimised, (adapters {name: tree}, frozen base, batch, frozen adapters or None) -> float32 scalar."""

    def loss(
        trees: dict[str, layers.Params],
        base: layers.Params,
        batch: reposing.Batch,
        frozen: Mapping[str, Adapter] | None,
    ) -> jax.Array:
        train = config.train
        return reposing.loss(
            method, composed(trees, config, frozen), base, batch, seed=train.seed, guidance=train.guidance,
            time_mean=train.time_mean, foreground_weight=train.foreground_weight,
        )  # fmt: skip

    return loss


def make_step(
    method: reposing.Method, optimizer: optax.GradientTransformationExtraArgs, config: Config, shardings: Any = None
) -> jax.stages.Wrapped:
    """The compiled step (state, frozen base, batch[, frozen adapters]) -> (state, values); the state is donated.

    ``shardings``, a tree like the state, says how the new one lies; it should lie as the old one did.

    The state holds ``adapters`` {name: tree}, ``optimizer``, ``step`` and, with ``train.ema``, the adapters' running
    ``average``; values are the scalars ``loss``, ``grad_norm`` (before clipping), for Prodigy its distance estimate
    ``d``, and ``skipped``: how many steps so far changed nothing because they were not finite, see ``optim.make``. For
    the frozen adapters see ``load_frozen``.

    With ``train.accumulate`` the batch is computed in so many parts of equal size, one after another, and loss and
    gradients are their means: those of the batch in one piece, since no sample's draws know its batch.
    """
    parts, minimised = config.train.accumulate, objective(method, config)

    def placed(gradients: dict[str, layers.Params]) -> dict[str, layers.Params]:
        return gradients if shardings is None else jax.lax.with_sharding_constraint(gradients, shardings["adapters"])

    def accumulated(
        trees: dict[str, layers.Params],
        base: layers.Params,
        batch: reposing.Batch,
        frozen: Mapping[str, Adapter] | None,
    ) -> tuple[jax.Array, dict[str, layers.Params]]:
        # Rows that lie side by side go to different parts: each device's rows are cut, and none move.
        cut = {name: rows.reshape(-1, parts, *rows.shape[1:]) for name, rows in batch.items()}

        def one(total: Any, part: jax.Array) -> tuple[Any, None]:
            rows = {name: jax.lax.dynamic_index_in_dim(x, part, 1, keepdims=False) for name, x in cut.items()}
            loss, gradients = jax.value_and_grad(minimised)(trees, base, rows, frozen)
            return (total[0] + loss, placed(jax.tree.map(jnp.add, total[1], gradients))), None

        # float32 whatever is trained: sums of bfloat16 numbers lose the small ones.
        zeros = placed(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), trees))
        (loss, total), _ = jax.lax.scan(one, (jnp.zeros(()), zeros), jnp.arange(parts))
        return loss / parts, jax.tree.map(lambda g, p: (g / parts).astype(p.dtype), total, trees)

    def step(
        state: State, base: layers.Params, batch: reposing.Batch, frozen: Mapping[str, Adapter] | None = None
    ) -> tuple[State, Values]:
        adapters = state["adapters"]
        if parts == 1:
            loss, gradients = jax.value_and_grad(minimised)(adapters, base, batch, frozen)
        else:
            loss, gradients = accumulated(adapters, base, batch, frozen)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], adapters, value=loss)
        skipped = optim.skipped_steps(optimizer_state)
        values = {"loss": loss, "grad_norm": optim.norm(gradients), "skipped": skipped}
        estimate = optim.prodigy_estimate(optimizer_state)
        if estimate is not None:
            values["d"] = estimate
        adapters = optax.apply_updates(adapters, updates)
        following = {"adapters": adapters, "optimizer": optimizer_state, "step": state["step"] + 1}
        if config.train.ema:
            # Short runs are averaged over about their last tenth: early weights would linger.
            decay = jnp.minimum(config.train.ema, (1 + state["step"]) / (10 + state["step"]))
            average = optax.incremental_update(adapters, state["average"], 1 - decay)
            held = skipped > optim.skipped_steps(state["optimizer"])
            following["average"] = jax.tree.map(lambda new, old: jnp.where(held, old, new), average, state["average"])
        return following, values

    placing = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=placing, compiler_options=compiling.options(shardings))


def initial_state(adapters: dict[str, layers.Params], optimizer: optax.GradientTransformation, config: Config) -> State:
    """The state before the first step, its adapters in ``lora.dtype``; see ``make_step``."""
    adapters = jax.tree.map(lambda p: p.astype(config.lora.dtype), adapters)
    state = {"adapters": adapters, "optimizer": optimizer.init(adapters), "step": jnp.zeros((), jnp.int32)}
    if config.train.ema:
        # float32 whatever is averaged: a thousandth of a bfloat16 number is lost in it.
        state["average"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), adapters)
    return state


def state_maker(
    config: Config, base: layers.Params, optimizer: optax.GradientTransformation
) -> Callable[[layers.Params | None], State]:
    """The function from the adapter that training begins with, None for a fresh one, to the state before step 1."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)

    def first_state(start: layers.Params | None) -> State:
        if start is None:
            key = draws.key(config.train.seed, draws.ADAPTER_INIT)
            rank, alpha = config.lora.rank, config.lora.alpha
            start = lora.initialize(key, shapes, rank=rank, alpha=alpha, stacked=flux.STACKED).params
        return initial_state({config.lora.name: start}, optimizer, config)

    return first_state


def exported(state: State, config: Config, frozen: Mapping[str, Adapter] | None = None) -> dict[str, Adapter]:
    """The adapters that a run hands on: what acts, see ``composed``, and of the trained ones their average if any."""
    trees = state["average" if config.train.ema else "adapters"]
    return composed(jax.tree.map(lambda p: p.astype(config.lora.dtype), trees), config, frozen)


def no_hidden_transfers() -> contextlib.AbstractContextManager[None]:
    """Within it only what says so moves between host and devices; anything else, a wait in every step, is an error."""
    return jax.transfer_guard("disallow")


def device_batch(batch: Mapping[str, Any], mesh: Mesh, encoder: DiptychEncoder | None = None) -> dict[str, jax.Array]:
    """A loader's batch on the mesh, cut along its leading axis; pairs of pictures are encoded on the way."""
    if encoder is not None:
        return encoder(batch)
    chosen = {name: np.asarray(batch[name]) for name in BATCH_KEYS}
    # Sample numbers are 64 bits wide on the host; keys fold in 32.
    chosen["sample"] = chosen["sample"].astype(np.uint32)
    return dict(meshes.put_batch(chosen, mesh))


@dataclasses.dataclass
class StepClock:
    """Splits wall time into waiting for data and everything else, step by step."""

    last: float = dataclasses.field(default_factory=time.perf_counter)
    data: float = 0.0

    def data_arrived(self) -> None:
        """Call when the batch is in hand."""
        self.data = time.perf_counter() - self.last

    def restart(self) -> None:
        """Starts a step's time now; call after work that belongs to no step."""
        self.last = time.perf_counter()

    def step(self, samples: int) -> dict[str, float]:
        """The timing fields of the step that ends here."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return {
            "samples_per_second": round(samples / seconds, 3),
            "seconds": round(seconds, 6),
            "data_seconds": round(self.data, 6),
        }


class StopVote:
    """Whether to stop, the same answer in every process of a run, so that all save the same step."""

    def __init__(self, stop: runs.StopSignals, mesh: Mesh) -> None:
        self._stop, self._mesh = stop, mesh
        self._vote: jax.Array | None = None

    def heard(self) -> int | None:
        """The signal to stop for, or None. All processes must call it in every step.

        Among several processes a signal counts one call after it came, when nobody waits for the answer any more.
        """
        if jax.process_count() == 1:
            return self._stop.signum
        before, self._vote = self._vote, meshes.highest(self._stop.signum or 0, self._mesh)
        return None if before is None else int(jax.device_get(before)) or None


@dataclasses.dataclass(frozen=True)
class Made:
    """A step whose values are still on the device.

    Attributes:
      step: its number, from 1 on.
      values: see ``make_step``.
      timing: see ``StepClock``.
      numbers: this process's rows of its batch, see ``reproduce.numbers``.
      position: of the loader, before that batch.
    """

    step: int
    values: Values
    timing: Mapping[str, float]
    numbers: Mapping[str, Any]
    position: Mapping[str, Any]


def host_row(made: Made) -> dict[str, Any]:
    """One line of ``metrics.jsonl``. Waits for the step's values."""
    numbers = {name: value.item() for name, value in jax.device_get(made.values).items()}
    return {"step": made.step, **numbers, **made.timing}


def written(row: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A row as JSON has it: a number that is not finite is null, and nothing is skipped unless it is asked for."""
    kept = {name: value for name, value in row.items() if name != "skipped" or config.train.nonfinite == "skip"}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in kept.items()
    }


def before(state: State, step: int) -> State:
    """The state before ``step``, which was not finite, from one that nothing changed since."""
    # Arithmetic on what is there keeps its place on the mesh.
    return {**state, "optimizer": optim.released(state["optimizer"]), "step": state["step"] * 0 + (step - 1)}


def resumed(state: State, config: Config) -> State:
    """A restored state; what an earlier part of the run skipped does not hold one that stops instead."""
    return state if config.train.nonfinite == "skip" else {**state, "optimizer": optim.released(state["optimizer"])}


def export(config: Config, folder: runs.RunFolder, adapter: Adapter, step: int, base_sha256: str) -> Path:
    """Writes the adapter of a step, arrays on the host, and then points ``adapters/last`` at it."""
    path = folder.adapter(step, config.lora.name)
    metadata = adapter_metadata(config, step, base_sha256)
    if config.lora.frozen:
        metadata = dataclasses.replace(metadata, rank=adapter.rank, alpha=adapter.scale * adapter.rank)
    with runs.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter_files.save_adapter(path, adapter, metadata, stacked=flux.STACKED)
    runs.write_atomic(folder.last, f"step_{step}\n")
    return path


def adapter_metadata(config: Config, step: int, base_sha256: str) -> adapter_files.AdapterMetadata:
    """What generation must know of a training run; rank and alpha are those of what it trains."""
    folder = resolve_base(config)
    return adapter_files.AdapterMetadata(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        base=folder.name,
        base_sha256=base_sha256,
        quantise=config.base.quantise,
        in_channels=flux.FluxConfig.from_json(folder / "transformer" / "config.json").in_channels,
        control=config.conditioning.control,
        skeleton=config.conditioning.skeleton,
        dot=config.conditioning.dot,
        line=config.conditioning.line,
        caption=config.conditioning.caption,
        prompt=config.conditioning.prompt,
        text_length=config.conditioning.text_length,
        size=config.conditioning.size,
        guidance=config.train.guidance,
        sample_guidance=config.sample.guidance,
        sample_steps=config.sample.steps,
        independent_conditions=config.conditioning.independent_conditions,
        compact=config.conditioning.compact,
        applies_to=api.APPLIES_TO[config.conditioning.method],
        step=step,
        method=api.method_name(config.conditioning),
        **(api.diptych_metadata(config) if config.conditioning.method == "insert" else {}),
    )


class SampleSheet:
    """A few pictures drawn during training by the sampler that ``generate`` runs, always of the same pairs.

    Each row of the PNG shows subject, control, target and the drawn picture, all through the autoencoder; of method
    insert the diptych with its hole, the whole one and the drawn one.
    """

    ROWS = 8

    def __init__(self, inputs: Input, method: reposing.Method, folder: Path, mesh: Mesh) -> None:
        """Loads the autoencoder and the pairs when first asked to draw."""
        self._inputs, self._config = inputs, inputs.config
        self._method, self._folder, self._mesh = method, folder, mesh
        self._reposer: api.Reposer | None = None
        self._batch: dict[str, Any] = {}

    def draw(self, base: layers.Params, adapters: dict[str, Adapter], step: int) -> Path:
        """Writes ``step_N.png``."""
        count = min(self._config.sample.batch, self.ROWS)
        parts = meshes.batch_parts(self._mesh)
        count = max(count // parts, 1) * parts
        index, shares = meshes.batch_share(self._mesh)
        own = slice(count // shares * index, count // shares * (index + 1))
        if self._reposer is None:
            with contextlib.closing(self._inputs.batches(count, self._config.sample.seed)) as loader:
                batch, encoder = next(loader), self._inputs.diptychs
            if encoder is not None:
                given = {name: np.asarray(batch[name])[own] for name in (*diptychs.KEYS, "mask")}
                batch = meshes.to_host(encoder(given), self._mesh)
            self._batch = dict(batch)
            self._reposer = self._make_reposer(base)
        reposer = dataclasses.replace(self._reposer, adapters=adapters)
        names = (*self._method.pictures, "repaint", "prompt_embeds", "pooled", "sample")
        inputs = {name: np.asarray(self._batch[name])[own] for name in names if name in self._batch}
        inputs["sample"] = inputs["sample"].astype(np.uint32)
        shown = (*self._method.pictures, "target")
        columns = [self._decode_mean(reposer, np.asarray(self._batch[name])[own]) for name in shown]
        # No sibling is known here.
        sample = dataclasses.replace(self._config.sample, batch=count, sibling_guidance=1.0)
        columns.append(reposer.draw(inputs, sample))
        # Compact conditions are shown at the size of the others.
        height = max(column.shape[1] for column in columns)
        scales = [height // column.shape[1] for column in columns]
        columns = [c.repeat(scale, axis=1).repeat(scale, axis=2) for c, scale in zip(columns, scales, strict=True)]
        sheet = np.concatenate([np.concatenate(list(column), axis=0) for column in columns], axis=1)
        path = self._folder / f"step_{step}.png"
        if processes.is_first():
            write_image(sheet, path)
        return path

    def _decode_mean(self, reposer: api.Reposer, moments: Any) -> np.ndarray:
        vae = self._method.vae
        mean = np.split(np.asarray(moments, np.float32), 2, axis=1)[0]
        scaled = (mean - vae.shift_factor) * vae.scaling_factor
        decoded = reposer.decode(reposer.vae.params, meshes.put_batch(scaled, self._mesh))
        return api.to_pixels(meshes.to_host(decoded, self._mesh))

    def _make_reposer(self, base: layers.Params) -> api.Reposer:
        folder = resolve_base(self._config)
        vae = pipeline.load_vae(folder, sharding=meshes.replicated(self._mesh))
        # Nothing is kept for a backward pass here.
        method = dataclasses.replace(self._method, remat="none")
        return api.Reposer(
            conditioning=self._config.conditioning,
            defaults=self._config.sample,
            method=method,
            base=base,
            adapters={},
            vae=vae,
            schedule=pipeline.scheduler(folder),
            text=(np.asarray(self._batch["prompt_embeds"]), np.asarray(self._batch["pooled"])),
            mesh=self._mesh,
            base_path=folder,
            base_sha256="",
            adapter_path=None,
            adapter_sha256=None,
            sampler=reposing.make_sampler(method),
            encode=api.make_encoder(vae),
            decode=api.make_decoder(vae),
        )
