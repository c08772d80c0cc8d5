"""Makes pictures: whole benchmarks, or the bird of one picture, or each of several, in the pose of another.

    python -m nabla_jax.generate --config configs/omk_fill.py --adapter runs/omk_fill --out pictures/omk_fill
    python -m nabla_jax.generate --config configs/omk_fill.py --adapter runs/omk_fill --subject a.jpg
        --subject_mask a_mask.png --target b.jpg --target_mask b_mask.png --out c.png
    python -m nabla_jax.generate --config configs/omk_fill.py --adapter runs/omk_fill --plate terns.csv
        --target b.jpg --target_mask b_mask.png --out terns

A benchmark's pictures go to ``OUT/BENCHMARK/right`` and, with a subject of another species,
``OUT/BENCHMARK/shuffled``: ``PAIR.png`` at the target's size and one row of ``manifest.jsonl`` each. The
same command makes what is missing. A picture depends on (seed, pair) and not on the batch it is made in.
With sample.sibling_guidance every pair has a sibling, too: a picture of a related species, see ``sibling_subjects``.
A benchmark that is a list in the folder of another one shares its pictures where they are there: its rows name them.
All devices share each batch. Several processes (NABLA_COORDINATOR, see parallel/processes.py) share the batches of a
benchmark and write into one folder that all of them see.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nabla_jax import config as configs
from nabla_jax import one_target, runs, watchdog
from nabla_jax.errors import UserError

if TYPE_CHECKING:
    from nabla_jax import api
    from nabla_jax.data import Dataset, Example
    from nabla_jax.data.pairs import Pair

Array = np.ndarray[Any, Any]

KINDS = ("right", "shuffled")
CEILING = "autoencoder-ceiling"
# Settings that rows name only where they are in use, so that older sets of pictures can be continued.
_NAMED_IN_USE = ("control_adapter_sha256", "image_guidance", "sibling_guidance", "compact", "method", "quantise")


def main(argv: Sequence[str]) -> None:
    """The command."""
    config, arguments = configs.parse_command(argv, "Makes pictures.", _add_arguments)
    single = one_target.wanted(config, arguments)
    configs.check_inputs(config, "generate", [] if single else _benchmarks(config, arguments))
    if single:
        one_target.make(config, arguments, _load, _settings)
    else:
        _make_benchmarks(config, arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--adapter",
        default="none",
        help="safetensors file, training run, asset:NAME, or none for the bare base",
    )
    add("--control_adapter", help="the control's own adapter, if --adapter is the subject's alone")
    add("--out", required=True, type=Path, help="folder for benchmarks and plates, or the file of one picture")
    add("--benchmark", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    add("--subjects", default=",".join(KINDS), help="right, shuffled or both (right,shuffled)")
    add("--limit", type=int, help="only N pairs of each benchmark, spread over its classes")
    add("--reference", choices=(CEILING,), help="instead of a model: the right answer through the autoencoder")
    add("--subject", type=Path, help="one picture: whose bird")
    add("--subject_mask", type=Path, help="may be left out where there are checkpoints to find the bird with")
    add("--plate", type=Path, metavar="CSV", help="several birds in the target's pose: columns label, picture and mask")
    add("--arrows", type=Path, metavar="CSV", help="for --plate: columns label, row, column and text")
    add("--target", type=Path, help="one picture or plate: in which pose and place")
    add("--target_mask", type=Path)
    add("--sibling", type=Path, help="for sample.sibling_guidance: a bird of a related species")
    add("--sibling_mask", type=Path, help="may be left out as --subject_mask may")
    add("--target_depth", type=Path, help="for control depth: grey picture of the target's size, near is bright")
    add(
        "--target_keypoints",
        type=Path,
        help="for control keypoints: 11 lines `part x y visible`; else found by extract.keypoints",
    )
    add("--target_caption", help="for caption background: what is to be seen round the bird")


def _benchmarks(config: configs.Config, arguments: argparse.Namespace) -> list[str]:
    return list(arguments.benchmark or config.benchmarks)


def _load(config: configs.Config, adapter: str, control_adapter: str | None) -> "api.Reposer":
    # Imported after the checks: a mistake in the configuration is answered before any framework loads.
    from nabla_jax import api

    return api.load(
        config.base.path,
        None if adapter == api.NO_ADAPTER else adapter,
        control_adapter=control_adapter,
        conditioning=config.conditioning,
        sample=config.sample,
        dtype=config.train.dtype,
        redux=config.base.redux or None,
        quantise=config.base.quantise,
        attention=config.base.attention,
        mesh=config.mesh,
    )


# ----------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """The pictures of one benchmark and one choice of subjects."""

    name: str
    kind: str
    folder: Path
    dataset: "Dataset"
    pairs: tuple["Pair", ...]
    subjects: dict[str, str]  # pair key -> id of the subject picture to use
    siblings: dict[str, str]  # pair key -> id of the sibling's picture, empty without sibling guidance
    whole: Path | None = None  # folder of the benchmark whose list this one's is a part of

    def path(self, pair: "Pair") -> Path:
        """Where a pair's picture goes."""
        return self.folder / f"{pair.key}.png"


