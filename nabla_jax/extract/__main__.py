"""Makes the masks, depth maps, captions and keypoints that a dataset folder lacks.

    python -m nabla_jax.extract --config configs/omk_depth.py
    python -m nabla_jax.extract --config configs/omk_depth.py --what masks --root data/nabirds --shard 0/4

Needs the extra ``nabla_jax[extract]`` (but for keypoints) and the checkpoint folders of the configuration's section
``extract``. Without --root, the folders of data.root and of the benchmarks. Continues where an earlier run stopped.
Several processes take a shard each: --shard, or NABLA_PROCESS_INDEX and NABLA_PROCESS_COUNT.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.data.pairs import split_list
from nabla_jax.errors import UserError
from nabla_jax.extract import work


def main(argv: Sequence[str]) -> None:
    """The command."""

    def arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add(
            "--what", help=f"some of {','.join(work.TASKS)}; default: what the configuration's control and caption need"
        )
        add("--root", action="append", default=[], help="a dataset folder; repeatable")
        add("--shard", help="i/n: this process makes every n-th picture from number i on")
        add("--clips", action="store_true", help="a folder of pictures is a clip: depth by extract.clip_depth")
        add("--overwrite", action="store_true", help="delete what was made with other settings, and make it again")

    config, options = configs.parse_command(argv, "Makes masks, depth maps, captions and keypoints.", arguments)
    chosen = work.needed(config) if options.what is None else tuple(options.what.split(","))
    unknown = [what for what in chosen if what not in work.TASKS]
    if unknown:
        raise UserError(f"--what: found {unknown[0]!r}, expected one of {', '.join(work.TASKS)}")
    shard = work.Shard.parse(options.shard) if options.shard else shard_of(os.environ)
    roots = options.root or _roots(config)
    folders = [work.Folder.open(Path(root)) for root in roots]
    for folder in folders:
        for what in work.TASKS:
            if what not in chosen:
                continue
            # Keypoints are looked for in the masks that may just have been made.
            folder = work.Folder.open(folder.root) if what == "keypoints" else folder
            if options.what is None and not options.overwrite and not folder.missing(what):
                # Not asked for by name: whoever has all masks needs no checkpoint that makes them.
                print(f"{folder.root}: {what}: none is missing", flush=True)
            else:
                work.extract(folder, what, config.extract, shard, overwrite=options.overwrite, clips=options.clips)


def _roots(config: configs.Config) -> list[str]:
    """``data.root`` and the folders of those benchmarks that are there."""
    folders = {str(split_list(root)[0]): Path(root) for root in config.benchmarks.values()}
    for folder, root in folders.items():
        if not root.exists():
            print(f"{folder}: not there, left out", flush=True)
    return list(dict.fromkeys([config.data.root, *(folder for folder, root in folders.items() if root.exists())]))


def shard_of(environment: Mapping[str, str]) -> work.Shard:
    """The shard of this process among those of a run; see ``nabla_jax.parallel.processes``."""
    index, count = environment.get("NABLA_PROCESS_INDEX", ""), environment.get("NABLA_PROCESS_COUNT", "")
    return work.Shard.parse(f"{index}/{count}") if index and count else work.Shard()


if __name__ == "__main__":
    runs.run_main(main)
