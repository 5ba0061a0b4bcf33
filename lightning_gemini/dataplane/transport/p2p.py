"""Worker to worker over torch.distributed, GEMINI's own path (SOSP '23, section 5): the sender's side.

What is said, each a frame of :mod:`~lightning_gemini.dataplane.wire` on the pair's gloo group::

    source   BEGIN   a version follows; payload: number of sub-buffers, and the size of each (0: on demand)
    holder   WANT    size = pieces copied out so far: 0 at first, then one such credit a piece
    holder   HAVE    it is complete here: that was all
    source   CHUNK   a piece of `chunk_bytes` from byte `size` on follows on the data group;
                     payload: the checksums of the shard's chunks that end in it
    source   END     that was the last
    source   ABORT   the version is given up
    holder   ACK     complete and verified: the answer to END
    holder   ABORT   the answer to ABORT
    holder   REFUSE  no; payload: why. The answer to BEGIN or END; before END, the source answers with ABORT
    either   END     without a version: goodbye

The source never has more pieces without credit than there are sub-buffers, so the holder can always take the next one.
"""

from __future__ import annotations

import contextlib
import queue
import struct
import threading
import time
from collections.abc import Callable

from lightning_gemini.config import P2P_BUFFER_BYTES
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pace_page import Pace
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport.chunk_stream import SLOWEST_READ_BYTES_PER_S
from lightning_gemini.dataplane.transport.outgoing import Outgoing, checksum_table
from lightning_gemini.dataplane.transport.pair import Pair
from lightning_gemini.dataplane.transport.sub_buffers import SubBuffers, host_bytes
from lightning_gemini.dataplane.wire import MAX_CHUNK_BYTES, Frame, Kind
from lightning_gemini.errors import ProtocolError

ANSWER_TIMEOUT_S = 60.0
"""How long the holder may take to answer, or to copy out a piece."""
GOODBYE = Frame(Kind.END)
BUFFERS = struct.Struct("<QQ")
_POLL_S = 0.001
_SHORT_LOOKS = 5  # at whether a span is open, before the next at everything
_GOODBYE_TIMEOUT_S = 2.0


class RefusedError(ProtocolError):
    """The holder does not take the version; the connection is good for the next one."""


