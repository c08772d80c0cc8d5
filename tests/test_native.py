"""Method native: subject and control as FLUX.1-Kontext's own references, untuned and with a LoRA on everything."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.numpy import load_file

import nabla_jax
from nabla_jax import config as configs
from nabla_jax import draws, evaluate, flow, generate, reposing, runs, train, training
from nabla_jax.checkpoints import adapters
from nabla_jax.checkpoints.merge import merge_adapter
from nabla_jax.config import Conditioning, Sample
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.parallel import mesh as meshes
from tests import fixtures
from tests.fixtures import picture

NATIVE = Conditioning(size=fixtures.SIZE, text_length=8, method="native")
LEVELS = np.array([1.0, 0.6, 0.0], np.float32)
GRID = (2, 3)


def arguments(tmp_path: Path, **overrides: Any) -> list[str]:
    """The command line of a native run in ``tmp_path / "run"`` on what was prepared for omini."""
    overrides = {"conditioning__method": "native", "train__workdir": str(tmp_path / "run"), **overrides}
    return ["--config", str(fixtures.write_config(fixtures.prepared_root(), tmp_path / "config.py", **overrides))]


@functools.cache
def opened() -> tuple[reposing.Method, layers.Params]:
    config = fixtures.config(fixtures.prepared_root(), conditioning__method="native")
    method, base = training.load_method(config, meshes.data_mesh())
    return dataclasses.replace(method, adapter=None), base


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shape = (2, 32, 2 * GRID[0], 2 * GRID[1])
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name in ("subject", "control", "empty")}
    return drawn | {
        "prompt_embeds": rng.normal(size=(2, 4, 16)).astype(np.float32),
        "pooled": rng.normal(size=(2, 16)).astype(np.float32),
        "sample": np.array([3, 4], np.uint32),
    }


def kontext(subject: str, control: str) -> Any:
    """The velocity as diffusers' FluxKontextPipeline takes it: latents and pictures in one stream at one time, of whose
    output the latents' part counts."""
    method, _ = opened()
    model = FluxTransformer2DModel.from_pretrained(fixtures.prepared_root() / "base" / "transformer").eval()
    data = batch()
    numbers = data["sample"]
    pictures = reposing.condition_tokens(method, data[subject], data[control], 0, numbers)
    places = [(index, row, column) for index in range(3) for row in range(GRID[0]) for column in range(GRID[1])]

    def velocity(latents: np.ndarray, time: float) -> np.ndarray:
        stream = np.concatenate([latents, *map(np.asarray, pictures)], axis=1)
        with torch.no_grad():
            found = model(
                hidden_states=torch.from_numpy(stream),
                encoder_hidden_states=torch.from_numpy(data["prompt_embeds"]),
                pooled_projections=torch.from_numpy(data["pooled"]),
                timestep=torch.full((2,), float(time)),
                guidance=torch.full((2,), 2.5),
                img_ids=torch.tensor(places, dtype=torch.float32),
                txt_ids=torch.zeros(4, 3),
            )
        return found.sample[:, : latents.shape[1]].numpy()

    return velocity


def sample(*image_guidance: float, **changes: np.ndarray) -> np.ndarray:
    method, base = opened()
    image = [jnp.float32(x) for x in image_guidance]
    sampler = reposing.make_sampler(method)
    return np.asarray(sampler(base, {}, batch() | changes, LEVELS, jnp.float32(2.5), jnp.uint32(0), *image))


def by_hand(image_guidance: float = 1.0) -> np.ndarray:
    numbers = batch()["sample"]
    followed, without = kontext("subject", "control"), kontext("empty", "empty")
    state = np.asarray(draws.normal(draws.keys(0, numbers, draws.NOISE), (GRID[0] * GRID[1], 64)))
    for now, following in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        v = followed(state, now)
        if image_guidance != 1:
            unconditional = without(state, now)
            v = unconditional + image_guidance * (v - unconditional)
        state = state + (following - now) * v
    return np.asarray(flow.unpack(jnp.asarray(state), 2 * GRID[0], 2 * GRID[1]))


def test_sampling_is_kontexts_own() -> None:
    found, expected = sample(), by_hand()
    # The argument of the guidance's embedding reaches 2,500: its last bit in float32 shows (see models/test_flux.py).
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4)
    guided = sample(2.0)
    np.testing.assert_allclose(guided, by_hand(2.0), rtol=0, atol=1e-3)
    assert np.abs(guided - found).max() > 0.05
    # Which picture is which matters.
    swapped = sample(subject=batch()["control"], control=batch()["subject"])
    assert np.abs(swapped - found).max() > 0.05


def test_references_in_the_stream_cannot_be_cached() -> None:
    method, base = opened()
    tokens = jnp.zeros((1, 6, 64))
    with pytest.raises(UserError, match="condition cache: method native has its references in the noise's own stream"):
        reposing.remember(method, base, {}, method.conditions(tokens, tokens, GRID), jnp.zeros((1, 16)))
    root = fixtures.prepared_root()
    with pytest.raises(UserError, match="the bare base: condition cache: method native has no conditions apart"):
        nabla_jax.load(root / "base", conditioning=NATIVE, cache=True)
    independent = dataclasses.replace(NATIVE, independent_conditions=True)
    with pytest.raises(UserError, match="independent_conditions: found true, expected false for method native"):
        nabla_jax.load(root / "base", conditioning=independent)


