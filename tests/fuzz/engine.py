"""Runs parsers on inputs that are almost right, and counts what comes of it.

An input is made from (seed, parser, number) alone. It is a correct result, a refusal in one line, or a finding: any
other exception, a wrong answer (the parser's own check raises AssertionError), or more than ``SLOW`` seconds. A parser
that does not come back is interrupted; the process' memory is limited, so that a file cannot ask for all of it.
"""

import collections
import contextlib
import dataclasses
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nabla_jax.errors import UserError

SLOW = 1.0  # seconds of one input, CPU time: other work on the machine does not count
HANG = 20.0  # seconds of the clock
MEMORY = 2**31  # bytes beyond what the process has when it begins

Mutate = Callable[[random.Random, Sequence[bytes]], bytes]


@dataclasses.dataclass(frozen=True)
class Parser:
    """A reader of the product and what to feed it.

    ``read`` takes an input, calls the product and checks what it answers. ``refusals`` are the exceptions that its
    documentation names. ``weight``: its share of the inputs, relative to others.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Mutate
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (UserError,)
    weight: float = 1.0


@dataclasses.dataclass
class Finding:
    """What went wrong, and the input that did it."""

    parser: str
    number: int
    data: bytes
    what: str


@dataclasses.dataclass
class Tally:
    """Counts of one parser; ``longest`` in seconds."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    uncaught: int = 0
    slow: int = 0
    longest: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)


class Hang(BaseException):
    """Not an Exception: no parser may catch it."""


def make_input(parser: Parser, seed: int, number: int) -> bytes:
    """Input ``number``; the first ones are the seeds as they are."""
    if number < len(parser.seeds):
        return parser.seeds[number]
    return parser.mutate(random.Random(f"{seed} {parser.name} {number}"), parser.seeds)


def run(parsers: Sequence[Parser], inputs: int, seed: int) -> dict[str, Tally]:
    """Feeds each parser its share of at least ``inputs`` inputs."""
    total = sum(parser.weight for parser in parsers)
    tallies = {}
    for parser in parsers:
        tallies[parser.name] = tally = Tally()
        for number in range(max(len(parser.seeds), -int(-inputs * parser.weight // total))):
            feed(parser, seed, number, tally)
    return tallies


def feed(parser: Parser, seed: int, number: int, tally: Tally) -> None:
    """One input."""
    data = make_input(parser, seed, number)
    tally.inputs += 1
    found, hung = "", False
    started = time.process_time()
    try:
        with _time_limit(HANG):
            parser.read(data)
        tally.read += 1
    except parser.refusals as error:
        tally.refused += 1
        if len(str(error).splitlines()) != 1:
            found = f"a message of other than one line: {error!r}"
        elif number < len(parser.seeds):
            found = f"a seed was refused: {error}"
    except Hang:
        found, hung = f"no answer within {HANG:g} s", True
    except Exception:  # noqa: BLE001 -- whatever it is, it is what is looked for
        found = traceback.format_exc()
    seconds = time.process_time() - started
    tally.longest = max(tally.longest, seconds)
    if seconds > SLOW and not found:
        found, hung = f"{seconds:.1f} s", True
    tally.slow += hung
    tally.uncaught += bool(found) and not hung
    if found:
        tally.findings.append(Finding(parser.name, number, data, found))


def kinds(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """The first finding of each kind (the end of its traceback) and how many there are of it."""
    groups: dict[tuple[str, ...], list[Finding]] = collections.defaultdict(list)
    for finding in findings:
        lines = finding.what.splitlines()
        places = [line for line in lines if line.startswith("  File ")]
        groups[finding.parser, *places[-2:], lines[-1].split(":")[0]].append(finding)
    return [(group[0], len(group)) for group in groups.values()]


def table(tallies: dict[str, Tally]) -> str:
    """One line a parser, and the closing line."""
    lines = [
        "| parser | inputs | read | refused | uncaught | slow | longest, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, t in tallies.items():
        counts = f"{t.inputs:,} | {t.read:,} | {t.refused:,} | {t.uncaught} | {t.slow}"
        lines.append(f"| {name} | {counts} | {1000 * t.longest:.0f} |")
    total = [sum(getattr(t, name) for t in tallies.values()) for name in ("inputs", "uncaught", "slow")]
    lines.append("")
    lines.append(f"inputs: {total[0]}, uncaught: {total[1]}, slow: {total[2]}")
    return "\n".join(lines)


def limit_memory() -> None:
    """Lets this process have ``MEMORY`` more bytes than it has now; beyond, allocations raise MemoryError."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
