"""Masked RMSE and the resizing before it, against the published evaluation's numbers."""

import numpy as np
import pytest

from nabla_jax.metrics import pixels
from tests.golden.golden import case

GOLDEN = case("metrics")
FILES = GOLDEN.files
EMPTY = [name for name in FILES if not GOLDEN.tensor(name, "mask").any()]
FILLED = [name for name in FILES if name not in EMPTY]


def test_there_are_equal_resized_and_empty_cases():
    sizes = {name: GOLDEN.tensor(name, "orig").shape == GOLDEN.tensor(name, "gen").shape for name in FILLED}
    assert set(sizes.values()) == {True, False}
    assert EMPTY


@pytest.mark.parametrize("name", FILES)
def test_target_and_mask_at_the_generated_size(name):
    tensors = GOLDEN.tensors(name)
    target, inside = pixels.at_size_of(tensors["gen"], tensors["orig"], tensors["mask"])
    np.testing.assert_allclose(target.astype(int), tensors["orig_resized"], rtol=0, atol=1)
    assert np.array_equal(inside, pixels.foreground(tensors["mask_resized"]))


@pytest.mark.parametrize("name", FILLED)
def test_rmse(name):
    tensors = GOLDEN.tensors(name)
    value = pixels.masked_rmse(tensors["gen"], tensors["orig"], tensors["mask"])
    # float32 in the published code; where it resizes, a grey level may round the other way.
    np.testing.assert_allclose([value], tensors["metrics"][1:2], rtol=2e-5)
    assert value == pytest.approx(GOLDEN.scalar(name)["l2_rmse"], rel=2e-5)


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_mask_is_no_perfect_score(name):
    """Decision 19: the published code scores such a pair 0 (perfect); here it has no value and is
    excluded.
    """
    tensors = GOLDEN.tensors(name)
    assert pixels.masked_rmse(tensors["gen"], tensors["orig"], tensors["mask"]) is None
    assert tensors["metrics"][1] == 0 and GOLDEN.scalar(name)["l2_rmse"] == 0
