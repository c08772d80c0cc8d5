"""Files shipped with the package: the embedded toy checkpoints and adapters, named ``asset:NAME``."""

import os
from pathlib import Path

from nabla_jax.errors import UserError

_PREFIX = "asset:"
DEFAULT_BASE = "asset:toy-flux-kontext"
"""The base that ``nabla_jax.load`` takes when none is named."""
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names that ``resolve`` knows."""
    return sorted(p.name for p in _FOLDER.iterdir() if p.is_dir() and not p.name.startswith("_"))


def resolve(path: str | os.PathLike[str]) -> Path:
    """``asset:NAME`` to the folder inside the package; any other path unchanged.

    Raises UserError for a name that is not shipped.
    """
    text = str(path)
    if not text.startswith(_PREFIX):
        return Path(path)
    name = text.removeprefix(_PREFIX)
    if name not in names():
        raise UserError(f"{text}: no such asset, shipped are {', '.join(names()) or 'none'}")
    return _FOLDER / name
