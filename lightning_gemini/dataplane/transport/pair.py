"""Two workers on process groups of their own: frames both ways on gloo, bytes too, or on NCCL where there is CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch._C._distributed_c10d import PrefixStore, Store

from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.wire import FRAME_BYTES, Frame
from lightning_gemini.errors import ProtocolError

SOURCE, HOLDER = 0, 1
"""Ranks in the pair: whose shard it is, and who keeps a copy."""
_FRAMES, _PAYLOADS, _BYTES, _NOTHING = 1, 2, 3, 4  # tags
_MESSAGE_BYTES = 512
_INLINE_BYTES = _MESSAGE_BYTES - FRAME_BYTES
_AHEAD, _MOST_POSTED = 4, 32
_POLL_S = 0.02
_FOREVER = datetime.timedelta(days=365)
_AT_ONCE = datetime.timedelta(milliseconds=1)


class Pair:
    """One end of the connection between an owner's worker and a holder's.

    One thread sends, another receives; :meth:`break_off` is for any. Nobody but these two takes part, so a pair that
    fails disturbs no collective of training.

    Args:
        frames: The gloo group.
        data: The group that carries the shard; the same one on the CPU.
        rank: ``SOURCE`` or ``HOLDER``.
    """

    def __init__(self, frames: Any, data: Any, rank: int) -> None:  # torch has no types for them
        self._frames, self._data, self._other = frames, data, 1 - rank
        self._posted: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._awaited: deque[tuple[bytearray, dist.Work]] = deque()
        self._breaking = threading.Lock()

    @classmethod
    def open(
        cls,
        store: Store,
        rank: int,
        device: torch.device,
        *,
        timeout_s: float,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Pair:
        """Meet the other end.

        Args:
            store: Where both meet; nobody else uses these keys.
            rank: ``SOURCE`` or ``HOLDER``.
            device: Where the bytes pass through.
            timeout_s: How long to wait for the other end.
            wanted: Asked while waiting; false gives up.

        Raises:
            OSError: It did not come.
        """
        timeout = datetime.timedelta(seconds=timeout_s)
        with _connection_errors():
            _meet(store, rank, timeout_s, wanted)
            frames = dist.ProcessGroupGloo(PrefixStore("frames", store), rank, 2, timeout)
            if device.type != "cuda":
                return cls(frames, frames, rank)
            return cls(frames, _nccl(PrefixStore("bytes", store), rank), rank)

    def send(self, frame: Frame, payload: bytes = b"") -> None:
        """Send a frame and its payload; does not wait for the other end.

        Raises:
            ConnectionError: It is gone.
        """
        if payload:
            frame = dataclasses.replace(frame, length=len(payload), checksum=xxhash.xxh3_64_intdigest(payload))
        self._post((frame.pack() + payload[:_INLINE_BYTES]).ljust(_MESSAGE_BYTES, b"\0"), _FRAMES)
        if len(payload) > _INLINE_BYTES:
            self._post(payload[_INLINE_BYTES:], _PAYLOADS)

    def _post(self, message: bytes, tag: int) -> None:
        memory = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        with _connection_errors():
            self._posted.append((memory, self._frames.send([memory], self._other, tag)))
            if len(self._posted) > _MOST_POSTED:  # gloo forgets what nobody keeps
                self._posted.popleft()[1].wait(_FOREVER)

    def receive(self) -> tuple[Frame, bytes]:
        """Wait for a frame; its payload comes with it.

        Raises:
            ProtocolError: It is damaged, or its length beyond its cap.
            ConnectionError: The other end is gone.
        """
        while len(self._awaited) < _AHEAD:  # gloo sends at once what is awaited already
            self._awaited.append(self._await(_MESSAGE_BYTES, _FRAMES))
        message = _finish(*self._awaited.popleft())
        frame = wire.unpack(message[:FRAME_BYTES])
        payload = message[FRAME_BYTES : FRAME_BYTES + min(frame.length, _INLINE_BYTES)]
        if frame.length > _INLINE_BYTES:
            payload += _finish(*self._await(frame.length - _INLINE_BYTES, _PAYLOADS))
        if payload and xxhash.xxh3_64_intdigest(payload) != frame.checksum:
            raise ProtocolError(f"the payload of a {frame.kind.name} frame was damaged on the way")
        return frame, payload

    def _await(self, size: int, tag: int) -> tuple[bytearray, dist.Work]:
        memory = bytearray(size)
        with _connection_errors():
            return memory, self._frames.recv([torch.frombuffer(memory, dtype=torch.uint8)], self._other, tag)

    def send_bytes(self, source: torch.Tensor) -> dist.Work:
        """Start sending bytes from the pair's device; they must stay as they are until the other end has them."""
        with _connection_errors():
            work: dist.Work = self._data.send([source], self._other, _BYTES)
            return work

    def receive_bytes(self, target: torch.Tensor) -> dist.Work:
        """Start receiving bytes into memory on the pair's device."""
        with _connection_errors():
            work: dist.Work = self._data.recv([target], self._other, _BYTES)
            return work

    def break_off(self) -> None:
        """Make every call in progress fail, at both ends; idempotent, any thread."""
        if not self._breaking.acquire(blocking=False):
            return
        # Gloo has no way to hang up, but for this: a wait that times out closes the group's connections.
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.uint8)
            self._frames.recv([nothing], self._other, _NOTHING).wait(_AT_ONCE)
        if self._data is not self._frames:
            self._data.abort()


def _finish(memory: bytearray, work: dist.Work) -> bytes:
    wait(work)
    return bytes(memory)


def wait(work: dist.Work) -> None:
    """Wait until gloo has sent or received something.

    Raises:
        ConnectionError: The other end is gone.
    """
    with _connection_errors():
        work.wait(_FOREVER)


def _meet(store: Store, rank: int, timeout_s: float, wanted: Callable[[], bool]) -> None:
    """Group constructors wait for the other end, and cannot be stopped: so be sure that it is there."""
    store.set(f"here{rank}", "1")
    deadline = time.monotonic() + timeout_s
    while not store.check([f"here{1 - rank}"]):
        if not wanted():
            raise ConnectionAbortedError("not wanted any more")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other worker did not come within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _nccl(store: Store, rank: int) -> Any:
    # CUDA only: run with two workers on one GPU, not yet with a GPU each.
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _FOREVER  # it would end the process; a peer that is gone is noticed on gloo
    return dist.ProcessGroupNCCL(store, rank, 2, options)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Torch says everything with a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        reason = first_line.rpartition(".cc")[2].partition("] ")[2] or first_line  # without the place in torch's source
        raise ConnectionError(f"{reason.partition('. ')[0]}") from error
