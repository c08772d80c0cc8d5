"""How programs are compiled: options by platform, memory given back before they run."""

import jax
import numpy as np
import pytest

from nabla_jax import compiling, host_memory
from tests import fixtures


def test_a_trimmed_function_is_compiled_once_for_each_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(host_memory, "give_back", lambda: trims.append(1))

    @compiling.trimmed
    @jax.jit
    def scaled(tree, factor):
        return {name: x * factor for name, x in tree.items()}

    with fixtures.compilations() as compiled:
        for length in (3, 3, 5, 3):
            rows = np.arange(length, dtype=np.float32)
            found = scaled({"rows": rows}, np.float32(2))
            np.testing.assert_array_equal(found["rows"], 2 * rows)
        assert scaled({"rows": np.arange(3)}, np.float32(2))["rows"].dtype == np.float32
    assert compiled.count("jit(scaled)") == len(trims) == 3


def test_processors_compile_at_a_low_level_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    options = compiling.options({"x": here})
    assert options == compiling.options() == {"xla_backend_optimization_level": 1}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert compiling.options({"x": here}) is None
