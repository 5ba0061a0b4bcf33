"""How fast a real link is: what a piece costs besides its bytes, and what the link goes on carrying."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import ProtocolError

_PINGS = 20
_LONGEST_S = 0.8
_ENOUGH_BYTES = 64 << 20  # far beyond what shapers let through in one burst
_ENOUGH_S = 0.06
_PROBE_S = 0.005  # shorter ones tell more of the peer's threads than of the link
_FIRST_PROBE_BYTES, _LARGEST_PROBE_BYTES = 16 << 10, 8 << 20
_SCRATCH_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a link carries.

    Attributes:
        bandwidth_bytes_per_s: Of a stream that lasts.
        startup_s: From a byte's departure to the news of its arrival, without load.
    """

    bandwidth_bytes_per_s: float
    startup_s: float


def measure(sock: socket.socket) -> LinkSpeed:
    """Measure the way to a replica server by sending to it for about a second at most, for less on a fast link.

    Args:
        sock: An authenticated connection with a timeout, on which nothing else is under way.

    Raises:
        OSError: The connection broke, or the peer answered something else.
    """
    trips_s = [_ping(sock) for _ in range(_PINGS)]
    quick_s = statistics.quantiles(trips_s)[0]  # others may have waited for a processor rather than for the link
    return LinkSpeed(_bandwidth(sock), quick_s)


def discard(sock: socket.socket, probe: Frame) -> None:
    """Take in a probe's payload and say so."""
    scratch = memoryview(bytearray(min(probe.length, _SCRATCH_BYTES)))
    left = probe.length
    while left:
        piece = scratch[: min(left, len(scratch))]
        wire.receive_into(sock, piece)
        left -= len(piece)
    wire.send(sock, Frame(Kind.ACK, size=probe.length))


def _ping(sock: socket.socket) -> float:
    began_s = time.monotonic()
    _send(sock, memoryview(b"?"))
    _answer(sock)
    return time.monotonic() - began_s


def _bandwidth(sock: socket.socket) -> float:
    """Bytes a second over the second half of the time: what shapers let through at first is over by then."""
    payload = memoryview(bytes(_LARGEST_PROBE_BYTES))
    size = _FIRST_PROBE_BYTES
    began_s = last_s = time.monotonic()
    arrivals = [(began_s, 0)]  # (when, how much in all)
    _send(sock, payload[:size])
    while True:
        elapsed_s, arrived = last_s - began_s, arrivals[-1][1]
        enough = elapsed_s >= _LONGEST_S or (arrived >= _ENOUGH_BYTES and elapsed_s >= _ENOUGH_S)
        if not enough:
            _send(sock, payload[:size])  # always one more than the link has delivered, so that it never rests
        arrived += _answer(sock)
        now_s = time.monotonic()
        arrivals.append((now_s, arrived))
        if enough:
            return _rate(arrivals)
        if now_s - last_s < _PROBE_S:
            size = min(2 * size, _LARGEST_PROBE_BYTES)
        last_s = now_s


def _rate(arrivals: list[tuple[float, int]]) -> float:
    first_s, end = arrivals[0][0], arrivals[-1]
    middle_s = (first_s + end[0]) / 2
    start = max(entry for entry in arrivals[:-1] if entry[0] <= middle_s)
    return (end[1] - start[1]) / max(end[0] - start[0], 1e-9)


def _send(sock: socket.socket, payload: memoryview) -> None:
    wire.send(sock, Frame(Kind.PROBE, length=len(payload)), payload)


def _answer(sock: socket.socket) -> int:
    try:
        frame = wire.receive(sock)
    except EOFError as error:
        raise ConnectionError("the peer closed the connection while the link was measured") from error
    if frame.kind is not Kind.ACK:
        raise ProtocolError(f"a probe of the link was answered {frame.kind.name}, expected ACK")
    return frame.size
