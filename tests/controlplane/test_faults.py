"""Faults one by one, on processes, connections, memory and interfaces of this test's own making."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.controlplane.faults import veth
from lightning_gemini.controlplane.faults.connections import cut_connections
from lightning_gemini.controlplane.faults.corruption import flip_byte
from lightning_gemini.controlplane.faults.killing import kill_processes
from lightning_gemini.controlplane.faults.lasting import CutConnections, LinkDown, Pause
from lightning_gemini.controlplane.faults.observer import Sighting
from lightning_gemini.controlplane.faults.recovery_watch import RecoveryWatch
from lightning_gemini.controlplane.processes import wait_gone
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.errors import IntegrityError

HOLDER = """
import sys
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Slab
slab = Slab.create(3, 300_000)
for version, buffer in zip((7, 8), slab.buffers):
    buffer.begin(VersionId(2, version), 300_000)
    buffer.data[:300_000] = bytes(300_000)
    buffer.seal(300_000)
    if version == 7 or sys.argv[1] == "both":
        buffer.complete()
print(*(buffer.fd for buffer in slab.buffers), flush=True)
sys.stdin.read()
"""
CONNECTED = """
import socket, sys
ends = [socket.create_connection(("127.0.0.1", int(port))) for port in sys.argv[1:]]
print("ready", flush=True)
for end in ends[:1]:
    assert end.recv(1) == b""
