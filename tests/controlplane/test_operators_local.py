"""Operators whose machines are processes of this host: real processes, ended with all that they leave behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_gemini.controlplane.operators.base import JobAccess, Machine, MachineState, Operator
from lightning_gemini.controlplane.operators.command import CommandOperator
from lightning_gemini.controlplane.operators.domains import next_domain
from lightning_gemini.controlplane.operators.registry import make_operator
from lightning_gemini.controlplane.processes import children_of, environment_of, start_time, wait_gone
from lightning_gemini.errors import ConfigurationError, OperatorError


@pytest.fixture
def access(tmp_path: Path) -> JobAccess:
    (tmp_path / "logs").mkdir()
    (tmp_path / "secret").write_text("ab" * 32)
    # Nobody answers there: agents wait for the job, and can be watched doing so.
    return JobAccess("job", "127.0.0.1:1", tmp_path / "secret", tmp_path, lease_ttl_s=2, stop_timeout_s=1.0)


@pytest.fixture(autouse=True)
def adoption() -> Iterator[None]:
    """Operators make the test process adopt orphans; other tests do not want them."""
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


@pytest.fixture
def others() -> Callable[[], list[int]]:
    """Children of the test process that are no machines, such as an etcd of another test."""
    found = children_of(os.getpid())
    return lambda: found


@pytest.fixture(params=["local", "command"])
def operator(request: pytest.FixtureRequest, access: JobAccess, others: Callable[[], list[int]]) -> Iterator[Operator]:
    made = make_operator(request.param, {"command": "exec {agent}"}, access, keep=others, domains=("a", "b"))
    yield made
    made.close()
    assert made.machines() == []


def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def domain_of(machine: Machine) -> str:
    """For a moment after its start a process has no environment that others can read."""
    pid = machine.pid or 0
    until(lambda: environment_of(pid))
    return environment_of(pid)["LIGHTNING_GEMINI_DOMAIN"]


def names(operator: Operator) -> list[str]:
    return [machine.name for machine in operator.machines()]


def test_machines_are_listed_until_they_are_destroyed(operator: Operator) -> None:
    assert operator.machines() == []
    for _ in range(3):
        operator.start_machine()
    machines = operator.machines()
    assert [(machine.name, machine.state) for machine in machines] == [
        (f"machine-{index}", MachineState.RUNNING) for index in range(3)
    ]
    assert [domain_of(machine) for machine in machines] == ["a", "b", "a"]
    assert machines[1].pid
    os.kill(machines[1].pid, signal.SIGKILL)
    until(lambda: operator.machines()[1].state is MachineState.ENDED)
    assert operator.machines()[1].returncode == -signal.SIGKILL
    operator.destroy_machine("machine-1")
    operator.destroy_machine("machine-1")
    operator.destroy_machine("machine-0")
    assert names(operator) == ["machine-2"]
    assert not wait_gone([machine.pid or 0 for machine in machines[:2]], 0)
    operator.start_machine()
    assert names(operator) == ["machine-2", "machine-3"], "no name is used twice"
    fresh = operator.machines()[1]
    assert domain_of(fresh) == "b"


def test_close_ends_all_machines(operator: Operator) -> None:
    operator.start_machine()
    operator.start_machine()
    pids = [machine.pid or 0 for machine in operator.machines()]
    operator.close()
    operator.close()
    assert not wait_gone(pids, 0)


def command_machine(access: JobAccess, template: str, **settings: object) -> tuple[CommandOperator, Machine]:
    mine = children_of(os.getpid())
    operator = CommandOperator({"command": template, **settings}, access, keep=lambda: mine)
    operator.start_machine()
    return operator, operator.machines()[0]


def test_the_command_is_a_template_and_its_end_is_the_machines_end(access: JobAccess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    destroyed = tmp_path / "destroyed"
    operator, _ = command_machine(
        access,
        f"echo '{{name}} {{index}} {{agent}}' > {out}; exit 3",
        destroy=f"echo {{name}} {{index}} >> {destroyed}",
    )
    until(lambda: operator.machines()[0].state is MachineState.ENDED)
    assert operator.machines()[0].returncode == 3
    words = out.read_text().split()
    assert words[:2] == ["machine-0", "0"]
    assert words[words.index("--name") + 1] == "machine-0"
    assert words[words.index("--job") + 1] == "job"
    operator.destroy_machine("machine-0")
    operator.start_machine()
    operator.close()
    assert destroyed.read_text().splitlines() == ["machine-0 0", "machine-1 1"]


def test_what_a_killed_command_leaves_behind_is_ended(access: JobAccess, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"setsid sleep 300 & echo $! > {pid_file}; : {{agent}}; wait"
    operator, machine = command_machine(access, script)
    until(lambda: pid_file.exists() and pid_file.read_text().strip())
    left = int(pid_file.read_text())
    os.kill(machine.pid or 0, signal.SIGKILL)
    until(lambda: operator.machines()[0].state is MachineState.ENDED)
    assert start_time(left) is not None
    operator.destroy_machine(machine.name)
    assert not wait_gone([left], 2)
    operator.close()


def test_a_pool_gives_the_lowest_free_index_and_says_when_there_is_none(access: JobAccess, tmp_path: Path) -> None:
    operator, first = command_machine(access, f"touch {tmp_path}/{{index}}-{{name}}; : {{agent}}; sleep 300", pool=2)
    operator.start_machine()
    with pytest.raises(OperatorError, match="all 2 machines of the pool are in use"):
        operator.start_machine()
    until((tmp_path / "0-machine-0").exists)
    operator.destroy_machine(first.name)
    operator.start_machine()
    expected = ["0-machine-0", "0-machine-2", "1-machine-1"]
    until(lambda: sorted(path.name for path in tmp_path.glob("?-machine-?")) == expected)
    operator.close()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cloud", {}, "operator must be one of local, command"),
        ("command", {"command": "sleep 1"}, "{agent} must stand where the agent is to be started"),
        ("command", {"command": "{agent}", "pool": 0}, "pool must be 1 or more"),
    ],
)
def test_impossible_operators_are_refused(
    name: str, settings: dict[str, object], message: str, access: JobAccess
) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("{", "\\{")):
        make_operator(name, settings, access)


def test_access_is_all_that_an_agent_needs(access: JobAccess) -> None:
    assert access.environment() == {
        "LIGHTNING_GEMINI_JOB": "job",
        "LIGHTNING_GEMINI_ETCD": "127.0.0.1:1",
        "LIGHTNING_GEMINI_SECRET": "ab" * 32,
    }
    by_command = subprocess.run([*access.command(), "--wait", "0"], capture_output=True, text=True, timeout=60)
    by_environment = subprocess.run(
        [*access.command()[:4], "--wait", "0"],
        env={**os.environ, **access.environment()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    for done in (by_command, by_environment):
        assert done.returncode == 2
        assert "found no job job at 127.0.0.1:1" in done.stderr


def test_a_replacement_gets_the_domain_that_is_missing() -> None:
    assert [next_domain("ab", live) for live in ("", "a", "ab", "aab", "bb", "b")] == ["a", "b", "a", "b", "a", "a"]
    assert next_domain((), ["a"]) == ""
