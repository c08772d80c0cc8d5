"""A picture depends on its pair and the seed alone: not on batch, order, devices, processes or interruption."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nabla_jax
from nabla_jax import api, generate, runs, training
from nabla_jax import config as configs
from nabla_jax.checkpoints import pipeline
from nabla_jax.data.pairs import Pair
from nabla_jax.errors import UserError
from nabla_jax.parallel import processes
from tests import fixtures
from tests.fixtures import oval_picture

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("omini", "schnell", "insert")
DEVICES, STEPS = 8, 4
LIMIT, BATCH = 6, 3
# Of pictures in 0 to 1, before they are rounded to 256 levels.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Model:
    """The values of a method's configuration and an adapter for it."""

    values: dict[str, Any]
    adapter: str

    @property
    def paths(self) -> tuple[str, str]:
        """Base and adapter."""
        return self.values["base"]["path"], self.adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A small random base and adapter for each method, and a small world."""
    root = tmp_path_factory.mktemp("invariance")
    fixtures.write_small_world(root / "world", images=76)
    fixtures.write_redux(root / "redux")
    drawing = {"sample__steps": STEPS, "sample__batch": BATCH}
    values = {
        "omini": fixtures.values(root, **drawing),
        "schnell": fixtures.values(root, base__path=str(root / "schnell"), sample__guidance=0.0, **drawing),
        "insert": fixtures.insert_values(root, **drawing),
    }
    found = {}
    for method, content in values.items():
        config = configs.from_dict(content)
        base = fixtures.write_base(
            Path(config.base.path), schnell=method == "schnell", fill=method == "insert", blocks=1
        )  # fmt: skip
        metadata = training.adapter_metadata(config, 1, pipeline.folder_hash(base / "transformer"))
        found[method] = Model(content, str(fixtures.write_adapter(root / f"{method}.safetensors", base, metadata)))
    return found


def jobs() -> list[api.Job]:
    return [
        api.Job(f"pair {i}", *oval_picture(40 + i, 60, i), *oval_picture(30, 50 - i, 10 + i)) for i in range(DEVICES)
    ]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures as they are written, their values before rounding, and into how many parts a batch was cut."""

    pictures: list[np.ndarray]
    values: np.ndarray
    parts: int


def draw(reposer: api.Reposer, chosen: list[api.Job], batch: int) -> Drawn:
    values, parts = [], []

    def decode(params: Any, latents: Any) -> Any:
        images = reposer.decode(params, latents)
        values.append(np.asarray(images) / 2 + 0.5)
        parts.append(len({str(shard.index[0]) for shard in latents.addressable_shards}))
        return images

    recording, sample = dataclasses.replace(reposer, decode=decode), dataclasses.replace(reposer.defaults, batch=batch)
    batches = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    pictures = [image for jobs in batches for image, _ in recording.repose_batch(jobs, sample)]
    (count,) = set(parts)
    # Only the last batch is padded.
    return Drawn(pictures, np.concatenate(values)[: len(chosen)], count)


@pytest.fixture(scope="module")
def whole(models: dict[str, Model]) -> dict[str, tuple[api.Reposer, Drawn]]:
    """Per method the loaded model and all pictures in one batch on one device."""
    loaded = {method: nabla_jax.load(*models[method].paths) for method in METHODS}
    return {method: (reposer, draw(reposer, jobs(), DEVICES)) for method, reposer in loaded.items()}


@pytest.mark.parametrize("method", METHODS)
def test_batch_and_order(method: str, whole: dict[str, tuple[api.Reposer, Drawn]]) -> None:
    """Bit for bit in any order; another place in a batch, or another program for another size, rounds otherwise."""
    reposer, expected = whole[method]
    shuffled = np.random.default_rng(0).permutation(DEVICES)
    again = draw(reposer, [jobs()[i] for i in shuffled], DEVICES)
    for place, i in enumerate(shuffled):
        np.testing.assert_array_equal(again.pictures[place], expected.pictures[i])
    np.testing.assert_array_equal(again.values, expected.values)
    for place in (0, 5):
        alone = draw(reposer, [jobs()[place]], DEVICES)
        np.testing.assert_allclose(alone.values[0], expected.values[place], rtol=0, atol=TOLERANCE)
    threes = draw(reposer, jobs(), 3)
    np.testing.assert_allclose(threes.values, expected.values, rtol=0, atol=TOLERANCE)
    # Not because all are alike.
    assert np.abs(expected.values[1:] - expected.values[:-1]).max(axis=(1, 2, 3)).min() > 0.05


def _draw_on_devices(models: str, sizes: str, out: str) -> None:
    """What the subprocesses run."""
    mesh = configs.Mesh(**json.loads(sizes))
    for method, paths in json.loads(models).items():
        drawn = draw(nabla_jax.load(*paths, mesh=mesh), jobs(), DEVICES)
        pictures = {f"picture {i}": picture for i, picture in enumerate(drawn.pictures)}
        np.savez(Path(out) / f"{method}.npz", values=drawn.values, parts=drawn.parts, **pictures)


