"""Scores pictures: per-pair numbers, means with intervals, reference points, and the static report.

    python -m nabla_jax.evaluate --config configs/omk_fill.py --pictures untuned=pictures/untuned \
        --pictures demo=pictures/demo --out reports/demo

Reads the folders that `generate` wrote, never a model that generates; `config.metrics` names the networks that
judge. Beside the given sets every table holds reference points made here (REFERENCES). Writes summary.json,
summary.md, comparisons.json, breakdown.json, regressions.json, evaluation.json and one CSV per benchmark and set;
--out/cache holds the oracle's pictures and what the networks said. Everything is reused by a later run on the same
inputs. Several processes (NABLA_COORDINATOR) share the work; the first writes the tables.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import nabla_jax
from nabla_jax import assets, runs, untrusted
from nabla_jax import config as configs
from nabla_jax.data import read_dataset
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.pairs import Pair, benchmark_pairs, duplicate_rows, shuffled_subjects, split_list, spread
from nabla_jax.data.taxonomy import distance, qualifier, species_name, species_path
from nabla_jax.errors import UserError
from nabla_jax.hashing import file_sha256
from nabla_jax.images import read_mask, read_rgb
from nabla_jax.metrics import identity, oracle, pixels, pose, references, retrieval, summary
from nabla_jax.metrics.summary import PairScore

Array = np.ndarray[Any, Any]
T = TypeVar("T")

REFERENCES = ("flat-colour", "copy-target", "paste-subject", "same-class", "sibling-class")
BASELINE = "untuned"
# Fields of a manifest's row; all others are settings of its set.
OF_ONE_PICTURE = frozenset(
    ("pair", "subject_id", "target_id", "subject_used", "sibling_used", "file", "mask", "height", "width", "placement")
)
NO_NETWORKS = configs.Metrics()
VERSION = 3  # of the numbers: raise it when a metric changes, so that no stored score is reused


def main(argv: Sequence[str]) -> None:
    """The command."""
    config, arguments = configs.parse_command(argv, "Scores pictures against benchmarks.", _add_arguments)
    if _several():
        from nabla_jax.parallel import processes

        processes.initialize()
    pictures = _named_folders(arguments.pictures)
    names = arguments.benchmark or list(config.benchmarks)
    configs.check_inputs(config, "evaluate", names)
    benchmarks = {name: Path(config.benchmarks[name]) for name in names}
    rows = evaluate(
        pictures,
        benchmarks,
        arguments.out,
        seed=arguments.seed,
        shuffle_seed=config.sample.seed,
        workers=arguments.workers,
        limit=arguments.limit,
        allow_missing=arguments.allow_missing,
        networks=config.metrics,
        baseline=arguments.baseline,
        trained=trained_species(config),
    )
    if not _is_first():
        return
    if arguments.report:
        from nabla_jax import report

        report.write(arguments.out, arguments.out, run=arguments.run)
    print(summary.text_table(rows), end="")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--pictures",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a set that generate wrote; repeatable",
    )
    add("--benchmark", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    add("--out", required=True, type=Path, help="folder for the results")
    add("--limit", type=int, help="only N pairs of each benchmark, those of generate --limit")
    add("--allow_missing", action="store_true", help="score what is there instead of stopping")
    add("--report", action="store_true", help="also write the static report into --out")
    add("--run", type=Path, help="training run whose loss curve the report shows")
    add(
        "--baseline",
        metavar="NAME",
        help="what differences are from: a set or reference point; default "
        f"{BASELINE}:SET for a set that has one, else {BASELINE}",
    )
    add("--seed", type=int, default=0, help="of the bootstrap and of the drawn reference points")
    add("--workers", type=int, default=2, help="processes; 0 works in this one")


def evaluate(
    pictures: Mapping[str, Path],
    benchmarks: Mapping[str, Path],
    out: Path,
    *,
    seed: int = 0,
    shuffle_seed: int = 0,
    workers: int = 2,
    limit: int | None = None,
    allow_missing: bool = False,
    networks: configs.Metrics = NO_NETWORKS,
    baseline: str | None = None,
    trained: Sequence[tuple[str, ...]] = (),
) -> list[dict[str, Any]]:
    """Scores every picture set on every benchmark, writes the results below `out`, returns the summary's
    rows.

    `seed` is that of the bootstrap and of the drawn reference points, `shuffle_seed` that of their shuffled
    subjects (the one `generate` sampled with). Metrics of `networks` that are not named are left out. `baseline` is the
    set or reference point that comparisons.json has differences from; None is that of `baseline_of`. `trained` are the
    taxonomic paths of the species of training (`trained_species`): each pair tells how far its species is from them.
    Among several processes all must call this; only the first writes results and returns rows.

    Raises UserError for pictures that are missing (unless allowed), do not belong to the benchmark, or cannot
    be read; for a target without a mask; and when `out` cannot be written.
    """
    if baseline is not None and baseline not in (*pictures, *REFERENCES):
        known = ", ".join([*pictures, *REFERENCES])
        raise UserError(f"--baseline: found {baseline!r}, expected one of {known}")
    open_benchmark.cache_clear()
    _read_files.cache_clear()
    with runs.lock(out / ".lock", f"--out {out}") if _is_first() else contextlib.nullcontext():
        contexts = {name: open_benchmark(root, limit) for name, root in benchmarks.items()}
        sets = {(m, b): read_set(folder / b, contexts[b]) for b in contexts for m, folder in pictures.items()}
        missing = _report_missing(sets, contexts, allow_missing)
        with _mapper(workers) as run_chunks:
            _render_answers(contexts, out, limit, run_chunks)
            seeds = (seed, shuffle_seed)
            scores = _score_all(pictures, contexts, sets, out, seeds, limit, networks, trained, run_chunks)
        if not _is_first():
            return []
        return _write_results(scores, contexts, sets, missing, out, seed, networks, baseline)


# ----------------------------------------------------------------------------------------------------------
# Several processes: without them nothing here loads a framework
# ----------------------------------------------------------------------------------------------------------


def _several() -> bool:
    return bool(os.environ.get("NABLA_COORDINATOR"))


def _is_first() -> bool:
    if not _several():
        return True
    from nabla_jax.parallel import processes

    return processes.is_first()


def _own_share(items: Sequence[T]) -> Sequence[T]:
    if not _several():
        return items
    from nabla_jax.parallel import processes

    return processes.own_share(items)


def _gather(text: str) -> list[str]:
    if not _several():
        return [text]
    from nabla_jax.parallel import processes

    return [part.decode() for part in processes.gather(text.encode())]


# ----------------------------------------------------------------------------------------------------------
# What there is: benchmarks and picture sets
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A dataset folder, or a pair list in one, as a benchmark. `fingerprint` changes with anything that could change a
    score.
    """

    root: Path
    dataset: Dataset
    pairs: tuple[Pair, ...]
    oracle: oracle.World | None
    fingerprint: str

    @functools.cached_property
    def own_keys(self) -> frozenset[str]:
        """Keys of the pairs that this process scores."""
        return frozenset(pair.key for chunk in _own_share(_chunked(self.pairs)) for pair in chunk)

    @functools.cached_property
    def _siblings(self) -> dict[int, list[int]]:
        leaves, targets = retrieval.leaves(self.dataset), {pair.class_id: pair.target_id for pair in self.pairs}
        return {c: retrieval.siblings(leaves, self.dataset.by_id[target]) for c, target in targets.items()}

    @functools.cached_property
    def _galleries(self) -> dict[int, list[str]]:
        classes = {c for found in self._siblings.values() for c in found}
        return {c: retrieval.gallery(self.dataset, c) for c in sorted(classes)}

    def galleries(self, pair: Pair) -> dict[int, list[str]]:
        """Class id -> ids of the real pictures that stand for it, of the classes a pair's bird is retrieved from;
        empty where its class has no sibling.
        """
        ids = {c: self._galleries[c] for c in self._siblings[pair.class_id]}
        own = {c: retrieval.members(found, pair.subject_id, pair.target_id) for c, found in ids.items()}
        return own if len(own) > 1 else {}

    @functools.cached_property
    def groups(self) -> dict[tuple[str, ...], dict[str, list[str]]]:
        """Path of a taxonomic node -> species below it -> ids of their pictures."""
        found: dict[tuple[str, ...], dict[str, list[str]]] = {}
        for example in self.dataset.examples:
            for depth in range(len(example.taxonomy)):
                node = found.setdefault(example.taxonomy[:depth], {})
                node.setdefault(example.species, []).append(example.id)
        return found


