"""Agents that scripts start by themselves: real processes, killed for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_gemini.controlplane import agent_client
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.control_socket import is_served
from lightning_gemini.controlplane.standalone import find_or_start, job_id, runtime_dir, socket_path
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import BufferState
from lightning_gemini.errors import AgentError, ConfigurationError
from tests.controlplane.agents import (
    JOB,
    ROOT,
    AgentProcess,
    ShortDirectory,
    memfd_of,
    start_process,
    users_of,
)
from tests.dataplane.machines import content_of, shard_bytes, write_version
from tests.dataplane.waiting import wait_until

FIRST = VersionId(1, 1)
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own."""
    directory = ShortDirectory()
    monkeypatch.setenv("TMPDIR", str(directory.path))
    monkeypatch.delenv("LIGHTNING_GEMINI_JOB", raising=False)
    yield runtime_dir()
    directory.remove()


@pytest.fixture
def find() -> Iterator[Callable[..., AgentClient]]:
    """Finds or starts an agent; ends every agent that was seen."""
    seen: list[tuple[AgentClient, AgentProcess]] = []

    def find_it(job: str = JOB, machine: int = 0, idle_timeout_s: float = 60.0) -> AgentClient:
        client = find_or_start(job, machine, "127.0.0.1", idle_timeout_s)
        seen.append((client, AgentProcess(client)))
        return client

    yield find_it
    for client, process in seen:
        client.close()
        process.kill()


Find = Callable[..., AgentClient]


