"""The watchdog: what hangs ends with the stacks of all threads, what is merely slow does not."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nabla_jax import generate, train, watchdog
from nabla_jax.config import Watch
from nabla_jax.data import loader as loaders
from nabla_jax.watchdog import Watchdog
from tests import fixtures


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import time
        from nabla_jax import watchdog
        from nabla_jax.config import Watch
        {textwrap.indent(textwrap.dedent(body), " " * 8).strip()}
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_part_that_hangs_ends_with_the_stacks_of_all_threads() -> None:
    done = run("""
        def stuck_loader(seconds):
            time.sleep(seconds)

        with watchdog.Watchdog(Watch(factor=3, seconds=0.3)) as watch:
            for step in range(1, 10):
                with watch.part("waiting for input", f"step {step}"):
                    stuck_loader(0.01 if step < 6 else 60)
    """)
    assert done.returncode == watchdog.STALLED
    first, *rest = done.stderr.splitlines()
    assert first.startswith("step 6: waiting for input has taken 0.") and first.endswith("the same command continues")
    assert any("in stuck_loader" in line for line in rest) and any("in _watch" in line for line in rest)


def test_one_that_lets_no_other_thread_run_ends_too() -> None:
    done = run("""
        import re
        watchdog._GRACE = 0.2
        with watchdog.Watchdog(Watch(factor=3, seconds=0.2)) as watch:
            for step in range(5):
                with watch.part("the step", f"step {step}"):
                    if step == 4:
                        # One call of the interpreter's own code, which takes years.
                        re.match(r"(a+)+$", "a" * 200 + "b")
    """)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in <module>" in done.stderr


def test_first_parts_and_what_is_not_watched_take_their_time() -> None:
    done = run("""
        with watchdog.Watchdog(Watch(factor=2, seconds=0.2)) as watch:
            for step in range(6):
                with watch.part("the step", f"step {step}"):
                    time.sleep(0.5 if step < watchdog.WARM_UP else 0.01)
                time.sleep(0.4 if step == 4 else 0)
        time.sleep(0.4)
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_limit_follows_the_running_time() -> None:
    watch = Watchdog(Watch(factor=10, seconds=0.2))
    assert watch.limit("a") is None
    for seconds in (0.0,) * watchdog.WARM_UP + (0.05,):
        with watch.part("a", ""):
            time.sleep(seconds)
    assert 0.5 <= (watch.limit("a") or 0) < 5
    assert watch.limit("b") is None
    off = Watchdog(Watch(seconds=0))
    for _ in range(5):
        with off.part("a", ""):
            pass
    assert off.limit("a") is None


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set in place of the end of this process."""
    event = threading.Event()

    def leave(status: int) -> None:
        assert status == watchdog.STALLED
        event.set()

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    return event


def test_training_whose_loader_is_stuck(
    tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read = loaders.Loader.__next__

    def stuck(self: loaders.Loader) -> Any:
        if self.get_state()["step"] == 5:
            assert ended.wait(60)
        return read(self)

    fixtures.prepared_root()
    monkeypatch.setattr(loaders.Loader, "__next__", stuck)
    settings = {"train__workdir": str(tmp_path / "run"), "train__steps": 6, "watch__seconds": 2.0, "watch__factor": 5.0}
    train.main(["--config", str(fixtures.write_config(fixtures.prepared_root(), tmp_path / "c.py", **settings))])
    err = capfd.readouterr().err
    assert f"{tmp_path / 'run'}: step 6: waiting for input has taken 2" in err and "in stuck" in err
    assert (tmp_path / "run" / "adapters" / "step_6").is_dir()


def test_generation_whose_pictures_never_come(
    ended: threading.Event, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Named:
        folder, key = tmp_path, "a"

    def paint(pairs: Any) -> Any:
        assert len(pairs) == 1 or ended.wait(60)
        return []

    with Watchdog(Watch(factor=2, seconds=0.3)) as watch:
        make = generate._watched(watch, Named, paint)  # type: ignore[arg-type]
        for count in (1, 1, 1, 2):
            make([Named] * count)  # type: ignore[list-item]
    assert f"{tmp_path}: pair a: a batch of pictures has taken 0." in capfd.readouterr().err
