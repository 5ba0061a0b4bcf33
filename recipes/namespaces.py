"""Machines with addresses and cables of their own, made of this host: network namespaces on a bridge. Needs root.

::

    bridge gem<id>br 10.x.y.254 ─┬─ gem<id>-0 ═ eth0 10.x.y.1   in namespace gem<id>-0
                                 ├─ gem<id>-1 ═ eth0 10.x.y.2   in namespace gem<id>-1
                                 └─ …
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import subprocess
from types import TracebackType

_NAME = re.compile(r"\bgem(\d+)[a-z](?:-\d+|br)\b")
_LETTERS = itertools.cycle("abcdefghijklmnopqrstuvwxyz")
MAX_MACHINES = 50
_SEGMENT_BYTES = 16384
# As on a fabric without loss: nothing is dropped, and no connection looks for its rate anew, neither after a pause
# nor every few seconds.
_STEADY = "cd /proc/sys/net/ipv4 && echo reno > tcp_congestion_control && echo 0 > tcp_slow_start_after_idle"
_QUEUE = "400ms"


class Namespaces:
    """So many machines; everything is gone after `close`, at the end of this process, or when the next one looks.

    Args:
        count: How many, up to ``MAX_MACHINES``.
        rate: What a cable carries in each direction, for ``tc tbf``, as in ``500mbit``; no limit by default.
        burst: What a cable that was idle carries at once, above its rate. Keep it well below a message whose time
            matters: the kernel lets that much of every one through for nothing.
    """

    def __init__(self, count: int, rate: str | None = None, burst: str = "256kb") -> None:
        assert 0 < count <= MAX_MACHINES
        self._id = f"gem{os.getpid()}{next(_LETTERS)}"
        self._rate, self._burst = rate, burst
        self.names = [f"{self._id}-{index}" for index in range(count)]
        self._subnet = ""

    @property
    def host(self) -> str:
        """This host's own address among the machines."""
        return f"{self._subnet}.254"

    def address(self, index: int) -> str:
        """A machine's address."""
        return f"{self._subnet}.{index + 1}"

    def cut(self, index: int) -> None:
        """Pulls a machine's cable: what is on its way is lost, and no connection is told."""
        _ip("link", "set", self.names[index], "down")

    def restore(self, index: int) -> None:
        """Plugs it in again."""
        _ip("link", "set", self.names[index], "up")

    def processes(self, index: int) -> list[int]:
        """Who runs on a machine."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[index]).split()]

    def command(self, index: int, *words: str) -> list[str]:
        """A command line that runs another one on a machine."""
        return ["ip", "netns", "exec", self.names[index], *words]

    def __enter__(self) -> Namespaces:
        remove_stale()
        atexit.register(self.close)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes it all; idempotent."""
        _remove([*self.names, f"{self._id}br"])
        atexit.unregister(self.close)

    def _make(self) -> None:
        self._subnet = _free_subnet()
        bridge = f"{self._id}br"
        _ip("link", "add", bridge, "type", "bridge", "forward_delay", "0")
        _ip("addr", "add", f"{self.host}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, name in enumerate(self.names):
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", bridge, "up")
            # Larger segments than the burst would be cut into packets by the processor, at ten times the cost.
            segments = f"link set eth0 gso_max_size {_SEGMENT_BYTES} up"
            for words in (f"addr add {self.address(index)}/24 dev eth0", segments, "link set lo up"):
                _ip("-n", name, *words.split())
            _run(*self.command(index, "sh", "-c", _STEADY))
            if self._rate is not None:
                limit = ["root", "tbf", "rate", self._rate, "burst", self._burst, "latency", _QUEUE]
                _run("tc", "qdisc", "add", "dev", name, *limit)
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)


def why_not() -> str | None:
    """Returns why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (package iproute2)"
    try:
        with Namespaces(1):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', error)}"


def remove_stale() -> None:
    """Removes what processes left that were killed."""
    names = {match[0]: int(match[1]) for match in _NAME.finditer(_ip("netns", "list") + _ip("-o", "link"))}
    _remove([name for name, pid in names.items() if not os.path.exists(f"/proc/{pid}")])


def _remove(names: list[str]) -> None:
    for name in names:
        # Our end of the cable by itself: with the namespace it would go only some time later.
        for words in (["link", "del", name], ["netns", "del", name]):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*words)


def _free_subnet() -> str:
    """Draws by the process id, so that processes that run side by side do not meet."""
    used = _ip("-o", "-4", "addr")
    for number in range(os.getpid(), os.getpid() + 100):
        subnet = f"10.{192 + number // 256 % 64}.{number % 256}"
        if f" {subnet}." not in used:
            return subnet
    raise OSError("found no free subnet below 10.192.0.0/10")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout
