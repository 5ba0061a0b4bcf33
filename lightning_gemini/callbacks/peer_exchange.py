"""The worker's side of transport ``p2p``: sends its shard to its holders, and takes in those it holds, beside training.

Until all holders were met, the agent replicates over TCP as it always does; from then on its replicator keeps away from
this rank (the page is held). When a connection fails, which takes no more than a peer's death, the agent takes over
again until the workers start anew.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

from lightning_gemini.callbacks.peer_memory import PeerMemory
from lightning_gemini.callbacks.replica_desk import AgentDesk
from lightning_gemini.config import P2P_BUFFER_BYTES, CheckpointConfig
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pacer import Pacer
from lightning_gemini.dataplane.slab import Buffer, BufferState, Slab
from lightning_gemini.dataplane.transport.p2p import P2pTransport, RefusedError
from lightning_gemini.dataplane.transport.p2p_receiver import P2pReceiver
from lightning_gemini.dataplane.transport.pair import HOLDER, SOURCE, Pair
from lightning_gemini.dataplane.transport.sub_buffers import make_sub_buffers
from lightning_gemini.errors import IntegrityError

log = logging.getLogger(__name__)

_MEETING_S = 30.0
_RETRY_S = 0.2
_IDLE_S = 0.5
_PATIENCE_S = 10.0  # holders that are just starting refuse for a moment
_CLOSE_S, _HURRY_S = 5.0, 0.2


class PeerExchange:
    """Threads of one rank: one a holder that sends, one a source that receives.

    Args:
        memory: The rank's agent, and who holds what.
        slab: The rank's own shards.
        device: What the bytes pass through.
        config: For the sub-buffers.
        fit: Number of the fit in this process: pairs of different fits must not meet.
        store: Where workers meet; ``None``: the store of the job's process group.
    """

    def __init__(
        self,
        memory: PeerMemory,
        slab: Slab,
        device: torch.device,
        config: CheckpointConfig,
        fit: int,
        store: Store | None = None,
    ) -> None:
        self._store = store
        self._memory, self._slab, self._device, self._config, self._fit = memory, slab, device, config, fit
        self._pacer = Pacer(slab.pace)
        self._wake = threading.Condition()
        self._news = 0
        self._open = False
        self._met: set[int] = set()
        self._fallen_back = False
        self._sending: dict[int, P2pTransport] = {}
        self._receiving: dict[int, P2pReceiver] = {}
        self._threads: list[threading.Thread] = []
        self._checked: VersionId | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to meet the peers; does not wait for them."""
        identity, placement = self._memory.identity, self._memory.placement
        self._open = True
        for machine in placement.holders(identity.machine)[1:]:
            self._sending[machine] = self._transport(machine)
            self._spawn(f"p2p-to-{machine}", self._send, machine)
        for machine in range(identity.machines):
            if machine != identity.machine and identity.machine in placement.holders(machine):
                self._spawn(f"p2p-from-{machine}", self._receive, machine)

    def close(self, *, orderly: bool = True) -> None:
        """End the threads; idempotent, and bounded in time where a peer is silent.

        Args:
            orderly: Whether all ranks close now, so that it is worth waiting for their goodbyes. One that failed
                must not keep the others from starting anew.
        """
        if not self._open:
            return
        with self._wake:
            self._open = False
            self._wake.notify_all()
        self._slab.pace.hold(False)
        if not self._join(_CLOSE_S if orderly else _HURRY_S):
            for transport in self._sending.values():
                transport.abort()
            for receiver in list(self._receiving.values()):
                receiver.close()
            self._join(_CLOSE_S)

    def _spawn(self, name: str, action: Callable[[int], None], machine: int) -> None:
        thread = threading.Thread(target=action, args=(machine,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _join(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def working(self) -> bool:
        """Whether replicas travel this way, rather than over TCP: all holders were met, and no connection failed."""
        return self._wanted_at_all and self._met == set(self._sending)

    @property
    def _wanted_at_all(self) -> bool:
        return self._open and not self._fallen_back

    @property
    def peak_buffer_bytes(self) -> int:
        """The most memory that sub-buffers took for peers' shards on this rank's device."""
        return sum(receiver.sub_buffers.peak_bytes for receiver in list(self._receiving.values()))

    def notify(self) -> None:
        """A version was begun, or completed."""
        with self._wake:
            self._news += 1
            self._wake.notify_all()

    # -- pairs -------------------------------------------------------------------------------------------------------

    def _transport(self, machine: int) -> P2pTransport:
        buffer_bytes = self._config.buffer_bytes or P2P_BUFFER_BYTES
        return P2pTransport(
            lambda: self._pair(self._memory.identity.machine, machine),
            machine,
            self._memory.generation,
            make_sub_buffers(self._device),
            count=self._config.sub_buffers,
            buffer_bytes=buffer_bytes,
        )

    def _pair(self, source: int, holder: int) -> Pair:
        """Meets the worker with this local rank on the other machine."""
        mine = source == self._memory.identity.machine
        job: Any = self._store or distributed_c10d._get_default_store()
        local = self._memory.identity.local_rank
        name = f"gemini/p2p/{self._memory.generation}/{self._fit}/{local}/{source}-{holder}"
        return Pair.open(
            PrefixStore(name, job.clone()),  # a connection of its own: who waits on it holds up nobody
            SOURCE if mine else HOLDER,
            self._device,
            timeout_s=_MEETING_S,
            wanted=lambda: self._wanted_at_all if mine else self._open,
        )

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive(self, machine: int) -> None:
        try:
            with contextlib.ExitStack() as stack:
                desk = AgentDesk(self._memory.client.another())
                stack.callback(desk.close)
                sub_buffers = make_sub_buffers(self._device)
                stack.callback(sub_buffers.close)
                receiver = P2pReceiver(lambda: self._pair(machine, self._memory.identity.machine), desk, sub_buffers)
                self._receiving[machine] = receiver
                receiver.run()
        except Exception as error:  # the owner hears of it as well, and its agent takes over
            level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING
            log.log(level, "no replicas come from machine %d over p2p any more: %s", machine, error, exc_info=True)

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send(self, machine: int) -> None:
        transport = self._sending[machine]
        try:
            with self._memory.client.another() as client:
                transport.connect()
                self._meet(machine)
                self._keep_up(transport, machine, client)
        except Exception as error:  # training goes on whatever happens here
            self._fall_back(machine, error)
        transport.close()

    def _meet(self, machine: int) -> None:
        with self._wake:
            self._met.add(machine)
            if self.working:
                self._slab.pace.hold(True)
            self._wake.notify_all()
            while self._wanted_at_all and not self.working:
                self._wake.wait(_IDLE_S)

    def _keep_up(self, transport: P2pTransport, machine: int, client: AgentClient) -> None:
        """Send whatever the holder lacks, until it is known that this way does not work."""
        held: VersionId | None = None
        refused_since: float | None = None
        while self.working:
            news = self._news
            try:
                held, pause_s = self._serve(transport, machine, client, held)
                refused_since = None
            except RefusedError:
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since > _PATIENCE_S:
                    raise
                self._recheck()
                pause_s = _RETRY_S
            with self._wake:
                if pause_s and self.working and self._news == news:
                    self._wake.wait(pause_s)

    def _serve(
        self, transport: P2pTransport, machine: int, client: AgentClient, held: VersionId | None
    ) -> tuple[VersionId | None, float]:
        """Send the newest version if the holder lacks it; returns what it has, and how long to wait for news."""
        buffer = self._slab.newest_started()
        version = buffer.id if buffer is not None else None
        if buffer is None or version is None:
            return held, _IDLE_S
        if version != held:
            kept = self._slab.kept_beside(version)
            if not transport.push(buffer, version, lambda: self._wanted(buffer), kept, self._pacer):
                return held, 0.0
        elif buffer.acked == version:
            return held, _IDLE_S
        # Again and again, until it is acknowledged: the agent may have heard of an older one meanwhile, by TCP.
        client.note_held(self._memory.identity.global_rank, machine, version, self._memory.generation)
        return version, _RETRY_S

    def _wanted(self, buffer: Buffer) -> bool:
        return self.working and buffer.state is not BufferState.EMPTY

    def _recheck(self) -> None:
        """Nobody takes a version whose bytes are corrupt here: so after a refusal each is read again, once."""
        buffer = self._slab.newest_started()
        version = buffer.id if buffer is not None else None
        if buffer is None or version is None or version == self._checked or buffer.state is not BufferState.COMPLETE:
            return
        self._checked = version
        try:
            buffer.verify()
        except IntegrityError as error:
            if self._slab.holding(version) is not None:  # else the next version began meanwhile
                log.warning("rank %d drops its copy of version %d: %s", buffer.owner, version.version, error)
                self._memory.client.discard(version)

    def _fall_back(self, machine: int, error: Exception) -> None:
        """Leave it to the agent, which sends over TCP."""
        with self._wake:
            first = self._wanted_at_all
            self._fallen_back = True
            self._wake.notify_all()
        if first:
            self._slab.pace.hold(False)
            with contextlib.suppress(OSError):
                self._memory.client.notify()
            unexpected = error if not isinstance(error, OSError) else None
            message = "p2p to machine %d failed (%s): this rank's replicas travel over tcp until the workers start anew"
            log.warning(message, machine, error, exc_info=unexpected)
