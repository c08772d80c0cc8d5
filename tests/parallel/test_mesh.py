"""The data axis over fake devices, and over two real processes."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from nabla_jax.errors import UserError
from nabla_jax.parallel import mesh as meshes
from nabla_jax.parallel import processes
from tests.fixtures import fake_devices, free_address

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from nabla_jax.parallel import mesh as meshes, processes

processes.initialize()
mesh = meshes.data_mesh()
rows = np.arange(8, dtype=np.float32).reshape(8, 1) * [1, 10]
per = 8 // jax.process_count()
own = rows[jax.process_index() * per:(jax.process_index() + 1) * per]
weight = np.array([1.0, 2.0], np.float32)
batch, weight = meshes.put_batch({"x": own}, mesh), meshes.put_replicated(weight, mesh)
loss, gradient = jax.jit(jax.value_and_grad(lambda w, x: jnp.mean(jnp.square(x @ w))))(weight, batch["x"])
processes.wait_for_all("end")
print(json.dumps({
    "devices": mesh.size, "axes": mesh.axis_names, "types": [str(t) for t in mesh.axis_types],
    "shape": batch["x"].shape, "rows": [int(s.data.shape[0]) for s in batch["x"].addressable_shards],
    "first": [float(s.data[0, 0]) for s in batch["x"].addressable_shards],
    "weights": [list(map(float, s.data)) for s in weight.addressable_shards],
    "loss": float(loss), "gradient": list(map(float, gradient.addressable_data(0))),
    "is_first": processes.is_first(),
}))
"""


def _start(devices: int, settings: dict[str, str]) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": fake_devices(devices)} | settings
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def _assert_right_numbers(result: dict[str, Any]) -> None:
    x = np.arange(8).reshape(8, 1) * np.array([1.0, 10.0])
    w = np.array([1.0, 2.0])
    assert result["loss"] == pytest.approx(np.mean((x @ w) ** 2), rel=1e-6)
    np.testing.assert_allclose(result["gradient"], 2 * x.T @ (x @ w) / 8, rtol=1e-6)


def test_four_devices() -> None:
    result = _finish(_start(4, {}))
    assert (result["devices"], result["axes"], result["types"]) == (4, ["data"], ["AxisType.Auto"])
    assert (result["shape"], result["rows"], result["first"]) == ([8, 2], [2] * 4, [0.0, 2.0, 4.0, 6.0])
    assert result["weights"] == [[1.0, 2.0]] * 4
    _assert_right_numbers(result)


def test_two_processes_of_two_devices() -> None:
    address = free_address()
    settings = {processes.COORDINATOR: address, processes.COUNT: "2"}
    running = [_start(2, settings | {processes.INDEX: str(index)}) for index in range(2)]
    for index, result in enumerate(map(_finish, running)):
        assert (result["devices"], result["shape"], result["rows"]) == (4, [8, 2], [2, 2])
        assert result["first"] == [[0.0, 2.0], [4.0, 6.0]][index]
        assert result["is_first"] == (index == 0)
        _assert_right_numbers(result)


def test_a_batch_that_the_devices_do_not_divide() -> None:
    two = jax.sharding.AbstractMesh((2,), ("data",))
    meshes.check_batch(4, two, "train.batch")
    with pytest.raises(UserError, match="train.batch: found 3, expected a multiple of the 2 devices"):
        meshes.check_batch(3, two, "train.batch")


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_shares_are_a_partition(count: int) -> None:
    items = [f"item {i}" for i in range(10)]
    shares = [processes.own_share(items, index, count) for index in range(count)]
    assert sorted(sum(map(list, shares), [])) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert processes.own_share(items) == items


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({processes.COORDINATOR: "host:1", processes.INDEX: "0"}, "NABLA_PROCESS_COUNT: found ''"),
        (
            {processes.COORDINATOR: "host:1", processes.COUNT: "2", processes.INDEX: "one"},
            "NABLA_PROCESS_INDEX: found 'one'",
        ),
        ({processes.COORDINATOR: "host:1", processes.COUNT: "2", processes.INDEX: "2"}, "expected 0 to 1"),
        (
            {processes.COORDINATOR: "host", processes.COUNT: "2", processes.INDEX: "1"},
            "expected host:port or auto",
        ),
    ],
)
def test_incomplete_settings(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processes.initialize(settings)


def test_no_settings_is_a_single_process() -> None:
    processes.initialize({})
    assert jax.process_count() == 1 and processes.is_first()
    processes.wait_for_all("alone")
