"""Measured work in fresh processes, and the record of what was measured.

A child tells its parent what it has done as lines of JSON with an ``event``; the parent reads its anonymous memory
meanwhile.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import host_memory
from nabla_jax.runs import environment, write_json

RESULTS = Path(__file__).parent / "results"


def event(name: str, **values: Any) -> None:
    """Tells the parent when (on the clock that all processes share) something is done."""
    print(json.dumps({"event": name, "time": time.monotonic(), "cpu": time.process_time(), **values}), flush=True)


def anonymous_memory(process: "subprocess.Popen[str]", pause: float = 0.003) -> Iterator[tuple[float, int]]:
    """(time, bytes of anonymous memory) of a running process, every ``pause`` seconds; on Linux only."""
    while process.poll() is None:
        now, found = time.monotonic(), host_memory.anonymous(process.pid)
        if found:
            yield now, found
        time.sleep(pause)


def run(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs ``python -m module arguments`` and gives the values of its ``done`` event.

    Added are ``seconds_to`` {event: seconds since the start}, ``memory_before`` at the event ``imported``,
    ``memory_peak`` from there on and ``memory_end`` at ``done``: bytes of anonymous memory.

    Raises RuntimeError, with the end of what the process said, when it fails.
    """
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error") | dict(environment or {}),
    )  # fmt: skip
    samples: list[tuple[float, int]] = []
    said: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    errors = process.stderr
    # Drained beside stdout: a full pipe would stop the child.
    threads = [
        threading.Thread(target=lambda: samples.extend(anonymous_memory(process, 0.02))),
        threading.Thread(target=lambda: said.extend(errors)),
    ]
    for thread in threads:
        thread.start()
    try:
        events = {e["event"]: e for e in (json.loads(line) for line in process.stdout if line.startswith('{"event"'))}
    except BaseException:
        process.kill()
        raise
    finally:
        for thread in threads:
            thread.join()
        process.wait()
    if process.returncode or "done" not in events:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {process.returncode}: {''.join(said)[-2000:]}")
    started, ended = events["imported"]["time"], events["done"]["time"]
    within = [value for when, value in samples if started <= when <= ended]
    return {k: v for k, v in events["done"].items() if k not in ("event", "time", "cpu")} | {
        "seconds_to": {name: e["time"] - begun for name, e in events.items()},
        "memory_before": max((value for when, value in samples if when <= started), default=0),
        "memory_peak": max(within, default=0),
        "memory_end": within[-1] if within else 0,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load, date, versions and commit."""
    about = environment()
    cpu, info = platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        cpu = names[0] if names else cpu
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = about["versions"] | _versions("torch", "diffusers")
    return {
        "date": about["time"], "commit": about["git_commit"], "python": about["python"], "versions": versions,
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory": pages, "load": os.getloadavg()[0],
        "malloc": {name: value for name, value in os.environ.items() if "MALLOC" in name.upper()},
    }  # fmt: skip


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Record:
    """A JSON file {"machine", "settings", "runs"} that grows run by run, so that a stopped benchmark is continued."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Opens ``path`` if it holds these settings, else begins anew."""
        self.path = path
        self.content: dict[str, Any] = {"machine": machine(), "settings": dict(settings), "runs": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == json.loads(json.dumps(dict(settings))):
                self.content = found

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished run."""
        return self.content["runs"].get(key)

    def put(self, key: str, values: Mapping[str, Any]) -> None:
        """Adds a run and writes the file."""
        self.content["runs"][key] = dict(values)
        self.write()

    def write(self, **more: Any) -> None:
        """Writes the file, with further entries."""
        self.content |= more
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def default_path(name: str) -> Path:
    """Of today's record."""
    return RESULTS / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