print("cut", flush=True)
sys.stdin.read()
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python code, with pipes, and ends it after the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(code: str, *arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True, **pipes))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_pause_stops_and_goes_on_by_itself_or_when_told(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import sys; print(1, flush=True); sys.stdin.read()")
    line_of(process)
    for lasts_s in (0.2, 100.0):
        pause = Pause(0, process.pid, lasts_s)
        while state(process.pid) != "T":
            time.sleep(0.001)
        if lasts_s > 1:
            assert pause.poll()
            pause.close()
        while pause.poll():
            time.sleep(0.01)
        pause.close()
        assert state(process.pid) != "T"


def test_a_pause_of_a_process_that_dies_is_over(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import time; time.sleep(100)")
    pause = Pause(0, process.pid, 100.0)
    process.kill()
    process.wait()
    assert not pause.poll()
    with pytest.raises(ProcessLookupError):
        Pause(0, process.pid, 1.0)


def test_a_kill_takes_the_group_and_says_who_was_alive(start: Callable[..., subprocess.Popen[str]]) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    process = start(code)
    child = int(line_of(process))
    assert kill_processes([process.pid], whole_groups=True) == [process.pid]
    process.wait()
    assert not wait_gone([child], 5)
    assert kill_processes([process.pid], whole_groups=True) == []


def test_connections_are_cut_on_both_ends_and_others_spared(start: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cut, socket.create_server(("127.0.0.1", 0)) as spared:
        ports = [server.getsockname()[1] for server in (cut, spared)]
        process = start(CONNECTED, *map(str, ports))
        (hit, _), (kept, _) = cut.accept(), spared.accept()
        with hit, kept:
            assert line_of(process) == "ready"
            fault = CutConnections(0, process.pid, [f"127.0.0.1:{ports[1]}"], 0.0)
            assert fault.cut == 1
            assert line_of(process) == "cut"
            assert hit.recv(1) == b""
            kept.settimeout(0.2)
            with pytest.raises(TimeoutError):
                kept.recv(1)
            assert not fault.poll()
            process.kill()
            process.wait()
            assert cut_connections(process.pid) == 0


def test_a_flipped_byte_is_in_the_newest_complete_version_and_is_caught(
    start: Callable[..., subprocess.Popen[str]], seed: int
) -> None:
    for versions, expected in (("both", 8), ("first", 7)):
        process = start(HOLDER, versions)
        descriptors = [int(word) for word in line_of(process).split()]
        flip = flip_byte(process.pid, [], random.Random(seed))
        assert flip is not None
        assert (flip.owner, flip.version, flip.version_generation) == (3, expected, 2)
        assert state(process.pid) != "T"
        for version, descriptor in zip((7, 8), descriptors, strict=True):
            buffer = Buffer(os.open(f"/proc/{process.pid}/fd/{descriptor}", os.O_RDWR))
            flipped = [place for place, byte in enumerate(bytes(buffer.data)) if byte]
            assert flipped == ([flip.offset] if version == expected else [])
            assert not flipped or buffer.data[flip.offset] == flip.mask
            if flipped:
                assert buffer.id == VersionId(2, expected)
                with pytest.raises(IntegrityError, match="is corrupt"):
                    buffer.verify()
            buffer.close()


def test_there_is_nothing_to_flip_without_a_complete_version(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("import sys; print(1, flush=True); sys.stdin.read()")
    line_of(process)
    assert flip_byte(process.pid, [], random.Random(1)) is None
    process.kill()
    process.wait()
    assert flip_byte(process.pid, [], random.Random(1)) is None


@pytest.fixture
def cable() -> Iterator[tuple[str, int]]:
    """A network namespace with a cable to it: our end's name, and the pid of a process inside."""
    name, ours = f"gemf{os.getpid() % 10000}", f"gemv{os.getpid() % 10000}"
    if os.geteuid() or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs root and network namespaces")
    try:
        commands = (f"ip link add {ours} type veth peer name eth0 netns {name}", f"ip link set {ours} up")
        for command in commands:
            subprocess.run(command.split(), check=True)
        with subprocess.Popen(["ip", "netns", "exec", name, "sleep", "100"]) as inside:
            while not veth.in_other_namespace(inside.pid):
                time.sleep(0.01)
            yield ours, inside.pid
            inside.kill()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def is_up(interface: str) -> bool:
    return bool(int(Path(f"/sys/class/net/{interface}/flags").read_text(), 16) & 1)


def test_the_cable_of_a_machine_in_a_namespace_is_found_cut_and_restored(cable: tuple[str, int]) -> None:
    interface, pid = cable
    assert veth.outer_end(pid) == interface
    for ends_by_itself in (True, False):
        fault = LinkDown(0, interface, 0.1 if ends_by_itself else 100.0)
        assert not is_up(interface)
        while ends_by_itself and fault.poll():
            time.sleep(0.01)
        fault.close()
        assert is_up(interface)
        assert not fault.poll()


def test_our_own_namespace_has_no_cable() -> None:
    assert not veth.in_other_namespace(os.getpid())
    with pytest.raises(OSError, match="No such device"):
        veth.set_link("gemnone", True)


def sighting(generation: int, steps: list[int], first_pid: int = 100) -> Sighting:
    """Machines in order, with one rank each."""
    return Sighting(
        tuple(
            {
                "generation": generation,
                "progress": {str(rank): step},
                "workers": [{"rank": rank, "pid": first_pid + rank}],
                "pid": 1000 + rank,
                "pool_pid": None,
                "root": 1,
            }
            for rank, step in enumerate(steps)
        ),
        len(steps),
    )


def test_a_job_is_calm_once_every_rank_has_made_a_step_after_the_fault() -> None:
    watch = RecoveryWatch()

    def calm(now: float, seen: Sighting, undisturbed: bool = True) -> bool:
        watch.see(seen, now, calm=undisturbed)
        return watch.calm_since is not None

    assert not calm(0, sighting(1, [5, 5]))
    assert not calm(1, sighting(1, [6, 5]))
    assert calm(2, sighting(1, [6, 6]))
    watch.hit("hardware", sighting(1, [6, 6]))
    assert not calm(3, sighting(1, [7, 7]))
    assert not calm(4, sighting(1, [8, 8]))  # the dead machine has not been missed yet
    assert not calm(5, sighting(2, [8, 8], first_pid=200))
    assert not calm(6, sighting(2, [3, 8], first_pid=200))
    assert calm(7, sighting(2, [3, 3], first_pid=200))
    assert not calm(8, sighting(2, [4, 4], first_pid=200), undisturbed=False)
    assert not calm(9, sighting(2, [4, 4], first_pid=200))
    assert calm(10, sighting(2, [5, 5], first_pid=200))


def test_the_death_of_a_root_without_a_slot_is_over_without_a_new_generation() -> None:
    watch = RecoveryWatch()
    watch.hit("root", sighting(4, [1, 1]))
    for second in range(14):
        watch.see(sighting(4, [second, second]), float(second), calm=True)
        assert watch.calm_since is None
    for second in (20, 21, 22):
        watch.see(sighting(4, [second, second]), float(second), calm=True)
    assert watch.calm_since == 21.0


def test_a_sighting_tells_who_can_be_hit() -> None:
    seen = sighting(3, [4, 6])
    assert (seen.generation, seen.step, seen.root, seen.in_order) == (3, 4, 1, True)
    assert seen.processes(1) == [1001, 101]
    assert seen.worker(1, None) == seen.worker(1, 1) == 101
    assert seen.has([0, 1], None)
    assert not seen.has([0], 1)
    half = Sighting((seen.statuses[0], None), 2)
    assert (half.step, half.in_order, half.processes(1)) == (0, False, [])
    statuses: Any = [{**seen.statuses[0], "root": None, "root_name": "m-7", "standbys": [{"name": "m-7", "pid": 9}]}]
    assert Sighting(tuple(statuses), 1).root_standby == {"name": "m-7", "pid": 9}
