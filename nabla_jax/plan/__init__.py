"""What a run takes before anything is loaded: bytes, floating-point operations, seconds; ``python -m nabla_jax.plan``."""
