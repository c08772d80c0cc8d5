"""Parameter trees to and from safetensors files, one tensor at a time.

A published name such as ``transformer_blocks.3.attn.to_q.weight`` is the path of a leaf in the parameter
tree, split at the dots. Blocks that run under ``jax.lax.scan`` are stored stacked: for a stacked prefix
``transformer_blocks`` that tensor is row 3 of the leaf ``("transformer_blocks", "attn", "to_q", "weight")``.
Nothing is transposed. A file may hold the published tensors under other names and several of them as one: such a
layout is a list of ``Stored``.
"""

import json
import math
import mmap
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from nabla_jax import untrusted
from nabla_jax.errors import UserError
from nabla_jax.models.quantised import Quantised, quantise

Params = dict[str, Any]
# (pattern, replacement) pairs tried in order with re.fullmatch on the name in the file: the first match gives
# the name in the tree; a replacement of None leaves the tensor out. Other names stay as they are.
Table = Sequence[tuple[str, str | None]]
Shape = tuple[int, ...]
Index = tuple[slice, ...]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# The names under which diffusers and transformers save, tried in this order before any other file.
_STEMS = ("diffusion_pytorch_model", "model")
# Page faults of fresh memory cost as much as reading: several threads share them.
_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 1 << 24
_DIMENSIONS = 32  # of a tensor at most
_BLOCKS = 1024  # that no file needs to hold for their names to be listed


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, shape, safetensors dtype code (``F32``, ``BF16``, ...) and first byte."""

    file: Path
    shape: Shape
    dtype: str
    offset: int


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` (exclusive) of the published tensor ``name``; a scalar has one row."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its name and shape there, and the published rows it holds, one after another."""

    name: str
    shape: Shape
    parts: tuple[Rows, ...]


# From the published names and shapes of all tensors of a model to the tensors of the file.
Layout = Callable[[Mapping[str, Shape]], list[Stored]]


def published_layout(shapes: Mapping[str, Shape]) -> list[Stored]:
    """Every published tensor stored as it is, under its own name."""
    return [Stored(name, shape, (whole(name, shape),)) for name, shape in shapes.items()]


def whole(name: str, shape: Shape) -> Rows:
    """All rows of a tensor."""
    return Rows(name, 0, shape[0] if shape else 1)


@dataclass(frozen=True)
class Header:
    """All tensors of a file or of a sharded folder, by name, and the files' metadata merged."""

    files: tuple[Path, ...]
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to a flat dict whose keys are the paths joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of ``flatten``."""
    tree: Params = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, shapes and dtypes of a safetensors file, or of a folder with one file or shards and an index.

    Raises UserError, naming the file, if it is absent, cut short or damaged, or if index and shards disagree.
    """
    files, index = _files(Path(path))
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        for name, entry in _file_header(file, metadata).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = entry
    if index is not None:
        absent = sorted(set(index) - set(tensors))
        if absent:
            raise UserError(f"{files[0].parent}: the index names tensors that no shard holds: {collapse(absent)}")
    return Header(files, tensors, metadata)


