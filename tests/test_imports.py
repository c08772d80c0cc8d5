"""What imports what: the arrows of the design run down only, and the core is light."""

import ast
import importlib.metadata
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import nabla_jax

PACKAGE = Path(nabla_jax.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
# Importing one of these may load only what the core needs: jax, flax, optax, orbax, numpy, safetensors.
LIGHT = ("models", "conditioning", "flow", "optim", "parallel")
HEAVY = {
    "PIL",
    "absl",
    "array_record",
    "diffusers",
    "gradio",
    "grain",
    "matplotlib",
    "ml_collections",
    "peft",
    "skimage",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "transformers",
}
TEST_ONLY = {"diffusers", "hypothesis", "lpips", "peft", "prodigyopt", "pytest"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folders(path: Path) -> set[str]:
    """The package's folders and modules that a file imports."""
    inside = (name.split(".") for name in imported(path) if name.startswith("nabla_jax."))
    return {parts[1] for parts in inside}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "models"], ids=module_name)
def test_models_import_nothing_else_of_the_package(path: Path) -> None:
    assert folders(path) <= {"models", "errors", "untrusted"}


VERBS = {"api", "app", "curate", "evaluate", "export", "fetch", "generate", "prepare", "train"}
LOWER = ("checkpoints", "conditioning", "data", "flow", "metrics", "models", "optim", "parallel")


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in LOWER], ids=module_name)
def test_nothing_below_imports_a_verb(path: Path) -> None:
    assert not folders(path) & VERBS


@pytest.mark.parametrize("path", [p for p in MODULES if "toybirds" in p.parts], ids=module_name)
def test_the_world_knows_nothing_of_models(path: Path) -> None:
    assert not folders(path) & {"models", "conditioning", "flow", "checkpoints", "optim", "parallel", *VERBS}
    assert not {name.split(".")[0] for name in imported(path)} & {"jax", "flax"}


def test_no_file_imports_what_only_tests_install() -> None:
    wrong = {module_name(p): {n.split(".")[0] for n in imported(p)} & TEST_ONLY for p in MODULES}
    assert {name: names for name, names in wrong.items() if names} == {}


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in memory after importing modules in a fresh interpreter."""
    code = f"import {', '.join(modules)}, json, sys; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(out.stdout.splitlines()[-1])}


def test_the_core_is_light_to_import() -> None:
    # text.py reads tokenizers; it is imported where prompts are encoded.
    names = [module_name(p) for p in MODULES if p.parent.name in LIGHT and p.name != "text.py"]
    baseline = loaded_by("jax", "flax.nnx", "optax", "orbax.checkpoint", "safetensors", "numpy")
    assert (loaded_by(*names) - baseline) & HEAVY == set()


def test_errors_in_a_configuration_are_told_before_jax_loads() -> None:
    found = loaded_by(
        "nabla_jax",
        "nabla_jax.errors",
        "nabla_jax.config",
        *(f"nabla_jax.{verb}" for verb in ("train", "generate", "export", "fetch", "curate", "app.__main__")),
    )
    assert found & {"gradio", "jax", "torch", "transformers"} == set()


def test_the_embedded_size_is_no_code_path() -> None:
    """The word stands in docstrings, comments, look-up of assets and the world's own folder alone."""
    free = {PACKAGE / "toybirds", PACKAGE / "assets"}
    found = []
    for path in MODULES:
        if free & set(path.parents):
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        previous = None
        for token in tokens:
            # A string that begins a logical line is a docstring.
            docstring = token.type == tokenize.STRING and previous in (
                None,
                tokenize.INDENT,
                tokenize.NEWLINE,
                tokenize.NL,
                tokenize.DEDENT,
            )
            asset = token.type == tokenize.STRING and token.string.startswith('"asset:')
            excused = docstring or asset or token.type == tokenize.COMMENT
            if "toy" in token.string.lower() and not excused:
                found.append(f"{path.relative_to(PACKAGE)}:{token.start[0]}: {token.line.strip()}")
            previous = token.type
    assert found == []


def test_the_world_is_found_by_its_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="nabla_jax.worlds", name="toybirds")
    assert entry.load().__name__ == "nabla_jax.toybirds"


def test_version() -> None:
    assert importlib.metadata.version("nabla_jax") == nabla_jax.__version__
