"""Computing in bfloat16: how far the velocity moves on the embedded base, and which operations must not join in."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import assets, flow, toybirds
from nabla_jax.checkpoints import pipeline
from nabla_jax.checkpoints.adapters import load_adapter
from nabla_jax.conditioning import omini
from nabla_jax.conditioning.geometry import Placement
from nabla_jax.conditioning.text import encode_prompts
from nabla_jax.config import Conditioning
from nabla_jax.data import controls
from nabla_jax.flow import path, sampler
from nabla_jax.models import attention, flux, layers

BASE = assets.resolve("asset:toy-flux-kontext")
ADAPTER = assets.resolve("asset:toy-omk-fill") / "toy-omk-fill.safetensors"
LIMIT = 1e-2
# A world that nothing here was trained on.
WORLD = 321
PAIRS = 16


# ---------------------------------------------------------------------------------------- the model as a whole


@pytest.fixture(scope="module")
def latents() -> dict[str, np.ndarray]:
    """Packed latents [PAIRS, N, C] of target, subject and fill control of birds nobody has seen."""
    size = 48
    vae = pipeline.load_vae(BASE)
    pictures: dict[str, list[np.ndarray]] = {"target": [], "subject": [], "control": []}
    for index in range(PAIRS):
        subject, target = toybirds.fresh_pair(WORLD, index, size)
        square = Placement.square(*target.mask.shape, size)
        pictures["target"].append(square.apply(target.rgb, 255, "bilinear"))
        control = controls.control_canvas(controls.View(target.rgb, target.mask), Conditioning(size))
        pictures["control"].append(control.pixels)
        pictures["subject"].append(Placement.subject(subject.mask, size).apply(subject.rgb, 255, "bilinear"))

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        mean, _ = jnp.split(layers.bind(vae.graphdef, vae.params).encode(images), 2, axis=1)
        return flow.pack((mean - vae.config.shift_factor) * vae.config.scaling_factor)

    scaled = {name: np.moveaxis(np.stack(images), -1, 1) / np.float32(127.5) - 1 for name, images in pictures.items()}
    return {name: np.asarray(encode(images.astype(np.float32))) for name, images in scaled.items()}


@pytest.mark.parametrize("with_adapter", [False, True], ids=["plain", "adapter"])
def test_velocity_of_the_embedded_base(latents, with_adapter: bool) -> None:
    """Relative L2 against float32 at the times of the published training: sigmoid of a standard normal."""
    component = pipeline.load_transformer(BASE)
    adapter, _ = load_adapter(ADAPTER, component.params, stacked=flux.STACKED)
    embeds, pooled = (np.repeat(x, PAIRS, axis=0) for x in encode_prompts(BASE, ["A photo of a bird."], 16))
    side = int(np.sqrt(latents["target"].shape[1]))
    ids = omini.grid_ids(side, side)
    noise = jax.random.normal(jax.random.key(0), latents["target"].shape)
    normal = np.array([-1.5, -0.9, -0.5, -0.15, 0.15, 0.5, 0.9, 1.5], np.float32)
    time = jax.nn.sigmoid(jnp.tile(normal, PAIRS // len(normal)))
    name = "default" if with_adapter else None
    conditions = [
        omini.Condition(latents["subject"], omini.subject_ids(side, side, kontext=True), name),
        omini.Condition(latents["control"], ids, name),
    ]
    branches = omini.branches(
        embeds, pooled, flow.interpolate(latents["target"], noise, time), ids, time, guidance=1.0,
        conditions=conditions if with_adapter else (),
    )  # fmt: skip

    def velocity(dtype: str) -> np.ndarray:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), component.params)
        model = layers.bind(component.graphdef, params)
        return np.asarray(jax.jit(lambda: model(branches, adapters={"default": adapter}, dtype=dtype))())

    exact, half = velocity("float32"), velocity("bfloat16")
    assert half.dtype == np.float32
    error = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < LIMIT  # not bfloat16 at all would be below


# ------------------------------------------------------------------------------------------------- the islands

Call = Callable[[], jax.Array]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def norm_of(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def layer_norm() -> tuple[Call, np.ndarray]:
    x = normal(4, 512) + jnp.bfloat16(3)
    return lambda: layers.layer_norm(x), norm_of(wide(x), 1e-6)


def affine_layer_norm() -> tuple[Call, np.ndarray]:
    x = normal(4, 512) + jnp.bfloat16(3)
    return lambda: layers.LayerNorm(512, dtype=jnp.bfloat16)(x), norm_of(wide(x), 1e-5)


def rms_norm() -> tuple[Call, np.ndarray]:
    x = normal(64, 128)
    expected = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    return lambda: layers.RMSNorm(128, dtype=jnp.bfloat16)(x), expected


def group_norm() -> tuple[Call, np.ndarray]:
    x = normal(2, 8, 16, 16) + jnp.bfloat16(3)
    expected = norm_of(wide(x).reshape(2, 4, -1), 1e-6).reshape(x.shape)
    return lambda: layers.GroupNorm(4, 8, dtype=jnp.bfloat16)(x), expected


def time_embedding() -> tuple[Call, np.ndarray]:
    time = jnp.asarray([0.1, 0.501, 0.503, 0.999, 30.0], jnp.float32)
    angles = 1000 * wide(time)[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    return lambda: flux.sinusoid(time), np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def rotary_embedding() -> tuple[Call, np.ndarray]:
    """Traced positions of a large picture, turned into angles and applied."""
    axes = (16, 56, 56)
    ids = np.stack([np.ones(64), np.arange(64) + 64.25, np.arange(64) * 2.5], axis=-1).astype(np.float32)
    x = normal(1, 64, 2, 128)
    frequencies = [10000.0 ** (-np.arange(0, width, 2) / width) for width in axes]
    angle = np.concatenate([ids[:, [i]].astype(np.float64) * f for i, f in enumerate(frequencies)], axis=-1)
    turned = (wide(x)[..., 0::2] + 1j * wide(x)[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    return lambda: flux.rotate(x, flux.rope(jnp.asarray(ids), axes)), expected


def softmax() -> tuple[Call, np.ndarray]:
    """Large scores that differ by little decide whom a query sees."""
    q, k, v = 8 * normal(1, 16, 1, 64), 8 * normal(1, 256, 1, 64, seed=1), normal(1, 256, 1, 64, seed=2)
    scores = np.einsum("bshd,bthd->bhst", wide(q), wide(k)) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), wide(v))
    return lambda: attention.attend(q, k, v, implementation="xla"), expected


def modulated(scale: jax.Array, x: jax.Array) -> np.ndarray:
    return norm_of(wide(x), 1e-6) * (1 + wide(scale)) + 0.25


def modulation() -> tuple[Call, np.ndarray]:
    x, scale = normal(2, 16, 512), 0.01 * jax.random.normal(jax.random.key(1), (2, 1, 512))
    return lambda: flux._modulate(x, jnp.float32(0.25), scale), modulated(scale, x)


def euler() -> tuple[Call, np.ndarray]:
    """Many small steps through a constant velocity."""
    start, step = normal(512), wide(normal(512, seed=1))
    sigmas = np.linspace(1, 0, 101).astype(np.float32)
    return (lambda: sampler.euler(lambda x, s: normal(512, seed=1), start, sigmas)), wide(start) - step


def noisy_point() -> tuple[Call, np.ndarray]:
    """Neighbouring times give different points."""
    x0, x1 = normal(4, 64), normal(4, 64, seed=1)
    time = jnp.asarray([0.5, 0.5005, 0.501, 0.5015], jnp.float32)
    t = wide(time)[:, None]
    return lambda: path.interpolate(x0, x1, time), (1 - t) * wide(x0) + t * wide(x1)


# Island -> (its module, its case, largest relative error). Results in bfloat16 are allowed their own rounding of
# 2 ** -8 and hardly more, results in float32 that of float32.
ROUNDED, EXACT = 1.02 * 2**-8, 2e-4
ISLANDS = {
    "layer norm": (layers, layer_norm, ROUNDED),
    "layer norm with weights": (layers, affine_layer_norm, ROUNDED),
    "RMS norm": (layers, rms_norm, ROUNDED),
    "group norm": (layers, group_norm, ROUNDED),
    "modulation": (flux, modulation, ROUNDED),
    "time embedding": (flux, time_embedding, 5e-2),
    "rotary embedding": (flux, rotary_embedding, ROUNDED),
    "softmax": (attention, softmax, 2e-2),
    "Euler step": (sampler, euler, EXACT),
    "noisy point": (path, noisy_point, EXACT),
}


class _Bfloat16Everywhere(types.SimpleNamespace):
    """``jax.numpy`` in which float32 is bfloat16."""

    def __getattr__(self, name: str):
        return getattr(jnp, name)


@contextmanager
def island_removed(module: types.ModuleType) -> Iterator[None]:
    """Within it, whatever a module computes in float32 is computed in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "jnp", _Bfloat16Everywhere(float32=jnp.bfloat16))
        yield


def error_of(call: Call, expected: np.ndarray) -> float:
    """Largest error relative to the value; values below a hundredth of the typical one count as that."""
    size = np.maximum(np.abs(expected), 0.01 * np.sqrt(np.mean(expected**2)))
    return float((np.abs(wide(call()) - expected) / size).max())


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_stay_in_float32(name: str) -> None:
    module, case, tolerance = ISLANDS[name]
    call, expected = case()
    assert error_of(call, expected) < tolerance
    with island_removed(module):
        assert error_of(call, expected) > 1.5 * tolerance
