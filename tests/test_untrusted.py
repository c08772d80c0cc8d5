"""Files of others: what they may say, and that nothing of them is ever run."""

import ast
import json
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nabla_jax import runs, untrusted
from nabla_jax.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file for folder in ("nabla_jax", "configs", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py")
)
# What turns bytes into code or objects of any class, and what reads files that way unless told not to.
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
    "code",
    "xdrlib",
}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}


def forbidden(source: str) -> list[str]:
    """What a file imports or calls of the above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS and not (name == "exec" and ast.unparse(node) == "exec('')"):
                found.append(name)
            if name in LOADERS:
                safe = name == "torch.load"
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if given.get(LOADERS[name]) != str(safe):
                    found.append(f"{name} without {LOADERS[name]}={safe}")
            if name.endswith((".read_pickle", ".to_pickle")) or "trust_remote_code" in {k.arg for k in node.keywords}:
                found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(file: Path) -> None:
    assert forbidden(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "import yaml.constructor",
        "eval(text)",
        "exec(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "pandas.read_pickle(file)",
        "AutoModel.from_pretrained(file, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_seen(line: str) -> None:
    assert len(forbidden(line)) == 1


def test_what_is_allowed_is_not() -> None:
    assert forbidden("exec('')\nmodel.eval()\nnp.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)") == []


# ------------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------------


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(), st.lists, max_leaves=5))
def test_json_is_read(value: Any) -> None:
    assert untrusted.parse_json(json.dumps(value)) == value
    assert untrusted.parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "9" * 5000,
        r'"\ud800"',
        b"\xff",
        b'"\xed\xa0\x80"',
    ],
    ids=["empty", "open", "deep list", "deep object", "digits", "half a character", "no text", "half, in bytes"],
)
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        untrusted.parse_json(text)


class Inner(TypedDict):
    n: int


class Outer(TypedDict):
    name: str
    size: tuple[int, int]
    inner: list[Inner]
    table: dict[str, float]
    maybe: bool | None
    kind: Literal["a", "b"]


WHOLE: dict[str, Any] = {
    "name": "x", "size": [1, 2], "inner": [{"n": 1, "more": 2}], "table": {"a": 1, "b": 2.5}, "maybe": None,
    "kind": "a",
}  # fmt: skip


def test_a_shape_that_fits() -> None:
    untrusted.check(WHOLE, Outer, "f.json")
    untrusted.check(WHOLE | {"maybe": True, "other": object()}, Outer, "f.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 3}, "f.json: name: found 3, expected a text"),
        ({"size": [1, 2, 3]}, "f.json: size: found [1, 2, 3], expected a list of 2"),
        ({"size": [1, True]}, "f.json: size.1: found True, expected a whole number"),
        ({"inner": [{"n": 2**70}]}, "f.json: inner.0.n: found 1180591620717411303424, expected a whole number"),
        ({"inner": [{}]}, "f.json: inner.0: missing n, expected an object with n"),
        ({"inner": {}}, "f.json: inner: found {}, expected a list"),
        ({"table": {"a": "1"}}, "f.json: table.a: found '1', expected a number"),
        ({"maybe": 0}, "f.json: maybe: found 0, expected true or false"),
        ({"kind": "c"}, "f.json: kind: found 'c', expected a or b"),
        ({"name": ["x" * 1000]}, f"f.json: name: found ['{'x' * 98}..., expected a text"),
    ],
)
def test_a_shape_that_does_not(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        untrusted.check(WHOLE | change, Outer, "f.json")
    assert str(error.value) == told


# ------------------------------------------------------------------------------------------------------------
# Paths and numbers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a/b/c.jpg", "./a", "a b", "ü/é.png", "..a/b..", "a//b"])
def test_paths_below(name: str) -> None:
    path = untrusted.below(Path("/data"), name)
    assert path is not None and Path("/data") in path.parents


@pytest.mark.parametrize(
    "name",
    ["", ".", "./.", "..", "../a", "a/../../b", "a/..", "/", "/etc/passwd", "a\0b", "x" * 256, "x/" * 3000, "\ud800"],
)
def test_paths_that_leave(name: str) -> None:
    assert untrusted.below(Path("/data"), name) is None
    assert not untrusted.is_file_name(name)


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "/", "\0", "ä", " "]), max_size=6).map("/".join))
def test_no_path_leaves(name: str) -> None:
    path = untrusted.below(Path("/data"), name)
    if path is not None:
        assert str(path.resolve()).startswith("/data/")
        path.is_file()  # never raises


def test_links_are_followed_in_reading_and_replaced_in_writing(tmp_path: Path) -> None:
    """As docs/trust.md says: large folders are kept on other disks, and nothing is written through a link."""
    far, root = tmp_path / "disk", tmp_path / "data"
    far.mkdir()
    root.mkdir()
    (far / "a.json").write_text("[1]")
    (root / "images").symlink_to(far)
    (root / "own.json").symlink_to(far / "a.json")
    path = untrusted.below(root, "images/a.json")
    assert path is not None and untrusted.read_json(path) == [1]
    runs.write_json(root / "own.json", [2])
    assert not (root / "own.json").is_symlink()
    assert untrusted.read_json(far / "a.json") == [1] and untrusted.read_json(root / "own.json") == [2]


def test_names_of_files() -> None:
    assert untrusted.is_file_name("model-00001-of-00002.safetensors")
    assert not any(map(untrusted.is_file_name, ("a/b", "..", "a\\b", "", "/a")))


@pytest.mark.parametrize("text", ["", "²", "٣", "-1", "+1", "1.0", " 1", "1_0", "9" * 19, "9" * 5000])
def test_words_that_are_no_number(text: str) -> None:
    assert untrusted.whole_number(text) is None


def test_words_that_are_numbers() -> None:
    assert [untrusted.whole_number(text) for text in ("0", "0295", "9" * 18)] == [0, 295, 10**18 - 1]


# ------------------------------------------------------------------------------------------------------------
# Messages
# ------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_message_is_one_line_that_steers_no_terminal(text: str) -> None:
    message = str(UserError(f"found {text!s}"))
    assert message.splitlines() == [message]
    assert message.isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in message)
    message.encode()


def test_a_plain_message_stays_as_it_is() -> None:
    assert str(UserError("data/ü.csv:3: found 'a', expected b")) == "data/ü.csv:3: found 'a', expected b"
    assert str(UserError("a\nb\x1b[31m")) == "a b\\x1b[31m"
