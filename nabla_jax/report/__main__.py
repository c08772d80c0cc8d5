"""Writes the report of an evaluation, or of several side by side.

python -m nabla_jax.report FOLDER --out DIR [--run RUN]
python -m nabla_jax.report FIRST SECOND NAME=THIRD --out DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nabla_jax import report, runs
from nabla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m nabla_jax.report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "evaluations",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="folder that evaluate wrote; the name defaults to the folder's",
    )
    add("--out", type=Path, help="where to write; default, for a single evaluation, its folder")
    add("--run", type=Path, help="training run whose loss curve is shown")
    add("--gallery", type=int, help="pairs shown per benchmark at most; default all")
    add("--workers", type=int, help="threads that make thumbnails; default one a core")
    arguments = parser.parse_args(argv)
    folders = named_folders(arguments.evaluations)
    for option in ("gallery", "workers"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: found {value}, expected at least 1")
    out = arguments.out
    if out is None:
        if len(folders) > 1:
            raise UserError(f"--out: expected a folder for the report of {len(folders)} evaluations")
        out = next(iter(folders.values()))
    one = next(iter(folders.values())) if len(folders) == 1 else folders
    print(report.write(one, out, run=arguments.run, gallery=arguments.gallery, workers=arguments.workers))


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Label -> folder. Labels that are not given are folders' names, with as much of the path as tells them apart.

    Raises UserError for a folder that is not there and for a label given twice.
    """
    found: dict[str, Path] = {}
    plain = [Path(word) for word in words if Path(word).is_dir()]
    for word in words:
        name, equals, path = word.partition("=")
        folder = Path(word)
        if not folder.is_dir() and equals:
            folder = Path(path)
        else:
            name = _label(folder, plain)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, expected one that evaluate wrote")
        if not name or name in found:
            raise UserError(f"{word}: found the name {name!r} twice, expected NAME=FOLDER with different names")
        found[name] = folder
    return found


def _label(folder: Path, others: Sequence[Path]) -> str:
    parts = folder.resolve().parts
    rest = [o.resolve().parts for o in others if o.resolve() != folder.resolve()]
    length = next((n for n in range(1, len(parts)) if all(r[-n:] != parts[-n:] for r in rest)), len(parts))
    return "/".join(parts[-length:])


if __name__ == "__main__":
    runs.run_main(main)
