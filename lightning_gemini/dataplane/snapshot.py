"""Copies a rank's state into its slab off the training thread, chunk by chunk, while training goes on."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import torch

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pinned_memory import PinnedMemory
from lightning_gemini.dataplane.shard import Draft, Layout, TensorSlot
from lightning_gemini.dataplane.slab import Buffer

log = logging.getLogger(__name__)

_GATE_S = 0.004
_PIECE_BYTES = 4 << 20
_DEVICE_PIECE_BYTES = 128 << 20  # 2.4 ms over PCIe 5; each takes the interpreter's lock away from training some times
_PIECES_UNDER_WAY = 2  # DeepSpeed waits for the whole device now and then, and so for what is queued
_HASHING_THREADS = 4  # one takes checksums at 8 GB/s, and a device writes at 50


class Snapshot:
    """One version on its way into a buffer.

    Attributes:
        id: The version.
        buffer: Where it goes; ``None`` until its first byte is written.
        bytes: Size of the shard; 0 until that is known.
        copy_s: Seconds from the beginning until the buffer was complete.
        stall_s: Seconds that the training thread lost; kept by the publisher.
        wait_s: Seconds that it was waited for at the other holders; kept by the publisher.
        hurried: Whether training waits for the copy, or soon will.
        read: Whether training may change the state again.
        done: Whether the buffer is complete, or the copy has failed.
    """

    def __init__(self, version: VersionId, changed: threading.Condition) -> None:
        self.id = version
        self.buffer: Buffer | None = None
        self.bytes = 0
        self.began = time.monotonic()
        self.copy_s = 0.0
        self.stall_s = self.wait_s = 0.0
        self.error: Exception | None = None
        self.device_ready: torch.cuda.Event | None = None
        self.device_done: torch.cuda.Event | None = None
        self.hurried = self.read = self.done = False
        self._changed = changed

    def hurry(self) -> None:
        """Training is about to wait for the copy: it goes on at once, whatever the gate says."""
        with self._changed:
            self.hurried = True
            self._changed.notify_all()

    def wait_until_read(self) -> None:
        """Block until training may change the state again; on CUDA until copies are queued, and the device waits."""
        if not self.read:
            self.hurry()
            with self._changed:
                self._changed.wait_for(lambda: self.read)
        if self.device_done is not None:
            torch.cuda.current_stream().wait_event(self.device_done)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the buffer is complete or the copy failed."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout_s)

    def wait_for_hurry(self, timeout_s: float) -> None:
        """Block until training waits for the copy, but not for long."""
        with self._changed:
            self._changed.wait_for(lambda: self.hurried, timeout_s)

    def note_read(self) -> None:
        """Nobody looks at the live tensors any more, or the device knows what to wait for."""
        with self._changed:
            self.read = True
            self._changed.notify_all()

    def note_done(self) -> None:
        """The buffer is complete, or the copy has failed."""
        with self._changed:
            self.read = self.done = True
            self._changed.notify_all()

    @property
    def replica_complete_s(self) -> float | None:
        """Seconds from the beginning until every other holder was complete; ``None``: not yet, or not any more."""
        if self.buffer is None or self.buffer.acked != self.id:
            return None
        return self.buffer.acked_at_ns / 1e9 - self.began


class Snapshotter:
    """A thread that copies one snapshot at a time.

    Args:
        notify: Called when a version was begun and when it is complete, on this thread.
        device: The training device; a CUDA device copies on a stream of its own, and threads take checksums meanwhile.
        gate: Asked on this thread before each piece whether it may be copied now; while it says no the copy waits, but
            never longer than until training does. ``None`` copies at once.
        sharers: Ranks that share the machine's processors.
    """

    def __init__(
        self,
        notify: Callable[[], None],
        device: torch.device,
        gate: Callable[[], bool] | None = None,
        sharers: int = 1,
    ) -> None:
        self._notify, self._gate, self._device = notify, gate, device
        self._stream: torch.cuda.Stream | None = None
        self._pinned: PinnedMemory | None = None
        self._hashing: Executor | None = None
        if device.type == "cuda":
            # Of high priority only because torch lends streams of the other kind to NCCL's callbacks as well.
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._pinned = PinnedMemory(device)
            self._hashing = ThreadPoolExecutor(_hashing_threads(sharers), "gemini-checksum")
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._deferred: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._warned = False

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="gemini-snapshot", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was begun and end the thread; idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout=60.0)
        if self._hashing is not None:
            self._hashing.shutdown()
        if self._pinned is not None and self._stream is not None:
            self._pinned.close(self._stream)

    def prepare(self, buffers: Iterable[Buffer]) -> None:
        """Make copies into these buffers fast from the first one on; takes seconds where a device is to write them."""
        if self._pinned is not None:
            for buffer in buffers:
                self._pinned.pin(torch.frombuffer(buffer.data, dtype=torch.uint8))

    def begin(self, version: VersionId, draft: Draft, choose: Callable[[], Buffer]) -> Snapshot:
        """Start copying; returns at once.

        Args:
            version: The version.
            draft: Its state; what it refers to must stay unchanged until ``wait_until_read``.
            choose: Called on this thread, once it is through with the version before: where the copy goes.
        """
        snapshot = Snapshot(version, self._changed)
        if self._stream is not None:
            snapshot.device_ready = torch.cuda.Event()
            snapshot.device_ready.record()  # behind the step, on training's stream
        self._queue.put(partial(self._take, snapshot, draft, choose))
        return snapshot

    def run(self, action: Callable[[], None]) -> None:
        """Do something on this thread, behind the copy that was begun last; returns at once. It must not raise."""
        self._queue.put(action)

    def defer(self, action: Callable[[], None]) -> None:
        """Do something small later on this thread: after the next copy, so as not to be in training's way now."""
        self._deferred.append(action)

    def _run(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self._device)  # it is each thread's own
        while (action := self._queue.get()) is not None:
            action()
        self._do_deferred()

    def _do_deferred(self) -> None:
        while self._deferred:
            self._do(self._deferred.popleft())

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # training would wait for ever for a thread that has ended
            log.debug("a deferred action failed: %s", error, exc_info=True)
            if not self._warned:
                self._warned = True
                log.warning("could not record what a version cost (%s); training and checkpoints go on", error)

    def _take(self, snapshot: Snapshot, draft: Draft, choose: Callable[[], Buffer]) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                self._copy(snapshot, draft, choose())
            self._notify()
        except Exception as error:  # a failed checkpoint must not kill training: the publisher reports it
            snapshot.error = error
            if snapshot.buffer is not None:
                snapshot.buffer.drop()
        snapshot.copy_s = time.monotonic() - snapshot.began
        snapshot.note_done()
        self._do_deferred()

    def _copy(self, snapshot: Snapshot, draft: Draft, buffer: Buffer) -> None:
        if snapshot.device_ready is not None:
            torch.cuda.current_stream().wait_event(snapshot.device_ready)
        layout = draft.finish()
        buffer.begin(snapshot.id, layout.total_bytes)
        snapshot.buffer, snapshot.bytes = buffer, layout.total_bytes
        self._notify()
        head = layout.head()
        buffer.data[: len(head)] = head
        sealing = _Sealing(buffer, self._hashing)
        self.prepare([buffer])
        if snapshot.device_ready is not None:
            # Nothing is queued that the device will do later: whoever waits for the device would wait for it, too.
            _wait_unless_hurried(snapshot, snapshot.device_ready.query)
        self._copy_tensors(snapshot, layout, buffer, sealing)
        if self._stream is not None:
            snapshot.device_done = torch.cuda.Event()
            snapshot.device_done.record()
        snapshot.note_read()
        sealing.finish()
        buffer.data[layout.blob_offset : layout.total_bytes] = layout.blob
        buffer.seal(layout.total_bytes)
        buffer.complete()

    def _copy_tensors(self, snapshot: Snapshot, layout: Layout, buffer: Buffer, sealing: _Sealing) -> None:
        target = torch.frombuffer(buffer.data, dtype=torch.uint8)
        for slot in layout.slots:
            piece_bytes = min(buffer.chunk_bytes, _PIECE_BYTES)
            if slot.tensor.is_cuda:
                # Clones of volatile state were made on the training stream and must outlive the copy.
                slot.tensor.record_stream(torch.cuda.current_stream())
                piece_bytes = _DEVICE_PIECE_BYTES
            for source, begin, end in _pieces(slot, piece_bytes):
                if self._gate is not None:
                    _wait_unless_hurried(snapshot, self._gate)
                sealing.written(end, _copy_piece(target[begin:end], source))
                if not snapshot.hurried:  # training waits neither for checksums nor for room
                    sealing.advance(_PIECES_UNDER_WAY - 1)


