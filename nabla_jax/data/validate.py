"""Lists every problem of data folders and pair lists at once: ``python -m nabla_jax.prepare --validate FOLDER ...``.

Nothing is written but what a source must unpack to be read at all. Lists are read whole and, unless ``--lists_only``,
the header of every picture, mask and depth map is opened. Each problem is one line: level, file, line, what was found
and expected, how to mend it. Errors keep the folder from being read and give exit status 2; warnings do not.

    python -m nabla_jax.prepare --validate data/nabirds
    python -m nabla_jax.prepare --validate --config configs/omk_fill.py
    python -m nabla_jax.prepare --validate --pairs nabla_pairs.csv inat_nabirds_pairs.csv inat_unseen_pairs.csv
"""

import argparse
import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.data import nabirds, pair_lists, scan_dataset
from nabla_jax.data.dataset import Dataset, Example
from nabla_jax.data.problems import Problem, Problems
from nabla_jax.data.tables import header_of
from nabla_jax.data.taxonomy import plumages, qualifier
from nabla_jax.errors import UserError
from nabla_jax.images import picture_size

DESCRIPTION = "Lists every problem of data folders and pair lists."


def main(argv: Sequence[str]) -> None:
    """The command. Raises UserError, after the list is printed, when it holds an error."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folders", nargs="*", metavar="FOLDER", help="data folders, in any known layout")
        parser.add_argument("--validate", action="store_true", help=argparse.SUPPRESS)
        parser.add_argument("--pairs", nargs="+", default=[], metavar="FILE", help="account for the rows of pair lists")
        parser.add_argument(
            "--strict_unseen", metavar="FILE", help="write the list of unseen species without seen ones"
        )
        parser.add_argument("--lists_only", action="store_true", help="open no picture")
        parser.add_argument("--limit", type=int, default=0, metavar="N", help="of each kind list the first N (0: all)")

    folders: list[tuple[str, dict[str, Any]]] = []
    if any(word.split("=")[0].split(".")[0] == "--config" for word in argv):
        config, options = configs.parse_command(argv, DESCRIPTION, arguments)
        folders.append((config.data.root, config.data.reading))
        folders += [(root, {}) for root in config.benchmarks.values() if Path(root).is_dir()]
    else:
        parser = argparse.ArgumentParser(description=DESCRIPTION, allow_abbrev=False)
        parser.add_argument(
            "--config", metavar="FILE[:arg]", help="check data.root and the benchmarks of a configuration"
        )
        arguments(parser)
        options = parser.parse_args(argv)
    folders += [(root, {}) for root in options.folders]
    if not folders and not options.pairs:
        raise UserError("--validate: found no folder, expected FOLDER, --config FILE or --pairs FILE")
    problems = Problems()
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for root, reading in folders:
        chosen.setdefault(os.path.normpath(root), (root, reading))
    datasets = [
        check_folder(root, problems, pictures=not options.lists_only, **reading) for root, reading in chosen.values()
    ]
    named = next((d for d in datasets if d is not None and nabirds.is_layout(d.root)), None)
    reports = pair_lists.report_all([Path(file) for file in options.pairs], problems, named)
    for report in reports:
        print("\n".join(pair_lists.describe(report)), flush=True)
    if options.strict_unseen:
        _write_strict(Path(options.strict_unseen), reports)
    for line in listing(problems, options.limit):
        print(line)
    errors, warnings = len(problems.errors), len(problems) - len(problems.errors)
    if errors:
        raise UserError(f"{errors} errors and {warnings} warnings, listed above")
    print(f"no errors, {warnings} warnings", flush=True)


def check_folder(root: str, problems: Problems, *, pictures: bool = True, **reading: Any) -> Dataset | None:
    """Scans a folder, opens its pictures if asked, prints what it holds, and returns what could be read of it."""
    own = Problems()
    dataset = None
    try:
        dataset = scan_dataset(root, own, **reading)
    except UserError as error:
        own.error(Path(root), None, str(error).removeprefix(f"{root}: "), "name a data folder")
    if dataset is not None:
        if pictures:
            check_pictures(dataset, own)
        pairs = dataset.root / "pairs.csv"
        if pairs.is_file() and "class_id" in header_of(pairs):
            pair_lists.report_all([pairs], own, dataset, published=False)
        print("\n".join(describe(dataset, own)), flush=True)
    problems.found += own.found
    return dataset


def check_pictures(dataset: Dataset, problems: Problems) -> None:
    """Opens the header of every picture, mask and depth map and compares their sizes with each other and the lists."""
    listed = nabirds.read_sizes(dataset.root) if nabirds.is_layout(dataset.root) else {}
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
        # In chunks: a task for each picture costs as much as its header.
        chunks = [dataset.examples[i : i + 256] for i in range(0, len(dataset.examples), 256)]
        sizes = pool.map(lambda chunk: [_sizes(example) for example in chunk], chunks)
        bar = runs.track(_flat(sizes), "open", total=len(dataset.examples), unit="picture")
        for example, found in zip(dataset.examples, bar, strict=True):
            _compare(example, found, listed.get(example.id), dataset.root, problems)


Size = tuple[int, int]


def _sizes(example: Example) -> dict[str, Size | UserError]:
    files = {"image": example.image, "mask": example.mask, "depth": example.depth}
    return {name: _size(path) for name, path in files.items() if path is not None}


def _size(path: Path) -> Size | UserError:
    try:
        return _plain_jpeg_size(path) or picture_size(path)
    except UserError as error:
        return error


def _plain_jpeg_size(path: Path) -> Size | None:
    """(height, width) of a JPEG without EXIF, None for everything else: five times as fast as opening it."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    if head[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if marker == 0xE1:  # EXIF or XMP: may hold an orientation
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header (ITU-T T.81, table B.1)
            height, width = int.from_bytes(head[place + 5 : place + 7]), int.from_bytes(head[place + 7 : place + 9])
            return (height, width) if height and width else None
        place += 2 + int.from_bytes(head[place + 2 : place + 4])
    return None