Made = tuple[Array, dict[str, Any]]  # a picture and its placement as JSON
MANIFEST = "manifest.jsonl"


def _make_benchmarks(config: configs.Config, arguments: argparse.Namespace) -> None:
    kinds = [kind.strip() for kind in arguments.subjects.split(",") if kind.strip()]
    _check_kinds(kinds, "--subjects")
    works = list(read_works(config, _benchmarks(config, arguments), kinds, arguments.out, arguments.limit))
    with runs.writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    import jax

    from nabla_jax.parallel import mesh as meshes
    from nabla_jax.parallel import processes

    processes.initialize()
    mesh = meshes.make_mesh(dataclasses.asdict(config.mesh), jax.local_devices())
    meshes.check_batch(config.sample.batch, mesh, "sample.batch")
    lock = runs.lock(arguments.out / ".lock", f"--out {arguments.out}")
    with lock if processes.is_first() else contextlib.nullcontext(), watchdog.Watchdog(config.watch) as watch:
        chosen = ("none", None) if arguments.reference else (arguments.adapter, arguments.control_adapter)
        reposer = _load(config, *chosen)
        settings = _settings(config, reposer, arguments.reference)
        for work in works:
            maker = _ceiling_maker(reposer, work, config) if arguments.reference else _maker(reposer, work, config)
            make(work, settings, config.sample.batch, _watched(watch, work, maker))


def _watched(
    watch: watchdog.Watchdog, work: "Work", maker: Callable[[Sequence["Pair"]], list[Made]]
) -> Callable[[Sequence["Pair"]], list[Made]]:
    def make(pairs: Sequence["Pair"]) -> list[Made]:
        with watch.part("a batch of pictures", f"{work.folder}: pair {pairs[0].key}"):
            return maker(pairs)

    return make


def _check_kinds(kinds: Sequence[str], what: str) -> None:
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"{what}: found {','.join(kinds)!r}, expected {' or '.join(KINDS)}, or both")


def draw_benchmarks(
    config: configs.Config, reposer: "api.Reposer", out: Path, kinds: Sequence[str], limit: int | None
) -> None:
    """Makes what is missing of the pictures of all benchmarks by a model that is loaded already.

    Raises UserError as ``read_works`` and ``make`` do, before anything is drawn where the fault is in a data set.
    """
    _check_kinds(kinds, "subjects")
    works = list(read_works(config, list(config.benchmarks), kinds, out, limit))
    with runs.lock(out / ".lock", f"--out {out}"):
        settings = _settings(config, reposer, None)
        for work in works:
            make(work, settings, config.sample.batch, _maker(reposer, work, config))


