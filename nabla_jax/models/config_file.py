"""Reading the published ``config.json`` of a model."""

import json
from pathlib import Path
from typing import Any

from nabla_jax.errors import UserError


def read_config(source: str | Path | dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """How to call the config in a message (its path, or ``name`` for a dict), and its content.

    Raises UserError naming the file if it is absent or not a JSON object.
    """
    if isinstance(source, dict):
        return name, source
    path = Path(source)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return str(path), content
