"""Agent to agent over TCP, straight from one machine's shared memory into another's."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import link_speed, wire
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport.base import Peer
from lightning_gemini.dataplane.transport.chunk_stream import (
    IO_TIMEOUT_S,
    SLOWEST_READ_BYTES_PER_S,
    receive_chunks,
    send_chunks,
)
from lightning_gemini.dataplane.transport.paced_stream import TornChunkError
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import ProtocolError


class TcpTransport:
    """The client side: one authenticated connection, opened on first use.

    Args:
        peer: Whom to talk to.
        job: The job's id.
        secret: The job's secret.
        machine: This machine's rank.
        generation: The generation that this machine is in; the peer refuses one that is over.
    """

    def __init__(self, peer: Peer, job: str, secret: bytes, machine: int, generation: int) -> None:
        self._peer, self._job, self._secret, self._machine = peer, job, secret, machine
        self._generation = generation
        self._sock: socket.socket | None = None
        self._aborted = False

    def push(
        self,
        buffer: Buffer,
        version: VersionId,
        still_wanted: Callable[[], bool],
        kept: VersionId | None = None,
        pacer: Pacer | None = None,
    ) -> bool:
        """See :class:`ReplicaTransport`."""
        with _closing_on_error(self):
            sock = self._connected()
            begin = Frame(Kind.BEGIN, buffer.owner, version, buffer.data_bytes, buffer.chunk_bytes)
            if buffer.id != version:  # overwritten meanwhile: the sizes may be the next version's
                return False
            wire.send(sock, dataclasses.replace(begin, sender_generation=self._generation, kept=kept))
            sock.settimeout(IO_TIMEOUT_S + begin.size / SLOWEST_READ_BYTES_PER_S)
            answer = self._answer(sock, begin, (Kind.WANT, Kind.HAVE))
            sock.settimeout(IO_TIMEOUT_S)
            if answer.kind is Kind.HAVE:
                return True
            try:
                finished = self._send_chunks(sock, buffer, version, still_wanted, pacer)
            except TornChunkError:
                self.close()
                return False
            wire.send(sock, Frame(Kind.END if finished else Kind.ABORT, buffer.owner, version))
            return finished and self._answer(sock, begin, (Kind.ACK,)).kind is Kind.ACK

    def _send_chunks(
        self,
        sock: socket.socket,
        buffer: Buffer,
        version: VersionId,
        still_wanted: Callable[[], bool],
        pacer: Pacer | None,
    ) -> bool:
        link = self._peer.machine
        try:
            return send_chunks(sock, buffer, version, still_wanted, pacer, link)
        finally:
            if pacer is not None:
                pacer.finish(link)

    def measure(self, quantity: Quantity) -> float:
        """Measure the way to the peer, for about a second at most; nothing else may be under way on it.

        Raises:
            OSError: The peer cannot be reached.
        """
        with _closing_on_error(self):
            return link_speed.measure(self._connected(), quantity)

    def fetch(self, owner: int, version: VersionId, allocate: Callable[[int], Buffer]) -> int:
        """See :class:`ReplicaTransport`."""
        with _closing_on_error(self):
            sock = self._connected()
            request = Frame(Kind.FETCH, owner, version)
            wire.send(sock, request)
            begin = self._answer(sock, request, (Kind.BEGIN,))
            buffer = allocate(begin.size)
            buffer.begin(version, begin.size, retrieved=True)
            if not receive_chunks(sock, buffer, begin):
                raise ProtocolError(f"machine {self._peer.machine} gave up sending the shard of rank {owner}")
            return begin.size

    def close(self) -> None:
        """See :class:`ReplicaTransport`."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def abort(self) -> None:
        """See :class:`ReplicaTransport`."""
        self._aborted = True
        sock = self._sock
        if sock is not None:  # not closed here: its number could be another file's before the other thread looks
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _connected(self) -> socket.socket:
        if self._aborted:
            raise ConnectionError(f"the connection to machine {self._peer.machine} was given up")
        if self._sock is None:
            self._sock = wire.connect(
                self._peer.address, self._job, self._secret, self._machine, timeout_s=IO_TIMEOUT_S
            )
        if self._aborted:  # while it connected
            raise ConnectionError(f"the connection to machine {self._peer.machine} was given up")
        return self._sock

    def _answer(self, sock: socket.socket, request: Frame, expected: tuple[Kind, ...]) -> Frame:
        try:
            frame = wire.receive(sock)
        except EOFError as error:
            raise ConnectionError(f"machine {self._peer.machine} closed the connection") from error
        if frame.kind is Kind.REFUSE:
            raise ProtocolError(f"machine {self._peer.machine} refused: {wire.receive_reason(sock, frame)}")
        if frame.kind not in expected:
            raise ProtocolError(f"machine {self._peer.machine} answered {frame.kind.name}, expected {expected}")
        if (frame.owner, frame.id) != (request.owner, request.id):
            raise ProtocolError(f"machine {self._peer.machine} speaks of another shard than it was asked about")
        return frame


class _closing_on_error:  # noqa: N801 - reads as a verb in a with statement
    def __init__(self, transport: TcpTransport) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._transport.close()