def read_works(
    config: configs.Config, names: Sequence[str], kinds: Sequence[str], out: Path, limit: int | None
) -> Iterator[Work]:
    """What there is to make for each benchmark and choice of subjects.

    Raises UserError for a dataset that cannot be read and for pictures without what their part is made of.
    """
    from nabla_jax.data import controls, read_dataset
    from nabla_jax.data.pairs import benchmark_pairs, shuffled_subjects, split_list, spread
    from nabla_jax.data.pictures import distinct_captions

    wholes = {Path(root): name for name, root in config.benchmarks.items()}
    # Parts come last: the pictures that they share are there by then.
    for name in sorted(names, key=lambda name: Path(config.benchmarks[name]).is_file()):
        root, path = split_list(config.benchmarks[name])
        whole = None if path is None else wholes.get(root)
        dataset = read_dataset(root)
        pairs = tuple(spread(benchmark_pairs(config.benchmarks[name], dataset), limit))
        for kind in kinds:
            right = {pair.key: pair.subject_id for pair in pairs}
            subjects = right if kind == "right" else shuffled_subjects(pairs, dataset, config.sample.seed)
            siblings: dict[str, str] = {}
            if config.sample.sibling_guidance != 1:
                siblings = sibling_subjects(pairs, subjects, dataset, config.sample.seed)
            controls.require([dataset.by_id[image] for image in dict.fromkeys(subjects.values())], "fill")
            targets = [dataset.by_id[image] for image in dict.fromkeys(pair.target_id for pair in pairs)]
            controls.require(targets, config.conditioning.control)
            if config.conditioning.caption == "background":
                distinct_captions(targets)
            shared = None if whole is None else out / whole / kind
            yield Work(name, kind, out / name / kind, dataset, pairs, subjects, siblings, shared)


def sibling_subjects(
    pairs: Sequence["Pair"], subjects: Mapping[str, str], dataset: "Dataset", seed: int
) -> dict[str, str]:
    """Pair key -> id of a picture of a sibling of the pair's subject, for sibling guidance.

    A sibling is of another species in the nearest taxonomic group that has one: of the family, else of the order, else
    any. Its plumage is of the subject's kind (the same qualifier, or one that names it too) where that group has such a
    bird. Drawn uniformly from the pictures of the subject's split that have a mask; each draw depends on (seed, pair
    key) alone, so that a part of a benchmark gets the same siblings as the whole.

    Args:
      pairs: of a benchmark in ``dataset``.
      subjects: pair key -> id of the subject's picture.

    Raises UserError when there is a single species.
    """
    from nabla_jax.data.taxonomy import same_plumage
    from nabla_jax.metrics import references, retrieval

    @functools.cache
    def masked(split: str) -> "tuple[Dataset, list[Example]]":
        examples = tuple(e for e in dataset.of_split(split) if e.mask is not None)
        part = dataclasses.replace(dataset, examples=examples)
        return part, retrieval.leaves(part)

    @functools.cache
    def pictures(split: str, class_id: int) -> list[str]:
        part, leaves = masked(split)
        subject = dataset.examples[dataset.classes[class_id][0]]
        near = set(retrieval.siblings(leaves, subject))
        others = [leaf for leaf in leaves if leaf.class_id in near and leaf.species != subject.species]
        alike = [leaf for leaf in others if same_plumage(leaf.class_name, subject.class_name)]
        return sorted(part.examples[i].id for leaf in alike or others for i in part.classes[leaf.class_id])

    chosen = {}
    for pair in pairs:
        subject = dataset.by_id[subjects[pair.key]]
        found = pictures(subject.split, subject.class_id)
        if not found:
            raise UserError(
                f"{dataset.root}: pair {pair.key}: found no picture with a mask of a species other than "
                f"{subject.species}"
            )
        chosen[pair.key] = references.choose(found, seed, pair.key, "sibling")
    return chosen


