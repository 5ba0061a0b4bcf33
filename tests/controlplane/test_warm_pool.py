"""The fork server with real processes."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE, start_time, wait_gone
from lightning_gemini.controlplane.warm_pool import PoolLost, WarmPool, WorkerCommand, WorkerExit
from lightning_gemini.controlplane.worker_env import PortReservation


class Pool:
    """A warm pool that preloads nothing or little, and what it said."""

    def __init__(self, directory: Path, preload: tuple[str, ...] = (), **env: str) -> None:
        self.directory = directory
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        variables = {**os.environ, PROTOBUF_VARIABLE: "python", **env}
        log = directory / "pool.out"
        self.pool = WarmPool(self.inbox.put, preload=["none"], log_path=log, env=variables)
        self.pool._modules = list(preload)  # only these, without torch and the others
        self.pool.start()

    def launch(self, source: str, *arguments: str, token: str = "1:0", **env: str) -> Path:
        script = self.directory / "script.py"
        script.write_text(source)
        log = self.directory / f"{token}.out"
        self.pool.launch([WorkerCommand(token, (str(script), *arguments), env, log)])
        return log

    def until(self, wanted: type | str) -> Any:
        while True:
            message = self.inbox.get(timeout=20)
            if message["event"] == wanted if isinstance(message, dict) else type(message) is wanted:
                return message

    def ended(self) -> WorkerExit:
        return self.until(WorkerExit)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path)
    yield pool
    pool.pool.close()


def test_a_script_runs_as_if_it_were_started_by_itself(pool: Pool) -> None:
    (pool.directory / "neighbour.py").write_text("name = 'neighbour'")
    source = """
import atexit, os, pickle, random, sys, threading, time, neighbour
class Thing: pass
atexit.register(lambda: print("at exit", Thing.__name__))
threading.Thread(target=lambda: time.sleep(0.3) or print("thread")).start()
assert pickle.loads(pickle.dumps(Thing())).__class__ is Thing
print(__name__, sys.argv[1:], neighbour.name, os.environ["RANK"], __file__ == sys.argv[0])
leaks = [name for name in os.environ if name.startswith("PROTOCOL_BUFFERS")]
print(os.getsid(0) == os.getpid(), leaks, os.environ["OMP_NUM_THREADS"])
sys.stderr.write("to stderr\\n")
"""
    log = pool.launch(source, "--a", "b", RANK="3")
    leave = pool.ended()
    assert (leave.token, leave.code, leave.signal) == ("1:0", 0, None), log.read_text()
    lines = set(log.read_text().splitlines())
    assert {"__main__ ['--a', 'b'] neighbour 3 True", "True [] 1", "to stderr", "thread", "at exit Thing"} <= lines


def test_workers_draw_different_random_numbers(tmp_path: Path) -> None:
    pool = Pool(tmp_path, OMP_NUM_THREADS="3")
    logs = [pool.launch("import random; print(random.random())", token=f"1:{i}") for i in range(2)]
    assert pool.ended().code == pool.ended().code == 0
    assert logs[0].read_text() != logs[1].read_text()
    pool.pool.close()


@pytest.mark.parametrize(
    ("source", "code", "output"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('no way')", 1, "no way"),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
        ("def f(:", 1, "SyntaxError"),
    ],
)
def test_exit_codes_and_tracebacks_are_those_of_python(pool: Pool, source: str, code: int, output: str) -> None:
    log = pool.launch(source)
    assert pool.ended().code == code
    assert output in log.read_text()


def test_a_killed_worker_is_reported_with_its_signal_and_its_children_die(pool: Pool) -> None:
    log = pool.launch("import os, time\nprint(os.fork() or 'child')\nif True: time.sleep(60)")
    pid = pool.until("started")["pid"]
    deadline = time.monotonic() + 5
    while len(log.read_text().splitlines() if log.exists() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    child = next(int(line) for line in log.read_text().splitlines() if line.isdigit())
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert pool.ended() == WorkerExit("1:0", pid, None, "SIGKILL")
    assert time.monotonic() - started < 1
    assert not wait_gone([child], 2)


def test_killing_workers_waits_until_they_are_gone_and_forgets_those_that_wait(pool: Pool) -> None:
    pool.launch("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    pid = pool.until("started")["pid"]
    assert pool.pool.workers() == {pid: "1:0"}
    assert pool.pool.kill_workers(5)
    assert start_time(pid) is None
    assert pool.pool.workers() == {}


def test_workers_ordered_before_the_imports_are_done_start_afterwards_unless_cancelled(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(1)")
    pool = Pool(tmp_path, preload=("slow_module", "no_such_module"), PYTHONPATH=f"{tmp_path}:{os.getcwd()}")
    cancelled = pool.launch("print('never')", token="1:0")
    assert pool.pool.kill_workers(1)
    log = pool.launch("import sys; print('slow_module' in sys.modules)", token="2:0")
    warnings = pool.until("ready")["warnings"]
    assert [warning for warning in warnings if "no_such_module" in warning]
    assert pool.ended().token == "2:0"
    assert log.read_text() == "True\n"
    assert not cancelled.exists()
    pool.pool.close()


def test_a_lost_fork_server_takes_its_workers_along_and_another_starts(pool: Pool) -> None:
    pool.launch("import time; time.sleep(60)")
    pid = pool.until("started")["pid"]
    assert pool.pool.pid is not None
    os.kill(pool.pool.pid, signal.SIGKILL)
    lost = pool.until(PoolLost)
    assert lost.exits == (WorkerExit("1:0", pid, None, "SIGKILL"),)
    assert not wait_gone([pid], 2)
    pool.pool.start()
    pool.launch("print('again')", token="2:0")
    assert pool.ended().code == 0


def test_pool_and_workers_die_with_their_agent(tmp_path: Path) -> None:
    agent = f"""
import json, queue, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_warm_pool import Pool
pool = Pool(Path({str(tmp_path)!r}))
pool.launch("import time; time.sleep(60)")
print(json.dumps([pool.pool.pid, pool.until("started")["pid"]]), flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", agent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdin is not None
    pids = json.loads(process.stdout.readline())
    assert all(start_time(pid) is not None for pid in pids)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not wait_gone(pids, 3)


def test_a_reserved_port_is_nobody_elses_but_can_be_listened_on() -> None:
    reservation = PortReservation()
    port = reservation.renew()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("", port))
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("::", port))
        server.listen()
        socket.create_connection(("127.0.0.1", port), 1).close()
    assert reservation.renew() != port
    reservation.close()
