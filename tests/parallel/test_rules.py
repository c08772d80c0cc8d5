"""Rules for parameters: each leaf has one, adapters lie as their weights do, any mesh trains as one device does."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nabla_jax import config as configs
from nabla_jax import optim
from nabla_jax.errors import UserError
from nabla_jax.models import flux, layers, lora
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import rules
from nabla_jax.training import initial_state
from tests.fixtures import fake_devices

SINGLE = "1,1,1,1"
MESHES = ("8,1,1,1", "1,8,1,1", "2,2,2,1", "1,2,2,2", "1,1,4,2", "2,1,1,4", "1,2,2,2,2")
"""data, fsdp, tensor, sequence, and the last with the batch in two parts."""


def leaves(config: flux.FluxConfig) -> dict[str, tuple[int, ...]]:
    _, shapes = layers.abstract(lambda rngs: flux.Flux(config, rngs=rngs))
    return {rules.name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}


@pytest.mark.parametrize("config", [flux.FluxConfig.kontext(), flux.FluxConfig.schnell(), flux.FluxConfig.fill()])
def test_every_large_parameter_of_a_published_model_is_cut(config: flux.FluxConfig) -> None:
    sizes = {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    whole = cut = 0
    for name, shape in leaves(config).items():
        spec = rules.fit(rules.spec_of(name, shape), shape, sizes)
        parts = rules.parts(spec, sizes)
        assert len(spec) <= len(shape)
        assert parts >= 4 or np.prod(shape) < 2**20, name
        whole += np.prod(shape, dtype=int)
        cut += np.prod(shape, dtype=int) // parts
    assert cut / whole < 1.01 / 8


def test_every_rule_is_needed() -> None:
    names = leaves(flux.FluxConfig.kontext())
    for pattern in rules.LINEARS:
        others = {key: sides for key, sides in rules.LINEARS.items() if key != pattern}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rules, "LINEARS", others)
            with pytest.raises(ValueError, match="found no rule"):
                for name, shape in names.items():
                    rules.spec_of(name, shape)


def test_adapters_and_the_optimizers_trees_lie_as_their_weights_do() -> None:
    config = configs.load("configs/omk_fill.py:toy", {"train.ema": "0.9"})
    _, shapes = layers.abstract(lambda rngs: flux.Flux(flux.FluxConfig.kontext(), rngs=rngs))

    def state() -> dict[str, object]:
        fresh = lora.initialize(jax.random.key(0), shapes, rank=16, alpha=16.0, stacked=flux.STACKED).params
        return initial_state({"fill": fresh}, optim.make(config.optim, "float32"), config)

    found = jax.eval_shape(state)
    paths, _ = jax.tree_util.tree_flatten_with_path(found)
    specs = {rules.name_of(path): rules.spec_of(rules.name_of(path), leaf.shape) for path, leaf in paths}
    column, row = "transformer_blocks/attn/to_q", "single_transformer_blocks/proj_out"
    for prefix in ("adapters/fill", "average/fill"):
        assert specs[f"{prefix}/{column}/lora_A"] == P(None, None, ("fsdp",))
        assert specs[f"{prefix}/{column}/lora_B"] == P(None, ("tensor", "fsdp"), None)
        assert specs[f"{prefix}/{row}/lora_A"] == P(None, None, ("tensor", "fsdp"))
        assert specs[f"{prefix}/{row}/lora_B"] == P(None, ("fsdp",), None)
    ends = [name.partition("fill/")[2] for name in specs if name.startswith("optimizer/") and "fill/" in name]
    trained = [name.partition("fill/")[2] for name in specs if name.startswith("adapters/")]
    assert set(ends) == set(trained) and len(ends) >= 2 * len(trained)
    for name, spec in specs.items():
        assert (
            not name.startswith("optimizer/")
            or "fill/" not in name
            or spec == specs["adapters/" + name[name.index("fill/") :]]
        )


def test_axes_that_do_not_divide_are_left_out_in_turn() -> None:
    sizes = {"data": 1, "fsdp": 3, "tensor": 4}
    assert rules.fit(P(("tensor", "fsdp"), "sequence"), (12, 8), sizes) == P(("tensor", "fsdp"), None)
    assert rules.fit(P(("tensor", "fsdp"), "tensor"), (8, 6), sizes) == P(("tensor",), None)


def test_a_name_without_a_rule_is_told() -> None:
    mesh = meshes.make_mesh({"data": 0, "fsdp": 1, "tensor": 1, "sequence": 1})
    leaf = jax.ShapeDtypeStruct((4, 4), np.float32)
    with pytest.raises(ValueError, match="no rule for new/weight, other/bias$"):
        rules.shardings(
            {"new": {"weight": leaf}, "other": {"bias": leaf}, "count": jax.ShapeDtypeStruct((), int)}, mesh
        )


def test_sizes_that_do_not_fit_the_devices_are_told() -> None:
    with pytest.raises(UserError, match=r"mesh: found data 0, fsdp 3, tensor 1, sequence 1, expected .* the 1 devices"):
        meshes.make_mesh({"data": 0, "fsdp": 3, "tensor": 1, "sequence": 1}, jax.devices()[:1])


def test_any_mesh_trains_as_one_device_does() -> None:
    environment = os.environ | {"XLA_FLAGS": fake_devices(8)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.meshes_program", SINGLE, *MESHES],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    results = {spec: json.loads(row) for spec, row in (line.split(" ", 1) for line in done.stdout.splitlines())}
    assert list(results) == [SINGLE, *MESHES]
    one = results.pop(SINGLE)
    for spec, found in results.items():
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=1e-5, err_msg=spec)
        np.testing.assert_allclose(found["norms"], one["norms"], rtol=1e-4, err_msg=spec)
        assert found["adapters"] == pytest.approx(one["adapters"], rel=1e-5), spec
        assert found["kept"] and found["compiled"] == ["jit(step)"], spec
        assert found["bytes"] == found["said"], spec
    assert results["1,8,1,1"]["bytes"]["state"] < one["bytes"]["state"] / 7
    assert results["8,1,1,1"]["bytes"] == one["bytes"]
