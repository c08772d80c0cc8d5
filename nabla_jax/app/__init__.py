"""The web app: ``python -m nabla_jax.app`` (see ``__main__``). Importing this imports nothing else."""
