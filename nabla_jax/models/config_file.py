"""Reading the published ``config.json`` of a model."""

import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nabla_jax.errors import UserError
from nabla_jax.untrusted import check, parse_json

_MOST, _MOST_BLOCKS = 2**20, 1024
_BEYOND = 1e9  # in half precision even smaller numbers are infinite
_MAY_BE_ZERO = frozenset(("num_layers", "num_single_layers", "bos_token_id", "eos_token_id"))


def read_config(source: str | Path | dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """How to call the config in a message (its path, or ``name`` for a dict), and its content.

    Raises UserError naming the file if it is absent or not a JSON object.
    """
    if isinstance(source, dict):
        return name, source
    path = Path(source)
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object")
    return str(path), content


def known_fields(
    where: str,
    raw: Mapping[str, Any],
    names: Iterable[str],
    *,
    required: Iterable[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries of a config that a dataclass has fields for.

    Args:
      where: how to call the config in a message.
      raw: the config's content.
      names: the dataclass's fields.
      required: keys that must be there: their default in the publishing library is another one than here.
      fixed: keys with the one value that the model here has; they may be absent.

    Raises:
      UserError: a required key is absent, or a fixed one has another value.
    """
    for key, value in (fixed or {}).items():
        if raw.get(key, value) != value:
            raise UserError(f"{where}: {key}: found {raw[key]!r}, expected {value!r}")
    missing = sorted(key for key in required if key not in raw)
    if missing:
        raise UserError(f"{where}: missing keys: {', '.join(missing)}")
    return {key: raw[key] for key in names if key in raw}


def check_types(where: str, kind: Any, raw: Mapping[str, Any]) -> None:
    """Raises UserError unless the entries that the dataclass ``kind`` has fields for are of the fields' types.

    Numbers must be finite, whole ones those of a network that somebody could have: a file of a few bytes must not ask
    for all memory.
    """
    for name, annotation in typing.get_type_hints(kind).items():
        if name not in raw:
            continue
        least = 0 if name in _MAY_BE_ZERO else 1
        if annotation is int and least:
            check_counts(where, **{name: raw[name]})
        check(raw[name], annotation, where, name)
        most = _MOST_BLOCKS if name.endswith(("layers", "blocks", "per_block")) else _MOST
        for value in raw[name] if isinstance(raw[name], list) else (raw[name],):
            if type(value) is int and not least <= value <= most:
                raise UserError(f"{where}: {name}: found {value}, expected {least} to {most}")
            if type(value) is float and not abs(value) < _BEYOND:
                raise UserError(f"{where}: {name}: found {value}, expected a number below {_BEYOND:g}")


def check_sizes(where: str, **sizes: int) -> None:
    """Raises UserError unless the sizes of a vision transformer are positive and fit each other."""
    check_counts(where, **sizes)
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(
            f"{where}: hidden_size: found {sizes['hidden_size']}, "
            f"expected a multiple of num_attention_heads ({sizes['num_attention_heads']})"
        )
    if sizes["patch_size"] > sizes["image_size"]:
        raise UserError(f"{where}: patch_size: found {sizes['patch_size']}, expected at most {sizes['image_size']}")


def check_counts(where: str, **values: Any) -> None:
    """Raises UserError naming the first of the keyword values that is no positive whole number."""
    for key, value in values.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {key}: found {value!r}, expected a positive whole number")
