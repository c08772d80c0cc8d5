"""What files of others say, made sure of before it is used: JSON and its shape, paths, whole numbers.

docs/trust.md tells what is read from where and what is refused.
"""

import json
import os
import re
import types
import typing
from pathlib import Path, PurePosixPath
from typing import Any

from nabla_jax.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAME_BYTES, _PATH_BYTES = 255, 4000  # what Linux and macOS take
_SHOWN = 100  # characters of what was found


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, however it is wrong.

    Refused are also nesting beyond the interpreter's depth, numbers of thousands of digits and halves of characters,
    which no file could hold when they are written again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError naming it when it is absent or no JSON."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error


def check(value: Any, kind: Any, where: str, name: str = "") -> None:
    """Raises UserError naming ``where`` and the field unless ``value`` is of ``kind``.

    ``kind`` is a type of plain JSON as annotations write it: ``str``, ``bool``, ``int`` (64 bits), ``float`` (any
    number), ``list[...]``, ``dict[str, ...]``, ``... | None``, ``Literal``, ``Any``, a tuple type for a list, or a
    TypedDict, whose fields must be there, unless they are NotRequired, and may have others beside them.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            check(value, next(a for a in arguments if a is not type(None)), where, name)
    elif origin is typing.Literal:
        if value not in arguments:
            raise _wrong(value, " or ".join(map(str, arguments)), where, name)
    elif origin is list or (origin is tuple and arguments[1:] == (...,)):
        if not isinstance(value, list | tuple):
            raise _wrong(value, "a list", where, name)
        for place, item in enumerate(value):
            check(item, arguments[0], where, _below(name, place))
    elif origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise _wrong(value, f"a list of {len(arguments)}", where, name)
        for place, (item, inner) in enumerate(zip(value, arguments, strict=True)):
            check(item, inner, where, _below(name, place))
    elif origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", where, name)
        for key, item in value.items():
            check(item, arguments[1], where, _below(name, key))
    elif typing.is_typeddict(kind):
        _check_fields(value, kind, where, name)
    elif not _is_plain(value, kind):
        words = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}
        raise _wrong(value, words[kind], where, name)


def _check_fields(value: Any, kind: Any, where: str, name: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", where, name)
    fields = typing.get_type_hints(kind)
    missing = [field for field in fields if field in kind.__required_keys__ and field not in value]
    if missing:
        what = f"{name}: " if name else ""
        raise UserError(f"{where}: {what}missing {', '.join(missing)}, expected an object with {', '.join(fields)}")
    for field, inner in fields.items():
        if field in value:
            check(value[field], inner, where, _below(name, field))


def _is_plain(value: Any, kind: type) -> bool:
    if type(value) is int:
        return kind in (int, float) and abs(value) < 2**63
    return type(value) is kind


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _wrong(found: Any, expected: str, where: str, name: str) -> UserError:
    shown = repr(found)
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return UserError(f"{where}: {name or 'content'}: found {shown}, expected {expected}")


def below(root: Path, name: str) -> Path | None:
    """``root / name`` for a relative path that stays below ``root``; None for one that leaves it or is no path.

    Names are compared, not what they lead to: a symbolic link that somebody put into the folder is followed, because
    large folders are kept on other disks that way.
    """
    path = PurePosixPath(name)
    try:
        encoded = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:
        return None
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        return None
    if any(len(part) > _NAME_BYTES for part in encoded) or sum(map(len, encoded)) + len(encoded) > _PATH_BYTES:
        return None
    return root / path


def is_file_name(name: str) -> bool:
    """Whether ``name`` is that of one file, without a folder."""
    return below(Path(), name) is not None and len(PurePosixPath(name).parts) == 1 and "\\" not in name


def whole_number(text: str) -> int | None:
    """A number of at most 18 digits 0 to 9, or None: ``str.isdigit`` also knows ², and numbers without end."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
