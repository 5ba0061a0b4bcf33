"""How fast a real link is: what a piece costs besides its bytes, and what the link goes on carrying."""

from __future__ import annotations

import enum
import socket
import statistics
import struct
import time
from collections import deque
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
_PROBES_AHEAD = 8  # the link must not rest while an answer waits behind the peer's own probes, which go the other way
_CLOCK = struct.Struct("<Q")
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


class Quantity(str, enum.Enum):
    """What can be measured of a link: a field of `LinkSpeed`, by its name."""

    BANDWIDTH = "bandwidth_bytes_per_s"
    STARTUP = "startup_s"


def measure(sock: socket.socket, quantity: Quantity) -> float:
    """Measure the way to a replica server: its bandwidth by sending for about a second at most, less on a fast link.

    One quantity at a time, on all machines alike: while one machine measures its bandwidth, another one's pings would
    tell how long its bytes wait behind that.

    Args:
        sock: An authenticated connection with a timeout, on which nothing else is under way.
        quantity: What of it.

    Raises:
        OSError: The connection broke, or the peer answered something else.
    """
    return _bandwidth(sock) if quantity is Quantity.BANDWIDTH else _startup_s(sock)


def discard(sock: socket.socket, probe: Frame) -> None:
    """Take in a probe's payload, and say when it was through."""
    scratch = memoryview(bytearray(min(probe.length, _SCRATCH_BYTES)))
    left = probe.length
    while left:
        piece = scratch[: min(left, len(scratch))]
        wire.receive_into(sock, piece)
        left -= len(piece)
    wire.send(sock, Frame(Kind.ACK, length=_CLOCK.size), _CLOCK.pack(time.monotonic_ns()))


def _startup_s(sock: socket.socket) -> float:
    trips_s = [_ping(sock) for _ in range(_PINGS)]
    return statistics.quantiles(trips_s)[0]  # others may have waited for a processor rather than for the link


def _ping(sock: socket.socket) -> float:
    began_s = time.monotonic()
    _send(sock, memoryview(b"?"))
    _answer(sock)
    return time.monotonic() - began_s


def _bandwidth(sock: socket.socket) -> float:
    """Bytes a second over the second half of the time: what shapers let through at first is over by then."""
    payload = memoryview(bytes(_LARGEST_PROBE_BYTES))
    size, on_their_way = _FIRST_PROBE_BYTES, deque[int]()
    arrivals: list[tuple[float, int]] = []  # (when, how much in all)
    enough = False
    while on_their_way or not enough:
        while not enough and len(on_their_way) < _PROBES_AHEAD:
            _send(sock, payload[:size])
            on_their_way.append(size)
        arrived = (arrivals[-1][1] if arrivals else 0) + on_their_way.popleft()
        arrivals.append((_answer(sock), arrived))
        elapsed_s = arrivals[-1][0] - arrivals[0][0]
        enough = elapsed_s >= _LONGEST_S or (arrived >= _ENOUGH_BYTES and elapsed_s >= _ENOUGH_S)
        if len(arrivals) > 1 and arrivals[-1][0] - arrivals[-2][0] < _PROBE_S:
            size = min(2 * size, _LARGEST_PROBE_BYTES)
    return _rate(arrivals)


def _rate(arrivals: list[tuple[float, int]]) -> float:
    first_s, end = arrivals[0][0], arrivals[-1]
    middle_s = (first_s + end[0]) / 2
    start = max(entry for entry in arrivals[:-1] if entry[0] <= middle_s)
    return (end[1] - start[1]) / max(end[0] - start[0], 1e-9)


def _send(sock: socket.socket, payload: memoryview) -> None:
    wire.send(sock, Frame(Kind.PROBE, length=len(payload)), payload)


def _answer(sock: socket.socket) -> float:
    """When the next probe was through, by the peer's clock: its answer may wait behind what the peer sends itself."""
    try:
        frame = wire.receive(sock)
    except EOFError as error:
        raise ConnectionError("the peer closed the connection while the link was measured") from error
    if (frame.kind, frame.length) != (Kind.ACK, _CLOCK.size):
        raise ProtocolError(f"a probe of the link was answered {frame.kind.name}, expected ACK and a time")
    clock = bytearray(_CLOCK.size)
    wire.receive_into(sock, memoryview(clock))
    nanoseconds: int = _CLOCK.unpack(clock)[0]
    return nanoseconds / 1e9
