"""Puts faults into the verbs, continues until they are done, and compares with runs that nothing happened to.

    python -m tests.faults                             # 220 faults of every kind, in turn (make faults)
    python -m tests.faults --count 20
    python -m tests.faults --job train --kills 20      # one training run, killed twenty times
    python -m tests.faults --job fetch,prepare --kind kill,rename

Faults are put into processes forked from this one, in which everything is imported already: a fault costs what the
verb does, and not its start. After each one the same job runs until it is done. A fault counts as lost where a file, a
row or a batch of the uninterrupted run is missing or another, as doubled where a row is there twice, and as hung where
a process does not end. Exits with status 1 if there is any of them, or a traceback where a line was due.
"""

import argparse
import collections
import dataclasses
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# One thread each, and no backend yet: this process is forked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[2] / ".cache" / "jax"))

import grain  # noqa: F401
import orbax.checkpoint  # noqa: F401

from nabla_jax import training  # noqa: F401
from nabla_jax.parallel import processes
from tests import fixtures
from tests.faults import injection, jobs
from tests.faults.injection import fork, kill, wait

JOBS = ("train", "prepare", "generate", "evaluate", "fetch")
# Of a job's kinds in turn; those of training alone come after the others.
KINDS = ("kill", "rename", "sigterm", "disk full", "file limit", "read-only", "clock", "two runs")
TRAIN_KINDS = ("kill in a step", "damaged checkpoint", "one of two killed")
ATTEMPTS = 6


