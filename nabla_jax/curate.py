"""Look-alike pairs for a benchmark of one's own, of birds or anything else: proposed, judged by people, listed.

python -m nabla_jax.curate propose DATA --out REVIEW     pairs that look alike, and REVIEW/index.html to judge them on
python -m nabla_jax.curate collect DATA verdicts*.csv    the accepted ones as DATA/pairs.csv, which evaluate reads
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nabla_jax import runs
from nabla_jax.curation import verdicts
from nabla_jax.data import dataset as datasets
from nabla_jax.data import read_dataset
from nabla_jax.data.pairs import lists_observations
from nabla_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m nabla_jax.curate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("propose", help="write a page of pairs to judge", allow_abbrev=False)
    second = commands.add_parser("collect", help="write the accepted pairs as a list", allow_abbrev=False)
    _add_propose(first)
    _add_collect(second)
    parser.epilog = first.format_help() + "\n" + second.format_help()
    arguments = parser.parse_args(argv)
    dataset = _dataset(arguments.data)
    (propose if arguments.command == "propose" else collect)(dataset, arguments)


def _add_propose(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="a dataset folder of any source")
    add("--out", required=True, type=Path, metavar="REVIEW", help="folder for the page, its pictures and the features")
    add("--split", default="test", choices=("test", "train", "all"), help="whose pictures are paired; default test")
    add("--pairs", type=int, default=10, metavar="N", help="of a class, at most; no picture is in two; default 10")
    add("--least", type=int, default=5, metavar="N", help="a class with fewer pairs is counted as short; default 5")
    add("--crop", default="mask", help="what counts of a picture: mask, box or image; default mask")
    add("--dinov2", default="asset:toy-dinov2", help="folder of a DINOv2; default the embedded one")
    add("--colour", type=float, default=0.5, help="weight of colours, 0 to 1; the rest is DINOv2's; default 0.5")
    add(
        "--varied",
        type=float,
        default=1.5,
        help="a class that varies so many times as the median is marked; default 1.5",
    )
    add(
        "--after",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="verdicts so far: only what is missing is proposed",
    )
    add("--batch", type=int, default=32, help="pictures through DINOv2 at a time; default 32")
    add("--side", type=int, default=512, help="longest side of the page's pictures in pixels; default 512")
    add("--workers", type=int, help="threads that make the page's pictures; default one a core")


def _add_collect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="the folder that the page was made for")
    add(
        "verdicts",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="files that the page's Download gave, of any number of people",
    )
    add("--agree", type=int, default=1, metavar="N", help="reviewers who must accept a pair; default 1")
    add("--list", type=Path, help="the list to write, in DATA; default DATA/pairs.csv")


def _dataset(root: Path) -> datasets.Dataset:
    if lists_observations(root):
        raise UserError(
            f"{root}: found a folder of iNaturalist observations, whose list pairs the photos of one bird: for "
            "look-alikes name the pictures in a manifest.csv there"
        )
    return read_dataset(root)


def propose(dataset: datasets.Dataset, arguments: argparse.Namespace) -> None:
    """The first command."""
    from nabla_jax.curation import review

    for name, least in (("pairs", 1), ("least", 0), ("batch", 1), ("side", 16), ("workers", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: found {value}, expected at least {least}")
    if not 0 <= arguments.colour <= 1:
        raise UserError(f"--colour: found {arguments.colour}, expected 0 to 1")
    if not arguments.dinov2:
        raise UserError("--dinov2: found nothing, expected a folder or asset:NAME")
    if not arguments.varied > 0:
        raise UserError(f"--varied: found {arguments.varied}, expected more than 0")
    settings = review.Settings(
        split=arguments.split,
        pairs=arguments.pairs,
        crop=arguments.crop,
        dinov2=arguments.dinov2,
        colour=arguments.colour,
        varied=arguments.varied,
        batch=arguments.batch,
    )
    found = review.propose(dataset, settings, arguments.out / "features", verdicts.read(arguments.after, dataset))
    page = review.write(found, arguments.out, arguments.side, arguments.workers or os.cpu_count() or 1)
    print("\n".join([f"{page}:", *review.describe(found, arguments.least)]))


def collect(dataset: datasets.Dataset, arguments: argparse.Namespace) -> None:
    """The second command."""
    path = arguments.list or dataset.root / "pairs.csv"
    if arguments.agree < 1:
        raise UserError(f"--agree: found {arguments.agree}, expected at least 1")
    verdicts.check_list(path, dataset)
    settled = verdicts.settle(verdicts.read(arguments.verdicts, dataset), arguments.agree)
    if not settled.accepted:
        raise UserError(f"{', '.join(map(str, arguments.verdicts))}: found no accepted pair, expected at least one")
    verdicts.write_list(path, settled.accepted, dataset)
    print("\n".join([f"{path}:", *verdicts.describe(settled, dataset)]))


if __name__ == "__main__":
    runs.run_main(main)
