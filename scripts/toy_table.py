"""Every system of the paper, the steps beyond it and the taxonomy's, trained and evaluated at toy size, as a queue.

python -m scripts.toy_table --docs docs                 # or make toy-table: everything
python -m scripts.toy_table --group table --only omk_fill,insert_fill --steps 20 --quick 8
python -m scripts.toy_table --list                      # the commands, none of them run

The queue runs the public commands in order. Each of them continues what an interrupted one left and does nothing where
its result is complete, so that the queue, too, can be stopped at any moment and run again. (Killed outright, it leaves
its command at work, and the next queue's says that another process is.) What is made lies below --out: prepared, runs,
pictures, evaluations, results.json and results.md; systems.json says what each system is, times.jsonl how long each
job took. A shortened queue (--steps, --quick, another world) has a folder of its own.
"""

import argparse
import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.errors import UserError
from scripts import results

ROOT = Path(__file__).resolve().parent.parent
WORLD = "data/toybirds"  # of the configurations
MAIN = "configs/omk_fill.py:toy"  # evaluates, and is what every variant differs from
KEYPOINTS = "configs/omk_keypoints.py:toy"
BENCHMARKS = ("toy-nabla", "toy-inat-seen", "toy-inat-unseen", "toy-inat-unseen-strict")
TIMES = results.TIMES
CEILING = "autoencoder-ceiling"
SHOWN_POSES = ("inat/na", "inat/unseen")  # folders of the world whose keypoints nobody annotated

TUNED = ("prepare", "train", "generate")
WHOLE = (*TUNED, "untuned")
DRAWN = ("generate",)


@dataclasses.dataclass(frozen=True)
class System:
    """Something that draws: a row of the results, or two with its untuned base.

    `overrides` is all that differs from the configuration; {half} in them is half the configuration's training steps.
    `adapter_of` names the system whose adapter is drawn with where none is trained, `frozen` the one whose adapter lies
    below the one that is trained, `against` the row that differences are from, `paper` the row of the paper.
    """

    config: str
    about: str
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    benchmarks: tuple[str, ...] = BENCHMARKS
    steps: tuple[str, ...] = TUNED
    adapter_of: str = ""
    frozen: str = ""
    against: str = ""
    paper: str = ""


def _of_paper(name: str, paper: str, about: str) -> System:
    return System(f"configs/{name}.py:toy", about, steps=WHOLE, against=f"untuned:{name}", paper=paper)


def _variant(about: str, overrides: Mapping[str, str], against: str = "omk_fill", **further: Any) -> System:
    return System(MAIN, about, overrides, against=against, **further)


TABLE = {
    "omk_fill": _of_paper("omk_fill", "Om-K", "OminiControl on Kontext, silhouette"),
    "omk_depth": _of_paper("omk_depth", "Om-K", "OminiControl on Kontext, depth map"),
    "omk_keypoints": _of_paper("omk_keypoints", "Om-K", "OminiControl on Kontext, skeleton"),
    "oms_fill": _of_paper("oms_fill", "Om-S", "OminiControl on schnell, silhouette"),
    "oms_depth": _of_paper("oms_depth", "Om-S", "OminiControl on schnell, depth map"),
    "oms_keypoints": _of_paper("oms_keypoints", "Om-S", "OminiControl on schnell, skeleton"),
    "insert_fill": _of_paper("insert_fill", "Ins-A", "Insert Anything on Fill, diptych"),
    "kontext_native": System("configs/kontext_native.py:toy", "Kontext as it is, shown both", steps=("untuned",)),
}

BEYOND = {
    "omk_fill+seed": _variant("nothing but another seed: how far two trainings lie apart", {"train.seed": "43"}),
    "omk_fill+independent": _variant(
        "conditions attend to themselves only", {"conditioning.independent_conditions": "true"}
    ),
    "omk_fill+compact": _variant("compact conditions: a quarter of the tokens", {"conditioning.compact": "2"}),
    "omk_fill+even_loss": _variant("the bird weighs 1, not 3 times its surroundings", {"train.foreground_weight": "1"}),
    "omk_fill+mined": _variant(
        "pairs of look-alikes only, not all of a class",
        {"train.sampler": "mined", "data.vision": "nabla_jax/assets/toy-dinov2"},
    ),
    "omk_fill+bfloat16": _variant("adapter kept in bfloat16, not float32", {"lora.dtype": "bfloat16"}),
    "omk_fill+guidance_1": _variant(
        "trained with guidance 1 and drawn likewise, not with 2.5",
        {"sample.guidance": "1.0"},
        steps=DRAWN,
        adapter_of="omk_fill",
    ),
    "omk_fill+guidance_2.5": _variant("trained with guidance 2.5 and drawn likewise", {"train.guidance": "2.5"}),
}

