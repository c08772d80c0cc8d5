"""What a run takes before anything is loaded: bytes, operations, seconds; ``python -m nabla_jax.plan``."""
