"""Re-pose a bird: a frozen FLUX.1 with small adapters, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_jax.api import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: configuration errors are told before jax loads.
    if name == "load":
        from nabla_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
