"""Run folders, atomic files, locks, signals, and errors on one line."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nabla_jax import config as configs
from nabla_jax import runs
from nabla_jax.errors import UserError
from tests import fixtures


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    runs.write_atomic(path, "old")
    blocked = path / "below"
    with pytest.raises(UserError, match="below: cannot be written|a.txt: cannot be written"):
        runs.write_atomic(blocked, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_lines_cut_off_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    lines = runs.JsonLines(path)
    assert lines.rows == [{"step": 1}, {"step": 2}]
    lines.append({"step": 3})
    lines.keep(lambda row: row["step"] != 2)
    lines.append({"step": 4})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 4}\n'
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        runs.JsonLines(path)


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    with runs.open_run(fixtures.config(tmp_path)):
        pass
    with runs.open_run(fixtures.config(tmp_path, train__steps=40, sample__steps=9)):
        pass
    with (
        pytest.raises(UserError, match=r"lora\.rank: 2 there, 3 here; train\.batch: 2 there, 4 here"),
        runs.open_run(fixtures.config(tmp_path, lora__rank=3, train__batch=4)),
    ):
        pass


def test_a_field_that_is_younger_than_the_run_has_its_default_there(tmp_path: Path) -> None:
    config = fixtures.config(tmp_path)
    with runs.open_run(config) as folder:
        pass
    values = json.loads(folder.config.read_text())
    for section, name in (("lora", "frozen"), ("data", "levels"), ("conditioning", "expansion")):
        del values[section][name]
    folder.config.write_text(json.dumps(values))
    with runs.open_run(config):
        assert json.loads(folder.config.read_text()) == json.loads(json.dumps(configs.to_dict(config)))
    folder.config.write_text(json.dumps(values))
    with (
        pytest.raises(
            UserError, match=r"\(data\.levels: \['0 class'\] there, \['0 self'\] here; lora\.frozen: '' there"
        ),
        runs.open_run(fixtures.config(tmp_path, lora__frozen="x", data__levels=("0 self",))),
    ):
        pass


def test_a_run_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    config = fixtures.config(tmp_path)
    with (
        runs.open_run(config),
        pytest.raises(UserError, match=rf"another process is working in it \(process {os.getpid()} on .*, lock "),
        runs.open_run(config),
    ):
        pass
    with runs.open_run(config):
        pass


def test_a_dead_run_keeps_no_lock(tmp_path: Path) -> None:
    program = f"""
        import os, pathlib, signal, sys
        from nabla_jax import runs
        with runs.lock(pathlib.Path({str(tmp_path / ".lock")!r}), "here"):
            if len(sys.argv) > 1:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    for words, status in ((["die"], -signal.SIGKILL), ([], 0)):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *words], check=False)
        assert done.returncode == status


def test_stop_signals_set_a_flag_then_interrupt() -> None:
    with runs.StopSignals() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("raise UserError('a.png: no such\\npicture')", 2, "a.png: no such picture\n"),
        ("raise runs.Interrupted(15, 'saved after step 3')", 143, "saved after step 3\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; the same command continues\n"),
        ("exec('raise KeyboardInterrupt')", 130, "interrupted; the same command continues\n"),
        (f"raise OSError({errno.ENOSPC}, 'No space left on device', 'out.bin')", 2,
         "out.bin: cannot be written: No space left on device\n"),
    ],
)  # fmt: skip
def test_mains_end_in_one_line(body: str, status: int, stderr: str, tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        from nabla_jax import runs
        from nabla_jax.errors import UserError
        def main(argv):
            {body}
        runs.run_main(main, [])
    """)
    (tmp_path / "program.py").write_text(program)
    # As a verb is started: python -m has a way of its own to end after an interrupt.
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, stderr)


def test_other_errors_keep_their_traceback() -> None:
    program = "from nabla_jax import runs\nruns.run_main(lambda a: 1 / 0, [])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_environment_lists_every_start(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    runs.write_environment(path)
    runs.write_environment(path, {"devices": ["cpu"]})
    starts = runs.read_json(path)
    assert len(starts) == 2
    assert starts[1]["devices"] == ["cpu"]
    assert starts[0]["versions"]["jax"]
