"""SHA-256 of files: what manifests and adapters name their inputs by."""

import hashlib
import os
from pathlib import Path

from nabla_jax.errors import UserError


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces. Raises UserError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
