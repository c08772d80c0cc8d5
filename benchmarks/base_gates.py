"""Can an adapter be trained on an embedded base? Two gates, minutes each on two cores.

    python -m benchmarks.base_gates --base schnell
    python -m benchmarks.base_gates --base fill

- ``overfit``: an adapter of rank 16 on 8 pairs of fresh individuals; mean loss under fixed noise and times, before and
  after. A base whose frozen noise branch cannot read the conditions stays where it was.
- ``subject effect``: an adapter on many pairs, each individual fresh; on held-out ones, the loss with the subject of
  another pair minus that with the right one, before, half-way and after. It rises where subjects are read.

On ``kontext`` and ``schnell`` the adapter acts on the condition tokens alone (OminiControl, control ``fill``), on
``fill`` on the whole sequence (Insert Anything). Individuals are of seed 940,000: no training's and no benchmark's.
``--sheet FILE`` also draws held-out pictures: subject, control or masked picture, drawn, drawn with another subject,
target.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nabla_jax import api, assets, flow, reposing
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.transformers_folder import load_redux, load_siglip
from nabla_jax.conditioning import diptych
from nabla_jax.conditioning.text import encode_prompts
from nabla_jax.config import Conditioning
from nabla_jax.images import write_image
from nabla_jax.metrics.preprocessing import ImageProcessor
from nabla_jax.models import flux, layers, lora
from nabla_jax.models.lora import Adapter
from nabla_jax.models.redux import ReduxEmbedder
from nabla_jax.pretrain import fill, pictures
from nabla_jax.runs import progress

SIZE, RANK, BATCH = 48, 16, 16
PROMPT, TEXT_LENGTH = "A photo of a bird.", 16
PAIRS, HELD_OUT, OVERFIT = 1200, 96, 8
TIME_MEAN, BIRD_WEIGHT = 1.0, 3.0

Arrays = dict[str, Any]  # NumPy arrays, or traced ones inside a compiled function


def draw_pairs(folder: Path, count: int) -> list[dict[str, Any]]:
    """Fresh individuals: reference, target and hole of each, see ``fill.draw_diptychs``."""
    config = pictures.PictureConfig("nabla_jax.toybirds", 940_000, count, SIZE)
    drawn = pictures.render(config, folder, workers=2)
    shown = fill.DiptychConfig(copies=0.0, whole=0.0, alone=0.0, expansion=(1.0, 1.0), masks=(("silhouette", 1.0),))
    return [fill.draw_diptychs(drawn, i, shown, SIZE)[0] for i in range(count)]


def with_other_subjects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair with the reference of its neighbour."""
    return [{**row, "reference": rows[i - 1]["reference"]} for i, row in enumerate(rows)]


