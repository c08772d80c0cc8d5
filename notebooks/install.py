"""Installs this checkout where jax is installed already, as on Colab, and leaves that jax as it is.

    python notebooks/install.py [--dry-run]

jax, jaxlib and the plugin of an accelerator belong together, and a hosted runtime has those that fit its driver; numpy
is in use by the running kernel. All of them are pinned to what is there. Where the project needs a newer one, pip says
so in one line and installs nothing: take a newer runtime then.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = re.compile(r"(jax|jaxlib|jax[-_](cuda|rocm).*|libtpu.*|numpy)", re.IGNORECASE)


def pins(installed: Mapping[str, str]) -> list[str]:
    """The lines of a constraints file that keep what must stay: name==version, sorted."""
    return sorted(f"{name}=={version}" for name, version in installed.items() if KEPT.fullmatch(name))


def command(constraints: Path, requirement: str, options: Sequence[str] = ()) -> list[str]:
    """The call of pip that installs ``requirement`` under these constraints."""
    return [sys.executable, "-m", "pip", "install", "--quiet", *options, "-c", str(constraints), requirement]


def main() -> None:
    """The command."""
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    kept = pins(installed)
    print("kept:", ", ".join(kept) or "nothing (no jax is installed, the newest one will be)")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{line}\n" for line in kept))
        sys.exit(subprocess.run(command(constraints, str(ROOT), sys.argv[1:])).returncode)


if __name__ == "__main__":
    main()
