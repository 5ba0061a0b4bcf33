"""Machines in network namespaces, with addresses and cables of their own: a partition harms nobody."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Namespaces, remove_stale, why_not

from lightning_gemini.controlplane.processes import wait_gone
from tests.system.conftest import NODES, Training

Make = Callable[..., Namespaces]
Train = Callable[..., Training]
Undisturbed = Callable[..., list[dict[str, Any]]]
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def machines() -> Iterator[Make]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(Namespaces(*arguments))


def send(net: Namespaces, index: int, address: tuple[str, int]) -> bool:
    """A machine sends a word to an address; says whether it could."""
    code = f"import socket; socket.create_connection({address!r}, 1).sendall(b'word')"
    return subprocess.run(net.command(index, sys.executable, "-S", "-c", code), capture_output=True).returncode == 0


def test_cables_are_cut_and_restored(machines: Make) -> None:
    net = machines(2, "200mbit")
    with socket.create_server((net.host, 0)) as server:
        address = server.getsockname()
        for cut in (False, True, False):
            (net.cut if cut else net.restore)(1)
            assert send(net, 0, address)
            assert send(net, 1, address) is not cut
        server.accept()[0].close()
        caller = server.accept()[1]
        assert caller[0] in {net.address(0), net.address(1)}
    limits = subprocess.run(net.command(0, "tc", "qdisc"), capture_output=True, text=True, check=True).stdout
    assert "tbf" in limits
    assert "rate 200Mbit" in limits


def test_what_a_killed_process_left_is_removed(machines: Make) -> None:
    code = """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from namespaces import Namespaces
        net = Namespaces(2).__enter__()
        print(net.names[0], flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(RECIPES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        name = maker.stdout.readline().strip()
        assert name in _networks()
        remove_stale()
        assert name in _networks(), "its maker lives"
        maker.send_signal(signal.SIGKILL)
    assert name in _networks()
    remove_stale()
    assert name.split("-")[0] not in _networks()
    mine = machines(1)
    assert mine.names[0] in _networks()
    mine.close()
    assert mine.names[0] not in _networks()


def _networks() -> str:
    return subprocess.run("ip netns list; ip -o link", shell=True, capture_output=True, text=True, check=True).stdout


class Isolation:
    """Cuts a machine off until another one has its slot, and lets it come back."""

    def __init__(self, run: Training, net: Namespaces, slot: int) -> None:
        self.run, self.net, self.slot = run, net, slot
        run.until(lambda: run.view().get("standbys"), 60)
        joined = [event for event in run.events("member_joined") if event["node"] == slot]
        self.name, self.pid = joined[-1]["name"], joined[-1]["pid"]
        self.index = int(self.name.removeprefix("machine-"))
        self.joins = len(joined)

    def cut(self) -> float:
        """Until a standby has the slot; returns the seconds."""
        assert len(self.net.processes(self.index)) >= 3, "agent, fork server and worker are on that machine"
        self.net.cut(self.index)
        started = time.monotonic()
        self.run.until(lambda: self._joins() > self.joins)
        return time.monotonic() - started

    def restore(self) -> None:
        """The agent sees that it was replaced, and ends by itself, with everything on its machine."""
        assert wait_gone([self.pid], 0), "it does not end as long as it is cut off"
        self.net.restore(self.index)
        self.run.until(lambda: f"{self.name} had lost its slot and ended" in self._launcher_log())
        assert not wait_gone([self.pid], 5)
        assert not self.net.processes(self.index)

    def _joins(self) -> int:
        return len([event for event in self.run.events("member_joined") if event["node"] == self.slot])

    def _launcher_log(self) -> str:
        path = self.run.path / "logs" / "launcher.jsonl"
        return path.read_text() if path.exists() else ""


@pytest.mark.timeout(600)
def test_an_isolated_machine_is_replaced_and_fences_itself(
    machines: Make, train: Train, undisturbed: Undisturbed
) -> None:
    net = machines(8, "500mbit")
    command = f"command,command='exec ip netns exec {net.names[0][:-1]}{{index}} {{agent}}',shared_imports=true"
    run = train("gemini_stage_2", seconds=1.0, operator=command, host=net.host, standby="1", lease_ttl="4")
    run.until_step(2)
    root = int(run.until(lambda: run.view().get("root") is not None and run.view())["root"])
    for number, slot in enumerate(((root + 1) % NODES, root)):
        isolation = Isolation(run, net, slot)
        print(f"node {slot} ({isolation.name}) replaced {isolation.cut():.1f} s after its cable was cut")
        isolation.restore()
        run.until(lambda: len(run.events("restored")) == NODES * (number + 1), 60)  # noqa: B023
        run.until_step(run.step() + 1)
        assert run.view()["root_name"] != isolation.name
    run.ports |= run.listening()
    run.hurry()
    assert run.wait(120) == 0, run.output.read_text()
    run.assert_clean()
    generations = Counter(event["generation"] for event in run.events("generation_started"))
    assert generations == {1: 1, 2: 1, 3: 1}, "exactly one root acted in each generation"
    failures = run.events("failure_detected")
    assert [(event["kind"], event["nodes_lost"]) for event in failures] == [
        ("hardware", [(root + 1) % NODES]),
        ("hardware", [root]),
    ]
    assert run.results() == undisturbed("2")
