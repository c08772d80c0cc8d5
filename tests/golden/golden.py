"""Reads the golden numbers: tensors and scalars made once from the published PyTorch system.

Layout: `<NABLA_GOLDEN_DIR>/<case>/<NABLA_GOLDEN_SET>/` with a `manifest.json` and `*.safetensors`. The
directory defaults to `tests/golden/data`, the set to `dev`. Tests take every size, file and tensor name from
the manifest, so that they also run against another set. Whatever is missing is a failure, never a skip.

    golden = case("schedules")
    sigmas = golden.tensor("schedules", "dev.steps28.n4096.sigmas")
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

# (case, file, tensor) of everything that was read in this process; the suite checks that nothing stored goes
# unread.
USED: set[tuple[str, str, str]] = set()
# Every array that was handed out, by identity, with what it is; holding it keeps the identity.
_ORIGIN: dict[int, tuple[np.ndarray, tuple[str, str, str]]] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case of one set: its folder and its manifest."""

    name: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings the numbers were made with."""
        return self.manifest["config"]

    @property
    def files(self) -> list[str]:
        """File names of the manifest, without `.safetensors`."""
        return [name.removesuffix(".safetensors") for name in self.manifest["files"]]

    def scalar(self, name: str) -> Any:
        """Value of a scalar of the manifest: a number, a list or a dict."""
        scalars = self.manifest["scalars"]
        if name not in scalars:
            raise AssertionError(f"{self.folder}/manifest.json: no scalar {name!r}; there are {sorted(scalars)}")
        return scalars[name]["value"]

    def names(self, file: str) -> list[str]:
        """Names of the tensors which the manifest promises for a file."""
        return list(self._entry(file)["tensors"])

    def has(self, file: str, name: str) -> bool:
        """Whether the manifest promises this tensor (sets differ in the intermediates they hold)."""
        return f"{_stem(file)}.safetensors" in self.manifest["files"] and name in self.names(file)

    def tensor(self, file: str, name: str) -> np.ndarray:
        """One tensor, in its stored dtype; float16 (always exactly representable here) becomes float32."""
        entry = self._entry(file)["tensors"]
        if name not in entry:
            raise AssertionError(f"{self.folder}/{_stem(file)}.safetensors: the manifest has no tensor {name!r}")
        path = self.folder / f"{_stem(file)}.safetensors"
        array = _read(path, (name,))[name]
        _check_content(path, name, array, entry[name])
        if list(array.shape) != list(entry[name]["shape"]):
            raise AssertionError(
                f"{self.folder}/{_stem(file)}.safetensors: {name} has shape {array.shape}, "
                f"the manifest says {entry[name]['shape']}"
            )
        USED.add((self.name, _stem(file), name))
        array = _widen(array)
        _ORIGIN[id(array)] = (array, (self.name, _stem(file), name))
        return array

    def tensors(self, file: str, prefix: str = "") -> dict[str, np.ndarray]:
        """All tensors of a file whose name begins with `prefix`; the prefix is cut off the keys."""
        return {
            name.removeprefix(prefix): self.tensor(file, name) for name in self.names(file) if name.startswith(prefix)
        }

    def path(self, file: str) -> Path:
        """Path of a file of the case, which must exist; all its tensors count as read."""
        USED.update((self.name, _stem(file), name) for name in self.names(file))
        path = self.folder / f"{_stem(file)}.safetensors"
        _check_file(path)
        return path

    def external_path(self, key: str) -> Path:
        """Path of a file of another case of the same set, by its key in the manifest's `external_files`."""
        external = self.manifest["external_files"]
        if key not in external:
            raise AssertionError(f"{self.folder}/manifest.json: no external file {key!r}; there are {sorted(external)}")
        path = (self.folder / external[key]).resolve()
        _check_file(path)
        return path

    def _entry(self, file: str) -> dict[str, Any]:
        files = self.manifest["files"]
        name = f"{_stem(file)}.safetensors"
        if name not in files:
            raise AssertionError(f"{self.folder}/manifest.json: no file {name!r}; there are {sorted(files)}")
        return files[name]


def case(name: str) -> Case:
    """The golden case `name` of the chosen set; a missing folder or manifest is an AssertionError."""
    root, chosen = _chosen()
    return _case(name, root / name / chosen)


def place() -> str:
    """Which goldens are read, for messages."""
    root, chosen = _chosen()
    return f"{root}, set {chosen}"


def origin(array: Any) -> tuple[str, str, str] | None:
    """(case, file, tensor) of a stored tensor or a view of one, None for anything else."""
    while isinstance(array, np.ndarray):
        known = _ORIGIN.get(id(array))
        if known is not None and known[0] is array:
            return known[1]
        array = array.base
    return None


def _chosen() -> tuple[Path, str]:
    root = Path(os.environ.get("NABLA_GOLDEN_DIR", Path(__file__).parent / "data"))
    return root, os.environ.get("NABLA_GOLDEN_SET", "dev")


@functools.cache
def _case(name: str, folder: Path) -> Case:
    return Case(name, folder, json.loads(_existing(folder / "manifest.json").read_text()))


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise AssertionError(f"golden file {path} is missing (NABLA_GOLDEN_DIR, NABLA_GOLDEN_SET)")
    return path


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    with safe_open(_existing(path), framework="numpy") as file:
        missing = sorted(set(names) - set(file.keys()))
        if missing:
            raise AssertionError(f"{path}: tensors {missing} are missing")
        return {name: file.get_tensor(name) for name in names}


@functools.cache
def _check_file(path: Path) -> None:
    """Checks every tensor of a file against the manifest beside it."""
    entries = json.loads(_existing(path.parent / "manifest.json").read_text())["files"][path.name]["tensors"]
    for name, array in _read(path, tuple(entries)).items():
        _check_content(path, name, array, entries[name])


def _check_content(path: Path, name: str, array: np.ndarray, entry: dict[str, Any]) -> None:
    """A tensor that is not the one which the manifest describes is a damaged golden, whatever the tests make of it."""
    found = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
    if found != entry["sha256_16"]:
        raise AssertionError(f"{path}: {name} has sha256 {found}…, the manifest says {entry['sha256_16']}…")


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array
