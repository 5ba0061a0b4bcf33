"""Hands frames and their payloads to a socket in the pieces that a pacer allows."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable

from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.pacer import Pacer, Underway
from lightning_gemini.dataplane.wire import Frame

_SIOCOUTQNSD = 0x894B  # <linux/sockios.h>
_SO_MEMINFO = 55  # <asm-generic/socket.h>
_INT = struct.Struct("=i")
_MEMINFO = struct.Struct("=8xI")  # of <linux/sock_diag.h>: SK_MEMINFO_WMEM_ALLOC, the third word
_SHORT_LOOKS = 5  # whether a span is open is known sooner than what may go,
_LOOKS_A_QUESTION = 3  # and that sooner than whether the version is still wanted


class TornChunkError(ConnectionAbortedError):
    """A version was given up in the middle of a chunk: what follows on the connection would be taken for its bytes."""


class PacedStream:
    """One version on its way to one holder.

    Args:
        sock: The connection.
        pacer: The owner's; its other links share what it allows.
        link: The holder's machine rank.
        still_wanted: Whether to go on.
    """

    def __init__(self, sock: socket.socket, pacer: Pacer, link: int, still_wanted: Callable[[], bool]) -> None:
        self._sock, self._pacer, self._link, self._still_wanted = sock, pacer, link, still_wanted
        self._granted = self._sent = self._looks = 0
        self._underway, self._drained = Underway(), False

    def send(self, frame: Frame, payload: memoryview, ready_bytes: Callable[[], int]) -> bool:
        """Send one frame with its payload, which must not be empty.

        Args:
            frame: The frame.
            payload: Its bytes.
            ready_bytes: How much of the shard is ready, from its first byte on: a piece may go on behind this payload.

        Returns:
            Whether it was sent; false where the version was given up before the first byte left.

        Raises:
            TornChunkError: It was given up in the middle of the payload; the connection is of no more use.
        """
        header, done = frame.pack(), 0
        while done < len(payload):
            size = min(self._allowed(ready_bytes), len(payload) - done)
            if not size:
                if done:
                    raise TornChunkError("the version was given up in the middle of a chunk")
                return False
            wire.send_all(self._sock, b"" if done else header, payload[done : done + size])
            done += size
            self._note(size)
        return True

    def _note(self, size: int) -> None:
        self._drained = False
        self._granted -= size
        self._sent += size
        self._pacer.page.note_sent(self._sent)
        self._pacer.page.note_in_flight(self._underway.in_flight_bytes + size)

    def _allowed(self, ready_bytes: Callable[[], int]) -> int:
        """Waits until bytes may go, and returns how many; 0 where the version is given up first."""
        while not (size := self._look(ready_bytes)):
            self._looks += 1
            if self._looks % _LOOKS_A_QUESTION == 0 and not self._still_wanted():
                return 0
            self._rest()
        return size

    def _look(self, ready_bytes: Callable[[], int]) -> int:
        pacer, link = self._pacer, self._link
        if not self._drained:  # else nothing was sent since, which spares a call into the kernel
            self._underway = underway(self._sock)
            self._drained = not self._underway.in_flight_bytes
        if not self._granted or not pacer.still_allowed(link):
            self._granted = pacer.allowance(ready_bytes() - self._sent, self._underway, link)
        ahead = pacer.ahead_bytes(link)
        room = ahead - self._underway.queued_bytes
        return min(self._granted, room) if room >= min(self._granted, ahead // 4) else 0

    def _rest(self) -> None:
        for _ in range(_SHORT_LOOKS):
            time.sleep(self._pacer.pause_s(self._underway, self._link))
            if not self._pacer.is_shut():
                return


def underway(sock: socket.socket) -> Underway:
    """What the kernel took for a TCP connection: unacknowledged by the peer's kernel; and still on this machine.

    The latter is what TCP has not sent yet, and what it has sent into the queue before the wire (with the kernel's own
    bytes for it); all of it where the kernel does not tell.
    """
    in_flight_bytes = _count(sock, termios.TIOCOUTQ)
    if not in_flight_bytes:
        return Underway()
    try:
        meminfo = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        queued_bytes = _count(sock, _SIOCOUTQNSD) + _MEMINFO.unpack(meminfo)[0]
    except (OSError, struct.error):
        queued_bytes = in_flight_bytes
    return Underway(in_flight_bytes, min(in_flight_bytes, queued_bytes))


def _count(sock: socket.socket, question: int) -> int:
    return int(_INT.unpack(fcntl.ioctl(sock.fileno(), question, bytes(_INT.size)))[0])