def load_tree(
    path: str | os.PathLike[str],
    abstract_params: Params,
    table: Table | None = None,
    *,
    stacked: tuple[str, ...] = (),
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    layout: Layout = published_layout,
) -> Params:
    """Reads a parameter tree leaf by leaf from mapped files, every block straight into its slice of the stack.

    Beside the finished parameters, host memory holds what is on its way to a device: at most one and a half times
    the largest leaf (or this process's part of it). CPU devices take the memory over without a copy.

    Args:
        path: a safetensors file, or a folder with one file or with shards and an index.
        abstract_params: nested dict of ``jax.ShapeDtypeStruct``: the names and shapes that must be there. In the place
            of one there may be a ``Quantised`` (see its module's ``abstract``): that leaf is quantised block by block
            while it is read, so that one block alone exists in full.
        table: renames or leaves out tensors of the file (see ``Table``). Two tensors of equal content may map
            to one name, as aliases of a tied weight do.
        stacked: dotted prefixes whose leaves carry a leading axis, e.g. ``("transformer_blocks",)``.
        dtype: replaces the dtype of every floating leaf of ``abstract_params``.
        sharding: a ``jax.sharding.Sharding`` for all leaves, or a tree of them like the params; each device
            receives its own part only. None puts whole arrays on the default device.
        layout: how the published tensors are stored in the file.

    Raises UserError, in one message, for every tensor that is missing, extra or of another shape.
    """
    stored, entries = _match(path, abstract_params, table, stacked, layout)
    leaves = flatten(abstract_params)
    shardings = flatten(_shardings(abstract_params, sharding))
    kinds = {name: _target_dtype(leaf.dtype, dtype) for name, leaf in leaves.items()}
    sizes = {name: _size(leaf, kinds[name]) for name, leaf in leaves.items()}
    largest = max(sizes.values(), default=0)
    result: dict[str, Any] = {}
    on_its_way: deque[tuple[Any, int]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool, ExitStack() as stack:
        files = {file: stack.enter_context(_opened(file)) for file in {entry.file for entry in entries.values()}}
        places = _places(stored, entries, files)
        for name, leaf in leaves.items():
            while on_its_way and sum(bytes_ for _, bytes_ in on_its_way) + sizes[name] > 1.5 * largest:
                jax.block_until_ready(on_its_way.popleft()[0])
            read = _reader(name, leaf.shape, kinds[name], places, stacked, pool)
            if isinstance(leaf, Quantised):
                codes, scale = _quantised(leaf, read)
                where = shardings[name]
                result[name] = Quantised(_put(codes, where.codes), _put(scale, where.scale), leaf.format)
            elif shardings[name] is None:
                result[name] = jax.device_put(read(tuple(slice(0, n) for n in leaf.shape)))
            else:
                result[name] = jax.make_array_from_callback(leaf.shape, shardings[name], _once(read, leaf.shape))
            on_its_way.append((result[name], sizes[name]))
        jax.block_until_ready([array for array, _ in on_its_way])
    return unflatten(result)


def check_tree(
    path: str | os.PathLike[str],
    abstract_params: Params,
    table: Table | None = None,
    *,
    stacked: tuple[str, ...] = (),
    layout: Layout = published_layout,
) -> Header:
    """Raises the UserError that ``load_tree`` would raise for names and shapes, reading headers only; returns them."""
    _match(path, abstract_params, table, stacked, layout)
    return read_header(path)


def file_tensors(
    params: Params,
    dtype: DTypeLike | None = None,
    *,
    stacked: tuple[str, ...] = (),
    layout: Layout = published_layout,
) -> list[tuple[Stored, np.dtype[Any]]]:
    """What ``save_tree`` writes: every tensor of the file, in order, and its dtype. ``params`` may be abstract.

    Raises ValueError for a dtype that these files do not hold, or for two in one tensor.
    """
    kinds: dict[str, np.dtype[Any]] = {}
    shapes: dict[str, Shape] = {}
    for name, leaf in flatten(params).items():
        kind = _target_dtype(leaf.dtype, dtype)
        if kind not in _CODES:
            raise ValueError(f"{name} has dtype {kind}, which safetensors files of this project do not hold")
        for published, shape in _published(name, leaf.shape, stacked):
            kinds[published], shapes[published] = kind, shape
    found = []
    for tensor in layout(shapes):
        kind, *others = {kinds[part.name] for part in tensor.parts}
        if others:
            raise ValueError(f"{tensor.name} would hold tensors of several dtypes: {kind}, {others[0]}")
        found.append((tensor, kind))
    return found


def save_tree(
    params: Params,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    *,
    stacked: tuple[str, ...] = (),
    layout: Layout = published_layout,
) -> None:
    """Writes a parameter tree as one safetensors file under its published names; ``load_tree``'s inverse.

    Leaves below a ``stacked`` prefix are written block by block; ``dtype`` converts floating leaves; ``layout``
    says how the file stores the published tensors. The header holds ``metadata`` and ``format: pt``, which
    transformers asks for. The file appears under its name when it is complete, never before; host memory holds one
    tensor at a time.
    """
    path = Path(path)
    leaves = flatten(params)
    blocks: dict[str, tuple[str, int | None]] = {}
    for name, leaf in leaves.items():
        alone = _prefix(name, stacked) is None
        names = [published for published, _ in _published(name, leaf.shape, stacked)]
        blocks.update({published: (name, None if alone else row) for row, published in enumerate(names)})
    tensors = file_tensors(params, dtype, stacked=stacked, layout=layout)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    offset = 0
    for tensor, kind in tensors:
        end = offset + math.prod(tensor.shape) * kind.itemsize
        header[tensor.name] = {"dtype": _CODES[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for part, kind in ((part, kind) for tensor, kind in tensors for part in tensor.parts):
                leaf, row = blocks[part.name]
                value = np.asarray(jax.device_get(leaves[leaf] if row is None else leaves[leaf][row]))
                value = value.reshape(value.shape or 1)[part.start : part.stop]
                value = np.ascontiguousarray(value.astype(kind, copy=False))
                out.write(value.reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _files(path: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The safetensors files at ``path`` and, for a sharded folder, the index' name -> file map."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _sharded(path)
        return (path,), None
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder (expected safetensors weights)")
    for stem in _STEMS:
        if (path / f"{stem}.safetensors.index.json").is_file():
            return _sharded(path / f"{stem}.safetensors.index.json")
        if (path / f"{stem}.safetensors").is_file():
            return (path / f"{stem}.safetensors",), None
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _sharded(indices[0])
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1 or indices:
        names = ", ".join(p.name for p in found + indices) or "none"
        raise UserError(f"{path}: expected one safetensors file or one index, found {names}")
    return (found[0],), None


def _sharded(index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    try:
        weight_map = untrusted.parse_json(index.read_bytes())["weight_map"]
        untrusted.check(weight_map, dict[str, str], str(index), "weight_map")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index with a weight_map ({error})") from error
    if not weight_map:
        raise UserError(f"{index}: weight_map: expected tensor names and their files, found none")
    for name in set(weight_map.values()):
        if not untrusted.is_file_name(name):
            raise UserError(f"{index}: weight_map: found {name[:100]!r}, expected the name of a file beside the index")
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent)}")
    return files, weight_map


def _file_header(file: Path, metadata: dict[str, str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        with safe_open(file, framework="numpy") as handle:
            metadata.update(handle.metadata() or {})
            names = handle.offset_keys()
        # Opening has checked the header against the file's size; the positions of the data are only in its text.
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = untrusted.parse_json(stream.read(length))
        for name in names:
            info = header[name]
            # A tensor of no bytes may be of any size on its other sides.
            if max(info["shape"], default=0) >= 2**31 or len(info["shape"]) > _DIMENSIONS:
                raise ValueError(f"{name} has shape {info['shape'][:_DIMENSIONS]}")
            entries[name] = Entry(file, tuple(info["shape"]), info["dtype"], 8 + length + info["data_offsets"][0])
        return entries
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a complete safetensors file (cut short or damaged): {error}") from error


def _resolve(header: Header, table: Table, path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Tree-side published name -> the names in the file that carry it (several only for equal aliases)."""
    sources: dict[str, list[str]] = {}
    for name in header.tensors:
        renamed = _rename(name, table)
        if renamed is not None:
            sources.setdefault(renamed, []).append(name)
    for renamed, names in sources.items():
        for other in names[1:]:
            readable = header.tensors[names[0]].dtype in DTYPES and header.tensors[other].dtype in DTYPES
            if not readable or not np.array_equal(_whole(header, names[0]), _whole(header, other)):
                raise UserError(f"{path}: {names[0]} and {other} stand for the same weight {renamed} but differ")
    return sources


def _match(
    path: str | os.PathLike[str], abstract_params: Params, table: Table | None, stacked: tuple[str, ...], layout: Layout
) -> tuple[list[Stored], dict[str, Entry]]:
    """The tensors that the model's file must hold and where each lies."""
    header = read_header(path)
    sources = _resolve(header, table or (), path)
    leaves = flatten(abstract_params)
    blocks = max((leaf.shape[0] for name, leaf in leaves.items() if _prefix(name, stacked)), default=0)
    if blocks > max(len(header.tensors), _BLOCKS):
        raise UserError(f"{path}: found {len(header.tensors)} tensors, expected those of {blocks} blocks")
    stored = layout({n: s for name, leaf in leaves.items() for n, s in _published(name, leaf.shape, stacked)})
    _check(path, header, sources, stored)
    return stored, {tensor.name: header.tensors[sources[tensor.name][0]] for tensor in stored}


def _rename(name: str, table: Table) -> str | None:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return name


def _whole(header: Header, name: str) -> np.ndarray:
    with safe_open(header.tensors[name].file, framework="numpy") as handle:
        return np.asarray(handle.get_tensor(name))


def _prefix(name: str, stacked: Iterable[str]) -> str | None:
    return next((p for p in stacked if name.startswith(f"{p}.")), None)


def _published(name: str, shape: Shape, stacked: tuple[str, ...]) -> list[tuple[str, Shape]]:
    """The published tensors that make up one leaf, in block order."""
    prefix = _prefix(name, stacked)
    if prefix is None:
        return [(name, tuple(shape))]
    rest = name[len(prefix) + 1 :]
    return [(f"{prefix}.{i}.{rest}", tuple(shape[1:])) for i in range(shape[0])]


def _check(
    path: str | os.PathLike[str],
    header: Header,
    sources: dict[str, list[str]],
    stored: Iterable[Stored],
) -> None:
    expected = {tensor.name: tensor.shape for tensor in stored}
    missing = [name for name in expected if name not in sources]
    extra = [name for renamed, names in sources.items() if renamed not in expected for name in names]
    wrong = []
    for renamed, names in sources.items():
        entry = header.tensors[names[0]]
        if renamed in expected and entry.shape != expected[renamed]:
            wrong.append(f"{names[0]} in {entry.file.name}: found {entry.shape}, expected {expected[renamed]}")
        if renamed in expected and entry.dtype not in DTYPES:
            wrong.append(f"{names[0]} in {entry.file.name}: found dtype {entry.dtype}, expected {', '.join(DTYPES)}")
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {collapse(missing)}")
    if extra:
        files = sorted({header.tensors[name].file.name for name in extra})
        problems.append(f"{len(extra)} not expected (in {', '.join(files)}): {collapse(extra)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape or type: {', '.join(wrong)}")
    if problems:
        raise UserError(f"{path}: the tensors do not fit the model; {'; '.join(problems)}")


def collapse(names: Sequence[str]) -> str:
    """All names on one line, those that differ in a block number once, as in ``blocks.{0..18}.weight``."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        groups.setdefault(key, []).extend([] if match is None else [int(match.group())])
    return ", ".join(_with_numbers(key, sorted(numbers)) for key, numbers in groups.items())


def _with_numbers(key: str, numbers: list[int]) -> str:
    if not numbers:
        return key
    if len(numbers) == 1:
        return key.replace("{}", str(numbers[0]), 1)
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    text = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))
    return key.replace("{}", f"{{{text}}}", 1)


def _shardings(abstract_params: Params, sharding: Any) -> Params:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda _: sharding, abstract_params)
    return jax.tree.map(lambda _, s: s, abstract_params, sharding)


def _target_dtype(found: DTypeLike, wanted: DTypeLike | None) -> np.dtype[Any]:
    kind = np.dtype(found)
    return kind if wanted is None or not jax.dtypes.issubdtype(kind, np.floating) else np.dtype(wanted)


@dataclass(frozen=True)
class _Open:
    """A file that is being read: its path, descriptor and bytes (mapped)."""

    path: Path
    descriptor: int
    data: np.ndarray

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """Fills ``target`` from ``source``, a view into ``data``, converting its dtype."""
        if target.dtype != source.dtype or not (target.flags.c_contiguous and source.flags.c_contiguous):
            np.copyto(target, source, casting="unsafe")
            return
        # Reading takes half the time of copying from the map, whose pages the kernel would set up one by one.
        offset = source.ctypes.data - self.data.ctypes.data
        rest = target.reshape(-1).view(np.uint8).data
        while rest:
            count = os.preadv(self.descriptor, [rest], offset)
            if not count:
                raise UserError(f"{self.path}: cut short while it was read")
            rest, offset = rest[count:], offset + count


@dataclass(frozen=True)
class _Place:
    """Rows ``start`` to ``stop`` of a published tensor as a view [stop - start, ...] into an open file."""

    start: int
    stop: int
    view: np.ndarray
    file: _Open


@contextmanager
def _opened(path: Path) -> Iterator[_Open]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    with stream:
        # The map lives as long as the views into it.
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        yield _Open(path, stream.fileno(), np.frombuffer(mapped, np.uint8))


def _places(
    stored: Iterable[Stored], entries: Mapping[str, Entry], files: Mapping[Path, _Open]
) -> dict[str, list[_Place]]:
    """Where the rows of every published tensor lie; nothing is read."""
    places: dict[str, list[_Place]] = {}
    for tensor in stored:
        entry = entries[tensor.name]
        file = files[entry.file]
        shape = entry.shape or (1,)
        data: np.ndarray = np.ndarray(shape, DTYPES[entry.dtype], buffer=file.data.data, offset=entry.offset)
        row = 0
        for part in tensor.parts:
            count = part.stop - part.start
            places.setdefault(part.name, []).append(_Place(part.start, part.stop, data[row : row + count], file))
            row += count
    return places


def _aligned(shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory that begins at a multiple of 64 bytes: XLA's CPU client takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _copies(
    out: np.ndarray, index: Index, shape: Shape, places: Iterable[_Place]
) -> Iterator[tuple[_Open, np.ndarray, np.ndarray]]:
    """(file, destination, source) of every copy that fills ``out`` with part ``index`` of a tensor of this shape."""
    if not shape:
        out, index, shape = out.reshape(1), (slice(0, 1),), (1,)
    first, last, _ = index[0].indices(shape[0])
    for place in places:
        start, stop = max(first, place.start), min(last, place.stop)
        if start < stop:
            # Reshaped because a file may keep axes of length 1 that the published tensor has not.
            rows = place.view[start - place.start : stop - place.start].reshape(stop - start, *shape[1:])
            target = out[start - first : stop - first]
            step = max(1, _CHUNK * (stop - start) // max(1, target.nbytes))
            for i in range(0, stop - start, step):
                yield place.file, target[i : i + step], rows[(slice(i, i + step), *index[1:])]


def _reader(
    name: str,
    shape: Shape,
    dtype: np.dtype[Any],
    places: Mapping[str, list[_Place]],
    stacked: tuple[str, ...],
    pool: ThreadPoolExecutor,
) -> Callable[[Index], np.ndarray]:
    """A function from an index into the leaf to that part of it, read from the files."""
    blocks = _published(name, shape, stacked)
    alone = _prefix(name, stacked) is None

    def read(index: Index) -> np.ndarray:
        part = _aligned(tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)), dtype)
        if alone:
            copies = list(_copies(part, index, shape, places[name]))
        else:
            rows = range(*index[0].indices(shape[0]))
            names = [blocks[row][0] for row in rows]
            copies = [c for i, n in enumerate(names) for c in _copies(part[i, ...], index[1:], shape[1:], places[n])]
        if part.nbytes < _CHUNK:
            for copy in copies:
                _Open.copy(*copy)
        else:
            list(pool.map(_Open.copy, *zip(*copies, strict=True)))
        return part

    return read


def _size(leaf: Any, dtype: np.dtype[Any]) -> int:
    """Bytes of an abstract leaf whose numbers are of ``dtype``, or of a quantised one."""
    if not isinstance(leaf, Quantised):
        return math.prod(leaf.shape) * dtype.itemsize
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in (leaf.codes, leaf.scale))


def _quantised(leaf: Quantised, read: Callable[[Index], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a whole leaf [L, out, in], from one block after another."""
    codes, scale = (_aligned(part.shape, np.dtype(part.dtype)) for part in (leaf.codes, leaf.scale))
    rest = tuple(slice(0, n) for n in leaf.shape[1:])
    for block in range(leaf.shape[0]):
        made = jax.device_get(quantise(read((slice(block, block + 1), *rest)), leaf.format))
        codes[block], scale[block] = made.codes[0], made.scale[0]
    return codes, scale


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _once(read: Callable[[Index], np.ndarray], shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    """``read`` that keeps its last answer: replicas ask for the same part several times."""
    kept: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def cached(index: Any) -> np.ndarray:
        full = tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        key = tuple((s.start, s.stop, s.step) for s in full)
        if key not in kept:
            kept.clear()
            kept[key] = read(full)
        return kept[key]

    return cached