@dataclasses.dataclass
class Bench:
    """A job, what it makes when nothing happens, and how long that takes."""

    job: jobs.Job
    folder: Path
    reference: jobs.Contents
    seconds: float
    renames: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fault did: how the process ended, and what was not as it should be."""

    ended: str
    lost: str = ""
    doubled: str = ""
    hung: str = ""
    unclear: str = ""


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Puts faults into the verbs and compares what they made.")
    parser.add_argument("--count", type=int, default=220, help="how many faults")
    parser.add_argument("--job", default=",".join(JOBS), help="only these, of " + ", ".join(JOBS))
    parser.add_argument("--kind", help="only these, of " + ", ".join((*KINDS, *TRAIN_KINDS)))
    parser.add_argument("--kills", type=int, help="instead: so many kills of one training run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nabla_jax_faults_") as name:
        folder = Path(name)
        wait(fork(lambda: jobs.write_root(folder / "root"), folder / "root.log"))
        rng = random.Random(options.seed)
        if options.kills:
            return _many_kills(folder, options.kills, rng)
        chosen = options.job.split(",")
        kinds = None if options.kind is None else options.kind.split(",")
        with _benches(folder, chosen) as benches:
            return _faults(benches, options.count, kinds, rng)


def _faults(benches: list[Bench], count: int, kinds: list[str] | None, rng: random.Random) -> int:
    outcomes: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    begun, turn = time.monotonic(), _turns(benches, kinds)
    for number in range(count):
        bench, kind = next(turn)
        outcome = _one(bench, kind, number, rng)
        outcomes[kind, bench.job.name].append(outcome)
        wrong = "; ".join(f"{k}: {v}" for k, v in dataclasses.asdict(outcome).items() if k != "ended" and v)
        print(f"{number + 1:4d} {kind} in {bench.job.name}: {outcome.ended}{'; ' + wrong if wrong else ''}", flush=True)
    return _table(outcomes, time.monotonic() - begun)


def _turns(benches: list[Bench], kinds: list[str] | None) -> Iterator[tuple[Bench, str]]:
    """Jobs and kinds in turn, so that any first few hold as many of both as they can."""
    place = 0
    while True:
        for i, bench in enumerate(benches):
            of_job = [*KINDS, *(TRAIN_KINDS if bench.job.steps else ())]
            if bench.job.steps:
                of_job += ["kill in a step", "rename", "kill in a step"]
            of_job = [kind for kind in of_job if kinds is None or kind in kinds]
            if of_job:
                yield bench, of_job[(place + 3 * i) % len(of_job)]
        place += 1


def _table(outcomes: dict[tuple[str, str], list[Outcome]], seconds: float) -> int:
    names = ("lost", "doubled", "hung", "unclear")
    print(f"\n{'kind':20}{'job':10}{'faults':>7}" + "".join(f"{name:>9}" for name in names) + "  ended")
    totals: collections.Counter[str] = collections.Counter()
    for (kind, job), those in sorted(outcomes.items()):
        counts = {name: sum(bool(getattr(one, name)) for one in those) for name in names}
        totals.update(counts | {"faults": len(those)})
        ends = collections.Counter(one.ended for one in those)
        told = ", ".join(f"{n} {end}" for end, n in ends.most_common())
        print(f"{kind:20}{job:10}{len(those):7}" + "".join(f"{counts[name]:9}" for name in names) + f"  {told}")
    print(f"{seconds:.0f} s")
    wrong = {name: totals[name] for name in names}
    if wrong["unclear"]:
        print(f"tracebacks or silence where a line was due: {wrong['unclear']}")
    print(f"faults: {totals['faults']}, " + ", ".join(f"{name}: {wrong[name]}" for name in names[:3]))
    return int(any(wrong.values()))


# ----------------------------------------------------------------------------------------------------------
# Benches
# ----------------------------------------------------------------------------------------------------------


@contextmanager
def _benches(folder: Path, names: list[str]) -> Iterator[list[Bench]]:
    root, found = folder / "root", {}
    with jobs.site(folder) as (url, pairs):
        makers: dict[str, Callable[[], jobs.Job]] = {
            "train": lambda: jobs.train_job(root),
            "prepare": lambda: jobs.prepare_job(root),
            "generate": lambda: jobs.generate_job(root),
            "evaluate": lambda: jobs.evaluate_job(root, found["generate"].folder / "whole"),
            "fetch": lambda: jobs.fetch_job(url, pairs),
        }
        needed = [name for name in ("generate", *JOBS) if name in names or (name == "generate" and "evaluate" in names)]
        for name in dict.fromkeys(needed):
            found[name] = _bench(makers[name](), folder / name)
        yield [found[name] for name in names]


def _bench(job: jobs.Job, folder: Path) -> Bench:
    folder.mkdir()
    _succeed(job, folder / "whole", [])  # compiles
    begun = time.monotonic()
    _succeed(job, folder / "again", [])
    seconds = time.monotonic() - begun
    _succeed(job, folder / "counted", [injection.count_renames(folder / "renames")])
    renames = folder / "renames"
    bench = Bench(
        job, folder, job.read(folder / "whole"), seconds, int(renames.read_text()) if renames.is_file() else 0
    )
    for name in ("again", "counted"):
        lost, doubled = _compare(bench, folder / name)
        assert not lost and not doubled, (job.name, lost, doubled)
    return bench


def _succeed(job: jobs.Job, out: Path, faults: list[injection.Fault]) -> None:
    log = out.with_suffix(".log")
    status = wait(fork(lambda: job.run(out), log, faults))
    assert status == 0, log.read_text()


def _compare(bench: Bench, out: Path) -> tuple[str, str]:
    """(what is missing or another, what is there twice)."""
    found, expected = bench.job.read(out), bench.reference
    lost = [name for name, data in expected.files.items() if found.files.get(name) != data]
    doubled = []
    for name, rows in expected.rows.items():
        there = found.rows.get(name, ())
        lost += [f"{name} {key}" for key, row in rows if (key, row) not in there]
        doubled += [f"{name} {key}" for key, n in collections.Counter(key for key, _ in there).items() if n > 1]
        lost += [f"{name} {key} is too much" for key, _ in there if key not in dict(rows)]
    return ", ".join(lost), ", ".join(doubled)


# ----------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------


def _one(bench: Bench, kind: str, number: int, rng: random.Random) -> Outcome:
    """Puts a fault of this kind into a job, continues, compares."""
    out = bench.folder / f"fault_{number}"
    log = out.with_suffix(".log")
    ended, unclear = "", ""
    try:
        ended, unclear = _inject(bench, kind, out, log, rng)
        for _ in range(ATTEMPTS):
            status = wait(fork(lambda: bench.job.run(out), log))
            if status == 0:
                break
        else:
            return Outcome(ended, lost=f"does not continue: {_last_line(log)}", unclear=unclear)
    except TimeoutError as error:
        return Outcome(ended or "hung", hung=str(error))
    lost, doubled = _compare(bench, out)
    outcome = Outcome(ended, lost, doubled, unclear=unclear)
    if not (lost or doubled or unclear):
        shutil.rmtree(out, ignore_errors=True)
    return outcome


def _inject(bench: Bench, kind: str, out: Path, log: Path, rng: random.Random) -> tuple[str, str]:
    """(how the process ended, what was unclear about it)."""
    job = bench.job

    def begin(*faults: injection.Fault) -> int:
        return fork(lambda: job.run(out), log, faults)

    def after_random_time(pid: int, signum: int) -> int:
        end = time.monotonic() + rng.uniform(0.02, 1.0) * bench.seconds
        status = wait(pid, lambda: time.monotonic() > end)
        if status is None:
            kill(pid, signum)
            status = wait(pid)
        assert status is not None
        return status

    def in_a_step(pid: int, signum: int) -> int:
        step = rng.randrange(1, 8)
        status = wait(pid, lambda: len(jobs.taken(out)) >= step)
        if status is None:
            time.sleep(rng.uniform(0, 0.05))
            kill(pid, signum)
            status = wait(pid)
        assert status is not None
        return status

    if kind == "kill":
        return _said(after_random_time(begin(), signal.SIGKILL)), ""
    if kind == "kill in a step":
        return _said(in_a_step(begin(), signal.SIGKILL)), ""
    if kind == "sigterm":
        moment = in_a_step if job.steps else after_random_time
        return _said(moment(begin(), signal.SIGTERM)), _traceback(log)
    if kind == "rename":
        number, after = rng.randint(1, max(bench.renames, 1)), rng.random() < 0.5
        return _said(wait(begin(injection.die_at_rename(number, after=after)))), ""
    if kind in ("disk full", "file limit"):
        size = rng.choice((8_000, 20_000, 60_000))
        fault = injection.fill_disk(rng.randint(1, 12)) if kind == "disk full" else injection.limit_files(size)
        status = wait(begin(fault))
        return _said(status), _traceback(log) if status else ""
    if kind == "read-only":
        out.mkdir()
        out.chmod(0o555)
        status = wait(begin(injection.drop_rights))
        out.chmod(0o755)
        return _said(status), _traceback(log) or ("" if status == 2 else f"status {status}, expected 2")
    if kind == "clock":
        return _said(wait(begin(injection.jump_clock(rng.randrange(2**32))))), _traceback(log)
    if kind == "two runs":
        return _two_runs(begin, out)
    if kind == "damaged checkpoint":
        ended = _said(in_a_step(begin(), signal.SIGKILL))
        there = out / "checkpoints"
        steps = [p for p in there.iterdir() if p.name.isdigit()] if there.is_dir() else []
        # Of a single one there is nothing to go back to, and the run says so.
        if len(steps) < 2:
            return ended, ""
        injection.damage(there, rng)
        return f"{ended}, damaged", ""
    assert kind == "one of two killed", kind
    return _one_of_two(begin, out, log, rng)


def _two_runs(begin: Callable[..., int], out: Path) -> tuple[str, str]:
    first = begin()
    status = wait(first, lambda: any((out / lock).is_file() for lock in (".lock", "../.lock")))
    if status is not None:
        return _said(status), ""
    second = begin()
    refused, whole = wait(second), wait(first)
    # The second may have come when the first was at its end.
    unclear = "" if whole == 0 and refused in (0, 2) else f"statuses {whole} and {refused}, expected 0 and 2"
    return f"{_said(whole)} and {_said(refused)}", unclear


def _one_of_two(begin: Callable[..., int], out: Path, log: Path, rng: random.Random) -> tuple[str, str]:
    address, seconds = fixtures.free_address(), 10
    started = []
    for index in range(2):
        settings = {
            processes.COORDINATOR: address, processes.COUNT: "2", processes.INDEX: str(index),
            processes.TIMEOUT: str(seconds),
        }  # fmt: skip
        started.append(begin(functools.partial(os.environ.update, settings)))
    victim = rng.randrange(2)
    step = rng.randrange(1, 6)
    status = wait(started[victim], lambda: len(jobs.taken(out)) >= step)
    kill(started[victim])
    if status is None:
        wait(started[victim])
    begun = time.monotonic()
    other = wait(started[1 - victim], patience=seconds + 60)
    took = time.monotonic() - begun
    unclear = "" if other == 0 or took < seconds + 30 and _last_line(log) else f"the other ended after {took:.0f} s"
    # What two processes added up differs from what one adds in the last bits: the run begins again.
    shutil.rmtree(out, ignore_errors=True)
    out.with_name(f"{out.name}.taken").unlink(missing_ok=True)
    return f"killed, the other {_said(other)}", unclear


def _many_kills(folder: Path, kills: int, rng: random.Random) -> int:
    """Kills one training run so many times, at random moments, and compares it with one that nothing happened to."""
    steps = 5 * kills + 8
    job = jobs.train_job(folder / "root", steps)
    bench = _bench(job, folder / "train")
    out, done, hung = bench.folder / "killed", 0, ""
    log, resumed = out.with_suffix(".log"), 0
    try:
        while True:
            pid = fork(lambda: job.run(out), log)
            # Past the last kill nothing stops it.
            goal = len(jobs.taken(out)) + rng.randint(1, 5) if done < kills else sys.maxsize
            status = wait(pid, functools.partial(_has_taken, out, goal))
            if status is None:
                time.sleep(rng.uniform(0, 0.1))
                kill(pid)
                status = wait(pid)
                done += status == -signal.SIGKILL
            if status == 0:
                break
            resumed += 1
            if resumed > 3 * kills or status not in (-signal.SIGKILL, 0):
                print(f"does not continue: {_last_line(log)}")
                return 1
    except TimeoutError as error:
        hung = str(error)
    lost, doubled = _compare(bench, out)
    name = f"adapters/step_{steps}/fill.safetensors"
    same = job.read(out).files.get(name) == bench.reference.files[name]
    taken = collections.Counter(row["batch"] for row in jobs.taken(out))
    print(f"train: {done} random kills over one run of {steps} steps, {sum(taken.values())} taken")
    for what, said in (("lost", lost), ("doubled", doubled), ("hung", hung)):
        if said:
            print(f"{what}: {said}")
    print(f"final adapters bitwise equal to the uninterrupted run's: {'yes' if same else 'no'}")
    print(f"faults: {done}, lost: {int(bool(lost))}, doubled: {int(bool(doubled))}, hung: {int(bool(hung))}")
    return int(bool(lost or doubled or hung) or not same or done < kills)


def _has_taken(out: Path, batches: int) -> bool:
    return len(jobs.taken(out)) >= batches


def _said(status: int | None) -> str:
    if status is None:
        return "running"
    return signal.Signals(-status).name if status < 0 else f"exit {status}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else ""


def _traceback(log: Path) -> str:
    text = log.read_text(errors="replace")
    return f"traceback: {_last_line(log)}" if "Traceback" in text else ""


if __name__ == "__main__":
    sys.exit(main())
