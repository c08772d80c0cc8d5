"""The kernels of attention against the quadratic path, alone and cut over devices, and what the backward pass keeps."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax.config import load
from nabla_jax.errors import UserError
from nabla_jax.models import attention, flux
from nabla_jax.models.attention import Splash, attend
from tests import fixtures

HERE = Splash(128, 128, interpret=True)


def draw(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def value_and_gradients(implementation: attention.Implementation, *arrays: jax.Array, **options: Any) -> list[Any]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = attend(q, k, v, implementation=implementation, **options)
        return jnp.sin(3 * found).sum(), found

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays))


# Blocks that are filled up and blocks that are not; several of them; padded samples; a scale of one's own.
@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [(130, 200, {}), (256, 128, {}), (9, 140, {"valid": (140, 97)}), (20, 128, {"valid": (1, 128), "scale": 0.3})],
)
def test_splash_attention_is_the_quadratic_one(queries: int, keys: int, options: dict[str, Any]) -> None:
    arrays = draw(2, queries, 2, 128, seed=1), draw(2, keys, 2, 128, seed=2), draw(2, keys, 2, 128, seed=3)
    if "valid" in options:
        options = options | {"valid": jnp.arange(keys) < jnp.asarray(options["valid"])[:, None]}
    found, expected = (value_and_gradients(how, *arrays, **options) for how in (HERE, "xla"))
    for here, there in zip(found, expected, strict=True):
        assert here.shape == there.shape and here.dtype == there.dtype
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * float(jnp.abs(there).max()))


def test_tokens_are_filled_up_to_whole_blocks() -> None:
    assert attention._blocks(9433, 512) == (256, 9472)
    assert attention._blocks(12800, 512) == (512, 12800)
    assert attention._blocks(12800, 1024) == (640, 12800)
    assert attention._blocks(1600, 512) == (128, 1664)
    assert attention._blocks(1, 512) == (128, 128)
    shape = jax.ShapeDtypeStruct((1, 9433, 24, 128), jnp.bfloat16)
    kernel = str(jax.make_jaxpr(lambda x: attend(x, x, x, implementation=Splash(ahead=True)))(shape))
    assert "splash" in kernel and "bf16[1,24,9472,128]" in kernel


def test_a_kernel_that_cannot_run_here_is_told() -> None:
    assert attention.parse("splash:256x1024") == Splash(256, 1024) and attention.parse("xla") == "xla"
    assert attention.choose("auto", 64) == "auto"
    assert attention.ahead("auto", 128) == Splash(ahead=True) and attention.ahead("auto", 64) == "auto"
    x = draw(1, 8, 1, 64, seed=1)
    calls = [
        (lambda: attention.choose("splash", 128), "implementation 'splash' needs a TPU, found cpu"),
        (lambda: attention.choose("cudnn", 128), "implementation 'cudnn' needs a GPU, found cpu"),
        (lambda: attend(x, x, x, implementation=HERE), "needs heads of 128, found 64"),
        (lambda: attend(x, x, x, implementation=Splash()), "needs a TPU, found cpu"),
        (lambda: attention.parse("splash:100x128"), "splash: queries: found 100, expected a multiple of 128"),
        (lambda: attention.parse("splash:128"), "base.attention: found 'splash:128'"),
        (lambda: attention.parse("flash"), "base.attention: found 'flash'"),
        (lambda: load("configs/omk_fill.py:toy", {"base.attention": "flash"}), "base.attention: found 'flash'"),
    ]
    for call, told in calls:
        with pytest.raises(UserError, match=told):
            call()


# ------------------------------------------------------------------------------------- what remat policies keep


def gradient(implementation: attention.Implementation, remat: flux.Remat) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Of a sine and attention, and shapes to trace it with."""

    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        y = jnp.sin(x * w)
        return attend(y, y, y, implementation=implementation)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return flux._remat(block, remat)(w, x).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((), (1, 128, 1, 128))]
    return jax.grad(loss), shapes


def test_the_splash_kernel_does_not_run_again() -> None:
    def transcendentals(remat: flux.Remat) -> float:
        function, shapes = gradient(HERE, remat)
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["transcendentals"]

    once, sine = transcendentals("none"), 128 * 128
    assert transcendentals("save_attention") == transcendentals("offload") == once + sine
    assert transcendentals("full") > once + 1.5 * sine  # and the softmax


def test_the_cudnn_kernel_does_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, not run: what is not here is the library and the device.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def forward_kernels(remat: flux.Remat) -> int:
        function, shapes = gradient("cudnn", remat)
        return str(jax.make_jaxpr(function)(*shapes)).count("dot_product_attention_fwd_wrapper[")

    assert forward_kernels("none") == forward_kernels("save_attention") == 1
    # Of what the kernel gives, the host can be sent the result alone.
    assert forward_kernels("full") == forward_kernels("offload") == 2


# --------------------------------------------------------------------------------------------- cut over devices

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from nabla_jax.models import flux, partitioning
from nabla_jax.models.attention import Splash, attend
from nabla_jax.parallel import mesh as meshes

rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((4, n, 2, 128)), jnp.float32) for n in (9, 140, 140))
valid = jnp.arange(140) < jnp.asarray([140, 100, 70, 50])[:, None]

def run(implementation, remat):
    def block(q, k, v):
        local = lambda q, k, v, valid: attend(q, k, v, valid=valid, implementation=implementation)
        return jnp.sin(partitioning.attend_locally(local, jnp.sin(q), jnp.sin(k), jnp.sin(v), valid))
    loss = lambda *arrays: (flux._remat(block, remat)(*arrays) ** 2).sum()
    return [np.asarray(x).tolist() for x in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v))]

expected = run("xla", "none")
mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2})
with jax.set_mesh(mesh):
    for implementation in (Splash(128, 128, interpret=True), "chunked"):
        for remat in ("none", "full", "save_attention", "offload"):
            found = run(implementation, remat)
            worst = max(np.abs(np.subtract(a, b)).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))
            print(json.dumps([str(implementation), remat, float(worst)]))
"""


def test_kernels_on_each_of_eight_devices() -> None:
    """Samples, heads and queries cut, keys gathered, queries filled up; the gradient under every policy."""
    environment = os.environ | {"XLA_FLAGS": fixtures.fake_devices(8)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for implementation, remat, worst in rows:
        assert worst < 1e-5, (implementation, remat)
