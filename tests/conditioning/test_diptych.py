"""Side by side: the folded mask and the hidden picture, element by element."""

import jax.numpy as jnp
import numpy as np
import pytest

from nabla_jax import flow
from nabla_jax.conditioning import diptych
from nabla_jax.errors import UserError


def test_every_pixel_of_the_mask_has_its_channel() -> None:
    """The formula of the layout, for every pixel of a non-square mask."""
    mask = (np.random.default_rng(0).uniform(size=(2, 32, 48)) > 0.5).astype(np.float32)
    found = np.asarray(diptych.fold_mask(jnp.asarray(mask)))
    assert found.shape == (2, 2 * 3, 256)
    for y in range(32):
        for x in range(48):
            token = (y // 16) * 3 + x // 16
            channel = ((y % 8) * 8 + x % 8) * 4 + (y // 8 % 2) * 2 + x // 8 % 2
            np.testing.assert_array_equal(found[:, token, channel], mask[:, y, x])


def test_masks_of_odd_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"mask: found 24x32, expected multiples of 16"):
        diptych.fold_mask(jnp.zeros((1, 24, 32)))


def test_hidden_pixels_are_grey_unless_told_otherwise() -> None:
    picture = jnp.full((1, 3, 2, 2), 0.7)
    mask = jnp.array([[[1.0, 0.0], [0.5, 0.49]]])
    np.testing.assert_allclose(diptych.hide(picture, mask)[0, 0], [[0.0, 0.7], [0.0, 0.7]], rtol=0, atol=1e-7)
    np.testing.assert_allclose(diptych.hide(picture, mask, -1.0)[0, 0], [[-1, 0.7], [-1, 0.7]], rtol=0, atol=1e-7)


def test_the_reference_lies_left_and_the_mask_of_the_right_half_is_its_own() -> None:
    reference, target = jnp.zeros((1, 3, 16, 16)), jnp.ones((1, 3, 16, 32))
    both = diptych.side_by_side(reference, target)
    assert both.shape == (1, 3, 16, 48)
    np.testing.assert_array_equal(both[..., :16], 0)
    with pytest.raises(UserError, match="the reference is 16 high, the target 8"):
        diptych.side_by_side(reference, target[:, :, :8])
    tokens = diptych.fill_tokens(
        flow.pack(jnp.ones((1, 16, 2, 6))), jnp.full((1, 3, 64), 2.0), jnp.full((1, 3, 256), 3.0)
    )
    np.testing.assert_array_equal(tokens[0, 0], [1.0] * 64 + [2.0] * 64 + [3.0] * 256)