def test_the_adapter_acts_on_everything(tmp_path: Path) -> None:
    """It draws what a base draws into which it is merged."""
    root = fixtures.prepared_root()
    bare = nabla_jax.load(root / "base", conditioning=NATIVE, sample=Sample(steps=2))
    drawn = lora.initialize(jax.random.key(0), bare.base, rank=2, alpha=2.0, stacked=flux.STACKED)
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, drawn.params)
    config = fixtures.config(root, conditioning__method="native")
    path = tmp_path / "fill.safetensors"
    adapter = lora.Adapter(random, drawn.scale)
    metadata = training.adapter_metadata(config, 1, bare.base_sha256)
    adapters.save_adapter(path, adapter, metadata, stacked=flux.STACKED)
    merge_adapter(path, root / "base", tmp_path / "merged")
    (a, a_mask), (b, b_mask) = picture(40, 60, 0), picture(50, 30, 1)
    sets = [
        bare,
        nabla_jax.load(root / "base", path),
        nabla_jax.load(tmp_path / "merged", conditioning=NATIVE, sample=Sample(steps=2)),
    ]
    images = [np.asarray(r.repose(a, b, a_mask, b_mask, seed=1, steps=2, guidance=2.5)).astype(int) for r in sets]
    assert np.abs(images[1] - images[2]).max() <= 1
    assert np.abs(images[1] - images[0]).max() > 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    train.main(arguments(folder, train__steps=2, train__sample_every=2))
    return folder / "run"


def test_it_trains_on_what_was_prepared_for_omini(run: Path) -> None:
    path = runs.RunFolder(run).adapter(2, "fill")
    metadata = adapters.read_metadata(path)
    assert (metadata.method, metadata.applies_to) == ("native", "all")
    # Every adapted linear learns, those of the last block too: the noise itself passes through them.
    tensors = load_file(path)
    assert all(tensors[name].any() for name in tensors if name.endswith("lora_B.weight"))
    losses = [row["loss"] for row in runs.read_rows(run / "metrics.jsonl")]
    omini = [row["loss"] for row in runs.read_rows(fixtures.trained_run() / "metrics.jsonl")]
    assert len(losses) == 2 and losses[0] != omini[0]
    assert (run / "samples" / "step_2.png").is_file()


def test_generate_and_evaluate(run: Path, tmp_path: Path) -> None:
    words, chosen = arguments(tmp_path), ["--limit", "2", "--subjects", "right"]
    pictures = []
    for name, adapter in (("tuned", str(run)), ("untuned", "none")):
        generate.main([*words, "--adapter", adapter, "--out", str(tmp_path / name), *chosen])
        rows = runs.read_rows(tmp_path / name / "nabla" / "right" / "manifest.jsonl")
        assert [row["method"] for row in rows] == ["native"] * 2
        pictures += ["--pictures", f"{name}={tmp_path / name}"]
    evaluate.main([*words, *pictures, "--out", str(tmp_path / "report"), "--limit", "2"])
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert {"tuned", "untuned"} <= {row["model"] for row in summary}
    # The adapter's metadata says how it draws.
    reposer = nabla_jax.load(fixtures.prepared_root() / "base", run)
    assert reposer.method.name == "native" and reposer.conditioning == NATIVE
    # A set is of one method, whichever came first; without an adapter nothing else tells them apart.
    omini = ["--config", str(fixtures.write_config(fixtures.prepared_root(), tmp_path / "omini.py"))]
    with pytest.raises(UserError, match="other settings .*method: 'native' there, None here"):
        generate.main([*omini, "--out", str(tmp_path / "untuned"), *chosen])
    generate.main([*omini, "--out", str(tmp_path / "omini"), *chosen])
    with pytest.raises(UserError, match="other settings .*method: None there, 'native' here"):
        generate.main([*words, "--out", str(tmp_path / "omini"), *chosen])


def test_what_does_not_belong_together_is_refused(run: Path, tmp_path: Path) -> None:
    root = fixtures.prepared_root()
    with pytest.raises(UserError, match="independent_conditions: found True, expected False for method native"):
        train.main(arguments(tmp_path, conditioning__independent_conditions=True))
    fixtures.write_base(tmp_path / "schnell", schnell=True, blocks=1)
    with pytest.raises(UserError, match=r"schnell: method native needs FLUX\.1-Kontext, found a base that knows no"):
        train.main(arguments(tmp_path, base__path=str(tmp_path / "schnell")))
    with pytest.raises(UserError, match=r"method native needs FLUX\.1-Kontext"):
        nabla_jax.load(tmp_path / "schnell", conditioning=NATIVE)
    with pytest.raises(UserError, match="adapter of another method: found 'omini', expected 'native'"):
        nabla_jax.load(root / "base", fixtures.trained_run(), conditioning=NATIVE)
    with pytest.raises(UserError, match="adapter of another method: found 'native', expected 'omini'"):
        nabla_jax.load(root / "base", run, conditioning=dataclasses.replace(NATIVE, method="omini"))
    with pytest.raises(UserError, match="method native has no control with an adapter of its own"):
        nabla_jax.load(root / "base", run, control_adapter=run)


@pytest.mark.parametrize("size", ["", ":toy"])
def test_the_configuration_is_om_ks_but_for_the_method(size: str) -> None:
    fill = configs.flatten(configs.to_dict(configs.load(f"configs/omk_fill.py{size}")))
    native = configs.flatten(configs.to_dict(configs.load(f"configs/kontext_native.py{size}")))
    differing = {key for key in fill.keys() | native.keys() if fill.get(key) != native.get(key)}
    assert differing == {"conditioning.method", "lora.name", "train.workdir", "source"}
    assert native["conditioning.method"] == "native" and "kontext_native" in native["train.workdir"]