_LEVEL = {"train.sampler": "level"}
TAXONOMY = {
    "omk_fill+class": _variant("pairs of a class, every picture as likely", {**_LEVEL, "data.levels": "0 class"}),
    "omk_fill+self_class": _variant(
        "half the steps a picture with itself, then pairs of a class",
        {**_LEVEL, "data.levels": "0 self,{half} class"},
        against="omk_fill+class",
    ),
    "omk_fill+order_class": _variant(
        "half the steps pairs of an order, then of a class",
        {**_LEVEL, "data.levels": "0 order,{half} class"},
        against="omk_fill+class",
    ),
    "omk_fill+family": _variant(
        "one adapter a level, the coarse one alone: half the steps on pairs of a family",
        {**_LEVEL, "data.levels": "0 family", "train.steps": "{half}"},
        against="omk_fill+class",
    ),
    "omk_fill+family+class": _variant(
        "one adapter a level: that one frozen, and half the steps on pairs of a class on top",
        {**_LEVEL, "data.levels": "0 class", "train.steps": "{half}"},
        against="omk_fill+class",
        frozen="omk_fill+family",
    ),
    **{
        f"omk_fill+siblings_{scale}": _variant(
            f"sibling guidance {scale}, no training (1 is none)",
            {"sample.sibling_guidance": scale},
            steps=DRAWN,
            adapter_of="omk_fill",
        )
        for scale in ("1", "1.5", "2")
    },
    # A class of one picture has no pair: there, a picture is paired with itself.
    "omk_fill+1_a_class": _variant(
        "one picture of each class, paired with itself",
        {**_LEVEL, "data.levels": "0 self", "data.per_class": "1"},
        against="omk_fill+class",
    ),
    **{
        f"omk_fill+{count}_a_class": _variant(
            f"at most {count} pictures of each class (all where it has no more)",
            {**_LEVEL, "data.levels": "0 class", "data.per_class": count},
            against="omk_fill+class",
        )
        for count in ("5", "20")
    },
}