def _settings(config: configs.Config, reposer: "api.Reposer", reference: str | None) -> dict[str, Any]:
    """The fields of a manifest row that every picture of a set shares; ``reference`` stands for the model."""
    further: dict[str, Any] = {}
    if reposer.control_path is not None:
        further = {"control_adapter": str(reposer.control_path), "control_adapter_sha256": reposer.control_sha256}
    if config.sample.image_guidance != 1:
        further["image_guidance"] = config.sample.image_guidance
    if config.sample.sibling_guidance != 1:
        further["sibling_guidance"] = config.sample.sibling_guidance
    if config.conditioning.compact != 1:
        further["compact"] = config.conditioning.compact
    if config.base.quantise != "none":
        further["quantise"] = config.base.quantise
    if config.conditioning.method != "omini":
        further["method"] = config.conditioning.method
    if config.conditioning.method == "insert":
        further |= {name: getattr(config.sample, name) for name in ("mask_policy", "expansion", "window", "feather")}
    return further | {
        "seed": config.sample.seed,
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "adapter": reference or (str(reposer.adapter_path) if reposer.adapter_path else "none"),
        "adapter_sha256": reposer.adapter_sha256,
        "base_sha256": reposer.base_sha256,
    }


def make(work: Work, settings: dict[str, Any], batch: int, maker: Callable[[Sequence["Pair"]], list[Made]]) -> None:
    """Makes the missing pictures of ``work``, each written whole before its row.

    Pairs are cut into the same batches whatever is missing, so a continued run repeats the very computation
    of an uninterrupted one. Among several processes all must call this: each makes its share of the batches and keeps
    a list of its own, from which the first process takes the rows in the end, or a later run where it came to none.

    Raises UserError when the folder holds pictures made with other settings, or is not the same for all processes.
    """
    from nabla_jax.images import write_image
    from nabla_jax.parallel import processes

    what, (index, count) = f"{work.name}/{work.kind}", processes.part()
    # Every process looks before the first one writes, so that all of them refuse.
    _check_settings(work, settings, [row for path in _lists(work) for row in runs.read_rows(path, runs.PictureRow)])
    processes.wait_for_all(f"{what} checked")
    if processes.is_first():
        _collect(work, settings)
    processes.wait_for_all(f"{what} collected")
    done = {row["pair"] for row in runs.read_rows(work.folder / MANIFEST, runs.PictureRow)}
    batches = [work.pairs[i : i + batch] for i in range(0, len(work.pairs), batch)]
    missing = [pairs for pairs in batches if any(pair.key not in done for pair in pairs)]
    share = processes.own_share(missing)
    rows = runs.JsonLines(work.folder / (MANIFEST if count == 1 else f"manifest-{index}.jsonl"), runs.PictureRow)
    there = len(work.pairs) - sum(map(len, missing))
    with runs.progress(there + sum(map(len, share)), what, done=there, unit="picture") as bar:
        for pairs in share:
            for pair, (image, placement) in zip(pairs, maker(pairs), strict=True):
                if pair.key in done:
                    continue
                write_image(image, work.path(pair))
                rows.append(_row(work, pair, image, placement, settings))
            bar.update(len(pairs))
    rows.close()
    processes.wait_for_all(f"{what} made")
    if count > 1 and processes.is_first():
        done = {row["pair"] for row in _collect(work, settings)}
        absent = [pair.key for pair in work.pairs if pair.key not in done]
        if absent:
            raise UserError(f"{work.folder}: found no pair {absent[0]}, expected one folder that all processes see")


def _lists(work: Work) -> list[Path]:
    """Where rows are: the manifest, and what several processes have not handed over to it."""
    return [work.folder / MANIFEST, *sorted(work.folder.glob("manifest-*.jsonl"))]


