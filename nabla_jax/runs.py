"""What every verb shares around its work: run folders, atomic files, locks, signals, progress bars,
one-line errors.

A run folder holds ``config.json`` (resolved), ``environment.json``, ``metrics.jsonl``, ``checkpoints/``,
``adapters/``, ``samples/`` and, of steps that were not finite, ``nonfinite/``. Nothing here imports jax.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from nabla_jax import config as configs
from nabla_jax import untrusted
from nabla_jax.errors import UserError

T = TypeVar("T")

# A run may be continued with other values of these: they do not change what the steps already made would
# have been.
CONTINUABLE = frozenset(
    (
        "source",
        "preview",
        "base.obtain",
        "base.attention",
        "data.obtain",
        "data.threads",
        "data.workers",
        "train.workdir",
        "train.steps",
        "train.accumulate",
        "train.log_every",
        "train.save_every",
        "train.sample_every",
        "train.nonfinite",
        "sample.steps",
        "sample.guidance",
        "sample.seed",
        "sample.batch",
        "sample.image_guidance",
        "sample.sibling_guidance",
        "sample.mask_policy",
        "sample.expansion",
        "sample.window",
        "sample.feather",
    )
)


# ----------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Work stopped at a point from which it can be continued, because a signal asked for it."""

    def __init__(self, signum: int, hint: str) -> None:
        super().__init__(hint)
        self.signum = signum


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a verb; exit status 2 for a user's mistake (one line), 128 + n when stopped by signal n.

    One of several processes waits for the others at its end, but leaves them at once where it failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        main(argv)
        _end_together()
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _end_together()
        _print_error(str(stop))
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        # Python takes one that was raised below an exec of text (dataclasses are made by it) for unhandled, whoever
        # caught it, and ends `python -m` by the signal; the next exec of text makes it forget.
        exec("")  # noqa: S102
        _fail("interrupted; the same command continues", 128 + signal.SIGINT)
    except OSError as error:
        # Files that cannot be written are the user's to mend; any other OSError is a bug and keeps its
        # traceback.
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT):
            raise
        _fail(f"{error.filename or 'output'}: cannot be written: {error.strerror}", 2)


def _fail(message: str, status: int) -> None:
    _print_error(message)
    if processes := _processes():
        processes.leave(status)
    sys.exit(status)


def _print_error(message: str) -> None:
    sys.stdout.flush()
    print(" ".join(message.split("\n")), file=sys.stderr, flush=True)


def _end_together() -> None:
    if processes := _processes():
        processes.finish()


