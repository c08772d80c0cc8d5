"""Pages of the documentation as programs: their code blocks, and how their commands are run."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    """A code block: the file that the line above it names ('' for none), its language and its text."""

    file: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page in their order. A line that is `FILE`: alone names the file that follows."""
    found = re.findall(r"(?:^`([^`\n]+)`:\n\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


def commands(text: str) -> list[str]:
    """The commands of a block without a language: continued lines joined, comments left out, single spaces."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    bare = [re.sub(r"\s+#.*", "", line) for line in lines]
    return [re.sub(r"\s+", " ", line).strip() for line in bare if line.strip()]


def run(call: list[str], folder: Path, *further: Path) -> None:
    """Runs a command in ``folder``, with this checkout and ``further`` folders to import from; it must end well."""
    paths = os.pathsep.join(map(str, (ROOT, *further)))
    done = subprocess.run(
        call, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{shlex.join(call)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