def _collect(work: Work, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Brings all rows whose picture is there into the manifest, and returns them.

    Those of other lists come in the order of the pairs, as a single process writes them.
    """
    manifest, *others = _lists(work)
    whole = runs.JsonLines(manifest, runs.PictureRow)
    whole.keep(lambda row: (work.folder / row["file"]).is_file())
    done = {row["pair"] for row in whole.rows}
    rows = [row for path in others for row in runs.read_rows(path, runs.PictureRow) if row["pair"] not in done]
    order = {pair.key: i for i, pair in enumerate(work.pairs)}
    rows.sort(key=lambda row: order.get(row["pair"], len(order)))
    whole.extend([row for row in rows if (work.folder / row["file"]).is_file()])
    whole.extend(_shared_rows(work, settings, {row["pair"] for row in whole.rows}))
    whole.close()
    for path in others:
        path.unlink()
    return whole.rows


def _row(work: Work, pair: "Pair", image: Array, placement: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "pair": pair.key,
        "subject_id": pair.subject_id,
        "target_id": pair.target_id,
        "subject_used": work.subjects[pair.key],
        **({"sibling_used": work.siblings[pair.key]} if work.siblings else {}),
        "file": work.path(pair).name,
        "height": image.shape[0],
        "width": image.shape[1],
        **settings,
        "placement": placement,
    }


def _shared_rows(work: Work, settings: dict[str, Any], done: set[str]) -> list[dict[str, Any]]:
    """The rows of the pairs that are not ``done`` and whose pictures the whole list's benchmark has.

    Pairs are matched by subject and target, since a part counts its own rows; a shuffled subject is then the whole's.
    """
    if work.whole is None:
        return []
    there = {
        (row["subject_id"], row["target_id"]): row
        for row in runs.read_rows(work.whole / MANIFEST, runs.PictureRow)
        if not _differing(row, settings) and (work.whole / row["file"]).is_file()
    }
    chosen = {pair.key: there.get((pair.subject_id, pair.target_id)) for pair in work.pairs if pair.key not in done}
    return [
        {**row, "pair": key, "file": Path(os.path.relpath(work.whole / row["file"], work.folder)).as_posix()}
        for key, row in chosen.items()
        if row is not None
    ]


def _differing(row: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    # The adapter's path may change (a moved run); its content may not.
    fixed = [key for key in settings if key != "adapter" or settings["adapter_sha256"] is None]
    fixed += [key for key in _NAMED_IN_USE if key not in settings]
    pairs = [(key, row.get(key), settings.get(key)) for key in fixed]
    return [f"{key}: {there!r} there, {here!r} here" for key, there, here in pairs if there != here]


def _check_settings(work: Work, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        differing = _differing(row, settings)
        if differing:
            raise UserError(
                f"{work.folder}: its pictures were made with other settings ({'; '.join(differing)}); choose "
                "another --out or delete it"
            )


def _maker(reposer: "api.Reposer", work: Work, config: configs.Config) -> Callable[[Sequence["Pair"]], list[Made]]:
    from nabla_jax import api
    from nabla_jax.data import controls

    def job(pair: "Pair") -> api.Job:
        examples = work.dataset.by_id
        # Of the subject its silhouette is enough, whatever the control.
        subject = controls.read_view(examples[work.subjects[pair.key]], "fill")
        target = controls.read_view(examples[pair.target_id], reposer.conditioning.control)
        key = f"{work.name}/{pair.key}"
        caption = examples[pair.target_id].caption
        found = api.Job(
            key, subject.image, subject.mask, target.image, target.mask, target.depth, target.keypoints, caption
        )
        if not work.siblings:
            return found
        sibling = controls.read_view(examples[work.siblings[pair.key]], "fill")
        return dataclasses.replace(found, sibling=sibling.image, sibling_mask=sibling.mask)

    def make(pairs: Sequence["Pair"]) -> list[Made]:
        jobs = [job(pair) for pair in pairs]
        return [(image, place.to_json()) for image, place in reposer.repose_batch(jobs, config.sample)]

    return make


def _ceiling_maker(
    reposer: "api.Reposer", work: Work, config: configs.Config
) -> Callable[[Sequence["Pair"]], list[Made]]:
    from nabla_jax.conditioning.geometry import Placement
    from nabla_jax.metrics.oracle import open_oracle

    oracle = open_oracle(work.dataset.root)
    if oracle is None:
        raise UserError(f"--reference {CEILING}: {work.dataset.root} has no oracle.json, so no right answer is known")

    def make(pairs: Sequence["Pair"]) -> list[Made]:
        answers = [oracle.right(work.subjects[pair.key], pair.target_id) for pair in pairs]
        results = reposer.reconstruct(answers, config.sample.batch)
        size = config.conditioning.size
        places = [Placement.square(a.shape[0], a.shape[1], size).to_json() for a in answers]
        return list(zip(results, places, strict=True))

    return make


if __name__ == "__main__":
    runs.run_main(main)
