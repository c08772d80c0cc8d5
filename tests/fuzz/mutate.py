"""Ways to make a file almost right: each takes a generator and the seeds, and gives an input."""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.engine import Mutate

LONG = "9" * 5000
NUMBERS = (
    "0", "-1", "1", "2", "-0", "+7", "007", "1e3", "1e400", "-1e400", "nan", "inf", "-inf", "1.5", "0.1", "0x10",
    "1_000", "²", "٣", "½", "255", "256", "65536", "2147483647", "2147483648", "-2147483649", "9223372036854775808",
    "18446744073709551616", "1e-320", "3.0", LONG, "",
)  # fmt: skip
TEXTS = (
    "", " ", "..", "../../../etc/passwd", "/etc/passwd", "/", ".", "./.", "a/../../b", "~/x", "a\\..\\b", "C:\\x",
    "\x00", "a\x00b", "\n", "\r", "\r\n", "\t", "\x1b[31m", "\u2028", "\ufeff", "\u202e", "é" * 200, "x" * 300,
    "x/" * 3000, "<script>alert(1)</script>", "%s{}$(x)", "'", '"', '""', ",", ";",
    "#", "=", "=1+1", "null", "true", "\ud800",
    "\U0001f426", "A" * 140_000, "*", "-", "--config", "a,b,c", "1 2 3", "bird.jpg",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, -(2**31) - 1, 2**63, 2**64,
    10**30, 10**400, [], {}, [[]], [None], [0], [1, 2, 3], {"": 0}, {"a": {"b": []}}, "1", "nan", *TEXTS,
)  # fmt: skip
INTEGERS = (0, 1, 7, 8, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def flip(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Bytes changed, cut, repeated, exchanged with another seed's; numbers in the place of bytes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) + 1)
        # Headers are where sizes stand: half of the changes go to the front.
        if rng.random() < 0.5:
            place = min(place, rng.randrange(1, 128))
        match rng.randrange(8):
            case 0 | 1:
                if data:
                    data[place % len(data)] ^= 1 << rng.randrange(8)
            case 2:
                if data:
                    data[place % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                data[place : place + size] = (rng.choice(INTEGERS) % 256**size).to_bytes(size, order)
            case 4:
                del data[rng.randrange(len(data) + 1) :]
            case 5:
                del data[place : place + rng.choice((1, 4, 64, 1000))]
            case 6:
                stretch = data[place : place + rng.choice((1, 4, 64, 1000))]
                data[place:place] = stretch * rng.choice((1, 2, 50))
            case _:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[place : place + rng.choice((0, 16, 400))] = other[start : start + rng.choice((1, 16, 400))]
    return bytes(data)


def text(separator: str) -> Mutate:
    """Lines of fields: exchanged, dropped, doubled, replaced by texts and numbers that ask for trouble."""

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.15:
            return flip(rng, seeds)
        lines = rng.choice(seeds).decode("utf-8", "replace").split("\n")
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(lines))
            fields = lines[at].split(separator)
            field = rng.randrange(len(fields))
            match rng.randrange(10):
                case 0 | 1:
                    fields[field] = rng.choice(TEXTS)
                case 2 | 3:
                    fields[field] = rng.choice(NUMBERS)
                case 4:
                    numbers = [m.span() for m in re.finditer(r"\d+", lines[at])]
                    if numbers:
                        start, end = rng.choice(numbers)
                        fields = (lines[at][:start] + rng.choice(NUMBERS) + lines[at][end:]).split(separator)
                case 5:
                    del fields[field]
                case 6:
                    fields.insert(field, rng.choice((*TEXTS, *fields)))
                case 7:
                    other = rng.randrange(len(lines))
                    lines[at], lines[other] = lines[other], lines[at]
                    continue
                case 8:
                    lines[at:at] = [rng.choice(lines)]
                    continue
                case _:
                    word = fields[field]
                    place = rng.randrange(len(word) + 1)
                    fields[field] = word[:place] + rng.choice((*TEXTS, *NUMBERS)) + word[place:]
            lines[at] = separator.join(fields)
        end = rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r"))
        return end.join(lines).encode("utf-8", "surrogatepass")

    return mutate


def change_json(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """``value`` with one node exchanged, dropped, doubled or renamed."""
    if not isinstance(value, dict | list) or not value or (depth and rng.random() < 0.2):
        return rng.choice(VALUES)
    if isinstance(value, list):
        copy = list(value)
        at = rng.randrange(len(copy))
        match rng.randrange(6):
            case 0:
                del copy[at]
            case 1:
                copy.insert(at, rng.choice((*VALUES, copy[at])))
            case 2:
                other = rng.randrange(len(copy))
                copy[at], copy[other] = copy[other], copy[at]
            case _:
                copy[at] = change_json(rng, copy[at], depth + 1)
        return copy
    key = rng.choice(list(value))
    changed = dict(value)
    match rng.randrange(8):
        case 0:
            del changed[key]
        case 1:
            changed[rng.choice(TEXTS[:40])] = changed.pop(key)
        case 2:
            changed[key] = value[rng.choice(list(value))]
        case 3:
            changed[rng.choice(("extra", "schema", "version", "", "__proto__"))] = rng.choice(VALUES)
        case _:
            changed[key] = change_json(rng, value[key], depth + 1)
    return changed


def dump(rng: random.Random, value: Any) -> bytes:
    """JSON, sometimes nested without end or with bytes that are no text."""
    dumped = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    chance = rng.random()
    if chance < 0.01:
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        depth = rng.choice((500, 1500, 20_000))
        deep = opening * depth + b"0" + closing * depth
        return rng.choice((deep, opening * depth, dumped.replace(b"0", deep, 1), dumped.replace(b"null", deep, 1)))
    if chance < 0.05:
        return flip(rng, [dumped])
    return dumped


def objects(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A JSON file with nodes changed."""
    if rng.random() < 0.1:
        return flip(rng, seeds)
    value = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = change_json(rng, value)
    return dump(rng, value)


def rows(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """JSON lines with lines changed."""
    if rng.random() < 0.15:
        return flip(rng, seeds)
    lines = rng.choice(seeds).split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        if lines[at].startswith(b'{"'):
            lines[at] = dump(rng, change_json(rng, _json(lines[at])))
        if rng.random() < 0.2:
            lines.insert(at, rng.choice((b"", b"{", b"null", b"3", b"[]", b'"x"', *lines)))
        if rng.random() < 0.1 and len(lines) > 1:
            del lines[rng.randrange(len(lines))]
    return b"\n".join(lines)


def _json(line: bytes) -> Any:
    """What a line says, or {} where another change has broken it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return {}


def safetensors(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Header and data apart: sizes, shapes, dtypes and offsets that lie, numbers that are none."""
    if rng.random() < 0.2:
        return flip(rng, seeds)
    data = rng.choice(seeds)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(10):
            case 0:
                header = change_json(rng, header)
                if not isinstance(header, dict):
                    break
                names = [n for n, v in header.items() if n != "__metadata__" and _is_tensor(v)]
            case 1 | 2 if names:
                _lie(rng, header[rng.choice(names)])
            case 3 if len(names) > 1:
                a, b = rng.sample(names, 2)
                key = rng.choice(("dtype", "shape", "data_offsets"))
                header[a][key] = header[b][key]
            case 4 if names:
                header[rng.choice(TEXTS)] = header.pop(names.pop(rng.randrange(len(names))))
            case 5 | 6 if isinstance(header.get("__metadata__"), dict):
                _change_metadata(rng, header["__metadata__"])
            case 7 if body:
                wide = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x7e", b"\xff\xff\xff\xff"))
                place = rng.randrange(len(body)) // 4 * 4
                body[place : place + len(wide)] = wide
            case 8:
                body = (
                    body[: rng.randrange(len(body) + 1)]
                    if rng.random() < 0.5
                    else body + bytes(rng.choice((1, 8, 4096)))
                )
            case _ if names:
                _empty(rng, header[rng.choice(names)])
    encoded = json.dumps(header).encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    stated = len(encoded) if rng.random() < 0.9 else rng.choice((*INTEGERS, len(encoded) - 8, len(encoded) + 8))
    return stated.to_bytes(8, "little") + encoded + bytes(body)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and {"dtype", "shape", "data_offsets"} <= value.keys()


def _lie(rng: random.Random, tensor: dict[str, Any]) -> None:
    key = rng.choice(("dtype", "shape", "data_offsets"))
    if key == "dtype":
        codes = (
            "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3",
            "F8_E5M2", "F4", "C64", "X", "f32",
        )  # fmt: skip
        tensor[key] = rng.choice((*codes, 3, None))
    else:
        tensor[key] = change_json(rng, tensor[key])


def _empty(rng: random.Random, tensor: dict[str, Any]) -> None:
    """No bytes, with a shape that has none either, or says it has many."""
    sizes = rng.choice(([0], [0, 3], [3, 0], [0, 0], [0, 2**62], [2**62, 2**62, 0], [2**64 - 1, 0], [0] * 100, [2**63]))
    if isinstance(tensor.get("data_offsets"), list) and tensor["data_offsets"]:
        tensor["data_offsets"] = [tensor["data_offsets"][0]] * 2
    tensor["shape"] = sizes


def _change_metadata(rng: random.Random, metadata: dict[str, Any]) -> None:
    if not metadata:
        metadata["format"] = rng.choice(TEXTS)
        return
    key = rng.choice(list(metadata))
    try:
        value = json.loads(metadata[key])
    except (TypeError, ValueError, RecursionError):
        metadata[key] = rng.choice(VALUES)
        return
    metadata[key] = dump(rng, change_json(rng, value)).decode("utf-8", "replace")


def signed(prefix: struct.Struct, sign: Callable[[bytes, bytes], bytes]) -> Mutate:
    """A checked record whose checksums are made anew after the change: what a forger would write."""

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.2:
            return flip(rng, seeds)
        data = rng.choice(seeds)
        length = prefix.unpack_from(data)[1]
        header, body = data[prefix.size : prefix.size + length], data[prefix.size + length :]
        if rng.random() < 0.8:
            header = dump(rng, change_json(rng, json.loads(header)))
        else:
            body = flip(rng, [body])
        return sign(header, body)

    return mutate


def png(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Pictures; the checksums of PNG chunks are sometimes made anew, so that the change is looked at."""
    data = flip(rng, seeds)
    return with_checksums(data) if data.startswith(b"\x89PNG") and rng.random() < 0.7 else data


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksum of each chunk made anew."""
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        out += data[place : place + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        place += 12 + length
    return bytes(out)
