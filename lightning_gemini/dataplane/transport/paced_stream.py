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
        self._granted = self._sent = self._in_flight = self._looks = 0
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
            self._note(size)
        return True

    def _note(self, size: int) -> None:
        self._drained = False
        self._granted -= size
        self._sent += size
        self._pacer.page.note_sent(self._sent)
        self._pacer.page.note_in_flight(self._in_flight + size)

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
            self._in_flight = in_flight_bytes(self._sock)
            self._drained = not self._in_flight
        if not self._granted or not pacer.still_allowed(link):
            self._granted = pacer.allowance(ready_bytes() - self._sent, self._in_flight, link)
        ahead = pacer.ahead_bytes(link)
        room = ahead - self._in_flight
        return min(self._granted, room) if room >= min(self._granted, ahead // 4) else 0

    def _rest(self) -> None:
        for _ in range(_SHORT_LOOKS):
            time.sleep(self._pacer.pause_s(self._in_flight, self._link))
            if not self._pacer.is_shut():
                return


def in_flight_bytes(sock: socket.socket) -> int:
    """Bytes that the kernel took for this connection and that the peer's kernel has not acknowledged."""
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack_from("<i" if sys.byteorder == "little" else ">i", answer)[0])
