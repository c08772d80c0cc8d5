"""Settings of the whole suite: CPU, a persistent compilation cache, no silent skips, no unread golden."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

ALLOWED_SKIPS = ("needs GPU", "needs TPU")

# Before jax is imported anywhere; subprocesses inherit them. The cache thresholds are zero because the suite
# compiles many small programs, each below jax's default threshold of one second.
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Most programs here run a few times at a tiny size: compiling them took most of the time, and takes a third less.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# A shell that starts the suite in the background makes it ignore SIGINT, and so would every command under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

_refused: list[str] = []


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped":
        return
    if hasattr(report, "wasxfail"):
        _refused.append(f"{report.nodeid}: expected failure: {report.wasxfail}")
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason not in ALLOWED_SKIPS:
        _refused.append(f"{report.nodeid}: skipped: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _refuse(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _refuse(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _refused:
        terminalreporter.section("skips that are not allowed", red=True)
        for line in _refused:
            terminalreporter.line(line)
    if _unread:
        terminalreporter.section("golden tensors that no test read", red=True)
        for line in _unread:
            terminalreporter.line(line)


# --- golden tensors that no test read: workers hand what they read to the controller, a whole run is checked

_read: set[tuple[str, str, str]] = set()
_unread: list[str] = []


def _read_here() -> set[tuple[str, str, str]]:
    module = sys.modules.get("tests.golden.golden")
    return set() if module is None else module.USED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _read.update(map(tuple, getattr(node, "workeroutput", {}).get("golden", ())))


def _is_whole_run(config: pytest.Config) -> bool:
    chosen = [Path(a.split("::")[0]).resolve() for a in config.args if "::" not in a]
    goldens = Path(__file__).resolve().parent / "golden"
    narrowed = config.option.keyword or config.option.markexpr or len(chosen) < len(config.args)
    if narrowed or not goldens.is_dir():
        return False
    return any(goldens.is_relative_to(folder) for folder in chosen)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden"] = sorted(_read_here())
        return
    _read.update(_read_here())
    if _is_whole_run(session.config) and session.exitstatus == pytest.ExitCode.OK:
        from tests.golden.test_classes import stored

        unread = {(*file.split("/"), tensor) for file, tensor in stored()} - _read
        _unread.extend(sorted("/".join(name) for name in unread))
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if (_refused or _unread) and session.exitstatus in fine:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
