"""Several real processes: what happens to the others when one of them fails, dies or is stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla_jax.errors import UserError
from nabla_jax.parallel import processes
from tests.fixtures import free_address

TIMEOUT = 8  # seconds

# The arguments are what each process does.
PROGRAM = """
import os, signal, sys, time
from nabla_jax import runs
from nabla_jax.errors import UserError
from nabla_jax.parallel import processes

def main(_):
    processes.initialize()
    processes.wait_for_all("start")
    print("started", flush=True)
    exec(sys.argv[1 + processes.part()[0]])

runs.run_main(main, [])
"""


class Pair:
    """Two processes over gloo, each with its own statements."""

    def __init__(self, *statements: str) -> None:
        address = free_address()
        settings = {processes.COORDINATOR: address, processes.COUNT: "2", processes.TIMEOUT: str(TIMEOUT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *statements],
                env=os.environ | settings | {processes.INDEX: str(index), "PYTHONPATH": str(Path.cwd())},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "started\n":
                assert line, process.communicate()[1]
        self.start = time.monotonic()

    def wait(self, index: int) -> tuple[int, str, float]:
        """(exit status, standard error, seconds since both started)."""
        _, err = self.processes[index].communicate(timeout=60)
        return self.processes[index].returncode, err, time.monotonic() - self.start


@pytest.fixture
def run() -> Iterator[type[Pair]]:
    started: list[Pair] = []

    class Kept(Pair):
        def __init__(self, *statements: str) -> None:
            started.append(self)
            super().__init__(*statements)

    yield Kept
    for process in (process for pair in started for process in pair.processes):
        process.kill()
        process.communicate()


DIE, WAIT = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(100)"


def test_a_process_that_dies_ends_one_that_works_alone(run: type[Pair]) -> None:
    pair = run(WAIT, DIE)
    assert pair.wait(1)[0] == -signal.SIGKILL
    status, err, seconds = pair.wait(0)
    assert status == -signal.SIGABRT and seconds < TIMEOUT + 5
    assert "another task died" in err and "stopped sending heartbeats):\n1\n" in err


def test_the_first_process_that_dies_ends_one_that_works_alone(run: type[Pair]) -> None:
    pair = run(DIE, WAIT)
    status, err, seconds = pair.wait(1)
    assert status == -signal.SIGABRT and seconds < TIMEOUT + 5
    assert "another task died" in err


@pytest.mark.parametrize(
    ("what", "status", "line"),
    [
        ("raise UserError('a.png: no such picture')", 2, "a.png: no such picture"),
        ("raise KeyError('x')", 1, "KeyError: 'x'"),
    ],
)
def test_a_failing_process_keeps_its_status_and_ends_the_waiting_one(
    run: type[Pair], what: str, status: int, line: str
) -> None:
    pair = run("processes.wait_for_all('never')", what)
    ended, err, seconds = pair.wait(1)
    assert (ended, err.splitlines()[-1]) == (status, line) and seconds < TIMEOUT / 2
    other, _, seconds = pair.wait(0)
    assert other != 0 and seconds < TIMEOUT + 5


def test_processes_that_fail_alike_say_so_alike(run: type[Pair]) -> None:
    pair = run(*["raise UserError('a.png: no such picture')"] * 2)
    assert [(status, err.splitlines()[-1]) for status, err, _ in map(pair.wait, (1, 0))] == [
        (2, "a.png: no such picture")
    ] * 2


def test_they_end_together_when_one_works_longer_than_a_shutdown_may_last(run: type[Pair]) -> None:
    pair = run(f"time.sleep({TIMEOUT + 4})", "pass")
    assert [pair.wait(index)[0] for index in range(2)] == [0, 0]
    assert pair.wait(1)[2] > TIMEOUT + 3


def test_a_joint_stop_keeps_its_status(run: type[Pair]) -> None:
    said = (
        "from nabla_jax.parallel import mesh as meshes; "
        "mesh = meshes.make_mesh(dict(data=0, fsdp=1, tensor=1, sequence=1)); "
        "signum = int(meshes.highest({}, mesh)); assert signum == 15; raise runs.Interrupted(signum, 'saved')"
    )
    pair = run(said.format(0), said.format(15))
    assert [(status, err.splitlines()[-1]) for status, err, _ in map(pair.wait, range(2))] == [(143, "saved")] * 2


def test_sigterm_stops_as_it_does_alone(run: type[Pair]) -> None:
    pair = run(WAIT, WAIT)
    for process in pair.processes:
        process.send_signal(signal.SIGTERM)
    assert pair.wait(1)[0] in (-signal.SIGTERM, -signal.SIGABRT)
    assert pair.wait(0)[0] == -signal.SIGTERM
    assert pair.wait(0)[2] < TIMEOUT / 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({processes.TIMEOUT: "soon"}, "NABLA_PROCESS_TIMEOUT: found 'soon', expected a number"),
        ({processes.TIMEOUT: "0"}, "NABLA_PROCESS_TIMEOUT: found 0, expected seconds, at least 1"),
        ({processes.COORDINATOR: "host:port"}, "NABLA_COORDINATOR: found 'host:port', expected host:port"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        processes.initialize({processes.COORDINATOR: "auto", processes.COUNT: "2", processes.INDEX: "0"} | settings)


def test_no_cluster_to_ask() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {processes.COORDINATOR: "auto"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "NABLA_COORDINATOR: found 'auto', which jax cannot join" in done.stderr.splitlines()[-1]


def test_a_port_in_use() -> None:
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        settings = {processes.COORDINATOR: address, processes.COUNT: "2", processes.INDEX: "0"}
        with pytest.raises(UserError, match=f"NABLA_COORDINATOR: found '{address}', where this process cannot listen"):
            processes.initialize(settings)