def _flat(chunks: Iterable[list[dict[str, Size | UserError]]]) -> Iterator[dict[str, Size | UserError]]:
    for chunk in chunks:
        yield from chunk


def _compare(
    example: Example,
    found: dict[str, Size | UserError],
    listed: tuple[int, Size] | None,
    root: Path,
    problems: Problems,
) -> None:
    files = {"image": example.image, "mask": example.mask, "depth": example.depth}
    for name, size in found.items():
        file = files[name]
        assert file is not None
        if isinstance(size, UserError):
            what = str(size).removeprefix(f"{file}: ")
            problems.error(file, None, what, "copy it again" if name == "image" else "make it again")
    size = found["image"]
    if isinstance(size, UserError):
        return
    for name in ("mask", "depth"):
        other = found.get(name, size)
        file = files[name]
        if not isinstance(other, UserError) and other != size and file is not None:
            what = f"is {other[0]}x{other[1]} (height x width), its picture {size[0]}x{size[1]}"
            problems.error(file, None, what, f"make the {name} again at the picture's size")
    if listed is not None and listed[1] != size:
        line, (height, width) = listed
        turned = ", exchanged by the picture's EXIF orientation" if (width, height) == size else ""
        what = f"picture {example.id} is {width} x {height} here and {size[1]} x {size[0]} on disk{turned}"
        problems.warn(root / "sizes.txt", line, what, "boxes are clipped to this list; correct the line or the picture")
    if example.box is not None and listed is None:
        _, _, bottom, right = example.box
        if bottom > size[0] or right > size[1]:
            what = f"box ends at x {right}, y {bottom}, the picture at {size[1]}, {size[0]}"
            problems.error(example.image, None, what, "correct the box")


def describe(dataset: Dataset, problems: Problems) -> list[str]:
    """What a folder holds, in a few lines."""
    examples = dataset.examples
    splits = collections.Counter(e.split for e in examples)
    names = {e.class_name for e in examples}
    qualifiers = {q for q in map(qualifier, names) if q is not None}
    out = [
        f"{dataset.root}: {len(examples):,} pictures ("
        + ", ".join(f"{count:,} {split}" for split, count in sorted(splits.items()))
        + f") of {len(dataset.classes):,} classes, {len({e.species for e in examples}):,} species",
        "  with "
        + ", ".join(
            f"{name} {sum(getattr(e, field) is not None for e in examples):,}"
            for name, field in (
                *(("mask", "mask"), ("depth", "depth"), ("box", "box"), ("keypoints", "keypoints")),
                *(("caption", "caption"), ("individual", "individual"), ("licence", "licence"), ("credit", "credit")),
            )
        ),
    ]
    for split in sorted(splits):
        sizes = collections.Counter(e.class_id for e in examples if e.split == split).values()
        out.append(
            f"  {split}: {sum(n * (n - 1) for n in sizes):,} ordered pairs within "
            f"{sum(n > 1 for n in sizes):,} classes, {sum(n == 1 for n in sizes):,} classes of one picture"
        )
    if qualifiers:
        parsed = sum(bool(plumages(q)) for q in qualifiers)
        out.append(
            f"  {len(qualifiers):,} qualifiers: {parsed} read as sex, age, season or morph, "
            f"{len(qualifiers) - parsed} kept verbatim"
        )
    out += [f"  {count:,} {what}" for what, count in sorted(problems.notes.items())]
    return out


def listing(problems: Problems, limit: int = 0) -> Iterator[str]:
    """One line for each problem, errors first; of each kind only the first ``limit``, unless 0."""
    kinds: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        # Problems of one file with one remedy, whatever the numbers and names in it, are of one kind.
        kinds.setdefault((problem.level, str(problem.file.parent), problem.fix), []).append(problem)
    for level in ("error", "warning"):
        for kind, found in kinds.items():
            if kind[0] != level:
                continue
            shown = found[:limit] if limit else found
            yield from (f"{level}: {problem}; {problem.fix}" for problem in shown)
            if len(found) > len(shown):
                yield f"{level}: ... and {len(found) - len(shown)} more like it"


def _write_strict(path: Path, reports: Sequence[pair_lists.Report]) -> None:
    unseen = [report for report in reports if report.kind == "unseen"]
    if len(unseen) != 1:
        raise UserError(f"--strict_unseen: found {len(unseen)} lists of unseen species among --pairs, expected one")
    runs.write_atomic(path, pair_lists.strictly_unseen(unseen[0]))
    kept = unseen[0].rows - len(unseen[0].seen or ())
    print(f"{path}: {kept} rows, strictly unseen", flush=True)