class Omini:
    """A base with position ids as the subject's place, its adapter on the conditions."""

    def __init__(self, name: str) -> None:
        folder = assets.resolve(f"asset:toy-flux-{name}")
        self.transformer, self.vae = pipeline.load_transformer(folder), pipeline.load_vae(folder)
        self.schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        self.text = encode_prompts(folder, [PROMPT], TEXT_LENGTH)
        conditioning = Conditioning(size=SIZE, text_length=TEXT_LENGTH)
        self.method = api.make_method(
            self.transformer, self.vae.config, conditioning, "gate", "float32", kontext=pipeline.is_kontext(folder)
        )
        self.guided = self.transformer.config.guidance_embeds
        self.steps = 12 if self.guided else 4

    def encode(self, rows: Sequence[dict[str, Any]], first: int) -> Arrays:
        """Moments of target, subject and control, the prompt, and sample numbers from ``first`` on."""
        run = api.make_encoder(self.vae)
        target, subject = (np.stack([row[name] for row in rows]) for name in ("target", "reference"))
        hole = np.stack([row["hole"] for row in rows])
        control = np.where(hole[..., None], np.uint8(0), target)
        parts = [
            [
                np.asarray(run(self.vae.params, jnp.asarray(api.to_images(p))))
                for p in np.array_split(images, max(len(rows) // 16, 1))
            ]
            for images in (target, subject, control)
        ]
        embeds, pooled = (np.repeat(array, len(rows), axis=0) for array in self.text)
        cells = hole.reshape(len(rows), SIZE // 4, 4, SIZE // 4, 4).mean((2, 4), dtype=np.float32)
        names = ("target", "subject", "control")
        moments = {name: np.concatenate(part) for name, part in zip(names, parts, strict=True)}
        numbers = np.arange(first, first + len(rows), dtype=np.uint32)
        return {**moments, "prompt_embeds": embeds, "pooled": pooled, "mask": cells, "sample": numbers}

    def loss(self, adapter: Adapter, batch: Arrays, seed: jax.Array) -> jax.Array:
        """``reposing.loss`` with draws that depend on ``seed``."""
        batch = {**batch, "sample": batch["sample"] + seed * np.uint32(100_003)}
        return reposing.loss(
            self.method, {"gate": adapter}, self.transformer.params, batch, seed=0, guidance=1.0, time_mean=TIME_MEAN,
            foreground_weight=BIRD_WEIGHT,
        )  # fmt: skip

    def draw(self, adapter: Adapter, batch: Arrays) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]."""
        levels = flow.sigmas(self.schedule, self.steps, (SIZE // 8) ** 2)
        latents = jax.jit(functools.partial(reposing.sample, self.method))(
            self.transformer.params, {"gate": adapter}, batch, levels, jnp.float32(2.5), jnp.uint32(0)
        )
        return api.to_pixels(api.make_decoder(self.vae)(self.vae.params, latents))


class Fill:
    """FLUX.1-Fill with Redux tokens, its adapter on the whole sequence."""

    steps = 12

    def __init__(self) -> None:
        folder, redux = assets.resolve("asset:toy-flux-fill"), assets.resolve("asset:toy-flux-redux")
        self.transformer, self.vae = pipeline.load_transformer(folder), pipeline.load_vae(folder)
        self.vision, whole = load_siglip(redux / "image_encoder"), load_redux(redux)
        self.embedder, _ = layers.abstract(lambda rngs: ReduxEmbedder(whole.config.image_embedder, rngs=rngs))
        self.params = {"transformer": self.transformer.params, "redux": whole.params["image_embedder"]}
        self.processor = ImageProcessor.from_json(redux / "feature_extractor" / "preprocessor_config.json")
        self.schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        self.settings = fill.Settings(hole_weight=BIRD_WEIGHT, guidance=(1.0, 1.0), time_mean=TIME_MEAN)

    def encode(self, rows: Sequence[dict[str, Any]], first: int) -> Arrays:
        """Latents of diptychs and SigLIP's patches of their references."""
        latents, patches = fill.make_encoders(self.vae, self.vision)
        arrays = fill.encode_rows(rows, latents)
        features = patches(self.processor([row["reference"] for row in rows]))
        hole = np.concatenate([np.zeros_like(arrays["hole"]), arrays["hole"]], axis=2)
        numbers = np.arange(first, first + len(rows), dtype=np.uint32)
        shown = {name: arrays[name] for name in ("picture", "masked")}
        return {**shown, "features": features, "hole": hole, "sample": numbers}

    def loss(self, adapter: Adapter, batch: Arrays, seed: jax.Array) -> jax.Array:
        """``fill.loss`` with draws that depend on ``seed``."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), batch["sample"][0]), seed)
        width = self.transformer.config.pooled_projection_dim
        networks = fill.Networks(self.transformer.graphdef, self.embedder, _no_text, TEXT_LENGTH, width)
        value, _ = fill.loss(networks, self.params, batch, key, self.settings, adapter)
        return value

    def draw(self, adapter: Adapter, batch: Arrays) -> np.ndarray:
        """The right halves, uint8 [B, H, W, 3]."""
        b, _, h, w = batch["picture"].shape
        grid = (h // 2, w // 2)
        levels = jnp.asarray(flow.sigmas(self.schedule, self.steps, grid[0] * grid[1]))
        tokens = layers.bind(self.embedder, self.params["redux"])(jnp.asarray(batch["features"], jnp.float32))
        prompt = diptych.prompt(tokens, TEXT_LENGTH, self.transformer.config.pooled_projection_dim)
        mask = diptych.fold_mask(jnp.asarray(batch["hole"], jnp.float32), SIZE // h)
        masked = flow.pack(jnp.asarray(batch["masked"], jnp.float32))

        @jax.jit
        def run(params: layers.Params, vae: layers.Params, adapter: Adapter, noise: jax.Array) -> jax.Array:
            def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
                branches = diptych.branches(
                    *prompt, noisy, masked, mask, grid, jnp.full((b,), sigma), guidance=30.0, adapter="gate"
                )
                return layers.bind(self.transformer.graphdef, params)(branches, adapters={"gate": adapter})

            return flow.unpack(flow.euler(velocity, noise, levels), h, w)

        noise = jax.random.normal(jax.random.key(0), (b, grid[0] * grid[1], 64))
        latents = run(self.transformer.params, self.vae.params, adapter, noise)
        return api.to_pixels(api.make_decoder(self.vae)(self.vae.params, latents))[:, :, SIZE:]


def _no_text(*_: Any) -> Any:
    raise ValueError("a diptych has no caption")


def make_trainer(base: Any, rate: float) -> tuple[Any, Any]:
    """(initial adapter and optimizer state, the compiled update)."""
    adapter = lora.initialize(jax.random.key(0), base.transformer.params, rank=RANK, alpha=RANK, stacked=flux.STACKED)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    @jax.jit
    def update(adapter: Adapter, state: Any, batch: Arrays, step: jax.Array) -> tuple[Adapter, Any, jax.Array]:
        value, grads = jax.value_and_grad(base.loss)(adapter, batch, step)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return (adapter, tx.init(adapter)), update


def taken(arrays: Arrays, index: np.ndarray) -> Arrays:
    return {name: array[index] for name, array in arrays.items()}


def mean_loss(base: Any, adapter: Adapter, arrays: Arrays, repeats: int) -> float:
    """Mean over all pairs and ``repeats`` draws of noise and time that are the same for every adapter."""
    run = jax.jit(base.loss)
    n = len(arrays["sample"])
    size = min(BATCH, n)
    batches = [taken(arrays, np.arange(i, i + size)) for i in range(0, n - size + 1, size)]
    seeds = [jnp.uint32(1_000_000 + r) for r in range(repeats)]
    return float(np.mean([float(run(adapter, batch, seed)) for batch in batches for seed in seeds]))


def overfit(base: Any, arrays: Arrays, steps: int, rate: float) -> dict[str, float]:
    """Loss on 8 pairs before and after."""
    eight = taken(arrays, np.arange(OVERFIT))
    (adapter, state), update = make_trainer(base, rate)
    before = mean_loss(base, adapter, eight, 16)
    # Two draws of noise and time per pair and step.
    batch = taken(eight, np.tile(np.arange(OVERFIT), 2))
    batch["sample"] = np.arange(2 * OVERFIT, dtype=np.uint32)
    with progress(steps, "overfit", unit="step") as bar:
        for step in range(steps):
            adapter, state, _ = update(adapter, state, batch, jnp.uint32(step))
            bar.update(1)
    return {"before": before, "after": mean_loss(base, adapter, eight, 16), "steps": steps}


def subject_effect(
    base: Any, arrays: Arrays, held: Arrays, shuffled: Arrays, steps: int, rate: float
) -> tuple[list[dict[str, float]], Adapter]:
    """Held-out losses with right and wrong subjects at the beginning, half-way and at the end."""
    (adapter, state), update = make_trainer(base, rate)
    rows = []

    def measure(step: int) -> None:
        right, wrong = (mean_loss(base, adapter, part, 4) for part in (held, shuffled))
        rows.append({"step": step, "right": right, "shuffled": wrong, "effect": wrong - right})
        print(rows[-1], flush=True)

    with progress(steps, "subject effect", unit="step") as bar:
        for step in range(steps):
            if step in (0, steps // 2):
                measure(step)
            rng = np.random.default_rng((1, step))
            batch = taken(arrays, rng.integers(len(arrays["sample"]), size=BATCH))
            adapter, state, _ = update(adapter, state, batch, jnp.uint32(step))
            bar.update(1)
    measure(steps)
    return rows, adapter


def write_sheet(
    path: Path, base: Any, adapter: Adapter, rows: list[dict[str, Any]], held: Arrays, wrong: Arrays
) -> None:
    """Rows of pictures, four times their size."""
    count = min(8, len(rows))
    index = np.arange(count)
    drawn, other = (base.draw(adapter, taken(part, index)) for part in (held, wrong))
    lines = []
    for i in range(count):
        hidden = np.where(rows[i]["hole"][..., None], np.uint8(127), rows[i]["target"])
        lines.append(np.concatenate([rows[i]["reference"], hidden, drawn[i], other[i], rows[i]["target"]], axis=1))
    sheet = np.concatenate(lines)
    write_image(sheet.repeat(4, axis=0).repeat(4, axis=1), path)


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("kontext", "schnell", "fill"), required=True)
    parser.add_argument("--steps", type=int, default=300, help="of the subject effect's adapter")
    parser.add_argument("--overfit-steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-3, help="Adam's learning rate")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--folder", type=Path, default=Path("data/gates"), help="where the pictures are kept")
    parser.add_argument("--sheet", type=Path, default=None, help="PNG of held-out pictures")
    args = parser.parse_args(argv)
    base = Fill() if args.base == "fill" else Omini(args.base)
    rows = draw_pairs(args.folder / f"pictures-{args.pairs}", args.pairs)
    held_rows, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    arrays = base.encode(rows, HELD_OUT)
    held, shuffled = base.encode(held_rows, 0), base.encode(with_other_subjects(held_rows), 0)
    effects, adapter = subject_effect(base, arrays, held, shuffled, args.steps, args.rate)
    found = {"base": args.base, "overfit": overfit(base, arrays, args.overfit_steps, args.rate), "subject": effects}
    print(json.dumps(found), flush=True)
    if args.sheet:
        write_sheet(args.sheet, base, adapter, held_rows, held, shuffled)


if __name__ == "__main__":
    main(sys.argv[1:])
