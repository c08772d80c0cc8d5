"""Functions that hand freed memory back before they run."""

import jax
import numpy as np

from nabla_jax import host_memory
from tests import fixtures


def test_a_trimmed_function_is_compiled_once_for_each_kind_of_arguments(monkeypatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(host_memory, "give_back", lambda: trims.append(1))

    @host_memory.trimmed
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
