"""Parameter trees to and from safetensors files, one tensor at a time.

A published name such as ``transformer_blocks.3.attn.to_q.weight`` is the path of a leaf in the parameter
tree, split at the dots. Blocks that run under ``jax.lax.scan`` are stored stacked: for a stacked prefix
``transformer_blocks`` that tensor is row 3 of the leaf ``("transformer_blocks", "attn", "to_q", "weight")``.
Nothing is transposed.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from nabla_jax.errors import UserError

Params = dict[str, Any]
# (pattern, replacement) pairs tried in order with re.fullmatch on the name in the file: the first match gives
# the name in the tree; a replacement of None leaves the tensor out. Other names stay as they are.
Table = Sequence[tuple[str, str | None]]
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


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, shape and safetensors dtype code (``F32``, ``BF16``, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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
            raise UserError(f"{files[0].parent}: the index names tensors that no shard holds: {_collapse(absent)}")
    return Header(files, tensors, metadata)


def check_tree(
    path: str | os.PathLike[str],
    abstract_params: Params,
    table: Table | None = None,
    *,
    stacked: tuple[str, ...] = (),
) -> Header:
    """Raises what ``load_tree`` would raise for missing, extra or misshapen tensors; reads headers only."""
    header = read_header(path)
    _check(path, header, _resolve(header, table or (), path), flatten(abstract_params), stacked)
    return header


def load_tree(
    path: str | os.PathLike[str],
    abstract_params: Params,
    table: Table | None = None,
    *,
    stacked: tuple[str, ...] = (),
    dtype: DTypeLike | None = None,
    sharding: Any = None,
) -> Params:
    """Reads a parameter tree tensor by tensor; host memory holds one leaf (or one shard of it) at a time.

    Args:
        path: a safetensors file, or a folder with one file or with shards and an index.
        abstract_params: nested dict of ``jax.ShapeDtypeStruct``: the names and shapes that must be there.
        table: renames or leaves out tensors of the file (see ``Table``). Two tensors of equal content may map
            to one name, as aliases of a tied weight do.
        stacked: dotted prefixes whose leaves carry a leading axis, e.g. ``("transformer_blocks",)``.
        dtype: replaces the dtype of every floating leaf of ``abstract_params``.
        sharding: a ``jax.sharding.Sharding`` for all leaves, or a tree of them like the params; each device
            receives its own part only. None puts whole arrays on the default device.

    Raises UserError, in one message, for every tensor that is missing, extra or of another shape.
    """
    header = read_header(path)
    sources = _resolve(header, table or (), path)
    leaves = flatten(abstract_params)
    _check(path, header, sources, leaves, stacked)
    shardings = flatten(_shardings(abstract_params, sharding))
    result: dict[str, jax.Array] = {}
    with ExitStack() as stack:
        handles = {file: stack.enter_context(safe_open(file, framework="numpy")) for file in header.files}

        def tensor(name: str, index: Index) -> np.ndarray:
            source = sources[name][0]
            entry = header.tensors[source]
            handle = handles[entry.file]
            try:
                if _covers(index, entry.shape):
                    return np.asarray(handle.get_tensor(source))
                return np.asarray(handle.get_slice(source)[index])
            except SafetensorError as error:
                raise UserError(f"{entry.file}: tensor {source} cannot be read: {error}") from error

        for name, leaf in leaves.items():
            target = _target_dtype(leaf.dtype, dtype)
            read = _reader(name, leaf.shape, target, tensor, stacked)
            if shardings[name] is None:
                result[name] = jax.device_put(read(tuple(slice(0, n) for n in leaf.shape)))
            else:
                result[name] = jax.make_array_from_callback(leaf.shape, shardings[name], _once(read, leaf.shape))
    return unflatten(result)


def save_tree(
    params: Params,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    *,
    stacked: tuple[str, ...] = (),
) -> None:
    """Writes a parameter tree as one safetensors file under its published names; ``load_tree``'s inverse.

    Leaves below a ``stacked`` prefix are written block by block; ``dtype`` converts floating leaves. The
    header holds ``metadata`` and ``format: pt``, which transformers asks for. The file appears under its name
    when it is complete, never before; host memory holds one leaf at a time.
    """
    path = Path(path)
    leaves = flatten(params)
    plan: list[tuple[str, np.dtype[Any]]] = []
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    offset = 0
    for name, leaf in leaves.items():
        kind = _target_dtype(leaf.dtype, dtype)
        if kind not in _CODES:
            raise ValueError(f"{path}: {name} has dtype {kind}, which safetensors files of this project do not hold")
        plan.append((name, kind))
        for published, shape in _published(name, leaf.shape, stacked):
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            header[published] = {
                "dtype": _CODES[kind],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, kind in plan:
                # Blocks of a stacked leaf lie one after another: the leaf in C order is already their bytes.
                value = np.ascontiguousarray(np.asarray(jax.device_get(leaves[name])).astype(kind, copy=False))
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
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index with a weight_map ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: expected tensor names and their files, found {weight_map!r}")
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent)}")
    return files, weight_map


def _file_header(file: Path, metadata: dict[str, str]) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="numpy") as handle:
            metadata.update(handle.metadata() or {})
            entries = {}
            for name in handle.offset_keys():
                view = handle.get_slice(name)
                entries[name] = Entry(file, tuple(view.get_shape()), str(view.get_dtype()))
            return entries
    except (SafetensorError, OSError) as error:
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


def _published(name: str, shape: tuple[int, ...], stacked: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
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
    leaves: Mapping[str, Any],
    stacked: tuple[str, ...],
) -> None:
    expected = {n: s for name, leaf in leaves.items() for n, s in _published(name, leaf.shape, stacked)}
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
        problems.append(f"{len(missing)} missing: {_collapse(missing)}")
    if extra:
        files = sorted({header.tensors[name].file.name for name in extra})
        problems.append(f"{len(extra)} not expected (in {', '.join(files)}): {_collapse(extra)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape or type: {', '.join(wrong)}")
    if problems:
        raise UserError(f"{path}: the tensors do not fit the model; {'; '.join(problems)}")


def _collapse(names: Sequence[str]) -> str:
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


def _covers(index: Index, shape: tuple[int, ...]) -> bool:
    return all((s.start or 0) == 0 and (s.stop is None or s.stop >= n) for s, n in zip(index, shape, strict=True))


def _reader(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    tensor: Callable[[str, Index], np.ndarray],
    stacked: tuple[str, ...],
) -> Callable[[Index], np.ndarray]:
    """A function from an index into the leaf to that part of it, read from the file."""
    blocks = _published(name, shape, stacked)
    if _prefix(name, stacked) is None:
        return lambda index: tensor(name, index).astype(dtype, copy=False)

    def read(index: Index) -> np.ndarray:
        rows = range(*index[0].indices(shape[0]))
        sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], shape[1:], strict=True)]
        part = np.empty((len(rows), *sizes), dtype)
        for i, row in enumerate(rows):
            part[i] = tensor(blocks[row][0], index[1:])
        return part

    return read


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
