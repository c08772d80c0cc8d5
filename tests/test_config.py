"""Configuration files, overrides, and what is said before anything expensive starts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nabla_jax import config as configs
from nabla_jax.errors import UserError
from tests import fixtures

PAPER = "configs/omk_fill.py"


def test_paper_run_is_the_published_one() -> None:
    config = configs.load(PAPER)
    assert config.base.path == "checkpoints/FLUX.1-Kontext-dev"
    assert config.conditioning == configs.Conditioning(
        size=1024,
        control="fill",
        caption="fixed",
        prompt="A photo of a bird.",
        text_length=512,
        independent_conditions=False,
    )
    assert (config.lora.rank, config.lora.alpha, config.lora.init) == (16, 16.0, "gaussian")
    assert config.optim == configs.Optim(
        name="prodigy", lr=1.0, d0=1e-6, weight_decay=0.01, betas=(0.9, 0.999), clip=1.0
    )
    train = config.train
    assert (train.steps, train.batch, train.seed, train.guidance) == (10_000, 5, 42, 1.0)
    assert (train.dtype, config.sample.steps) == ("bfloat16", 28)
    assert 2.5 <= config.sample.guidance <= 3.5
    assert set(config.benchmarks) == {"nabla", "inat-seen", "inat-unseen", "inat-unseen-strict", "clips"}
    toy = configs.load(f"{PAPER}:toy").benchmarks
    assert toy == {f"toy-{name}": root.replace("data/", "data/toybirds/") for name, root in config.benchmarks.items()}


@pytest.mark.parametrize("size", ["", ":toy"])
@pytest.mark.parametrize("control", ["depth", "keypoints"])
def test_the_other_controls_differ_in_nothing_else(control: str, size: str) -> None:
    fill = configs.flatten(configs.to_dict(configs.load(PAPER + size)))
    config = configs.load(f"configs/omk_{control}.py{size}")
    other = configs.flatten(configs.to_dict(config))
    differing = {key for key in fill.keys() | other.keys() if fill.get(key) != other.get(key)}
    assert differing == {"conditioning.control", "lora.name", "data.prepared", "train.workdir", "source"}
    assert config.conditioning.control == control and config.lora.name == f"omk_{control}"
    assert all(control in path for path in (config.data.prepared, config.train.workdir))


def test_toy_changes_only_sizes_paths_and_numbers() -> None:
    real = configs.flatten(configs.to_dict(configs.load(PAPER)))
    toy = configs.flatten(configs.to_dict(configs.load(f"{PAPER}:toy")))
    changed = {key for key in real.keys() | toy.keys() if real.get(key) != toy.get(key)}
    method = {
        "conditioning.control",
        "conditioning.skeleton",
        "conditioning.caption",
        "conditioning.prompt",
        "conditioning.independent_conditions",
        "lora.init",
        "optim.name",
        "optim.lr",
        "optim.weight_decay",
        "optim.betas",
        "optim.clip",
        "train.guidance",
        "train.sampler",
        "data.split",
    }
    assert not changed & method
    assert toy["base.path"] == "asset:toy-flux-kontext"


@pytest.mark.parametrize(
    ("arg", "overrides", "key", "expected"),
    [
        ("steps=200", {}, "train.steps", 200),
        ("toy,steps=200", {}, "train.steps", 200),
        ("rank=4", {}, "lora.rank", 4),
        ("optim.lr=0.5", {}, "optim.lr", 0.5),
        ("steps=200", {"train.steps": "300"}, "train.steps", 300),
        ("", {"conditioning.independent_conditions": "true"}, "conditioning.independent_conditions", True),
        ("", {"optim.betas": "0.8,0.99"}, "optim.betas", (0.8, 0.99)),
        ("", {"benchmarks.mine.v2": "data/mine"}, "benchmarks.mine.v2", "data/mine"),
        ("", {"optim.lr": "1"}, "optim.lr", 1.0),
        ("", {"data.levels": "0 self,500 self=1 class=3"}, "data.levels", ("0 self", "500 self=1 class=3")),
        ("", {"data.controls": "fill"}, "data.controls", ("fill",)),
        ("", {"data.per_class": "1", "train.sampler": "level", "data.levels": "0 self"}, "data.per_class", 1),
        ("", {"data.per_class": "1", "train.sampler": "level", "data.levels": "0 order class=0"}, "data.per_class", 1),
        ("", {"data.per_class": "5"}, "data.per_class", 5),
        ("", {"data.controls": ""}, "data.controls", ()),
    ],
)
def test_overrides(arg: str, overrides: dict[str, str], key: str, expected: object) -> None:
    config = configs.load(f"{PAPER}:{arg}" if arg else PAPER, overrides)
    assert configs.flatten(configs.to_dict(config))[key] == expected


@pytest.mark.parametrize(
    ("arg", "overrides", "words"),
    [
        ("", {"optim.lrr": "1"}, ["optim.lrr", "optim.lr"]),
        ("stepz=3", {}, ["stepz", "train.steps"]),
        ("", {"trian.steps": "1"}, ["trian.steps", "train.steps"]),
        ("huge", {}, ["huge", "toy"]),
        ("", {"train.steps": "1.5"}, ["train.steps", "1.5", "an integer"]),
        ("", {"train.steps": "many"}, ["train.steps", "many", "an integer"]),
        ("", {"optim.lr": "fast"}, ["optim.lr", "fast", "a number"]),
        ("", {"optim.betas": "0.9"}, ["optim.betas", "0.9", "2 numbers"]),
        ("", {"conditioning.independent_conditions": "1"}, ["independent_conditions", "true or false"]),
        ("", {"conditioning.size": "100"}, ["conditioning.size", "100", "multiple of 16"]),
        ("", {"train.steps": "0"}, ["train.steps", "0", "more than 0"]),
        ("", {"optim.name": "sgd"}, ["optim.name", "sgd", "prodigy"]),
        ("", {"train": "3"}, ["train"]),
        ("", {"benchmarks": "data"}, ["benchmarks"]),
        ("", {"data.controls": "fill,infrared"}, ["data.controls", "infrared", "fill"]),
        ("", {"data.mode": "lazy"}, ["data.mode", "lazy", "on_the_fly"]),
        ("", {"data.similarity": "60"}, ["data.similarity", "60", "cosine"]),
        ("", {"data.workers": "-1"}, ["data.workers", "-1", "0 or more"]),
        ("", {"data.mode": "on_the_fly", "train.sampler": "mined"}, ["train.sampler", "features", "precomputed"]),
        ("", {"data.per_class": "-1"}, ["data.per_class", "-1", "0 or more"]),
        ("", {"data.per_class": "1"}, ["data.per_class", "train.sampler all_pairs", "level", "self", "family"]),
        (
            "",
            {"data.per_class": "1", "train.sampler": "level", "data.levels": "0 self,9 class=2"},
            ["data.per_class", "9 class=2", "two pictures of a class", "self"],
        ),
        ("", {"lora.dtype": "float16"}, ["lora.dtype", "float16", "float32, bfloat16"]),
    ],
)
def test_a_wrong_override_names_key_found_and_expected(arg: str, overrides: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        configs.load(f"{PAPER}:{arg}" if arg else PAPER, overrides)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_key_without_a_field_and_a_missing_key_are_errors(tmp_path: Path) -> None:
    values = fixtures.values(tmp_path)
    values["train"]["warmup"] = 3
    with pytest.raises(UserError, match=r"unknown key train\.warmup"):
        configs.from_dict(values)
    values = fixtures.values(tmp_path)
    del values["train"]["steps"]
    with pytest.raises(UserError, match=r"missing key train\.steps"):
        configs.from_dict(values)
    values = fixtures.values(tmp_path)
    values["lora"]["rank"] = "2"
    with pytest.raises(UserError, match=r"lora\.rank: found '2', expected an integer"):
        configs.from_dict(values)
    values["lora"]["rank"] = True
    with pytest.raises(UserError, match=r"lora\.rank: found True, expected an integer"):
        configs.from_dict(values)


def test_resolved_configuration_survives_json(tmp_path: Path) -> None:
    config = configs.load(f"{PAPER}:toy")
    text = json.dumps(configs.to_dict(config))
    assert configs.from_dict(json.loads(text)) == config


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        configs.load(str(tmp_path / "absent.py"))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"broken\.py: cannot be run"):
        configs.load(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no function get_config"):
        configs.load(str(tmp_path / "empty.py"))


def test_missing_inputs_are_told_together_and_quickly(tmp_path: Path) -> None:
    """The paper's run without weights and data: one message, before any framework is imported."""
    repository = Path(__file__).parent.parent
    for folder in ("configs", "nabla_jax"):
        (tmp_path / folder).symlink_to(repository / folder)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nabla_jax.train", "--config", PAPER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert time.monotonic() - start < 5
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    messages = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert not any(line.split("|")[-1].strip() == "jax" for line in imports)
    assert len(messages) == 1
    for word in ("FLUX.1-Kontext-dev", "checkpoints/", "data/nabirds", "images.txt", "make demo", ":toy"):
        assert word in messages[0]