@pytest.fixture
def start_raw() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts agent processes without looking whether there is one; ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(start_process(socket_path(JOB, 0)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


StartRaw = Callable[[], "subprocess.Popen[bytes]"]


def end(client: AgentClient) -> AgentProcess:
    process = AgentProcess(client)
    process.kill()
    return process


def join(client: AgentClient, rank: int = 0) -> None:
    client.set_peers(1, 1, [("127.0.0.1", 1)])
    client.join(rank, 1, "mixed")


# -- finding and starting ----------------------------------------------------------------------------------------------


def test_the_first_starts_the_agent_and_the_next_finds_it(find: Find) -> None:
    first, second = find(), find()
    assert first.identity == second.identity
    assert first.identity["pid"] != os.getpid()


def test_every_machine_and_every_job_has_its_own(find: Find) -> None:
    clients = [find(), find(machine=1), find(job="another")]
    assert len({client.identity["pid"] for client in clients}) == 3
    assert len({client.identity["secret"] for client in clients}) == 3
    assert [client.identity["machine"] for client in clients] == [0, 1, 0]


def test_an_agent_is_small_and_keeps_its_secret(find: Find) -> None:
    client = find()
    process = Path(f"/proc/{client.identity['pid']}")
    maps = process.joinpath("maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "torch" not in maps
    assert client.identity["secret"] not in process.joinpath("cmdline").read_text()
    assert client.identity["secret"] not in process.joinpath("environ").read_text()


def test_files_are_for_this_user_alone(find: Find, runtime: Path) -> None:
    find()
    path = socket_path(JOB, 0)
    assert path.parent.parent == runtime
    modes = [place.stat().st_mode & 0o777 for place in (runtime, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


def test_an_agent_outlives_the_script_that_started_it(find: Find) -> None:
    code = (
        "import os, signal; from lightning_gemini.controlplane.standalone import find_or_start;"
        f"print(find_or_start({JOB!r}, 0, '127.0.0.1', 60.0).identity['pid'], flush=True);"
        "os.killpg(0, signal.SIGKILL)"
    )
    script = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=False, start_new_session=True
    )
    assert script.returncode == -signal.SIGKILL
    assert find().identity["pid"] == int(script.stdout)


def test_another_version_is_refused_with_the_remedy(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = find().identity["pid"]
    monkeypatch.setattr(agent_client, "__version__", "99.0")
    with pytest.raises(
        AgentError, match=rf"pid {pid}\) is lightning-gemini .*the caller 99.0: run 'lightning-gemini stop"
    ):
        find_or_start(JOB, 0, "127.0.0.1", 60.0)


def test_an_agent_of_another_job_on_the_socket_is_refused_with_the_remedy(find: Find, runtime: Path) -> None:
    find(job="another")
    (runtime / JOB).mkdir(mode=0o700)
    socket_path("another", 0).rename(socket_path(JOB, 0))
    with pytest.raises(AgentError, match=f"serves job another, not {JOB}: .*stop that agent"):
        find_or_start(JOB, 0, "127.0.0.1", 60.0)


def test_an_agent_that_cannot_start_says_why() -> None:
    with pytest.raises(AgentError, match=r"the agent did not start: \[Errno 99\] Cannot assign requested address"):
        find_or_start(JOB, 0, "192.0.2.1", 60.0)


# -- one agent a socket ------------------------------------------------------------------------------------------------


def test_a_second_agent_on_a_socket_is_refused(find: Find, start_raw: StartRaw) -> None:
    client = find()
    second = start_raw()
    _, errors = second.communicate(timeout=30.0)
    assert second.returncode != 0
    assert b"another agent serves" in errors
    assert b"stop it ('lightning-gemini stop')" in errors
    assert client.status()["job"] == JOB
    assert find().identity["pid"] == client.identity["pid"]


def test_of_agents_that_start_together_on_a_left_behind_socket_one_stays(find: Find, start_raw: StartRaw) -> None:
    end(find())
    path = socket_path(JOB, 0)
    assert path.exists()
    processes = [start_raw() for _ in range(4)]
    wait_until(lambda: sum(process.poll() is not None for process in processes) == 3, "three are refused")
    (winner,) = [process for process in processes if process.poll() is None]
    with AgentClient(path, JOB) as client:
        assert client.identity["pid"] == winner.pid
        client.stop()
    assert winner.wait(20.0) == 0


def test_scripts_that_start_together_share_one_agent(find: Find) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(find().identity["pid"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(found) == 3
    assert len(set(found)) == 1


# -- killed ------------------------------------------------------------------------------------------------------------


def test_a_killed_agent_leaves_no_memory_behind_and_the_next_takes_its_socket(find: Find) -> None:
    before = set(SHARED_MEMORY.iterdir())
    client = find()
    join(client)
    slab = client.attach(20 * 2**20)
    write_version(slab.buffers[0], FIRST, 20 * 2**20)
    memory = [memfd_of(buffer) for buffer in slab.buffers]
    assert [users_of(memfd) for memfd in memory] == [{os.getpid(), client.identity["pid"]}] * 2
    assert set(SHARED_MEMORY.iterdir()) == before
    killed = end(client)
    assert content_of(slab.buffers[0])  # what a worker has mapped stays readable for it
    slab.close()
    assert [users_of(memfd) for memfd in memory] == [set(), set()]  # the kernel has freed it
    assert set(SHARED_MEMORY.iterdir()) == before
    assert socket_path(JOB, 0).exists()
    assert not is_served(socket_path(JOB, 0))
    again = find()
    assert again.identity["pid"] != killed.pid
    assert again.status()["holdings"] == []


def test_a_killed_worker_leaves_its_complete_version_with_the_agent(find: Find) -> None:
    client = find()
    client.set_peers(1, 1, [("127.0.0.1", 1)])
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from lightning_gemini.controlplane.agent_client import AgentClient;"
        "from lightning_gemini.core.recovery import VersionId; from tests.dataplane.machines import write_version;"
        f"client = AgentClient(Path(sys.argv[1]), {JOB!r}); client.join(0, 1, 'mixed'); slab = client.attach(100000);"
        "write_version(slab.buffers[0], VersionId(1, 1), 100000);"
        "write_version(slab.buffers[1], VersionId(1, 2), 100000, until_byte=50000);"
        "slab.buffers[0].report_progress(2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = str(socket_path(JOB, 0))
    script = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert script.returncode == -signal.SIGKILL
    wait_until(lambda: not client.status()["workers"], "the agent has noticed")
    status = client.status()
    assert [(held["version"], held["complete"]) for held in status["holdings"]] == [(1, True)]
    assert status["progress"] == {"0": 2}
    client.join(0, 1, "mixed")
    slab = client.attach_existing()
    assert slab is not None
    assert content_of(slab.buffers[0]) == shard_bytes(0, FIRST, 100_000)
    assert slab.buffers[1].state is BufferState.EMPTY
    slab.close()


# -- leaving -----------------------------------------------------------------------------------------------------------


def assert_gone(process: AgentProcess, runtime: Path) -> None:
    wait_until(lambda: not process.alive, "the agent ended")
    process.reap()
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("way", ["request", "SIGTERM", "SIGINT", "idle"])
def test_an_agent_that_leaves_removes_its_files(find: Find, runtime: Path, way: str) -> None:
    client = find(idle_timeout_s=1.0 if way == "idle" else 60.0)
    process = AgentProcess(client)
    join(client)
    client.attach(1000).close()
    if way == "request":
        client.stop()
    elif way != "idle":
        os.kill(process.pid, getattr(signal, way))
    client.close()  # an idle agent leaves when no worker is there
    assert_gone(process, runtime)


def test_an_agent_does_not_leave_while_a_worker_is_there(find: Find, runtime: Path) -> None:
    client = find(idle_timeout_s=0.5)
    process = AgentProcess(client)
    join(client)
    deadline = threading.Event()
    assert not deadline.wait(1.5)  # three times as long as it would wait for a worker
    assert process.alive
    client.close()
    assert_gone(process, runtime)


def test_an_agent_that_leaves_spares_the_others_of_its_job(find: Find, runtime: Path) -> None:
    zero, one = find(machine=0), find(machine=1)
    process = AgentProcess(zero)
    zero.stop()
    wait_until(lambda: not process.alive, "the agent ended")
    assert one.status()["machine"] == 1
    assert sorted(path.name for path in (runtime / JOB).iterdir()) == ["agent-1.log", "agent-1.sock"]


def test_two_signals_at_once_end_it_as_one(find: Find, runtime: Path) -> None:
    process = AgentProcess(find())
    for _ in range(5):
        os.kill(process.pid, signal.SIGTERM)
    assert_gone(process, runtime)


# -- names and places --------------------------------------------------------------------------------------------------


def test_the_same_command_in_the_same_directory_is_the_same_job() -> None:
    job = job_id(["train.py", "--lr", "1"], "/home/me")
    assert re.fullmatch("[0-9a-f]{12}", job)
    assert job == job_id(["train.py", "--lr", "1"], "/home/me")
    others = [job_id(["train.py", "--lr", "2"], "/home/me"), job_id(["train.py", "--lr", "1"], "/home/you")]
    others += [job_id(["other.py", "--lr", "1"], "/home/me"), job_id(["train.py", "--lr 1"], "/home/me")]
    assert len({job, *others}) == 5


def test_a_job_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GEMINI_JOB", "nightly-7.b_2")
    assert job_id(["train.py"], "/") == "nightly-7.b_2"


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "/etc", ".", "..", ".hidden", "with space", "x" * 65, "é"])
def test_a_name_that_is_no_directory_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LIGHTNING_GEMINI_JOB", name)
    with pytest.raises(ConfigurationError, match="LIGHTNING_GEMINI_JOB must be up to 64 letters"):
        job_id(["train.py"], "/")


def test_a_path_that_is_too_long_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    with pytest.raises(AgentError, match="107 are allowed: set TMPDIR to a shorter one"):
        find_or_start(JOB, 0, "127.0.0.1", 60.0)


def test_a_runtime_directory_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"lightning-gemini-{os.getuid()}").symlink_to(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(AgentError, match="belongs to another user; set TMPDIR"):
        runtime_dir()


def test_a_runtime_directory_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    mine = Path(os.environ["TMPDIR"]) / "lightning-gemini-12345"
    mine.mkdir()  # by this user
    with pytest.raises(AgentError, match="belongs to another user; set TMPDIR"):
        runtime_dir()