def _processes() -> types.ModuleType | None:
    # There only if the verb asked for it: importing it would load jax, which a mistake need not wait for.
    return sys.modules.get("nabla_jax.parallel.processes")


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a flag that loops look at; a second one interrupts at once.

    Use as a context manager; the previous handlers return at its end.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: types.FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def progress(total: int, what: str, *, done: int = 0, unit: str = "it", shown: bool = True) -> Any:
    """A progress bar with rate and time left on stderr, as a context manager; ``update(n)`` advances it."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, mininterval=0.5, smoothing=0.1,
        disable=not shown,
    )  # fmt: skip


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields ``items`` under a progress bar."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=what, unit=unit, dynamic_ncols=True, mininterval=0.5, smoothing=0.1)


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write below ``path`` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error


def write_atomic(path: Path, data: bytes | str | Iterable[bytes]) -> None:
    """Writes a file, given whole or in pieces, so that it is either whole or absent, also after a power cut.

    Raises UserError when the folder cannot be made or the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as out:
                for piece in [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data:
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with ``write_atomic``."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError naming the file when it is absent or no JSON."""
    return untrusted.read_json(path)


class JsonLines:
    """A file of one JSON object per line, appended to; each line reaches the disk before ``append`` returns.

    A line that a killed process left half written is cut off when the file is opened again.
    """

    def __init__(self, path: Path, kind: Any = dict[str, Any]) -> None:
        """Reads the rows that are there, of ``kind``; see ``read_rows``."""
        self.path = path
        self.rows: list[dict[str, Any]] = read_rows(path, kind)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.read_bytes() != _lines(self.rows).encode():
                write_atomic(path, _lines(self.rows))
            self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one line."""
        self.extend([row])

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds several lines; a death in between keeps the first ones."""
        with writing(self.path):
            self._file.write(_lines(rows).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += [dict(row) for row in rows]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the rows that are not ``wanted``."""
        kept = [row for row in self.rows if wanted(row)]
        if len(kept) == len(self.rows):
            return
        self._file.close()
        write_atomic(self.path, _lines(kept))
        self.rows = kept
        with writing(self.path):
            self._file = self.path.open("ab")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class PictureRow(TypedDict):
    """What a list of pictures that ``generate`` made says of each, beside its settings; ``file``: below the list's."""

    pair: str
    subject_id: str
    target_id: str
    subject_used: str
    file: str


def read_rows(path: Path, kind: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """The complete rows of a JSON-lines file; empty when it is absent.

    Raises UserError for a damaged line other than the last, and for one that is not of ``kind`` (see
    ``untrusted.check``).
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = untrusted.parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"found {type(row).__name__}")
        except ValueError as error:
            if number == len(lines):  # no newline after it: the process died while writing
                break
            raise UserError(f"{path}: line {number} is no JSON object ({error})") from error
        untrusted.check(row, kind, f"{path}: line {number}")
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------
# Run folders
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one training run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """A list of starts: versions, devices, command."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints by step."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Sheets drawn during training."""
        return self.path / "samples"

    def nonfinite(self, step: int) -> Path:
        """What is known of a step that was not finite; see ``nabla_jax.reproduce``."""
        return self.path / "nonfinite" / f"step_{step}.json"

    @property
    def lock(self) -> Path:
        """Held by the process that works in the folder."""
        return self.path / ".lock"

    def adapter(self, step: int, name: str) -> Path:
        """The exported adapter of a step."""
        return self.path / "adapters" / f"step_{step}" / f"{name}.safetensors"

    @property
    def last(self) -> Path:
        """A file holding the name of the newest step folder beside it."""
        return self.path / "adapters" / "last"

    def last_step(self) -> int | None:
        """The step of the newest exported adapter."""
        if not self.last.is_file():
            return None
        text = self.last.read_bytes().decode(errors="replace").strip()
        step = untrusted.whole_number(text.removeprefix("step_"))
        if not text.startswith("step_") or step is None:
            raise UserError(f"{self.last}: found {text[:100]!r}, expected step_N")
        return step

    def last_adapter(self, name: str) -> Path:
        """The newest exported adapter."""
        return self.adapter(self.last_step() or 0, name)


@contextlib.contextmanager
def open_run(config: configs.Config, sha256: Mapping[str, str] | None = None) -> Iterator[RunFolder]:
    """Makes or continues the run folder ``train.workdir`` and holds its lock.

    ``sha256``: hashes, by configuration key, of files that every step depends on; part of what may not change.

    Raises UserError if another process works in it, if it was made with another configuration (naming the
    keys that differ), or if it cannot be written.
    """
    folder = RunFolder(Path(config.train.workdir))
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    with lock(folder.lock, f"train.workdir {folder.path}"):
        resolved = configs.to_dict(config) | ({"sha256": dict(sha256)} if sha256 else {})
        if folder.config.is_file():
            _check_same(folder, resolved)
        write_json(folder.config, resolved)
        yield folder


@contextlib.contextmanager
def join_run(config: configs.Config) -> Iterator[RunFolder]:
    """The run folder ``train.workdir``, which another process of the same run has opened."""
    yield RunFolder(Path(config.train.workdir))


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock that the system releases when the process ends, however it ends."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip()
            raise UserError(f"{what}: another process is working in it ({holder or 'unknown'}, lock {path})") from error
        with writing(path):
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}\n")
            handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def _check_same(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    # A field that is younger than the run has a default that leaves the run what it was.
    written = read_json(folder.config)
    untrusted.check(written, dict[str, Any], str(folder.config))
    before = json.loads(json.dumps(configs.defaults())) | configs.flatten(written)
    now = configs.flatten(json.loads(json.dumps(resolved)))
    differing = [
        f"{key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in CONTINUABLE
        and not key.startswith(("benchmarks", "extract.", "mesh.", "metrics.", "watch."))
    ]
    if differing:
        raise UserError(
            f"{folder.path}: this run was made with another configuration ({'; '.join(differing)}); "
            "choose another train.workdir or delete it"
        )


def write_environment(path: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Appends versions, platform, git commit and command line of this start to a JSON list."""
    starts = read_json(path) if path.is_file() else []
    untrusted.check(starts, list[Any], str(path))
    starts.append(environment() | dict(extra or {}))
    write_json(path, starts)


def environment() -> dict[str, Any]:
    """What is needed to explain a result later."""
    packages = (
        "nabla_jax",
        "jax",
        "jaxlib",
        "libtpu",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "safetensors",
    )
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