GROUPS = {"table": TABLE, "beyond": BEYOND, "taxonomy": TAXONOMY}
SYSTEMS = {name: system for group in GROUPS.values() for name, system in group.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of the queue."""

    out: Path
    docs: Path | None = None  # where the results are written besides `out`
    groups: tuple[str, ...] = tuple(GROUPS)
    only: tuple[str, ...] = ()
    quick: int | None = None
    steps: int | None = None
    world: str = WORLD
    images: int | None = None
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)
    done: frozenset[str] = frozenset()  # names of jobs that earlier runs of the queue completed


@dataclasses.dataclass(frozen=True)
class Job:
    """A command; `seconds` is a guess for two cores, of use beside the others' only."""

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float


# ----------------------------------------------------------------------------------------------------------
# What there is to do
# ----------------------------------------------------------------------------------------------------------


def list_jobs(options: Options) -> list[Job]:
    """Every command in order, each once. Raises UserError for a name that is not a system's.

    Evaluations hold what an earlier queue in the same folder drew, too.
    """
    chosen, there = _chosen(options), _there(options)
    jobs = _data_jobs(options)
    for group, names in chosen.items():
        for name in names:
            jobs += _jobs_of(name, options)
        if group == "table":
            jobs += [_ceiling(options), *(_published(name, options) for name in options.published)]
        jobs += [_evaluate(group, there[group], options), _results(group, options)]
    return list({job.name: job for job in jobs}.values())


def describe(options: Options) -> dict[str, Any]:
    """What the rows of the results are: the content of systems.json."""
    systems = []
    for group, names in _there(options).items():
        for name in names:
            system = SYSTEMS[name]
            values = _values(system, options)
            systems.append(
                {
                    "model": name if "generate" in system.steps else f"untuned:{name}",
                    "untuned": f"untuned:{name}" if "untuned" in system.steps else None,
                    "group": group,
                    "about": system.about,
                    "config": system.config,
                    "overrides": values,
                    "against": system.against or None,
                    "paper": system.paper or None,
                    "control": _load(system.config).conditioning.control,
                    "run": str(_run(options, name)) if "train" in system.steps else None,
                }
            )
    return {
        "steps": options.steps,
        "limit": options.quick,
        "world": options.world,
        "benchmarks": list(BENCHMARKS),
        "systems": systems,
        "published": {f"published:{name}": path for name, path in options.published.items()},
        "evaluations": {group: str(_evaluation(options, group)) for group in _there(options)},
    }


def _chosen(options: Options) -> dict[str, list[str]]:
    unknown = sorted({*options.only, *options.published} - set(SYSTEMS))
    if unknown:
        raise UserError(f"--only, --published: found {unknown[0]!r}, expected some of {', '.join(SYSTEMS)}")
    wanted = {g: [name for name in GROUPS[g] if not options.only or name in options.only] for g in options.groups}
    found = {group: names for group, names in wanted.items() if names}
    if not found:
        raise UserError(f"--only: found none of {', '.join(options.only)} in --group {', '.join(options.groups)}")
    return found


def _there(options: Options) -> dict[str, list[str]]:
    """What is chosen, and what earlier runs of the queue drew."""
    chosen, found = _chosen(options), {}
    for group, systems in GROUPS.items():
        if group in chosen or f"evaluate {group}" in options.done:
            names = [name for name in systems if name in chosen.get(group, ()) or _is_drawn(name, options)]
            found[group] = names
    return found


def _is_drawn(name: str, options: Options) -> bool:
    steps = SYSTEMS[name].steps
    jobs = [f"draw {name}"] * ("generate" in steps) + [f"draw untuned:{name}"] * ("untuned" in steps)
    return options.done.issuperset(jobs)


def _data_jobs(options: Options) -> list[Job]:
    images = [] if options.images is None else ["--images", str(options.images), "--orders", "1"]
    roots = [word for folder in SHOWN_POSES for word in ("--root", f"{options.world}/{folder}")]
    return [
        Job("world", "nabla_jax.toybirds", ("--out", options.world, *images), 10),
        Job("keypoints", "nabla_jax.extract", ("--config", KEYPOINTS, "--what", "keypoints", *roots), 30),
    ]


def _jobs_of(name: str, options: Options) -> list[Job]:
    system = SYSTEMS[name]
    jobs = []
    for needed in (system.adapter_of, system.frozen, system.against):
        # The untuned base of a system is its own job below.
        if needed and not needed.startswith("untuned:"):
            jobs += _jobs_of(needed, options)
    words = _words(system, options, name)
    share = (options.steps or 300) / 300
    drawn = _share_drawn(options)
    if "prepare" in system.steps and _load(system.config).conditioning.method != "insert":
        jobs.append(Job(f"prepare {Path(_prepared(name, options)).name}", "nabla_jax.prepare", words, 20))
    if "train" in system.steps:
        jobs.append(Job(f"train {name}", "nabla_jax.train", words, 120 * share))
    if "generate" in system.steps:
        adapter = str(_run(options, system.adapter_of or name))
        jobs.append(_generate(name, words, adapter, system.benchmarks, options, 130 * drawn))
    if "untuned" in system.steps:
        jobs.append(_generate(f"untuned:{name}", words, "none", system.benchmarks, options, 130 * drawn))
    return jobs


def _generate(
    model: str, words: Sequence[str], adapter: str, benchmarks: Sequence[str], options: Options, seconds: float
) -> Job:
    arguments = (*words, *_benchmarks(benchmarks), "--adapter", adapter, "--out", str(_pictures(options, model)))
    return Job(f"draw {model}", "nabla_jax.generate", (*arguments, *_limit(options)), seconds)


def _ceiling(options: Options) -> Job:
    arguments = (*_words(SYSTEMS["omk_fill"], options, "omk_fill"), *_benchmarks(BENCHMARKS), "--reference", CEILING)
    out = ("--out", str(_pictures(options, CEILING)), *_limit(options))
    return Job(f"draw {CEILING}", "nabla_jax.generate", (*arguments, *out), 20)


def _published(name: str, options: Options) -> Job:
    words = _words(SYSTEMS[name], options, name)
    seconds = 130 * _share_drawn(options)
    return _generate(f"published:{name}", words, options.published[name], SYSTEMS[name].benchmarks, options, seconds)


def _evaluate(group: str, names: Sequence[str], options: Options) -> Job:
    models: list[str] = []
    for name in names:
        system = SYSTEMS[name]
        if group != "table":
            models += [base for base in (system.adapter_of, system.against) if base]
        models += [name] * ("generate" in system.steps) + [f"untuned:{name}"] * ("untuned" in system.steps)
    if group == "table":
        models += [*(f"published:{name}" for name in options.published), CEILING]
    models = list(dict.fromkeys(models))
    sets = [word for model in models for word in ("--pictures", f"{model}={_pictures(options, model)}")]
    words = ("--config", MAIN, *_paths(_load(MAIN), options), *_benchmarks(BENCHMARKS), *_limit(options))
    arguments = (*words, "--out", str(_evaluation(options, group)), *sets)
    return Job(f"evaluate {group}", "nabla_jax.evaluate", arguments, 30 + 40 * len(models) * _share_drawn(options))


def _results(group: str, options: Options) -> Job:
    targets = [options.out, *([] if options.docs is None else [options.docs])]
    words = [word for target in targets for word in ("--out", str(target))]
    return Job(f"results after {group}", "scripts.results", (str(options.out), *words), 20)


def _words(system: System, options: Options, name: str) -> tuple[str, ...]:
    """The configuration of a system as words of a command line."""
    own = {"data.prepared": _prepared(name, options), "train.workdir": str(_run(options, name))}
    if _load(system.config).conditioning.method == "insert" or "prepare" not in system.steps:
        del own["data.prepared"]
    values = {**own, **_values(system, options)}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return ("--config", system.config, *_paths(_load(system.config), options), *overrides)


def _values(system: System, options: Options) -> dict[str, str]:
    """What differs from the system's configuration, paths aside."""
    steps = options.steps or _load(system.config).train.steps
    values = {} if options.steps is None else {"train.steps": str(steps)}
    values |= {key: value.format(half=max(1, steps // 2)) for key, value in system.overrides.items()}
    return values | ({"lora.frozen": str(_run(options, system.frozen))} if system.frozen else {})


def _paths(config: configs.Config, options: Options) -> tuple[str, ...]:
    """Overrides for another world than the configurations'."""
    if options.world == WORLD:
        return ()
    folders = {"data.root": config.data.root, **{f"benchmarks.{name}": at for name, at in config.benchmarks.items()}}
    return tuple(f"--config.{key}={folder.replace(WORLD, options.world)}" for key, folder in folders.items())


@functools.cache
def _load(config: str) -> configs.Config:
    return configs.load(config)


def _prepared(name: str, options: Options) -> str:
    """A variant that says something of data or conditions has a folder of its own, whatever it is."""
    folder = Path(_load(SYSTEMS[name].config).data.prepared).name
    own = any(key.startswith(("data.", "conditioning.")) for key in SYSTEMS[name].overrides)
    return str(options.out / "prepared" / (f"{folder}+{name.partition('+')[2]}" if own else folder))


def _run(options: Options, name: str) -> Path:
    return options.out / "runs" / name


def _pictures(options: Options, model: str) -> Path:
    untuned, _, name = model.rpartition("untuned:")
    return options.out / "pictures" / ("untuned" if name != model else "") / name.replace(":", "-")


def _evaluation(options: Options, group: str) -> Path:
    return options.out / "evaluations" / group


def _share_drawn(options: Options) -> float:
    return min(1.0, (options.quick or 150) / 150)


def _benchmarks(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--benchmark", name))


def _limit(options: Options) -> tuple[str, ...]:
    return () if options.quick is None else ("--limit", str(options.quick))


# ----------------------------------------------------------------------------------------------------------
# Doing it
# ----------------------------------------------------------------------------------------------------------


def time_left(jobs: Sequence[Job], done: int, times: Mapping[str, float]) -> float:
    """Seconds that the jobs from number `done` on will take: guesses times the pace of those whose time is known.

    A job that was completed before is left out: its command finds nothing to do.
    """
    known = [job for job in jobs if job.name in times]
    guessed = sum(job.seconds for job in known)
    pace = sum(times[job.name] for job in known) / guessed if guessed else 1.0
    return pace * sum(job.seconds for job in jobs[done:] if job.name not in times)


def environment() -> dict[str, str]:
    """Variables of every command: compiled functions are kept, as in scripts/demo.sh."""
    ours = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return ours | dict(os.environ)


def command(job: Job) -> list[str]:
    """The words that start a job from the repository's root."""
    return ["scripts/keep_buffers.sh", sys.executable, "-m", job.module, *job.arguments]


def run_all(jobs: Sequence[Job], out: Path) -> None:
    """Runs the jobs in order; raises UserError for the first that fails, Interrupted after a signal."""
    log = runs.JsonLines(out / TIMES)
    times = {row["job"]: row["seconds"] for row in log.rows}
    for number, job in enumerate(jobs):
        left = _clock(time_left(jobs, number, times))
        print(f"--- {number + 1} of {len(jobs)}: {job.name} (left: {left})", flush=True)
        begun = time.monotonic()
        _run_one(job)
        taken = time.monotonic() - begun
        print(f"--- {number + 1} of {len(jobs)}: {job.name}: {_clock(taken)}", flush=True)
        if job.name not in times:
            times[job.name] = round(taken, 1)
            log.append({"job": job.name, "seconds": times[job.name]})
    log.close()


def _run_one(job: Job) -> None:
    with runs.StopSignals() as stop:
        # In a session of its own, so that Ctrl-C reaches it through us alone: a second signal would not let it save.
        child = subprocess.Popen(command(job), cwd=ROOT, env=environment(), start_new_session=True)
        told = False
        try:
            while True:
                try:
                    status = child.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    if stop.signum is not None and not told:
                        child.send_signal(stop.signum)
                        told = True
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        if stop.signum is not None:
            raise runs.Interrupted(stop.signum, f"{job.name}: stopped; the same command continues")
    if status:
        raise UserError(f"{job.name}: ended with status {status}; its command: {shlex.join(command(job))}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def parse(argv: Sequence[str]) -> tuple[Options, bool]:
    """(What is asked for, whether only to list it). Raises UserError for unknown names and numbers below 1."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.toy_table",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--group", choices=(*GROUPS, "all"), default="all", help="which systems; default all")
    add("--only", default="", help="names of systems, comma-separated; what they need comes with them")
    add("--quick", type=int, metavar="N", help="N pairs of each benchmark (--limit of generate and evaluate)")
    add("--steps", type=int, metavar="N", help="steps of every training")
    add("--world", default=WORLD, help="folder of the world; written where it is not there")
    add("--images", type=int, metavar="N", help="write a small world: N pictures of birds of one order")
    add(
        "--published", action="append", default=[], metavar="NAME=PATH", help="an adapter for that configuration's base"
    )
    add("--out", type=Path, help="default runs/toy_table, with steps, pairs and world in its name where they are set")
    add("--docs", type=Path, help="folder that results.json and results.md are written to besides --out")
    add("--list", action="store_true", help="print the commands and run none")
    given = parser.parse_args(argv)
    for name in ("quick", "steps", "images"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"--{name}: found {getattr(given, name)}, expected at least 1")
    if given.images is not None and given.world == WORLD:
        raise UserError(f"--images: found --world {WORLD}, expected another folder: that one is for the whole world")
    published = dict(word.partition("=")[::2] for word in given.published)
    if not all(published.values()):
        raise UserError(f"--published: found {given.published}, expected NAME=PATH")
    out = given.out
    if out is None:
        shortened = [f"{name}-{getattr(given, name)}" for name in ("steps", "quick") if getattr(given, name)]
        shortened += [Path(given.world).name] * (given.world != WORLD)
        out = Path("runs") / "+".join(["toy_table", *shortened])
    options = Options(
        out=out,
        docs=given.docs,
        groups=tuple(GROUPS) if given.group == "all" else (given.group,),
        only=tuple(name for name in given.only.split(",") if name),
        quick=given.quick,
        steps=given.steps,
        world=given.world,
        images=given.images,
        published=published,
    )
    return options, given.list


def main(argv: Sequence[str]) -> None:
    """The command."""
    os.chdir(ROOT)
    options, only_list = parse(argv)
    done = frozenset(row["job"] for row in runs.read_rows(options.out / TIMES))
    options = dataclasses.replace(options, done=done)
    jobs = list_jobs(options)
    if only_list:
        print("\n".join(f"# {job.name}\n{shlex.join(command(job))}" for job in jobs))
        return
    with runs.lock(options.out / ".lock", f"--out {options.out}"):
        runs.write_json(options.out / results.SYSTEMS, describe(options))
        run_all(jobs, options.out)


if __name__ == "__main__":
    runs.run_main(main)
