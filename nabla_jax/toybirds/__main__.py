"""python -m nabla_jax.toybirds --out DIR [--seed 0] [--size 48] [--images 1600] [--workers 2]"""

from __future__ import annotations

import argparse
import sys

from nabla_jax.errors import UserError
from nabla_jax.toybirds.writer import write_world


def main(arguments: list[str] | None = None) -> int:
    """Write a world; returns the exit status (2 with one line on stderr for a user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m nabla_jax.toybirds", description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write; must be missing, empty or this very world")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--size", type=int, default=48, help="long side of the pictures in pixels")
    parser.add_argument("--images", type=int, default=1600, help="pictures in nabirds/")
    parser.add_argument("--orders", type=int, default=4, help="orders, each of 3 families of 6 species")
    parser.add_argument("--pose", choices=("photo", "free"), default="photo", help="free: any direction")
    parser.add_argument("--pose_range", type=float, default=1.0, help="0 (one pose) to 1")
    parser.add_argument("--workers", type=int, default=2, help="processes; does not change the result")
    args = parser.parse_args(arguments)
    try:
        print(write_world(**vars(args)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
