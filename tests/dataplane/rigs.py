"""A holder and the way to it, for every transport: what the contract needs besides the transport itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from lightning_gemini.dataplane.slab import Buffer
from lightning_gemini.dataplane.transport import Peer, ReplicaTransport, TcpTransport
from lightning_gemini.dataplane.transport.p2p import P2pTransport
from lightning_gemini.dataplane.transport.p2p_receiver import P2pReceiver
from lightning_gemini.dataplane.transport.pair import HOLDER, SOURCE, Pair
from lightning_gemini.dataplane.transport.reception import Reception
from lightning_gemini.dataplane.transport.sub_buffers import SubBuffers
from lightning_gemini.dataplane.wire import Frame
from tests.dataplane.machines import JOB, SECRET, Machine

CPU = torch.device("cpu")
SUB_BUFFERS, BUFFER_BYTES = 3, 3 * 300_001  # pieces that neither divide the shard nor its chunks


class Rig(Protocol):
    """Machine 0 sends to machine 1."""

    holder: Machine

    def connect(self, generation: int = 1) -> ReplicaTransport:
        """A way to the holder; not used yet."""

    def connect_to_nobody(self) -> ReplicaTransport:
        """A way to a machine that is not there."""

    def again(self, transport: ReplicaTransport) -> ReplicaTransport:
        """What the sender uses after a failure."""

    def disconnect(self) -> None:
        """Break every connection."""

    def sender(self) -> list[str]:
        """Arguments of :mod:`tests.dataplane.doomed_sender` that lead to the holder."""

    def close(self) -> None:
        """End everything."""


class TcpRig:
    def __init__(self, directory: Path) -> None:
        self.holder = Machine(1)

    def connect(self, generation: int = 1) -> TcpTransport:
        return TcpTransport(self.holder.peer, JOB, SECRET, 0, generation)

    def connect_to_nobody(self) -> TcpTransport:
        gone = Machine(1)
        gone.close()
        return TcpTransport(gone.peer, JOB, SECRET, 0, 1)

    def again(self, transport: ReplicaTransport) -> ReplicaTransport:
        return transport

    def disconnect(self) -> None:
        self.holder.server.disconnect()

    def sender(self) -> list[str]:
        host, port = self.holder.server.address
        return ["tcp", f"{host}:{port}"]

    def close(self) -> None:
        self.holder.close()


class StoreDesk:
    """The holder's store without an agent in front of it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._reception: Reception | None = None

    def begin(self, begin: Frame) -> Buffer | None:
        self._reception = Reception(self._machine.store, begin)
        if self._reception.buffer is None:
            self.end()
        return self._reception.buffer

    def end(self) -> None:
        assert self._reception is not None
        self._reception.end()


class P2pRig:
    """Both workers in this process, each with its own process group; a pair has one sender."""

    def __init__(self, directory: Path, sub_buffers: int = SUB_BUFFERS, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.holder = Machine(1)
        self.receivers: list[P2pReceiver] = []
        self._directory, self._sub_buffers, self._buffer_bytes = directory, sub_buffers, buffer_bytes
        self._threads: list[threading.Thread] = []
        self._made: list[P2pTransport] = []

    def connect(self, generation: int = 1) -> P2pTransport:
        return self._transport(self._receive(), generation)

    def connect_to_nobody(self) -> P2pTransport:
        return self._transport(self._directory / "nobody", 1)

    def _transport(self, path: Path, generation: int) -> P2pTransport:
        made = p2p_transport(path, generation, self._sub_buffers, self._buffer_bytes)
        self._made.append(made)
        return made

    def again(self, transport: ReplicaTransport) -> ReplicaTransport:
        assert isinstance(transport, P2pTransport)
        return transport if transport.connected else self.connect()

    def disconnect(self) -> None:
        for receiver in self.receivers:
            receiver.close()

    def sender(self) -> list[str]:
        return ["p2p", str(self._receive())]

    def _receive(self) -> Path:
        path = self._directory / f"pair{len(self.receivers)}"
        receiver = P2pReceiver(lambda: open_pair(path, HOLDER), StoreDesk(self.holder), SubBuffers())
        self.receivers.append(receiver)
        thread = threading.Thread(target=_run, args=(receiver,), name=f"receiver {path.name}")
        self._threads.append(thread)
        thread.start()
        return path

    def close(self) -> None:
        for transport in self._made:
            transport.close()
        self.disconnect()
        for thread in self._threads:
            thread.join(20.0)
            assert not thread.is_alive()
        self.holder.close()


def _run(receiver: P2pReceiver) -> None:
    with contextlib.suppress(OSError):  # the sender died, or broke off: the test knows
        receiver.run()


def open_pair(path: Path, rank: int, timeout_s: float = 20.0) -> Pair:
    return Pair.open(dist.FileStore(str(path), 2), rank, CPU, timeout_s=timeout_s)


def p2p_transport(
    path: Path, generation: int, sub_buffers: int = SUB_BUFFERS, buffer_bytes: int = BUFFER_BYTES
) -> P2pTransport:
    timeout_s = 0.5 if path.name == "nobody" else 20.0
    return P2pTransport(
        lambda: open_pair(path, SOURCE, timeout_s),
        1,
        generation,
        SubBuffers(),
        count=sub_buffers,
        buffer_bytes=buffer_bytes,
    )


def transport_to(kind: str, way: str) -> ReplicaTransport:
    """What leads where :meth:`Rig.sender` says."""
    if kind == "p2p":
        return p2p_transport(Path(way), 1)
    host, _, port = way.rpartition(":")
    return TcpTransport(Peer(1, (host, int(port))), JOB, SECRET, 0, 1)


RIGS: dict[str, Callable[[Path], Rig]] = {"tcp": TcpRig, "p2p": P2pRig}
