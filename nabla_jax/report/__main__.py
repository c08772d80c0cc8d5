"""Writes the report of an evaluation: python -m nabla_jax.report --evaluation DIR --out DIR [--run RUN]."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nabla_jax import report, runs


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m nabla_jax.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--evaluation", required=True, type=Path, help="folder that evaluate wrote")
    parser.add_argument("--out", type=Path, help="where to write; default the same folder")
    parser.add_argument("--run", type=Path, help="training run whose loss curve is shown")
    parser.add_argument("--gallery", type=int, default=60, help="pairs shown per benchmark")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.evaluation
    print(report.write(arguments.evaluation, out, run=arguments.run, gallery=arguments.gallery))


if __name__ == "__main__":
    runs.run_main(main)