class _Sealing:
    """Seals chunks in order, as soon as all their bytes are there.

    Args:
        buffer: It was begun.
        pool: Threads that take checksums; ``None``: the calling one does.
    """

    def __init__(self, buffer: Buffer, pool: Executor | None) -> None:
        self._buffer, self._pool, self._chunk_bytes = buffer, pool, buffer.chunk_bytes
        self._chunks = 0
        self._written: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self._hashed: deque[Future[list[int]]] = deque()

    def written(self, end: int, event: torch.cuda.Event | None) -> None:
        """All bytes before ``end`` are there, or are once ``event`` has happened."""
        self._written.append((end, event))

    def advance(self, most_under_way: int) -> None:
        """Seal what is there by now; wait until no more pieces than so many are not."""
        while self._written:
            event = self._written[0][1]
            if event is not None and not event.query():
                if len(self._written) <= most_under_way:
                    break
                event.synchronize()
            self._hash(self._written.popleft()[0])
            self._seal_what_is_hashed()
        self._seal_what_is_hashed()

    def _seal_what_is_hashed(self) -> None:
        while self._hashed and self._hashed[0].done():
            self._seal(self._hashed.popleft().result())

    def finish(self) -> None:
        """Wait for all of them."""
        self.advance(0)
        while self._hashed:
            self._seal(self._hashed.popleft().result())

    def _hash(self, end: int) -> None:
        chunks = range(self._chunks, end // self._chunk_bytes)
        if not chunks:
            return
        self._chunks = chunks.stop
        if self._pool is None:
            self._buffer.seal(end)
        else:
            self._hashed.append(self._pool.submit(lambda: [*map(self._buffer.hashed, chunks)]))

    def _seal(self, checksums: list[int]) -> None:
        for checksum in checksums:
            self._buffer.seal_chunk(self._buffer.chunks_ready, checksum)


def _wait_unless_hurried(snapshot: Snapshot, condition: Callable[[], bool]) -> None:
    while not snapshot.hurried and not condition():
        snapshot.wait_for_hurry(_GATE_S)


def _hashing_threads(sharers: int) -> int:
    return max(1, min(_HASHING_THREADS, len(os.sched_getaffinity(0)) // sharers // 2))


def _copy_piece(target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
    """Copy a piece; from a device only queue that, and return the event behind it."""
    if source.is_cuda:
        target.view(source.dtype).copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        event.record()
        return event
    if source.is_cpu and not (source.is_conj() or source.is_neg()):
        # In a tenth of the time that torch takes for a small one, and without the GIL.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())
    else:
        target.view(source.dtype).copy_(source)
    return None


def _pieces(slot: TensorSlot, piece_bytes: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Cut a tensor into runs of at most ``piece_bytes``, each with its place in the shard."""
    flat = slot.tensor.reshape(-1)
    per_piece = max(1, piece_bytes // flat.element_size())
    for start in range(0, flat.numel(), per_piece):
        piece = flat[start : start + per_piece]
        begin = slot.offset + start * flat.element_size()
        yield piece, begin, begin + piece.numel() * piece.element_size()
