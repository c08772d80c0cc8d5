"""What a reader must do with files that it cannot use."""

from collections.abc import Callable

import pytest

from nabla_jax.errors import UserError


def refused(call: Callable[[], object], *told: str) -> None:
    """Asserts that the call ends in a UserError that tells each text."""
    with pytest.raises(UserError) as error:
        call()
    for text in told:
        assert text in str(error.value), str(error.value)[:500]
