"""The short form: `python -m tests.fuzz` takes many more inputs."""

import json
import random
import re
import subprocess
import sys
import time

import pytest

from nabla_jax.errors import UserError
from tests.fuzz import engine, mutate


def test_no_reader_is_surprised() -> None:
    # In a process of its own: its memory is limited, and a reader in C could take it down.
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "4000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.fullmatch(r"inputs: (\d+), uncaught: 0, slow: 0", done.stdout.splitlines()[-1])
    assert found is not None and int(found[1]) >= 4000


def number(data: bytes) -> None:
    """A parser with one of each fault, chosen by its input."""
    match data:
        case b"refused":
            raise UserError("found refused")
        case b"uncaught":
            raise KeyError("uncaught")
        case b"wrong":
            raise AssertionError
        case b"slow":
            end = time.process_time() + 1.5 * engine.SLOW
            while time.process_time() < end:
                pass
        case b"hangs":
            time.sleep(3600)


def feed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> engine.Tally:
    monkeypatch.setattr(engine, "HANG", 1.0)
    monkeypatch.setattr(engine, "SLOW", 0.05)
    tally = engine.Tally()
    engine.feed(engine.Parser("numbers", [b"whole"], lambda *_: data, number), 0, 1, tally)
    return tally


@pytest.mark.parametrize(
    ("data", "counts"),
    [
        (b"read", (1, 0, 0, 0)),
        (b"refused", (0, 1, 0, 0)),
        (b"uncaught", (0, 0, 1, 0)),
        (b"wrong", (0, 0, 1, 0)),
        (b"slow", (1, 0, 0, 1)),
        (b"hangs", (0, 0, 0, 1)),
    ],
)
def test_what_the_engine_counts(data: bytes, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tally = feed(data, monkeypatch)
    assert (tally.read, tally.refused, tally.uncaught, tally.slow) == counts
    assert len(tally.findings) == counts[2] + counts[3]
    assert engine.table({"numbers": tally}).endswith(f"inputs: 1, uncaught: {counts[2]}, slow: {counts[3]}")


def test_a_refused_seed_is_a_finding() -> None:
    tally = engine.Tally()
    engine.feed(engine.Parser("numbers", [b"refused"], lambda *_: b"", number), 0, 0, tally)
    assert tally.uncaught == 1


@pytest.mark.parametrize(
    ("change", "seed"),
    [
        (mutate.flip, b"0123456789" * 20),
        (mutate.text(","), b"a,b,c\n1,2,3\n"),
        (mutate.objects, b'{"a": [1, {"b": null}], "c": "d"}'),
        (mutate.rows, b'{"a": 1}\n{"a": 2}\n'),
    ],
    ids=["bytes", "text", "objects", "rows"],
)
def test_inputs_are_repeatable_and_differ(change: engine.Mutate, seed: bytes) -> None:
    parser = engine.Parser("any", [seed], change, number)
    made = [engine.make_input(parser, 3, n) for n in range(200)]
    assert made == [engine.make_input(parser, 3, n) for n in range(200)]
    assert made[0] == seed and len(set(made)) > 100
    assert made[1:] != [engine.make_input(parser, 4, n) for n in range(1, 200)]


def test_a_changed_object_is_close_to_the_seed() -> None:
    seed = {"a": [1, 2, 3], "b": {"c": "d", "e": None}}
    changed = [mutate.change_json(random.Random(n), seed) for n in range(300)]
    assert seed == {"a": [1, 2, 3], "b": {"c": "d", "e": None}}
    assert sum(isinstance(value, dict) and len(value.keys() & seed.keys()) >= 1 for value in changed) == 300
    assert len({json.dumps(value) for value in changed}) > 100
