"""Feeds every reader of outside files many inputs: ``python -m tests.fuzz --inputs 100000 --seed 0``.

Prints a table and ``inputs: N, uncaught: 0, slow: 0``; exit status 1 otherwise. ``--parser NAME --input N`` repeats one
input and writes it where ``--keep`` says.
"""

import argparse
import faulthandler
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from tests.fuzz import engine, parsers


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parser", action="append", help="only this one (may be repeated)")
    parser.add_argument("--input", type=int, help="only this number of it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the inputs of findings there")
    words = parser.parse_args()
    # A reader that does not let the interpreter's own alarm through.
    faulthandler.dump_traceback_later(3600, exit=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # Files are written by the hundred thousand: into memory, where the system has such a place.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="nabla_jax_fuzz_", dir=memory)).resolve()
    try:
        known = parsers.parsers(folder)
        chosen = [p for p in known if words.parser is None or p.name in words.parser]
        if not chosen:
            parser.error(f"--parser: expected some of {', '.join(p.name for p in known)}")
        engine.limit_memory()
        if words.input is None:
            tallies = engine.run(chosen, words.inputs, words.seed)
        else:
            tallies = {p.name: engine.Tally() for p in chosen}
            for p in chosen:
                engine.feed(p, words.seed, words.input, tallies[p.name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    for finding, count in engine.kinds(findings):
        print(
            f"\n{finding.parser}, input {finding.number} ({count} of this kind): {finding.data[:300]!r}\n{finding.what}"
        )
        if words.keep is not None:
            words.keep.mkdir(parents=True, exist_ok=True)
            (words.keep / f"{finding.parser.replace(' ', '_')}-{finding.number}").write_bytes(finding.data)
    print(f"\n{engine.table(tallies)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
