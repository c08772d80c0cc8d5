"""Every stored tensor is declared in one of three classes, and the suite notices when one of them changes.

That every declared tensor is also read is checked at the end of a full run, in ``conftest.py``.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden import golden

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "classes.json").read_text())
ROWS = TABLE["tensors"]
_NAMES = {row["file"].split("/")[0] for row in ROWS}
CASES = sorted(p.name for p in (HERE / "data").iterdir() if any(fnmatch.fnmatchcase(p.name, name) for name in _NAMES))
# Only these may be superseded (by pattern of file); everything else is met.
SUPERSEDED = {
    "preprocessing/raw_pairs",
    "preprocessing/probabilistic_mask",
    "metrics/empty",
    "insert_fill/*",
    "sampling_*",
}


def declared(file: str, tensor: str) -> dict | None:
    """The first row that matches."""
    matches = (r for r in ROWS if fnmatch.fnmatchcase(file, r["file"]) and fnmatch.fnmatchcase(tensor, r["tensor"]))
    return next(matches, None)


def postponed(file: str, tensor: str = "*") -> bool:
    """Whether a tensor, or a whole file, waits for a part that is not built yet."""
    rows = (row for row in TABLE["not_yet"] if fnmatch.fnmatchcase(file, row["file"]))
    return any(fnmatch.fnmatchcase(tensor, row.get("tensor", "*")) for row in rows)


def stored() -> list[tuple[str, str]]:
    """(case/file, tensor) of everything the manifests of the covered cases promise."""
    return [
        (f"{name}/{file}", tensor)
        for name in CASES
        for file in golden.case(name).files
        for tensor in golden.case(name).names(file)
        if not postponed(f"{name}/{file}", tensor)
    ]


def test_every_tensor_is_declared() -> None:
    assert [item for item in stored() if declared(*item) is None] == []


def test_every_row_is_well_formed_and_needed() -> None:
    needed = [declared(*item) for item in stored()]
    for row in ROWS:
        assert row["class"] in TABLE["classes"], row
        assert row["reason"], row
        assert (HERE.parent / row["test"]).is_file(), row
        if golden.case(CASES[0]).folder.name == "dev" or "mid." not in row["tensor"]:
            assert row in needed, row
        if row["class"] == "c":
            assert row["file"] in SUPERSEDED, row
            assert "decision" in row["reason"], row


def test_nothing_stored_here_is_forgotten() -> None:
    folders = sorted(p.name for p in (HERE / "data").iterdir() if p.is_dir())
    assert folders == CASES
    for folder in folders:
        files = {p.stem for p in (HERE / "data" / folder / "dev").glob("*.safetensors")}
        promised = set(json.loads((HERE / "data" / folder / "dev" / "manifest.json").read_text())["files"])
        assert files <= {f.removesuffix(".safetensors") for f in promised}
        assert {f for f in promised if not postponed(f"{folder}/{f[:-12]}")} <= {f"{f}.safetensors" for f in files}


# With a manifest that agrees with the change, the comparison itself must notice; else the check sum does.
PERTURBED = [
    ("schedules", "schedules", "sigmas", "test_schedules.py", True),
    ("schedules", "schedules", "sigmas", "test_schedules.py", False),
    ("flux_base", "fill", "output", "test_flux_base.py::test_output_with_reference_frequencies", True),
    ("omini_kontext", "grads_base_default", "x_embedder.lora_A", "test_omini.py::test_variant", True),
]


@pytest.mark.parametrize(("case", "file", "tensor", "test", "agreeing"), PERTURBED)
def test_a_changed_tensor_fails_the_run(
    case: str, file: str, tensor: str, test: str, agreeing: bool, tmp_path: Path
) -> None:
    """A copy of the goldens with one tensor changed by a thousandth of its largest entry."""
    source = golden.case(case).folder
    root = tmp_path / "goldens"
    shutil.copytree(source.parent.parent, root)
    path = root / case / source.name / f"{file}.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if tensor in n)
    changed = tensors[name] + 1e-3 * np.abs(tensors[name]).max()
    changed = changed.astype(tensors[name].dtype)
    save_file({**tensors, name: changed}, path)
    if agreeing:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        entry = manifest["files"][path.name]["tensors"][name]
        entry["sha256_16"] = hashlib.sha256(changed.tobytes()).hexdigest()[:16]
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(HERE / test)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        command,
        env={**environment, "NABLA_GOLDEN_DIR": str(root)},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert ("the manifest says" in result.stdout) == (not agreeing), result.stdout
    assert "AssertionError" in result.stdout
