"""The p sub-buffers that a shard's pieces pass through on the device (GEMINI, SOSP '23, section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_gemini.dataplane.pinned_memory import PinnedMemory
from lightning_gemini.dataplane.transport import pair as pairs
from lightning_gemini.dataplane.transport.pair import Pair


@dataclass(frozen=True, slots=True)
class Arrival:
    """A piece that is being received.

    Attributes:
        tensor: The part of the sub-buffer that it comes into.
        work: Its receipt.
        event: Behind its receipt; on CUDA.
    """

    tensor: torch.Tensor
    work: dist.Work
    event: torch.cuda.Event | None = None


class SubBuffers:
    """Pieces take turns: piece n uses sub-buffer n mod p, so p of them are under way at once.

    On the CPU the sender needs none: gloo reads the slab.

    Attributes:
        count: The number of sub-buffers, p.
        peak_bytes: The most memory that they took.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.count, self.peak_bytes = 1, 0
        self._buffers: list[torch.Tensor] = []

    def reserve(self, count: int, size_bytes: int) -> None:
        """Have ``count`` of at least ``size_bytes`` each; 0: as large as the pieces turn out to be."""
        self.count = count
        del self._buffers[count:]
        for number in range(count):
            self._take(number, size_bytes)

    def _take(self, number: int, size_bytes: int) -> torch.Tensor:
        """A sub-buffer's first bytes; a larger one replaces it where it is too small."""
        place = number % self.count
        while len(self._buffers) <= place:
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if self._buffers[place].numel() < size_bytes:
            self._buffers[place] = torch.empty(0, dtype=torch.uint8, device=self.device)  # first let go of the old one
            self._buffers[place] = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
            self.peak_bytes = max(self.peak_bytes, sum(buffer.numel() for buffer in self._buffers))
        return self._buffers[place][:size_bytes]

    def send(self, pair: Pair, number: int, source: torch.Tensor) -> dist.Work:
        """Start sending piece ``number`` from host memory, which must stay as it is until the peer has it."""
        return pair.send_bytes(source)

    def sent(self, work: dist.Work) -> None:
        """The peer has copied a piece out: let go of it."""
        pairs.wait(work)

    def receive(self, pair: Pair, number: int, size_bytes: int) -> Arrival:
        """Start receiving piece ``number``; what its sub-buffer held must have been copied out."""
        tensor = self._take(number, size_bytes)
        return Arrival(tensor, pair.receive_bytes(tensor))

    def copy_out(self, arrival: Arrival, target: torch.Tensor) -> None:
        """Wait for a piece and copy it to host memory; returns when it is there."""
        pairs.wait(arrival.work)
        target.copy_(arrival.tensor)

    def discard(self, arrival: Arrival) -> None:
        """Wait for a piece that nobody wants."""
        pairs.wait(arrival.work)

    def close(self) -> None:
        """Let go of the host memory that pieces were copied to; idempotent."""


class DeviceSubBuffers(SubBuffers):
    """The same in device memory, at both ends: host → device → peer's device → peer's host.

    CUDA only: run with two workers on one GPU, not yet with a GPU each. The sender's host-to-device copies run opposite
    to the device-to-host copies that it makes for its own snapshot and for its peers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        # Of high priority only because torch lends streams of the other kind to NCCL's callbacks as well.
        self._network, self._copies = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._pinned = PinnedMemory(device)

    def _take(self, number: int, size_bytes: int) -> torch.Tensor:
        # On this stream, whose own memory no work of training's is still reading.
        with torch.cuda.device(self.device), torch.cuda.stream(self._network):
            return super()._take(number, size_bytes)

    def send(self, pair: Pair, number: int, source: torch.Tensor) -> dist.Work:
        """See :class:`SubBuffers`. ``source`` was pinned by the snapshot."""
        tensor = self._take(number, source.numel())  # the peer has what it held: it said so
        with torch.cuda.device(self.device), torch.cuda.stream(self._network):
            tensor.copy_(source, non_blocking=True)
            return pair.send_bytes(tensor)

    def sent(self, work: dist.Work) -> None:
        """See :class:`SubBuffers`. Waiting would make this thread's stream wait: training's."""

    def receive(self, pair: Pair, number: int, size_bytes: int) -> Arrival:
        """See :class:`SubBuffers`."""
        tensor = self._take(number, size_bytes)
        with torch.cuda.device(self.device), torch.cuda.stream(self._network):
            work = pair.receive_bytes(tensor)
            work.wait()  # the stream does, not this thread: it would with a timeout
            event = torch.cuda.Event()
            event.record(self._network)
        return Arrival(tensor, work, event)

    def copy_out(self, arrival: Arrival, target: torch.Tensor) -> None:
        """See :class:`SubBuffers`."""
        assert arrival.event is not None
        whole = target.untyped_storage()
        self._pinned.pin(torch.empty(0, dtype=torch.uint8).set_(whole))  # the peer's slab, once
        with torch.cuda.device(self.device), torch.cuda.stream(self._copies):
            self._copies.wait_event(arrival.event)
            target.copy_(arrival.tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._copies)
        done.synchronize()

    def discard(self, arrival: Arrival) -> None:
        """See :class:`SubBuffers`."""
        assert arrival.event is not None
        arrival.event.synchronize()

    def close(self) -> None:
        """See :class:`SubBuffers`."""
        self._pinned.close(self._copies)


def make_sub_buffers(device: torch.device) -> SubBuffers:
    """The kind that suits the device."""
    return DeviceSubBuffers(device) if device.type == "cuda" else SubBuffers()


def host_bytes(memory: memoryview) -> torch.Tensor:
    """Host memory as a tensor of bytes; no copy."""
    return torch.frombuffer(memory, dtype=torch.uint8) if memory else torch.empty(0, dtype=torch.uint8)
