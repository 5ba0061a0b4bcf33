"""Faults that last: a stopped process, cut connections, a link that is down. Each can be taken back at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from lightning_gemini.controlplane.faults.connections import cut_connections
from lightning_gemini.controlplane.faults.veth import set_link
from lightning_gemini.controlplane.processes import start_time


class LastingFault(Protocol):
    """Something that goes on until it is over, or taken back.

    Attributes:
        node: The machine that it was done to.
    """

    node: int

    def poll(self) -> bool:
        """Goes on with it; says whether it is still going on."""

    def close(self) -> None:
        """Takes it back now; idempotent."""


class Pause:
    """A stopped process (SIGSTOP), continued after a while.

    Args:
        node: Its machine.
        pid: The process.
        lasts_s: Seconds until it goes on.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, node: int, pid: int, lasts_s: float) -> None:
        self.node, self._pid = node, pid
        self._until = time.monotonic() + lasts_s
        self._started = start_time(pid)  # the number may be another process's by then
        self._over = False
        os.kill(pid, signal.SIGSTOP)

    def poll(self) -> bool:
        """See `LastingFault.poll`."""
        if time.monotonic() >= self._until or start_time(self._pid) != self._started:
            self.close()
        return not self._over

    def close(self) -> None:
        """See `LastingFault.close`."""
        if not self._over and start_time(self._pid) == self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGCONT)
        self._over = True


class CutConnections:
    """The peers' connections of one agent, cut again and again as they come back.

    Args:
        node: Its machine.
        pid: The agent.
        spared: Addresses that it may talk to: the key-value store's.
        lasts_s: Seconds until connections may stay.

    Attributes:
        cut: How many were cut up to now.
    """

    def __init__(self, node: int, pid: int, spared: Sequence[str], lasts_s: float) -> None:
        self.node, self._pid, self._spared = node, pid, spared
        self._until, self._over = time.monotonic() + lasts_s, False
        self.cut = cut_connections(pid, spared)

    def poll(self) -> bool:
        """See `LastingFault.poll`."""
        if not self._over:
            with contextlib.suppress(OSError):
                self.cut += cut_connections(self._pid, self._spared)
            self._over = time.monotonic() >= self._until
        return not self._over

    def close(self) -> None:
        """See `LastingFault.close`."""
        self._over = True


class LinkDown:
    """A machine's network interface without a carrier: addresses and routes stay, nothing gets through.

    Args:
        node: The machine.
        interface: Our end of its virtual cable.
        lasts_s: Seconds until it is up again.

    Raises:
        OSError: The interface cannot be taken down.
    """

    def __init__(self, node: int, interface: str, lasts_s: float, set_to: Callable[[str, bool], None] = set_link):
        self.node, self.interface, self._set = node, interface, set_to
        self._until, self._over = time.monotonic() + lasts_s, False
        set_to(interface, False)

    def poll(self) -> bool:
        """See `LastingFault.poll`."""
        if time.monotonic() >= self._until:
            self.close()
        return not self._over

    def close(self) -> None:
        """See `LastingFault.close`."""
        if not self._over:
            self._over = True
            with contextlib.suppress(OSError):  # the machine and its cable may be gone
                self._set(self.interface, True)
