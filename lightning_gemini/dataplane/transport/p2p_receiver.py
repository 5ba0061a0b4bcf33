"""Worker to worker over torch.distributed: the holder's side, out of sub-buffers into the peer's slab."""

from __future__ import annotations

import logging
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport.chunk_stream import require_wanted, seal_verified
from lightning_gemini.dataplane.transport.outgoing import chunks_ended
from lightning_gemini.dataplane.transport.p2p import BUFFERS, GOODBYE
from lightning_gemini.dataplane.transport.pair import Pair
from lightning_gemini.dataplane.transport.sub_buffers import Arrival, SubBuffers, host_bytes
from lightning_gemini.dataplane.wire import MAX_CHUNK_BYTES, MAX_REASON_BYTES, Frame, Kind
from lightning_gemini.errors import AgentError, GeminiError, IntegrityError, ProtocolError

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_MOST_SUB_BUFFERS = 1024


class ReplicaDesk(Protocol):
    """Gives out the right to write a peer's shard into this machine's memory, one at a time."""

    def begin(self, begin: Frame) -> Buffer | None:
        """The buffer for what was announced, begun; ``None`` if it is complete here already.

        Raises:
            GeminiError: It is not wanted here.
            AgentError: Whoever owns the memory is gone.
        """

    def end(self) -> None:
        """Nothing is written any more; what is not complete is dropped. Idempotent."""


@dataclass(frozen=True, slots=True)
class _News:
    """A frame that came, and the piece that follows it."""

    frame: Frame
    payload: bytes = b""
    arrival: Arrival | None = None


def _look_at_nothing() -> None:
    return None


class P2pReceiver:
    """Takes in the versions of one owner. One thread receives pieces while the other copies the ones before out.

    Args:
        open_pair: Meets the owner's worker; raises OSError where it does not come.
        desk: Where the shard goes.
        sub_buffers: What pieces are received into.
    """

    def __init__(self, open_pair: Callable[[], Pair], desk: ReplicaDesk, sub_buffers: SubBuffers) -> None:
        self._open_pair, self._desk, self.sub_buffers = open_pair, desk, sub_buffers
        self._pair: Pair | None = None
        self._news: queue.SimpleQueue[_News | Exception] = queue.SimpleQueue()
        self._credits = 0
        self._closed = False

    def run(self) -> None:
        """Serve the owner until it says goodbye. The caller gives the thread.

        Raises:
            OSError: The owner is gone, or did not come.
            ProtocolError: It spoke out of turn.
        """
        self._pair = pair = self._open_pair()
        reader = threading.Thread(target=self._receive, args=(pair,), name="p2p-receive", daemon=True)
        reader.start()
        try:
            if self._closed:
                raise ConnectionAbortedError("closed")
            while (news := self._next()).frame.kind is Kind.BEGIN:
                self._take_version(pair, news.frame)
            if news.frame != GOODBYE:
                raise ProtocolError(f"unexpected {news.frame.kind.name} frame")
            pair.send(GOODBYE)
            self._wait_for_hanging_up()
        finally:
            pair.break_off()

    def close(self) -> None:
        """Let :meth:`run` end at once; idempotent, any thread."""
        self._closed = True
        pair = self._pair
        if pair is not None:
            pair.break_off()

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive(self, pair: Pair) -> None:
        """Put pieces into sub-buffers as they come; they are free by then, or the owner is out of turn."""
        pieces = 0
        try:
            while True:
                frame, payload = pair.receive()
                arrival = None
                if frame.kind is Kind.BEGIN:
                    self._reserve(payload)
                    pieces = self._credits = 0
                elif frame.kind is Kind.CHUNK:
                    if pieces - self._credits >= self.sub_buffers.count:
                        raise ProtocolError(f"a piece without credit: {self.sub_buffers.count} are on their way")
                    arrival = self.sub_buffers.receive(pair, pieces, frame.chunk_bytes)
                    pieces += 1
                self._news.put(_News(frame, payload, arrival))
        except Exception as error:  # whatever it is, the other thread must hear of it
            self._news.put(error)

    def _reserve(self, payload: bytes) -> None:
        count, size_bytes = BUFFERS.unpack(payload) if len(payload) == BUFFERS.size else (0, 0)
        if not 0 < count <= _MOST_SUB_BUFFERS or size_bytes > MAX_CHUNK_BYTES:
            raise ProtocolError(f"{count} sub-buffers of {size_bytes} bytes were asked for")
        self.sub_buffers.reserve(count, size_bytes)

    def _next(self, look: Callable[[], object] = _look_at_nothing) -> _News:
        """Wait for a frame; ``look`` is called now and then."""
        while True:
            try:
                news = self._news.get(timeout=_LOOK_S)
            except queue.Empty:
                look()
                continue
            if isinstance(news, Exception):
                raise news
            return news

    def _wait_for_hanging_up(self) -> None:
        """The owner hangs up when it has heard the goodbye: not before, or it would be cut off."""
        try:
            self._next()
        except OSError:
            return

    # -- one version -------------------------------------------------------------------------------------------------

    def _take_version(self, pair: Pair, begin: Frame) -> None:
        try:
            buffer = self._desk.begin(begin)
        except AgentError:
            raise
        except GeminiError as error:
            _refuse(pair, begin, error)
            return
        if buffer is None:
            pair.send(Frame(Kind.HAVE, begin.owner, begin.id))
            return
        try:
            pair.send(Frame(Kind.WANT, begin.owner, begin.id))
            answer = self._fill(pair, _Incoming(begin, buffer, self.sub_buffers))
        finally:
            self._desk.end()
        if answer is not None:
            pair.send(Frame(answer, begin.owner, begin.id))

    def _fill(self, pair: Pair, incoming: _Incoming) -> Kind | None:
        """Take every piece; returns what to answer at the end, if that was not said yet."""
        begin, refused = incoming.begin, False
        look: Callable[[], object] = incoming.require_wanted
        ended = False
        while not ended:
            try:
                news = self._next(look)
                ended = news.frame.kind is Kind.END
                if news.frame.kind is Kind.ABORT:
                    return Kind.ABORT
                if refused:
                    self._skip(news)
                elif incoming.take(news):
                    return Kind.ACK
                else:
                    self._credits += 1
                    pair.send(Frame(Kind.WANT, begin.owner, begin.id, self._credits))
            except (IntegrityError, ConnectionAbortedError) as error:
                refused, look = True, _look_at_nothing
                self._desk.end()  # at once: a recovery may be waiting for it
                _refuse(pair, begin, error)
        return None

    def _skip(self, news: _News) -> None:
        """Pass over what the owner sent before it heard the refusal."""
        if news.arrival is not None:
            self.sub_buffers.discard(news.arrival)


