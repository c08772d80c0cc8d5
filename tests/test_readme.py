"""The commands that the documentation and the configurations show exist, with these options."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nabla_jax
from nabla_jax import config as configs
from nabla_jax.keypoints.__main__ import KeypointsConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = sorted((ROOT / "configs").glob("*.py"))


def commands() -> list[str]:
    """Every line of the pages and configurations that is a command, continuation lines joined."""
    found = []
    for path in (*PAGES, *FILES):
        if path.name == "extending.md":  # whose commands are run by a test of their own
            continue
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        found += re.findall(r"^ *python -m (nabla_jax[^\n#`]*?)(?:\s+#.*)?$", text, re.MULTILINE)
    return sorted({command.strip() for command in found})


@functools.cache
def help_of(module: str) -> str:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module, *words = shlex.split(command)
    text = help_of(module)
    for word in words:
        if word.startswith("--") and not word.startswith("--config."):
            assert re.search(rf"{re.escape(word.partition('=')[0])}\b", text), word
    if module == "nabla_jax.keypoints":
        configs.load_as(KeypointsConfig, words[words.index("--config") + 1])
    elif "--config" in words and module != "nabla_jax.pretrain":
        configs.load(words[words.index("--config") + 1])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`((?:tests|configs)/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / file).is_file(), file
        assert not name or f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_each_of_the_25_complaints_has_an_answer_and_what_shows_it() -> None:
    """A row names the test or command that fails where the answer is wrong, or says that there is none yet."""
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "faq.md").read_text().splitlines() if re.match(r"\| \d", line)
    ]
    assert [int(row[0].removeprefix("| ").split(".")[0]) for row in rows] == list(range(1, 26))
    for row in rows:
        assert len(row) == 3 and row[1]
        assert re.search(r"`(tests/[\w/]+\.py|configs/\w+\.py|python -m [\w.]+|make [\w-]+)|not yet", row[2]), row[0]


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == nabla_jax.__version__
    assert re.search(r"^license: (.+)$", text, re.MULTILINE)[1] == "Apache-2.0"
    arxiv = re.search(r"arXiv:([\d.]+)", text)[1]
    assert f"arXiv:{arxiv}" in (ROOT / "README.md").read_text()


def test_make_targets_named_in_the_pages() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = r"(?:^|`)make ([a-z-]+(?: [a-z-]+)*)"
    found = [names for page in PAGES for names in re.findall(shown, page.read_text(), re.MULTILINE)]
    assert {"demo", "test"} <= {name for names in found for name in names.split()} <= targets


def test_the_python_interface() -> None:
    assert nabla_jax.load.__module__ == "nabla_jax.api"
    assert callable(nabla_jax.api.Reposer.repose)
    with pytest.raises(AttributeError):
        _ = nabla_jax.no_such_name