def test_benchmarks_that_are_not_there_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    config = fixtures.config(tmp_path, data__obtain="get it there")
    for name in ("seen", "clips"):
        config.benchmarks[name] = str(tmp_path / name)
    with pytest.raises(UserError, match=r"benchmarks nabla \(.*\), seen \(.*\), clips \(.*docs/data.md: get it there"):
        configs.check_inputs(config, "evaluate")
    (tmp_path / "world" / "nabirds").mkdir(parents=True)
    (tmp_path / "clips").mkdir()
    with pytest.raises(UserError, match="--benchmark nabla --benchmark clips leaves it out") as caught:
        configs.check_inputs(config, "evaluate")
    assert "get it there" not in str(caught.value) and "\n" not in str(caught.value)
    configs.check_inputs(config, "evaluate", ["nabla", "clips"])
    with pytest.raises(UserError, match=r"the benchmark seen \(found nothing at [^;]*$"):
        configs.check_inputs(config, "evaluate", ["seen"])


def test_prepared_folder_is_asked_for_with_its_command(tmp_path: Path) -> None:
    fixtures.write_base(tmp_path / "base")
    (tmp_path / "world" / "nabirds").mkdir(parents=True)
    (tmp_path / "world" / "nabirds" / "images.txt").write_text("")
    with pytest.raises(UserError, match=r"python -m nabla_jax\.prepare"):
        configs.check_inputs(fixtures.config(tmp_path), "train")


def test_incomplete_base_is_described(tmp_path: Path) -> None:
    fixtures.write_base(tmp_path / "base")
    (tmp_path / "world" / "nabirds").mkdir(parents=True)
    (tmp_path / "world" / "nabirds" / "images.txt").write_text("")
    (tmp_path / "base" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae/config.json"):
        configs.check_inputs(fixtures.config(tmp_path), "prepare")


def test_unknown_asset_and_benchmark(tmp_path: Path) -> None:
    config = fixtures.config(tmp_path, base__path="asset:no-such-thing")
    with pytest.raises(UserError, match="no-such-thing"):
        configs.check_inputs(config, "generate")
    with pytest.raises(UserError, match="unknown benchmark other, configured are nabla"):
        configs.check_inputs(fixtures.config(tmp_path), "evaluate", ["other"])