def start(call: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A function of this module in a process of its own."""
    code = f"import sys; from tests import test_invariance as t; t.{call}(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(*running: subprocess.Popen[str]) -> None:
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@pytest.mark.parametrize(("sizes", "parts"), [({}, DEVICES), ({"fsdp": 2, "tensor": 2, "sequence": 2}, 2)])
def test_devices(
    sizes: dict[str, int], parts: int, models: dict[str, Model], whole: dict[str, Any], tmp_path: Path
) -> None:
    flags = fixtures.fake_devices(DEVICES)
    paths = {method: model.paths for method, model in models.items()}
    finish(start("_draw_on_devices", json.dumps(paths), json.dumps(sizes), str(tmp_path), XLA_FLAGS=flags))
    for method in METHODS:
        expected = whole[method][1]
        assert expected.parts == 1
        with np.load(tmp_path / f"{method}.npz") as found:
            assert found["parts"] == parts
            np.testing.assert_allclose(found["values"], expected.values, rtol=0, atol=TOLERANCE, err_msg=method)
            for i, picture in enumerate(expected.pictures):
                # A value between two levels may be rounded to either.
                assert np.abs(found[f"picture {i}"].astype(int) - picture).max() <= 1


# --------------------------------------------------------------------------------------- processes, interruption


def _generate(commands: str, last: str = "") -> None:
    """What the subprocesses run; with ``last`` the second one dies instead of writing its row of that number."""
    if last and os.environ[processes.INDEX] == "1":
        append = runs.JsonLines.append

        def dying(self: runs.JsonLines, row: Any) -> None:
            if len(self.rows) == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, row)

        runs.JsonLines.append = dying  # type: ignore[method-assign]
    for words in json.loads(commands):
        generate.main(words)
        # The processes are joined from now on.
        os.environ.pop(processes.COORDINATOR, None)


def start_two(commands: list[list[str]], *further: str) -> list[subprocess.Popen[str]]:
    address = fixtures.free_address()
    settings = {processes.COORDINATOR: address, processes.COUNT: "2"}
    texts = (json.dumps(commands), *further)
    return [start("_generate", *texts, **settings, **{processes.INDEX: str(i)}) for i in range(2)]


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_processes_and_interruption(models: dict[str, Model], tmp_path: Path) -> None:
    """Two processes make the files of one, byte for byte, also after one of them was killed."""

    def command(method: str, out: str) -> list[str]:
        file = fixtures.write_values(models[method].values, tmp_path / f"{method}.py")
        words = ["--config", str(file), "--adapter", models[method].adapter, "--out", str(tmp_path / out / method)]
        return [*words, "--limit", str(LIMIT), "--subjects", "right"]

    # Of two batches each process has one; the second dies before the second of its three rows.
    first, second = start_two([command("omini", "two")], "1")
    assert second.wait(timeout=300) == -signal.SIGKILL
    first.kill()
    first.communicate()
    folder = tmp_path / "two" / "omini" / "nabla" / "right"
    (left,) = runs.read_rows(folder / "manifest-1.jsonl")
    assert len(runs.read_rows(folder / generate.MANIFEST)) == 0
    with (folder / "manifest-1.jsonl").open("a") as file:
        file.write('{"pai')  # a row that did not reach the disk whole
    before = (folder / left["file"]).stat().st_mtime_ns

    together = start_two([command(method, "two") for method in METHODS])
    for method in METHODS:
        generate.main(command(method, "one"))
    finish(*together)
    assert (folder / left["file"]).stat().st_mtime_ns == before
    for method in METHODS:
        one, two = (contents(tmp_path / out / method) for out in ("one", "two"))
        assert sum(name.endswith(".png") for name in one) == LIMIT
        if method == "omini":  # its rows are in the order of two runs
            lists = [sorted(files.pop(f"nabla/right/{generate.MANIFEST}").splitlines()) for files in (one, two)]
            assert lists[0] == lists[1]
        assert one == two


def test_rows_that_processes_left_behind_are_taken_over(models: dict[str, Model], tmp_path: Path) -> None:
    """By a single process, too; nothing is made again but what has no picture."""
    config = configs.from_dict(models["omini"].values)
    (work,) = generate.read_works(config, ["nabla"], ["right"], tmp_path, 10)
    made: list[str] = []

    def paint(pairs: list[Pair]) -> list[generate.Made]:
        made.extend(pair.key for pair in pairs)
        return [(np.full((4, 4, 3), 90, np.uint8), {}) for _ in pairs]

    settings = {"seed": 0, "adapter": "none", "adapter_sha256": None}
    generate.make(work, settings, 4, paint)
    manifest = work.folder / generate.MANIFEST
    lines = manifest.read_text().splitlines(keepends=True)
    assert len(made) == len(lines) == 10
    made.clear()
    for number in range(3):  # three processes, of whose work nothing was handed over
        (work.folder / f"manifest-{number}.jsonl").write_text("".join(lines[number::3]) + '{"pair')
    manifest.unlink()
    generate.make(work, settings, 4, paint)
    assert manifest.read_text() == "".join(lines) and not made
    assert list(work.folder.glob("manifest*")) == [manifest]
    (work.folder / "manifest-0.jsonl").write_text(lines[9])
    manifest.write_text("".join(lines[:9]))
    work.path(work.pairs[9]).unlink()
    generate.make(work, settings, 4, paint)
    assert manifest.read_text() == "".join(lines) and made == [pair.key for pair in work.pairs[8:]]
    # They are checked as the manifest is.
    (work.folder / "manifest-0.jsonl").write_text(lines[9].replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="other settings .*seed: 1 there, 0 here"):
        generate.make(work, settings, 4, paint)