@functools.cache
def open_benchmark(root: Path, limit: int | None = None) -> Benchmark:
    """Reads the lists of a dataset folder, or a list in one, no pictures. Raises UserError, also if a bird of a pair
    has no mask.
    """
    dataset = read_dataset(split_list(root)[0])
    pairs = tuple(spread(benchmark_pairs(root, dataset), limit))
    if not pairs:
        raise UserError(f"{root}: found no benchmark pair, expected at least one")
    used = sorted({i for pair in pairs for i in (pair.subject_id, pair.target_id)})
    bare = [i for i in used if dataset.by_id[i].mask is None]
    if bare:
        raise UserError(
            f"{root}: found no mask for {len(bare)} of {len(used)} pictures of the benchmark's pairs, "
            f"the first is {bare[0]} ({dataset.by_id[bare[0]].image})"
        )
    return Benchmark(root, dataset, pairs, oracle.open_oracle(dataset.root), _fingerprint(dataset, pairs))


def _fingerprint(dataset: Dataset, pairs: Sequence[Pair]) -> str:
    """Hash of the folder's lists, the pairs, and the names and sizes of the pictures and masks in it."""
    digest = hashlib.sha256(f"{VERSION} {nabla_jax.__version__}".encode())
    lists = sorted(p for p in dataset.root.iterdir() if p.suffix in (".txt", ".csv", ".json") and p.is_file())
    for path in lists:
        digest.update(f"\n{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    for pair in pairs:
        digest.update(f"\n{pair.key} {pair.subject_id} {pair.target_id} {pair.class_id}".encode())
    for example in dataset.examples:
        files = [path for path in (example.image, example.mask) if path is not None]
        digest.update(f"\n{example.id} {[path.stat().st_size for path in files]}".encode())
        if example.keypoints is not None:
            digest.update(example.keypoints.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures of one set for one benchmark: pair key -> manifest row whose `file` is the picture's path, and
    `mask` that of the generated bird's mask, `masks/PAIR.png` beside the picture, if it is there.

    `shuffled` is empty if the set has none. `fingerprint` changes when a picture is made anew.
    """

    right: Mapping[str, Mapping[str, Any]]
    shuffled: Mapping[str, Mapping[str, Any]]
    has_shuffled: bool
    fingerprint: str


def read_set(folder: Path, benchmark: Benchmark) -> PictureSet:
    """Reads the manifests `right` and `shuffled` below `folder`; rows without their picture count as missing.

    Raises UserError for a row of another pair or other pictures than the benchmark's.
    """
    right, shuffled = (_read_manifest(folder / kind, benchmark) for kind in ("right", "shuffled"))
    digest = hashlib.sha256()
    for kind, found in (("right", right), ("shuffled", shuffled)):
        for key in sorted(found):
            row = {k: v for k, v in found[key].items() if k not in ("file", "mask")}
            sizes = [Path(found[key][name]).stat().st_size for name in ("file", "mask") if name in found[key]]
            digest.update(f"{kind} {key} {sizes} {json.dumps(row, sort_keys=True)}\n".encode())
    return PictureSet(right, shuffled, (folder / "shuffled").is_dir(), digest.hexdigest()[:16])


def _read_manifest(folder: Path, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    path = folder / "manifest.jsonl"
    expected = {pair.key: pair for pair in benchmark.pairs}
    found = {}
    for row in runs.read_rows(path, runs.PictureRow):
        pair = expected.get(row["pair"])
        if pair is None:
            continue
        if (row["subject_id"], row["target_id"]) != (pair.subject_id, pair.target_id):
            raise UserError(
                f"{path}: pair {pair.key} is {row['subject_id']} into {row['target_id']}, expected "
                f"{pair.subject_id} into {pair.target_id} ({benchmark.root})"
            )
        used = row["subject_used"]
        if used not in benchmark.dataset.by_id or (used == pair.subject_id) != (folder.name == "right"):
            raise UserError(
                f"{path}: pair {pair.key}: subject_used is {used}, expected "
                f"{'' if folder.name == 'right' else 'another picture than '}{pair.subject_id}"
            )
        # A part of a list may name the pictures of the whole: then masks lie beside those.
        out = os.path.normpath(folder.parent.parent)
        picture = Path(os.path.normpath(folder / row["file"]))
        if not picture.is_relative_to(out) or untrusted.below(Path(out), str(picture.relative_to(out))) is None:
            raise UserError(
                f"{path}: pair {pair.key}: file {row['file'][:100]!r} leaves {folder.parent.parent}, or is no path"
            )
        if picture.is_file():
            mask = picture.parent / "masks" / f"{picture.stem}.png"
            own = {"mask": str(mask)} if mask.is_file() else {}
            found[pair.key] = row | {"file": str(picture)} | own
    return found


def _report_missing(
    sets: Mapping[tuple[str, str], PictureSet], contexts: Mapping[str, Benchmark], allowed: bool
) -> list[dict[str, Any]]:
    """Counts and lists pictures that are not there; raises UserError unless allowed."""
    missing: list[dict[str, Any]] = []
    for (model, name), found in sets.items():
        keys = [pair.key for pair in contexts[name].pairs]
        for kind, there in (("right", found.right), ("shuffled", found.shuffled)):
            absent = [key for key in keys if key not in there]
            if absent and (kind == "right" or found.has_shuffled):
                missing.append({"model": model, "benchmark": name, "kind": kind, "of": len(keys), "pairs": absent})
    if missing and not allowed:
        text = "; ".join(
            f"{m['model']} {m['benchmark']}/{m['kind']}: {len(m['pairs'])} of {m['of']} "
            f"({', '.join(m['pairs'][:3])}{', ...' if len(m['pairs']) > 3 else ''})"
            for m in missing
        )
        raise UserError(f"missing pictures: {text}; run generate again, or score the rest with --allow_missing")
    return missing


# ----------------------------------------------------------------------------------------------------------
# Work on pairs, in this process or in workers
# ----------------------------------------------------------------------------------------------------------

Chunks = Callable[[Callable[..., list[T]], Sequence[tuple[Any, ...]]], Iterator[list[T]]]


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed parent cannot tell its workers to stop: they watch it.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Chunks[Any]]:
    """A function that applies (function, argument tuples) in order, in `workers` processes or, with 0,
    here.
    """
    if workers <= 0:
        yield lambda function, arguments: (function(*a) for a in arguments)
        return
    # Spawned, not forked: a fork of a process with threads (JAX, BLAS) may hang.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield lambda function, arguments: (f.result() for f in [pool.submit(function, *a) for a in arguments])
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(f"a worker process died ({error}), is there enough memory? --workers 0 needs none") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunked(items: Sequence[T], size: int = 4) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def answer_path(out: Path, benchmark: Benchmark, pair: str) -> Path:
    """Where the oracle's answer of a pair is kept."""
    return out / "cache" / benchmark.fingerprint / f"{pair}.npz"


def _render_answers(contexts: Mapping[str, Benchmark], out: Path, limit: int | None, run: Chunks[str]) -> None:
    work = []
    for benchmark in contexts.values():
        if benchmark.oracle is not None:
            own = [p.key for p in benchmark.pairs if p.key in benchmark.own_keys]
            todo = [key for key in own if not answer_path(out, benchmark, key).is_file()]
            work += [(benchmark.root, limit, out, keys) for keys in _chunked(todo)]
    with runs.progress(sum(len(w[-1]) for w in work), "right answers", unit="pair") as bar:
        for done in run(render_answers, work):
            bar.update(len(done))


def render_answers(root: Path, limit: int | None, out: Path, keys: Sequence[str]) -> list[str]:
    """Asks the oracle about the pairs `keys` and stores its answers; pairs with an empty mask have none."""
    benchmark = open_benchmark(root, limit)
    assert benchmark.oracle is not None
    pairs = {pair.key: pair for pair in benchmark.pairs}
    for key in keys:
        pair = pairs[key]
        mask = _read(benchmark, pair.target_id)[1]
        if mask.any():
            answer = oracle.ask(benchmark.oracle, pair.subject_id, pair.target_id, mask)
            runs.write_atomic(answer_path(out, benchmark, key), oracle.pack(*answer))
    return list(keys)


@dataclasses.dataclass(frozen=True)
class Job:
    """One pair to score: picture files of a set, or None for a reference point; the other subject, if any; the file
    of the generated bird's mask, if any.
    """

    pair: str
    right: str | None
    shuffled: str | None
    other_subject: str | None
    mask: str | None = None


def _score_all(
    pictures: Mapping[str, Path],
    contexts: Mapping[str, Benchmark],
    sets: Mapping[tuple[str, str], PictureSet],
    out: Path,
    seeds: tuple[int, int],
    limit: int | None,
    networks: configs.Metrics,
    trained: Sequence[tuple[str, ...]],
    run: Chunks[PairScore],
) -> dict[tuple[str, str], list[PairScore]]:
    """(benchmark, model) -> scores in the order of the pairs. Stored scores of the same inputs are reused."""
    scores: dict[tuple[str, str], list[PairScore]] = {}
    work: list[tuple[str, str, str, list[Job]]] = []
    judges = _fingerprint_of_networks(networks)
    known = hashlib.sha256(json.dumps(sorted(trained)).encode()).hexdigest()[:16]
    distance_of = distance_from(trained)
    for name, benchmark in contexts.items():
        other = {}
        if benchmark.oracle is not None:
            other = shuffled_subjects(benchmark.pairs, benchmark.dataset, seeds[1])
        for model in [*pictures, *REFERENCES]:
            if model in pictures:
                inputs = sets[model, name].fingerprint
                jobs = _jobs_of_set(sets[model, name], benchmark)
            else:
                inputs = hashlib.sha256(json.dumps([seeds[0], other], sort_keys=True).encode()).hexdigest()[:16]
                jobs = [Job(pair.key, None, None, other.get(pair.key)) for pair in benchmark.pairs]
            inputs = f"{benchmark.fingerprint} {inputs} {known}{judges}"
            stored = _stored_scores(out, name, model, inputs)
            if stored is not None:
                scores[name, model] = stored
            elif jobs:
                work.append((name, model, inputs, jobs))
    # Where the processes share no disk, what the first one has is what counts.
    todo = {tuple(key) for key in json.loads(_gather(json.dumps([w[:2] for w in work]))[0])}
    work = [w for w in work if w[:2] in todo]
    judge = _Judge(networks, contexts, out, seeds[0], {name for name, _, _, _ in work})
    with runs.progress(sum(len(w[-1]) for w in work), "scores", unit="picture") as bar:
        for name, model, inputs, jobs in work:
            found: list[PairScore] = []
            root = contexts[name].root
            own = [job for job in jobs if job.pair in contexts[name].own_keys]
            for chunk in run(score_pairs, [(root, limit, out, model, seeds[0], part) for part in _chunked(own)]):
                found += chunk
                bar.update(len(chunk))
            found = _in_order(found, jobs)
            found = judge.add(found, name, model, inputs, jobs)
            examples = contexts[name].dataset.by_id
            found = [dataclasses.replace(s, distance=distance_of(examples[s.target_id])) for s in found]
            if _is_first():
                _store_scores(out, name, model, inputs, found)
            scores[name, model] = found
    order = [(name, model) for name in contexts for model in [*pictures, *REFERENCES]]
    return {key: scores[key] for key in order if key in scores}


def _in_order(own: list[PairScore], jobs: Sequence[Job]) -> list[PairScore]:
    """The scores of all processes in the order of the jobs."""
    texts = _gather(summary.to_csv(own))
    if len(texts) == 1:
        return own
    by_pair = {score.pair: score for text in texts for score in summary.parse_csv(text)}
    return [by_pair[job.pair] for job in jobs]


# ----------------------------------------------------------------------------------------------------------
# What the networks say, in this process
# ----------------------------------------------------------------------------------------------------------


def _fingerprint_of_networks(networks: configs.Metrics) -> str:
    if not networks.folders:
        return ""
    from nabla_jax.metrics import networks as nets

    return f" {nets.fingerprint(networks)}"


class _Judge:
    """The networks, loaded when the first set needs them, and the descriptions of real pictures."""

    def __init__(
        self, settings: configs.Metrics, contexts: Mapping[str, Benchmark], out: Path, seed: int, names: set[str]
    ) -> None:
        self.contexts, self.out, self.seed = contexts, out, seed
        self.networks: Any = None
        self.real: dict[str, Any] = {}
        self.keypoints: dict[str, dict[str, Array | None]] = {}
        if not settings.folders or not names:
            return
        from nabla_jax.metrics import networks as nets
        from nabla_jax.metrics import perception

        self.networks = nets.load_networks(settings)
        for name in (name for name in contexts if name in names):
            benchmark = contexts[name]
            own = sorted({i for pair in benchmark.pairs for i in (pair.subject_id, pair.target_id)})
            described = functools.partial(
                perception.describe_real,
                self.networks,
                read=functools.partial(_read, benchmark),
                fingerprint=functools.partial(_fingerprint_of_picture, benchmark),
                cache=out / "cache" / "features",
            )
            self.real[name] = described(own, nets.ALL)
            if perception.RETRIEVAL in self.networks.names:
                shown = {i for pair in benchmark.pairs for ids in benchmark.galleries(pair).values() for i in ids}
                self.real[name] |= described(sorted(shown - set(own)), (perception.RETRIEVAL,))
            if self.networks.keypoints is not None:
                known = _keypoints_of_targets(benchmark, self.networks.keypoints.config.parts)
                bare = [id for id, keypoints in known.items() if keypoints is None]
                found = described(bare, (nets.KEYPOINTS,)) if bare else {}
                self.keypoints[name] = known | {id: row[nets.KEYPOINTS] for id, row in found.items()}

    def add(self, scores: list[PairScore], name: str, model: str, inputs: str, jobs: Sequence[Job]) -> list[PairScore]:
        """The scores with what the networks say of pairs that count."""
        if self.networks is None:
            return scores
        from nabla_jax.metrics import perception

        benchmark = self.contexts[name]
        pairs = {pair.key: pair for pair in benchmark.pairs}
        counted = {score.pair for score in scores if not score.excluded}
        cases = [self._case(name, model, pairs[job.pair], job) for job in jobs if job.pair in counted]
        read = functools.partial(_read, benchmark)
        cache = self.out / "cache" / "judgements"
        what = f"{name}/{model}"
        with runs.progress(len(cases), what, unit="picture") as bar:
            found = perception.score(
                self.networks, cases, self.real[name], read, f"{inputs} {model} {self.seed}", cache, bar
            )
        columns: Mapping[str, Mapping[str, Any]] = found
        return [dataclasses.replace(score, **columns.get(score.pair, {})) for score in scores]

    def _case(self, name: str, model: str, pair: Pair, job: Job) -> Any:
        from nabla_jax.metrics import perception

        benchmark = self.contexts[name]
        if job.right is not None:
            picture = functools.partial(read_rgb, job.right)
        else:
            picture = functools.partial(draw_reference, model, benchmark, pair, pair.subject_id, self.seed)
        galleries = benchmark.galleries(pair)
        keypoints = self.keypoints.get(name, {}).get(pair.target_id)
        return perception.Case(pair.key, pair.subject_id, pair.target_id, pair.class_id, picture, galleries, keypoints)


def _keypoints_of_targets(benchmark: Benchmark, parts: Sequence[str]) -> dict[str, Array | None]:
    """Target id -> its keypoints as the data set has them; None where it has none, or of other parts."""
    dataset = benchmark.dataset
    found = {pair.target_id: dataset.by_id[pair.target_id].keypoints for pair in benchmark.pairs}
    same = not dataset.parts or tuple(dataset.parts) == tuple(parts)
    return {id: k if same and k is not None and len(k) == len(parts) else None for id, k in sorted(found.items())}


def _fingerprint_of_picture(benchmark: Benchmark, id: str) -> str:
    example = benchmark.dataset.by_id[id]
    return " ".join(file_sha256(path) for path in (example.image, example.mask) if path is not None)


def _jobs_of_set(found: PictureSet, benchmark: Benchmark) -> list[Job]:
    jobs = []
    for pair in benchmark.pairs:
        if pair.key in found.right:
            shuffled, right = found.shuffled.get(pair.key), found.right[pair.key]
            file = None if shuffled is None else shuffled["file"]
            jobs.append(Job(pair.key, right["file"], file, None, right.get("mask")))
    return jobs


def _score_paths(out: Path, benchmark: str, model: str) -> tuple[Path, Path]:
    folder = out / "pairs" / benchmark
    return folder / f"{model}.csv", folder / f"{model}.inputs"


def _stored_scores(out: Path, benchmark: str, model: str, inputs: str) -> list[PairScore] | None:
    table, stamp = _score_paths(out, benchmark, model)
    if not (table.is_file() and stamp.is_file()):
        return None
    same = stamp.read_text() == f"{inputs} {hashlib.sha256(table.read_bytes()).hexdigest()}\n"
    return summary.from_csv(table) if same else None


def _store_scores(out: Path, benchmark: str, model: str, inputs: str, scores: Sequence[PairScore]) -> None:
    table, stamp = _score_paths(out, benchmark, model)
    text = summary.to_csv(scores)
    runs.write_atomic(table, text)
    # The stamp comes last and names the table's content: a table without its stamp is made again.
    runs.write_atomic(stamp, f"{inputs} {hashlib.sha256(text.encode()).hexdigest()}\n")


def score_pairs(
    root: Path, limit: int | None, out: Path, model: str, seed: int, jobs: Sequence[Job]
) -> list[PairScore]:
    """Scores some pairs of one picture set or reference point."""
    benchmark = open_benchmark(root, limit)
    pairs = {pair.key: pair for pair in benchmark.pairs}
    return [_score_pair(benchmark, out, model, seed, pairs[job.pair], job) for job in jobs]


def _score_pair(benchmark: Benchmark, out: Path, model: str, seed: int, pair: Pair, job: Job) -> PairScore:
    example = benchmark.dataset.by_id[pair.target_id]
    target, mask = _read(benchmark, pair.target_id)
    score = PairScore(
        pair=pair.key,
        subject_id=pair.subject_id,
        target_id=pair.target_id,
        class_id=pair.class_id,
        order=order_of(example),
        species=example.species,
        qualifier=plumage_of(example),
        pixels=int(mask.sum()),
        family=family_of(example),
        cluster=individual_of(benchmark.dataset.by_id[pair.subject_id], example),
        area=float(mask.mean()),
    )
    empty = [i for i in (pair.subject_id, pair.target_id) if not _read(benchmark, i)[1].any()]
    if empty:
        return dataclasses.replace(score, excluded=f"the mask of {empty[0]} is empty")
    if job.right is not None:
        picture: Array = read_rgb(job.right)
        shuffled = None if job.shuffled is None else read_rgb(job.shuffled)
    else:
        picture = draw_reference(model, benchmark, pair, pair.subject_id, seed)
        other = job.other_subject
        # A picture without a bird in it cannot stand in for the subject.
        usable = other is not None and _read(benchmark, other)[1].any()
        shuffled = draw_reference(model, benchmark, pair, other, seed) if other and usable else None
    score = dataclasses.replace(
        score,
        rmse=pixels.masked_rmse(picture, target, mask),
        ssim=pixels.masked_ssim(picture, target, mask),
        mask_iou=None if job.mask is None else pose.mask_iou(read_mask(job.mask, picture.shape[:2]), mask),
    )
    if benchmark.oracle is None:
        return score
    _, answer = oracle.unpack(answer_path(out, benchmark, pair.key))
    errors = identity.identity_errors(_inside(picture, mask), answer)
    assert errors is not None
    return dataclasses.replace(
        score,
        right_error=errors.right,
        shuffled_error=None if shuffled is None else pixels.rmse_of_pixels(_inside(shuffled, mask), answer.right),
        sibling_error=errors.sibling,
        sibling_plumage_error=errors.sibling_plumage,
        rank=errors.rank,
        lineup=len(answer.lineup),
    )


def _inside(picture: Array, mask: Array) -> Array:
    """The picture's pixels inside the mask, after bringing it to the mask's size."""
    return references.stretch(picture, *mask.shape)[mask]


@functools.lru_cache(maxsize=64)
def _read_files(image: Path, mask: Path) -> tuple[Array, Array]:
    pixels_ = read_rgb(image)
    return pixels_, read_mask(mask, pixels_.shape[:2])


def _read(benchmark: Benchmark, id: str) -> tuple[Array, Array]:
    """(picture [H, W, 3] uint8, mask [H, W] bool) of an example that has both."""
    example = benchmark.dataset.by_id[id]
    if example.mask is None:
        raise UserError(f"{example.image}: found no mask for {id}")
    return _read_files(example.image, example.mask)


def order_of(example: Example) -> str:
    """The taxonomic group right below the root; '' where the data set has species only."""
    path = example.taxonomy
    return path[1] if len(path) > 2 and species_name(path[1]) != example.species else ""


def family_of(example: Example) -> str:
    """The group below the order; '' where the data set has none between it and the species."""
    path = example.taxonomy
    return path[2] if len(path) > 3 and species_name(path[2]) != example.species else ""


def plumage_of(example: Example) -> str:
    """The qualifier of the class's name; '' where it names the individual, as for clips."""
    found = qualifier(example.class_name)
    return "" if found is None or found == example.individual else found


def individual_of(subject: Example, target: Example) -> str:
    """The individual both pictures show, such as an observation of iNaturalist; '' where that is not known."""
    same = subject.individual is not None and subject.individual == target.individual
    return f"individual {subject.individual}" if same else ""


def trained_species(config: configs.Config) -> list[tuple[str, ...]]:
    """The taxonomic paths of the species in the training folder; none where the folder is not there."""
    if not Path(config.data.root).is_dir():
        return []
    dataset = read_dataset(config.data.root, **config.data.reading)
    return sorted({species_path(e.taxonomy) for e in dataset.of_split(config.data.split)})


def distance_from(trained: Sequence[tuple[str, ...]]) -> Callable[[Example], int | None]:
    """Levels from an example's species up to the lowest group that a species of training shares: 0 for one of them.

    None where that is not known: no species are given, or the data set of a new species names no groups above it.
    """

    @functools.cache
    def of_species(path: tuple[str, ...]) -> int | None:
        if path[-1] in species:
            return 0
        return distance(path, trained) if species and len(path) > 2 else None

    species = {path[-1] for path in trained}
    return lambda example: of_species(species_path(example.taxonomy))


def draw_reference(name: str, benchmark: Benchmark, pair: Pair, subject_id: str, seed: int) -> Array:
    """The picture of a reference point for a pair, with `subject_id` as its subject; the target's size.

    'same-class' is another picture of the subject's class (the subject itself only where the class has no
    other), 'sibling-class' one of a species next to the subject's: of the nearest taxonomic group that has
    another species. Both are whole pictures stretched to the target's size, so they show what resemblance
    alone gives.
    """
    target, mask = _read(benchmark, pair.target_id)
    if name == "copy-target":
        return references.copy_target(target)
    if name in ("flat-colour", "paste-subject"):
        make = references.flat_colour if name == "flat-colour" else references.paste_subject
        return make(*_read(benchmark, subject_id), target, mask)
    candidates = _class_mates(benchmark, subject_id, pair) if name == "same-class" else _siblings(benchmark, subject_id)
    chosen = references.choose(candidates, seed, pair.key, name)
    return references.stretch(read_rgb(benchmark.dataset.by_id[chosen].image), *mask.shape)


def _class_mates(benchmark: Benchmark, subject_id: str, pair: Pair) -> list[str]:
    dataset = benchmark.dataset
    mates = [dataset.examples[i].id for i in dataset.classes[dataset.by_id[subject_id].class_id]]
    return [i for i in mates if i not in (subject_id, pair.target_id)] or [subject_id]


def _siblings(benchmark: Benchmark, subject_id: str) -> list[str]:
    subject = benchmark.dataset.by_id[subject_id]
    for depth in range(len(subject.taxonomy) - 1, -1, -1):
        species = benchmark.groups[subject.taxonomy[:depth]]
        others = [i for name, ids in species.items() if name != subject.species for i in ids]
        if others:
            return others
    raise UserError(f"{benchmark.root}: found one species only ({subject.species}), expected at least two")


# ----------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------


def _write_results(
    scores: Mapping[tuple[str, str], list[PairScore]],
    contexts: Mapping[str, Benchmark],
    sets: Mapping[tuple[str, str], PictureSet],
    missing: Sequence[dict[str, Any]],
    out: Path,
    seed: int,
    networks: configs.Metrics,
    baseline: str | None,
) -> list[dict[str, Any]]:
    rows, breakdown, comparisons = [], [], []
    for (name, model), found in scores.items():
        rows += summary.rows(model, name, found, seed)
        breakdown += summary.breakdown(model, name, found, seed)
        base = baseline or baseline_of(model, [m for b, m in scores if b == name])
        if model != base and (name, base) in scores:
            comparisons += summary.compare(model, base, name, found, scores[name, base], seed)
    about = {
        "version": VERSION,
        "nabla_jax": nabla_jax.__version__,
        "seed": seed,
        "benchmarks": [_about_benchmark(name, b, scores) for name, b in contexts.items()],
        "sets": [_about_set(model, name, found) for (model, name), found in sets.items()],
        "references": list(REFERENCES),
        "networks": _about_networks(networks),
        "missing": list(missing),
    }
    models = [m for m in dict.fromkeys(m for _, m in scores) if summary.kind(m, REFERENCES) == "model"]
    lines = summary.regressions(scores, models, seed)
    for file, value in (
        ("comparisons", summary.correct(comparisons)),
        ("breakdown", breakdown),
        ("regressions", lines),
        ("evaluation", about),
    ):
        runs.write_json(out / f"{file}.json", value)
    runs.write_atomic(out / "summary.md", summary.text_table(rows, markdown=True))
    runs.write_json(out / "summary.json", rows)
    for note in summary.notes(about):
        print(note)
    return rows


def baseline_of(model: str, models: Sequence[str]) -> str:
    """What a model is compared with unless told: 'untuned:MODEL' where it is among `models`, else 'untuned'."""
    own = f"{BASELINE}:{model}"
    return own if own in models else BASELINE


def _about_benchmark(
    name: str, benchmark: Benchmark, scores: Mapping[tuple[str, str], list[PairScore]]
) -> dict[str, Any]:
    excluded = {s.pair: s.excluded for (b, _), found in scores.items() if b == name for s in found if s.excluded}
    path = benchmark.dataset.root / oracle.FILE
    return {
        "name": name,
        "root": str(benchmark.dataset.root),
        "list": benchmark.root.name if benchmark.root != benchmark.dataset.root else None,
        "fingerprint": benchmark.fingerprint,
        "pairs": len(benchmark.pairs),
        "classes": len({p.class_id for p in benchmark.pairs}),
        "duplicates": duplicate_rows(benchmark.pairs),
        "excluded": excluded,
        "oracle": {k: v for k, v in runs.read_json(path).items() if not isinstance(v, dict | list)}
        if benchmark.oracle is not None
        else None,
    }


def _about_networks(networks: configs.Metrics) -> dict[str, dict[str, Any]]:
    """Network -> its folder and the hash of its weights."""
    found = {}
    for name, path in networks.folders.items():
        weights = sorted(assets.resolve(path).glob("*.safetensors"))
        found[name] = {"folder": path, "sha256": [file_sha256(file) for file in weights]}
    return found


def _about_set(model: str, benchmark: str, found: PictureSet) -> dict[str, Any]:
    settings = dict.fromkeys(("seed", "steps", "guidance", "adapter", "adapter_sha256", "base_sha256"))
    # Others are named in manifests only where they are in use, such as those of method insert.
    settings |= dict.fromkeys(name for row in found.right.values() for name in row if name not in OF_ONE_PICTURE)
    values = {name: sorted({json.dumps(row[name]) for row in found.right.values() if name in row}) for name in settings}
    return {
        "model": model,
        "benchmark": benchmark,
        "fingerprint": found.fingerprint,
        "pictures": len(found.right),
        "shuffled": len(found.shuffled),
        "files": {key: row["file"] for key, row in sorted(found.right.items())},
    } | {name: [json.loads(v) for v in texts] for name, texts in values.items()}


def _named_folders(words: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or "/" in name:
            raise UserError(f"--pictures: found {word!r}, expected NAME=FOLDER")
        if name in REFERENCES or name in found:
            raise UserError(f"--pictures: the name {name!r} is taken")
        if not Path(folder).is_dir():
            raise UserError(f"--pictures {name}: no such folder {folder}")
        found[name] = Path(folder)
    return found


if __name__ == "__main__":
    runs.run_main(main)
