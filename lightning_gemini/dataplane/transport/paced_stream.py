"""Hands frames and their payloads to a socket in the pieces that a pacer allows."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable

from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.wire import Frame

_LOOKS_A_QUESTION = 10  # whether the version is still wanted takes longer to find out than whether a span is open


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
        self._drained = False

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
            self._drained = False
            self._granted -= size
            self._sent += size
            self._pacer.page.note_sent(self._sent)
        return True

    def _allowed(self, ready_bytes: Callable[[], int]) -> int:
        """Waits until bytes may go, and returns how many; 0 where the version is given up first."""
        pacer, link = self._pacer, self._link
        while True:
            in_flight = self._in_flight()
            if not self._granted or not pacer.still_allowed(link):
                self._granted = pacer.allowance(ready_bytes() - self._sent, in_flight, link)
            ahead = pacer.ahead_bytes(link)
            room = ahead - in_flight
            if self._granted and room >= min(self._granted, ahead // 4):
                return min(self._granted, room)
            if not self._is_wanted():
                return 0
            time.sleep(pacer.pause_s(link))

    def _in_flight(self) -> int:
        if self._drained:  # and nothing was sent since: spares a call into the kernel at every look
            return 0
        found = in_flight_bytes(self._sock)
        self._pacer.page.note_in_flight(found)
        self._drained = not found
        return found

    def _is_wanted(self) -> bool:
        self._looks += 1
        return self._looks % _LOOKS_A_QUESTION != 0 or self._still_wanted()


def in_flight_bytes(sock: socket.socket) -> int:
    """Bytes that the kernel took for this connection and that the peer's kernel has not acknowledged."""
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack_from("<i" if sys.byteorder == "little" else ">i", answer)[0])
