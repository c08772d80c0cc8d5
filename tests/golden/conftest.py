"""A table at the end of every run: how far our numbers lie from the stored ones, at most, for each golden case."""

import sys
from typing import Any

import numpy as np
import pytest

# case -> (largest relative error, number of comparisons, tensor where it is largest), collected in this process.
_largest: dict[str, tuple[float, int, str]] = {}


def _note(case: str, error: float, count: int, where: str) -> None:
    previous, total, at = _largest.get(case, (-1.0, 0, ""))
    _largest[case] = (error, total + count, where) if error > previous else (previous, total + count, at)


def relative_error(found: Any, expected: np.ndarray) -> float:
    """The largest deviation over the largest stored magnitude; the deviation itself where only zeros are stored."""
    expected = np.asarray(expected, np.float64)
    if not expected.size:
        return 0.0
    deviation = np.abs(np.asarray(found, np.float64) - expected).max()
    return float(deviation / (np.abs(expected).max() or 1.0))


@pytest.fixture(autouse=True, scope="session")
def _measured() -> Any:
    """Notes every comparison with a stored tensor, or a view of one, that ``np.testing`` makes and that holds."""
    from tests.golden import golden

    def noting(check: Any) -> Any:
        def checked(found: Any, expected: Any, *rest: Any, **options: Any) -> None:
            check(found, expected, *rest, **options)
            origin = golden.origin(expected)
            if origin is not None:
                case, file, tensor = origin
                _note(case, relative_error(found, expected), 1, f"{file}/{tensor}")

        return checked

    with pytest.MonkeyPatch.context() as patch:
        for name in ("assert_allclose", "assert_array_equal"):
            patch.setattr(np.testing, name, noting(getattr(np.testing, name)))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of a distributed run hands its part to the controller."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden_errors"] = {name: list(row) for name, row in _largest.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for case, (error, count, where) in getattr(node, "workeroutput", {}).get("golden_errors", {}).items():
        _note(case, error, count, where)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table."""
    if not _largest:
        return
    module = sys.modules.get("tests.golden.golden")
    terminalreporter.section(
        f"largest relative error per golden case{'' if module is None else f' ({module.place()})'}"
    )
    width = max(map(len, _largest))
    terminalreporter.line(f"{'case':<{width}}  {'error':>8}  {'compared':>8}  where")
    for case, (error, count, where) in sorted(_largest.items()):
        terminalreporter.line(f"{case:<{width}}  {error:8.1e}  {count:>8}  {where}")
