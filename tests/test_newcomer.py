"""The README's commands, one after another in an empty folder, as a newcomer types them.

Every command of a code block is run, or stands in ELSEWHERE with what runs it. SMALLER adds options that the README
names (sizes, limits, values of the configuration) so that the walk takes minutes.
"""

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_jax import runs
from nabla_jax.data import read_dataset
from nabla_jax.data.pairs import benchmark_pairs
from tests import walks
from tests.walks import ROOT

ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": "this is it",
    "python -m nabla_jax.curate propose data/fish --out runs/fish-review": "tests/test_curate.py",
    "python -m nabla_jax.curate collect data/fish verdicts-*.csv": "tests/test_curate.py",
    "python -m nabla_jax.export ADAPTER --merge BASE --out merged": "tests/test_export.py",
}
# The beginning of a command -> what is added to it; the first that fits.
DRAW = "--config.sample.steps=2 --config.sample.batch=4"
SMALLER = {
    "python -m nabla_jax.toybirds": "--images 144 --orders 1 --workers 1",
    "python -m nabla_jax.prepare": "",
    "python -m nabla_jax.train": "--config.train.steps=2 --config.train.batch=2 --config.train.sample_every=0",
    "python -m nabla_jax.generate --config configs/omk_fill.py:toy --adapter asset:toy-omk-fill --subject": DRAW,
    "python -m nabla_jax.generate": f"--benchmark toy-nabla --limit 2 {DRAW}",
    "python -m nabla_jax.evaluate": "--benchmark toy-nabla --limit 2 --workers 0",
    "python -m nabla_jax.export": "",
}


def steps() -> list[tuple[str, str]]:
    """(language, command or program) of the README's code blocks in their order."""
    found = []
    for block in walks.blocks(ROOT / "README.md"):
        assert block.language in ("", "python"), f"a block of {block.language}: say here how it is run"
        texts = [block.text] if block.language == "python" else walks.commands(block.text)
        found += [(block.language, text) for text in texts]
    return found


def words(command: str) -> list[str]:
    """A command of the README as it is run here."""
    if command.startswith(("launch/", "sbatch ")):
        script, *rest = shlex.split(command)
        if script == "sbatch":
            script, rest = rest[1], rest[2:]
        verb = rest.index("train")
        return ["bash", script, *rest[:verb], "--dry-run", *rest[verb:]]
    added = next(options for beginning, options in SMALLER.items() if command.startswith(beginning))
    return [sys.executable, *shlex.split(command)[1:], *added.split()]


def write_photos(world: Path, folder: Path) -> None:
    """Two birds of the world as the reader's own photos: a.jpg and b.jpg, with their masks."""
    photos, pair = read_dataset(world).by_id, benchmark_pairs(world)[0]
    for name, example in (("a", photos[pair.subject_id]), ("b", photos[pair.target_id])):
        Image.open(example.image).convert("RGB").save(folder / f"{name}.jpg")
        assert example.mask is not None
        Image.open(example.mask).save(folder / f"{name}_mask.png")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the walk."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    program = ""
    for language, step in steps():
        if step in ELSEWHERE:
            continue
        if "a.jpg" in step and not (folder / "a.jpg").exists():
            write_photos(folder / "data" / "toybirds" / "nabirds", folder)
        if language == "python":
            program += step  # a later block goes on with the names of the earlier ones
        else:
            walks.run(words(step), folder)
    walks.run([sys.executable, "-c", program], folder)
    return folder


def test_the_walk_ends_with_what_the_page_promises(walked: Path) -> None:
    rows = runs.read_json(walked / "runs" / "report" / "summary.json")
    assert {row["model"] for row in rows} >= {"untuned", "mine"}
    for page in ("runs/report/index.html", "runs/mine/index.html"):
        assert (walked / page).stat().st_size > 0
    with Image.open(walked / "c.png") as result, Image.open(walked / "b.jpg") as target:
        assert result.size == target.size
        assert np.asarray(result).std() > 0
    assert (walked / "kohya.safetensors").is_file()


def test_every_excuse_is_for_a_command_of_the_page() -> None:
    shown = {step for _, step in steps()}
    assert set(ELSEWHERE) <= shown
    assert [beginning for beginning in SMALLER if not any(step.startswith(beginning) for step in shown)] == []
    assert all((ROOT / where).is_file() for where in ELSEWHERE.values() if where.endswith(".py"))
    assert "make demo" in (ROOT / ".ci" / "run").read_text()