class _Incoming:
    """A version that is being received: pieces in order, each chunk verified when its last byte is here."""

    def __init__(self, begin: Frame, buffer: Buffer, sub_buffers: SubBuffers) -> None:
        self.begin, self.buffer, self._sub_buffers = begin, buffer, sub_buffers
        self._target = host_bytes(buffer.data)
        self._received = 0

    def take(self, news: _News) -> bool:
        """Take a piece, or the end; true when the version is complete.

        Raises:
            IntegrityError: A chunk does not match its checksum.
            ConnectionAbortedError: The version was given up here meanwhile.
            ProtocolError: A frame out of turn.
        """
        frame = news.frame
        if (frame.owner, frame.id) != (self.begin.owner, self.begin.id):
            raise ProtocolError(f"a {frame.kind.name} frame of rank {frame.owner} came out of turn")
        if news.arrival is not None and frame.size == self._received:
            self._take_piece(news.arrival, self._received + frame.chunk_bytes, news.payload)
            return False
        if frame.kind is not Kind.END:
            raise ProtocolError(f"a {frame.kind.name} frame came out of turn after {self._received} bytes")
        self.require_wanted()
        self.buffer.complete()
        return True

    def require_wanted(self) -> None:
        """Raises ConnectionAbortedError where the version was given up here meanwhile."""
        require_wanted(self.buffer, self.begin.id)

    def _take_piece(self, arrival: Arrival, end: int, table: bytes) -> None:
        checksums = self._checksums(table, end)
        if self.buffer.id != self.begin.id:
            self._sub_buffers.discard(arrival)
        self.require_wanted()
        self._sub_buffers.copy_out(arrival, self._target[self._received : end])
        for index, checksum in enumerate(checksums, self.buffer.chunks_ready):
            seal_verified(self.buffer, index, checksum)
        self._received = end

    def _checksums(self, table: bytes, end: int) -> tuple[int, ...]:
        """Those of the chunks that are here once the piece is."""
        if not self._received < end <= self.begin.size:
            raise ProtocolError(f"a piece up to byte {end} came out of turn")
        count = chunks_ended(self.buffer, end) - self.buffer.chunks_ready
        if len(table) != 8 * count:
            raise ProtocolError(f"expected the checksums of {count} chunks, found {len(table)} bytes")
        return struct.unpack(f"<{count}Q", table)


def _refuse(pair: Pair, begin: Frame, error: Exception) -> None:
    pair.send(Frame(Kind.REFUSE, begin.owner, begin.id), str(error).encode()[:MAX_REASON_BYTES])
