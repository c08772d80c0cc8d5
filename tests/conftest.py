"""Settings of the whole suite: CPU, a persistent compilation cache, one thread per torch, and no silent skips."""

import os
from pathlib import Path

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
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

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


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
