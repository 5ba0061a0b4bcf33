"""Impossible requests are refused before anything starts, with the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gemini.cli import main
from lightning_gemini.controlplane.run_directory import RunDirectory, find_job
from lightning_gemini.errors import ConfigurationError


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--local-nodes", "0"], "--local-nodes must be 1 or more, got 0"),
        (["--nproc-per-node", "-1"], "--nproc-per-node must be 1 or more, got -1"),
        (["--max-failures", "-1"], "--max-failures must be 0 or more"),
        (["--etcd", "127.0.0.1:1"], "no etcd answers at 127.0.0.1:1"),
        (["--etcd", "nowhere"], "HOST:PORT"),
        (["--standby", "-1"], "--standby must be 0 or more, got -1"),
        (["--etcd-members", "2"], "--etcd-members must be 1 or 3, got 2"),
        (["--domains", "a,b,c"], "--domains names 3 machines, the job has 1: give one for each"),
        (["--host", "0.0.0.0"], "--host must be an address at which machines reach this host"),
        (["--operator", "cloud"], "operator must be one of aws, command, kubernetes, local, slurm, got 'cloud'"),
        (["--operator", "command,pools=3"], "operator command has no setting 'pools'; it has: name, command"),
        (["--operator", "command,command=sleep 9"], "{agent} must stand where the agent is to be started"),
        (["--run-dir", "/proc/no"], "cannot write the run directory"),
    ],
)
def test_run_refuses(words: list[str], message: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words, script]) == 2
    assert message in capsys.readouterr().err


def test_run_refuses_a_missing_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--run-dir", str(tmp_path / "run"), str(tmp_path / "no.py")]) == 2
    assert "there is no script" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_commands_say_where_they_looked_for_a_job(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--run-dir", str(tmp_path)]) == 2
    assert f"found no job in {tmp_path}" in capsys.readouterr().err


def test_a_job_of_a_dead_launcher_is_not_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = RunDirectory.claim(tmp_path / "run")
    run.write_job({"job": "j"})
    assert find_job(None)["alive"]
    assert find_job(None)["run_dir"] == str(tmp_path / "run")
    text = (run.path / "job.json").read_text().replace('"launcher_start_time": ', '"launcher_start_time": 1')
    (run.path / "job.json").write_text(text)
    assert not find_job(run.path)["alive"]
    with pytest.raises(ConfigurationError, match="a live job uses"):
        RunDirectory.claim(run.path)
    run.close()
    RunDirectory.claim(run.path).close()


def test_run_directories_are_private_and_sockets_have_short_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = RunDirectory.claim(tmp_path / ("long" * 30))
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert run.write_secret().stat().st_mode & 0o777 == 0o600
    assert run.sockets("job", 2)[1] == tmp_path / f"lightning-gemini-{os.getuid()}" / "job-1.sock"
    run.close()
    assert not (run.path / "secret").exists()


def test_the_command_line_and_the_agent_import_no_torch() -> None:
    code = (
        "import sys, lightning_gemini.cli, lightning_gemini.cli.run, lightning_gemini.controlplane.launcher, "
        "lightning_gemini.controlplane.agent_main; from lightning_gemini.controlplane.kv.etcd import load_etcd3; "
        "load_etcd3(); print([name for name in ('torch', 'lightning', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
