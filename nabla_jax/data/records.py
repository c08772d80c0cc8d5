"""Records of named arrays, and ArrayRecord shards of them with random access.

A record is flat bytes: an 8-byte magic; the length of the JSON header, a CRC-32 of that length and of the header, and
a CRC-32 of all that follows the header (three little-endian uint32); the header, padded with spaces so that it ends at
a multiple of 64 bytes; then each array's raw little-endian values at an offset that is a multiple of 64. Decoding
copies nothing.
"""

import bisect
import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from nabla_jax import untrusted
from nabla_jax.errors import UserError

Array = np.ndarray[Any, Any]

MAGIC = b"NBLAREC\x02"
OPTIONS = "group_size:1,uncompressed"  # one record a chunk: a random read touches nothing else
_PREFIX = struct.Struct("<8sIII")
_ALIGNMENT = 64


_DTYPES = frozenset(
    np.dtype(kind).newbyteorder("<").str
    for kind in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)
_DIMENSIONS = 32  # of an array at most


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    offset: int


class _Header(TypedDict):
    meta: dict[str, Any]
    arrays: dict[str, _Entry]


class RecordError(ValueError):
    """Bytes that are not a whole, unchanged record."""


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _header_checksum(header: bytes | memoryview) -> int:
    return zlib.crc32(header, zlib.crc32(len(header).to_bytes(4, "little")))


def encode_record(meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """``meta`` (JSON values) and named arrays as bytes; equal input gives equal bytes.

    Raises ValueError for a dtype that is not plain numbers.
    """
    entries: dict[str, Any] = {}
    payload = bytearray()
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"array {name!r} has dtype {array.dtype}, expected numbers")
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        entries[name] = {"dtype": data.dtype.str, "shape": list(array.shape), "offset": len(payload)}
        payload += data.tobytes()
        payload += bytes(_aligned(len(payload)) - len(payload))
    text = json.dumps({"meta": dict(meta), "arrays": entries}, separators=(",", ":"), ensure_ascii=False).encode()
    header = text.ljust(_aligned(_PREFIX.size + len(text)) - _PREFIX.size)
    return _PREFIX.pack(MAGIC, len(header), _header_checksum(header), zlib.crc32(payload)) + header + payload


def decode_record(data: bytes, *, payload: bool = True) -> tuple[dict[str, Any], dict[str, Array]]:
    """The inverse of ``encode_record``; arrays are read-only views of ``data``.

    ``payload`` false leaves out the checksum of the arrays, for bytes that were verified on the way.

    Raises RecordError when the bytes are cut, changed, or something else.
    """
    if len(data) < _PREFIX.size:
        raise RecordError(f"{len(data)} bytes are no record")
    magic, length, header_checksum, payload_checksum = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise RecordError(f"found the magic {magic!r}, expected {MAGIC!r}")
    view, start = memoryview(data), _PREFIX.size + length
    if _header_checksum(view[_PREFIX.size : start]) != header_checksum:
        raise RecordError("the header's checksum does not match")
    if payload and zlib.crc32(view[start:]) != payload_checksum:
        raise RecordError("the checksum does not match")
    # A checksum shows what was damaged, not who wrote it: what the header says is looked at, too.
    try:
        header = untrusted.parse_json(data[_PREFIX.size : start])
        untrusted.check(header, _Header, "header")
        return header["meta"], {name: _view(data, start, name, entry) for name, entry in header["arrays"].items()}
    except (ValueError, UserError) as error:
        raise RecordError(str(error)) from error


def _view(data: bytes, start: int, name: str, entry: "_Entry") -> Array:
    """An array of the record, which must lie in it whole."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"array {name}: found dtype {entry['dtype'][:20]!r}, expected numbers")
    dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
    if len(shape) > _DIMENSIONS or any(not 0 <= size < 2**31 for size in shape):
        raise ValueError(f"array {name}: found shape {shape[:_DIMENSIONS]}")
    count, offset = math.prod(shape), start + entry["offset"]
    if entry["offset"] < 0 or offset + count * dtype.itemsize > len(data):
        raise ValueError(f"array {name}: {count} values from byte {entry['offset']} on are not in the record")
    return np.frombuffer(data[:0] if not count else data, dtype, count, offset if count else 0).reshape(shape)


def write_shard(path: str | os.PathLike[str], records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file in one step (it is whole or not there) and returns the number of records.

    Raises UserError naming the file when it cannot be written.
    """
    from array_record.python import array_record_module

    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    try:
        temporary.unlink(missing_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(temporary), OPTIONS)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    try:
        for record in records:
            _write(writer, record, path)
            count += 1
    except BaseException:
        # The caller's own error (a bad picture, an interrupt) matters more than a second one from closing.
        _close_quietly(writer)
        temporary.unlink(missing_ok=True)
        raise
    try:
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {_first(error)}") from error
    return count


def _write(writer: Any, record: bytes, path: Path) -> None:
    try:
        writer.write(record)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written: {_first(error)}") from error


def _close_quietly(writer: Any) -> None:
    try:
        writer.close()
    except (OSError, RuntimeError):
        return


def _first(error: Exception) -> str:
    return str(error).split(";")[0]


class RecordReader(Sequence[bytes]):
    """Random access to the records of several shards, counted through. Safe to call from many threads."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], counts: Sequence[int] | None = None) -> None:
        """Opens the shards. ``counts``: how many records each must hold.

        Raises UserError naming the first shard that is missing, cut, damaged or of another length.
        """
        from array_record.python import array_record_module

        self.paths = [Path(p) for p in paths]
        self._readers = []
        lengths = []
        for i, path in enumerate(self.paths):
            if not path.is_file():
                raise UserError(f"{path}: no such shard")
            try:
                # Callers bring their own threads; a pool for each shard would only get in their way.
                reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
                sound, length = reader.ok(), reader.num_records()
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{path}: corrupt or truncated shard ({_first(error)})") from error
            expected = counts[i] if counts is not None else None
            if not sound or (expected is not None and length != expected):
                wanted = f", expected {expected}" if expected is not None else ""
                raise UserError(f"{path}: corrupt or truncated shard: found {length} records{wanted}")
            self._readers.append(reader)
            lengths.append(length)
        self._ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, position in it) of record ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def __getitem__(self, index: Any) -> Any:
        shard, position = self.locate(index)
        try:
            (data,) = self._readers[shard].read([position])
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self.paths[shard]}: corrupt or truncated shard ({_first(error)})") from error
        return data

    def record(self, index: int) -> tuple[dict[str, Any], dict[str, Array]]:
        """Record ``index``, decoded. Raises UserError naming the shard when it is damaged."""
        data = self[index]
        try:
            # A shard is chunks of one record with a hash of each, which reading has just compared.
            return decode_record(data, payload=False)
        except RecordError as error:
            shard, position = self.locate(index)
            raise UserError(f"{self.paths[shard]}: corrupt shard: record {position}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open the files themselves.
        ends = [0, *self._ends]
        return type(self), (self.paths, [after - before for before, after in itertools.pairwise(ends)])

    def close(self) -> None:
        """Closes the files."""
        for reader in self._readers:
            reader.close()
