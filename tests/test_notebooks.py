"""The notebooks run from top to bottom at the size they are shipped at, and keep the jax of the machine they run on."""

import ast
import re
import subprocess
from pathlib import Path

import nbclient
import nbformat
import pytest

from nabla_jax import runs
from notebooks import install

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARKED = "## GPU or TPU, and real weights"


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a notebook in ``folder`` and returns what it printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(ROOT / "notebooks" / name)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def test_from_an_adapter_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("evaluate_colab.ipynb", tmp_path, monkeypatch)
    report = tmp_path / "work" / "report"
    rows = runs.read_json(report / "summary.json")
    drawn = {row["model"] for row in rows} & {"toy-omk-fill", "untuned"}
    assert drawn == {"toy-omk-fill", "untuned"}
    metrics = {row["metric"] for row in rows if row["mean"] is not None}
    assert {"rmse", "dinov2", "lpips"} <= metrics
    assert "toy-omk-fill" in shown and "copy-target" in shown
    assert (report / "index.html").is_file() and (tmp_path / "work" / "report.zip").is_file()


def test_two_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute("quickstart_colab.ipynb", tmp_path, monkeypatch)
    first, second = ((tmp_path / "work" / f"result-{n}.png").read_bytes() for n in (0, 1))
    assert first != second


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}
    assert {key for cell in notebook.cells for key in cell.metadata} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_one_marked_cell_takes_real_weights_and_is_off(path: Path) -> None:
    cells = read(path).cells
    (number,) = (i for i, cell in enumerate(cells) if cell.source.startswith(MARKED))
    switches = [n for n in ast.parse(cells[number + 1].source).body if isinstance(n, ast.Assign)]
    assert [(ast.unparse(n.targets[0]), ast.literal_eval(n.value)) for n in switches] == [("REAL_WEIGHTS", False)]


# ------------------------------------------------------------------------------------------------------ installing


def test_what_a_runtime_has_of_jax_is_pinned() -> None:
    found = {"jax": "0.11.1", "jaxlib": "0.11.1", "jax-cuda12-plugin": "0.11.1", "jax-cuda12-pjrt": "0.11.1"}
    found |= {"libtpu": "0.0.40", "numpy": "2.1.3", "flax": "0.12.8", "jaxtyping": "0.3.0", "numpydoc": "1.8"}
    expected = ["jax-cuda12-pjrt", "jax-cuda12-plugin", "jax", "jaxlib", "libtpu", "numpy"]
    assert install.pins(found) == sorted(f"{name}=={found[name]}" for name in expected)


def pip(tmp_path: Path, pin: str, requirement: str) -> subprocess.CompletedProcess[str]:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(pin + "\n")
    words = install.command(constraints, requirement, ["--dry-run", "--no-index", "--disable-pip-version-check"])
    return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)


def test_pip_keeps_the_pinned_jax_or_says_that_it_cannot(tmp_path: Path) -> None:
    import jax

    kept = pip(tmp_path, f"jax=={jax.__version__}", "jax>=0.10")
    assert (kept.returncode, "Would install" in kept.stdout) == (0, False), kept.stderr
    refused = pip(tmp_path, f"jax=={jax.__version__}", "jax>999")
    assert refused.returncode != 0
    assert "jax" in refused.stderr


def test_every_notebook_installs_by_that_command_alone() -> None:
    for path in NOTEBOOKS:
        source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
        assert source.count('"notebooks" / "install.py"') == 2
        assert re.search(r"\bpip\b|^[!%]", source, re.MULTILINE) is None
