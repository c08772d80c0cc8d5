"""Re-pose a bird: a frozen FLUX.1 with small adapters, in JAX."""

__version__ = "0.1.0"