class P2pTransport:
    """Pushes a worker's own shard, out of its slab, to the worker with the same local rank on a holder machine.

    Args:
        open_pair: Meets that worker; raises OSError where it does not come.
        machine: The holder's machine rank.
        generation: The generation that this worker is in.
        sub_buffers: What pieces pass through on this side.
        count: The number of sub-buffers where no plan says it (p in GEMINI).
        buffer_bytes: Their size together where no plan says it (R in GEMINI).
    """

    def __init__(
        self,
        open_pair: Callable[[], Pair],
        machine: int,
        generation: int,
        sub_buffers: SubBuffers,
        *,
        count: int = 4,
        buffer_bytes: int = P2P_BUFFER_BYTES,
    ) -> None:
        self._open_pair, self._machine, self._generation = open_pair, machine, generation
        self._sub_buffers, self._count, self._buffer_bytes = sub_buffers, count, buffer_bytes
        self._pair: Pair | None = None
        self._reader: threading.Thread | None = None
        self._answers: queue.SimpleQueue[tuple[Frame, bytes] | Exception] = queue.SimpleQueue()
        self._aborted = False

    # -- the interface -----------------------------------------------------------------------------------------------

    def push(
        self,
        buffer: Buffer,
        version: VersionId,
        still_wanted: Callable[[], bool],
        kept: VersionId | None = None,
        pacer: Pacer | None = None,
    ) -> bool:
        """See :class:`~lightning_gemini.dataplane.transport.base.ReplicaTransport`.

        Raises:
            RefusedError: The holder does not take this version (now); ask again.
            OSError: The connection failed; it is of no use any more.
        """
        pair = self.connect()
        try:
            return self._push(pair, buffer, version, still_wanted, kept, pacer)
        except RefusedError:
            raise
        except BaseException:
            self._drop(pair)
            raise
        finally:
            if pacer is not None:
                pacer.finish(self._machine)

    def close(self) -> None:
        """See :class:`~lightning_gemini.dataplane.transport.base.ReplicaTransport`."""
        pair, reader = self._pair, self._reader
        if pair is None or reader is None:
            return
        with contextlib.suppress(OSError, queue.Empty):
            pair.send(GOODBYE)
            while not isinstance(answer := self._answers.get(timeout=_GOODBYE_TIMEOUT_S), Exception):
                if answer[0] == GOODBYE:
                    break
        self._drop(pair)
        reader.join(_GOODBYE_TIMEOUT_S)

    def abort(self) -> None:
        """See :class:`~lightning_gemini.dataplane.transport.base.ReplicaTransport`."""
        self._aborted = True
        pair = self._pair
        if pair is not None:
            pair.break_off()

    @property
    def connected(self) -> bool:
        """Whether the holder was met, and the connection has not failed since."""
        return self._pair is not None

    # -- one version -------------------------------------------------------------------------------------------------

    def _push(
        self,
        pair: Pair,
        buffer: Buffer,
        version: VersionId,
        still_wanted: Callable[[], bool],
        kept: VersionId | None,
        pacer: Pacer | None,
    ) -> bool:
        size, chunk_bytes = buffer.data_bytes, buffer.chunk_bytes
        if buffer.id != version:  # overwritten meanwhile: the sizes may be the next version's
            return False
        generation = self._generation
        begin = Frame(Kind.BEGIN, buffer.owner, version, size, chunk_bytes, sender_generation=generation, kept=kept)
        outgoing = self._outgoing(buffer, begin, pacer)
        pair.send(begin, BUFFERS.pack(outgoing.sub_buffers, outgoing.piece_bytes))
        patience_s = ANSWER_TIMEOUT_S + size / SLOWEST_READ_BYTES_PER_S
        if self._answer(begin, patience_s, Kind.WANT, Kind.HAVE).kind is Kind.HAVE:
            return True
        try:
            finished = self._stream(pair, outgoing, still_wanted, pacer)
        except RefusedError:
            self._give_up(pair, begin)
            raise
        if not finished:
            self._give_up(pair, begin)
            return False
        pair.send(Frame(Kind.END, begin.owner, version))
        while self._answer(begin, patience_s, Kind.WANT, Kind.ACK).kind is not Kind.ACK:
            pass  # credits for the last pieces
        return True

    def _outgoing(self, buffer: Buffer, begin: Frame, pacer: Pacer | None) -> Outgoing:
        plan = pacer.page.plan() if pacer is not None and pacer.page.pace is Pace.PACED else None
        count, piece_bytes = self._count, self._buffer_bytes // self._count
        if plan is not None:
            piece_bytes = 0 if plan.one_chunk else plan.chunk_bytes
            count = 1 if plan.one_chunk else max(1, plan.window_bytes // plan.chunk_bytes)
        if not buffer.fits(begin.size):
            buffer.remap()
        piece_bytes = min(piece_bytes, begin.size, MAX_CHUNK_BYTES)
        self._sub_buffers.count = count
        return Outgoing(buffer, begin, count, piece_bytes, host_bytes(buffer.data))

    def _stream(self, pair: Pair, outgoing: Outgoing, still_wanted: Callable[[], bool], pacer: Pacer | None) -> bool:
        """Send every piece as soon as it is sealed and allowed; false when the version is given up on the way."""
        while outgoing.offset < outgoing.data_bytes:
            if outgoing.buffer.id != outgoing.version or not still_wanted():
                return False
            size = outgoing.sendable()
            if size and pacer is not None:
                size = pacer.allowance(size, outgoing.underway, self._machine)
            if size:
                self._send_piece(pair, outgoing, size)
                if pacer is not None:
                    pacer.page.note_sent(outgoing.offset)
                    pacer.page.note_in_flight(outgoing.in_flight)
                self._take_credits(outgoing, 0.0)
            else:
                self._wait_for_change(outgoing, pacer)
        return outgoing.buffer.id == outgoing.version

    def _wait_for_change(self, outgoing: Outgoing, pacer: Pacer | None) -> None:
        """Until it is worth asking again. This runs beside the training thread, so a look must cost next to nothing."""
        for _ in range(_SHORT_LOOKS):
            pause_s = _POLL_S if pacer is None else pacer.pause_s(outgoing.underway, self._machine)
            if self._take_credits(outgoing, pause_s) or pacer is None or not pacer.is_shut():
                return

    def _send_piece(self, pair: Pair, outgoing: Outgoing, size: int) -> None:
        buffer, begin, end = outgoing.buffer, outgoing.offset, outgoing.offset + size
        pair.send(Frame(Kind.CHUNK, buffer.owner, outgoing.version, begin, size), checksum_table(buffer, begin, end))
        work = self._sub_buffers.send(pair, outgoing.pieces, outgoing.source[begin:end])
        if not outgoing.uncredited:
            outgoing.heard = time.monotonic()
        outgoing.uncredited.append((size, work))
        outgoing.offset, outgoing.pieces = end, outgoing.pieces + 1

    def _take_credits(self, outgoing: Outgoing, patience_s: float) -> bool:
        """See what the holder has copied out; waits a little for it where there is nothing else to do."""
        heard = False
        while not self._answers.empty() or (patience_s and not heard):
            try:
                credit = self._answer(outgoing.begin, patience_s, Kind.WANT)
            except TimeoutError:
                break
            outgoing.heard, heard, patience_s = time.monotonic(), True, 0.0
            while outgoing.uncredited and outgoing.pieces - len(outgoing.uncredited) < credit.size:
                self._sub_buffers.sent(outgoing.uncredited.popleft()[1])
        if outgoing.uncredited and time.monotonic() - outgoing.heard > ANSWER_TIMEOUT_S:
            raise TimeoutError(f"machine {self._machine} took no piece for {ANSWER_TIMEOUT_S:.0f} s")
        return heard

    def _give_up(self, pair: Pair, begin: Frame) -> None:
        """Agree with the holder on where the next version begins."""
        pair.send(Frame(Kind.ABORT, begin.owner, begin.id))
        while True:
            with contextlib.suppress(RefusedError):  # said before it heard
                if self._answer(begin, ANSWER_TIMEOUT_S, Kind.WANT, Kind.ABORT).kind is Kind.ABORT:
                    return

    # -- the connection ----------------------------------------------------------------------------------------------

    def connect(self) -> Pair:
        """Meet the holder's worker, if that was not done yet.

        Raises:
            OSError: It does not come.
        """
        if self._pair is None and not self._aborted:
            self._answers = queue.SimpleQueue()
            self._pair = pair = self._open_pair()
            self._reader = threading.Thread(
                target=_read_answers, args=(pair, self._answers), name=f"p2p-answers-{self._machine}", daemon=True
            )
            self._reader.start()
        if self._aborted or self._pair is None:
            self._drop(self._pair)
            raise ConnectionError(f"the connection to machine {self._machine} was given up")
        return self._pair

    def _drop(self, pair: Pair | None) -> None:
        self._pair = None
        if pair is not None:
            pair.break_off()

    def _answer(self, begin: Frame, patience_s: float, *expected: Kind) -> Frame:
        try:
            answer = self._answers.get(block=patience_s > 0, timeout=patience_s or None)
        except queue.Empty:
            raise TimeoutError(f"machine {self._machine} did not answer within {patience_s:.0f} s") from None
        if isinstance(answer, Exception):
            raise ConnectionError(f"the connection to machine {self._machine} failed: {answer}") from answer
        frame, payload = answer
        if (frame.owner, frame.id) != (begin.owner, begin.id):
            raise ProtocolError(f"machine {self._machine} speaks of another shard than it was asked about")
        if frame.kind is Kind.REFUSE:
            raise RefusedError(f"machine {self._machine} refused: {payload.decode(errors='replace')}")
        if frame.kind not in expected:
            raise ProtocolError(f"machine {self._machine} answered {frame.kind.name}, expected {expected}")
        return frame


def _read_answers(pair: Pair, answers: queue.SimpleQueue[tuple[Frame, bytes] | Exception]) -> None:
    try:
        while True:
            frame, payload = pair.receive()
            answers.put((frame, payload))
            if frame == GOODBYE:
                return
    except Exception as error:  # whatever it is, the sender must hear of it
        answers.put(error)
