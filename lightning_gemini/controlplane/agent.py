"""The machine's agent: owns the memory, serves its workers on a unix socket, and replicates to its peers.

It imports no torch: it starts in well under a second, stays small, and outlives every trainer. The cluster side (who is
dead, which generation it is) is :mod:`lightning_gemini.controlplane.worker_agent`; this class does not know of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.control_socket import ControlSocket, Reply, WorkerSession
from lightning_gemini.controlplane.link_survey import LinkSurvey
from lightning_gemini.controlplane.receptions import Receptions
from lightning_gemini.core.fields import strings
from lightning_gemini.core.recovery import (
    Fetch,
    fetch_from_json,
    inventory_to_json,
    version_from_json,
)
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.replicator import Replicator
from lightning_gemini.dataplane.slab import BufferState
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer
from lightning_gemini.errors import AgentError, ProtocolError
from lightning_gemini.version import __version__

log = logging.getLogger(__name__)

_FENCE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent must know at its start.

    Attributes:
        job: The job's id; workers and peers of other jobs are refused.
        machine: This machine's rank.
        socket_path: Where workers find it.
        secret: What peers must know.
        bind_host: Interface of the replica server.
        run_dir: Directory of the run, for logs; ``None`` without ``lightning-gemini run``.
        idle_timeout_s: Leave after so many seconds without a worker; ``None``: stay until told.
    """

    job: str
    machine: int
    socket_path: Path
    secret: bytes
    bind_host: str = "127.0.0.1"
    run_dir: Path | None = None
    idle_timeout_s: float | None = None


class MachineAgent:
    """Store, replica server, replicator and control socket of one machine.

    Args:
        settings: See :class:`AgentSettings`.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.on_fatal: Callable[[int, str], None] | None = None
        self.status_extra: Callable[[], dict[str, Any]] = dict
        self.closed = threading.Event()
        self._store = ShardStore(settings.machine)
        self._secret = settings.secret
        self._server = ReplicaServer(settings.bind_host, settings.job, settings.secret, self._store)
        self._replicator = Replicator(self._store, self._connect)
        self._survey = LinkSurvey(self._connect)
        self._receptions = Receptions(self._store)
        self._peers: dict[int, Peer] = {}
        self._control = ControlSocket(settings.socket_path, self._handle, self._worker_left)
        self._workers: dict[int, int] = {}  # global rank -> pid
        self._last_seen = time.monotonic()
        self._retrieving = threading.Lock()  # the root orders retrievals ahead, workers ask for what is still missing
        self._retrieval: TcpTransport | None = None
        self._closing = threading.RLock()  # a second signal may come while the first is being handled

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the sockets.

        Raises:
            AgentError: Another agent serves this socket.
            OSError: The interface or the socket's directory cannot be used.
        """
        self._server.start()
        try:
            self._control.start()
        except BaseException:
            self._server.close()
            raise
        if self.settings.idle_timeout_s is not None:
            threading.Thread(target=self._leave_when_idle, name="idle", daemon=True).start()

    def close(self) -> None:
        """Close the sockets and free the memory; idempotent. ``closed`` is set when all that is done."""
        with self._closing:
            if self.closed.is_set():
                return
            self._control.close()
            self._replicator.close()
            self._end_transfers()
            self._server.close()
            self._store.clear()
            self.closed.set()

    def __enter__(self) -> MachineAgent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def replica_address(self) -> tuple[str, int]:
        """Where peers reach the replica server."""
        return self._server.address

    # -- what the cluster side asks for ------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What this machine holds, as JSON."""
        return {
            **inventory_to_json(self._store.inventory()),
            "replicas": self._store.replicas,
            "placement": self._store.strategy,
            "domains": None if self._store.domains is None else list(self._store.domains),
            "nproc": self._store.nproc_per_machine,
            "progress": {str(rank): step for rank, step in self.progress().items()},
        }

    def set_peers(self, generation: int, nproc_per_node: int, addresses: Sequence[tuple[str, int]]) -> None:
        """Enter a generation: these are the machines now, in rank order; older generations are refused.

        Raises:
            LayoutMismatchError: Memory holds a job of another shape.
        """
        self._store.enter_generation(generation, len(addresses), nproc_per_node)
        self._replicator.close()
        self._end_transfers()
        for rank in self._store.own_ranks():
            self._store.abandon_unfinished(rank)
            self._set_free(rank)
            slab = self._store.slab(rank)
            for buffer in slab.buffers if slab else ():
                buffer.forget_peers()
        me = self.settings.machine
        self._peers = {rank: Peer(rank, (host, port)) for rank, (host, port) in enumerate(addresses) if rank != me}
        self._replicator.start(list(self._peers.values()))

    def _set_free(self, rank: int) -> None:
        """Nobody is left who says when this rank's shards may travel."""
        slab = self._store.slab(rank)
        if slab is not None:
            slab.pace.reset()

    def _end_transfers(self) -> None:
        """What older generations still send or retrieve must not land in memory after the next report."""
        retrieval = self._retrieval
        if retrieval is not None:
            retrieval.abort()
        self._server.disconnect()
        self._receptions.give_up()
        if not self._store.wait_for_writers(_FENCE_TIMEOUT_S):
            log.error("a transfer of an older generation did not end within %.0f s", _FENCE_TIMEOUT_S)

    def retrieve(self, fetches: Sequence[Fetch]) -> tuple[int, float]:
        """Fetch shards from peers into this machine's memory.

        Returns:
            Bytes received, and seconds taken.

        Raises:
            GeminiError: A shard could not be fetched.
            OSError: A peer could not be reached.
        """
        generation = self._store.generation
        with self._retrieving:
            began = time.monotonic()
            mine = [fetch for fetch in fetches if fetch.target == self.settings.machine]
            return sum(self._fetch(fetch, generation) for fetch in mine), time.monotonic() - began

    def _fetch(self, fetch: Fetch, generation: int) -> int:
        with self._store.writer(fetch.owner):
            if not self._store.may_retrieve(fetch.owner, fetch.id):
                return 0
            peer = self._peers.get(fetch.source)
            if peer is None:
                raise ProtocolError(f"machine {fetch.source} is not in this generation any more")
            self._retrieval = transport = self._connect(peer)
            try:
                if self._store.generation != generation:
                    raise ProtocolError(f"retrieval given up: generation {self._store.generation} began")
                return transport.fetch(
                    fetch.owner, fetch.id, lambda size: self._store.retrieval_target(fetch.owner, fetch.id, size)
                )
            finally:
                self._retrieval = None
                transport.close()

    def progress(self) -> dict[int, int]:
        """Optimizer steps that each rank of this machine completed; survives the rank's process."""
        slabs = ((rank, self._store.slab(rank)) for rank in self._store.own_ranks())
        return {rank: slab.buffers[0].progress for rank, slab in slabs if slab is not None}

    def status(self) -> dict[str, Any]:
        """A snapshot for people."""
        return {
            "job": self.settings.job,
            "machine": self.settings.machine,
            "pid": os.getpid(),
            "version": __version__,
            "generation": self._store.generation,
            "holdings": list(self._holdings()),
            "memory_bytes": self._store.total_bytes,
            "progress": {str(rank): step for rank, step in self.progress().items()},
            "workers": [{"rank": rank, "pid": pid} for rank, pid in sorted(self._workers.items())],
            **self.status_extra(),
        }

    def _holdings(self) -> Iterator[dict[str, Any]]:
        for buffer in (buffer for slab in self._store.slabs() for buffer in slab.buffers):
            version, complete = buffer.id, buffer.state is BufferState.COMPLETE
            if version is not None:
                yield {
                    "owner": buffer.owner,
                    "generation": version.generation,
                    "version": version.version,
                    "complete": complete,
                    "bytes": buffer.data_bytes,
                    "role": "owner" if buffer.owner in self._store.own_ranks() else "replica",
                }

    def _connect(self, peer: Peer) -> TcpTransport:
        return TcpTransport(peer, self.settings.job, self._secret, self.settings.machine, self._store.generation)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _handle(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        self._last_seen = time.monotonic()
        name = request.get("request")
        handler = getattr(self, f"_on_{name}", None)
        if handler is None:
            raise ProtocolError(f"unknown request {name!r:.80}")
        if name != "hello" and not session.pid:
            raise ProtocolError("the first request must be 'hello', with the job and the version")
        reply: Reply = handler(session, request)
        return reply

    def _worker_left(self, session: WorkerSession) -> None:
        self._receptions.end(session)
        if session.rank is not None and self._workers.get(session.rank) == session.pid:
            del self._workers[session.rank]
            self._set_free(session.rank)
            self._store.abandon_unfinished(session.rank)

    def _on_hello(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        if request["job"] != self.settings.job:
            raise AgentError(
                f"this agent (pid {os.getpid()}) serves job {self.settings.job}, not {request['job']}: "
                "unset LIGHTNING_GEMINI_AGENT or stop that agent"
            )
        if request["version"] != __version__:
            raise AgentError(
                f"this agent (pid {os.getpid()}) is lightning-gemini {__version__}, the caller {request['version']}: "
                "run 'lightning-gemini stop --agents' with the agent's version or end that process, then start again"
            )
        session.pid = int(request["pid"])
        return {
            "machine": self.settings.machine,
            "pid": os.getpid(),
            "generation": self._store.generation,
            "secret": self._secret.hex(),
            "address": list(self.replica_address),
        }, ()

    def _on_secret(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        """Plain mode: the agents that a job's ranks started agree on the first one's secret."""
        self._secret = bytes.fromhex(request["secret"])
        self._server.set_secret(self._secret)
        return {}, ()

    def _on_peers(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        addresses = [(str(host), int(port)) for host, port in request["addresses"]]
        self.set_peers(int(request["generation"]), int(request["nproc"]), addresses)
        return {}, ()

    def _on_join(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        rank = int(request["rank"])
        if rank not in self._store.own_ranks():
            raise ProtocolError(f"rank {rank} is not of machine {self.settings.machine}: {self._store.own_ranks()}")
        domains = strings(request, "domains") if request.get("domains") is not None else None
        self._store.set_replication(int(request["replicas"]), str(request["placement"]), domains)
        self._replicator.notify()
        session.rank = rank
        self._workers[session.rank] = session.pid
        return self.report(), ()

    def _on_attach(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        rank = _joined(session)
        existing = self._store.slab(rank)
        if existing is None and not request.get("create", True):
            return {"found": False}, ()
        slab = existing or self._store.own(rank, int(request["bytes"]))
        return {"found": True}, tuple(buffer.fd for buffer in slab.buffers)

    def _on_report(self, *_: Any) -> Reply:
        return self.report(), ()

    def _on_retrieve(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        received, seconds = self.retrieve([fetch_from_json(fetch) for fetch in request["fetches"]])
        return {"bytes": received, "seconds": seconds}, ()

    def _on_resume_from(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        version = request["id"]
        self._store.resume_from(None if version is None else version_from_json(version))
        return {}, ()

    def _on_discard(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        self._store.discard(_joined(session), version_from_json(request["id"]))
        return {}, ()

    def _on_measure_links(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        placement = self._store.placement
        holders = placement.holders(self.settings.machine)[1:] if placement else ()
        peers = [self._peers[machine] for machine in holders if machine in self._peers]
        found = self._survey.measure(peers, Quantity(request["quantity"]), again=bool(request["again"]))
        return {"links": list(found.items())}, ()

    def _on_replica_begin(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        return self._receptions.begin(session, request)

    def _on_replica_end(self, session: WorkerSession, _: dict[str, Any]) -> Reply:
        self._receptions.end(session)
        return {}, ()

    def _on_note_held(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        version, generation = version_from_json(request["id"]), int(request["generation"])
        self._replicator.note_held(int(request["owner"]), int(request["machine"]), version, generation)
        return {}, ()

    def _on_notify(self, *_: Any) -> Reply:
        self._replicator.notify()
        return {}, ()

    def _on_fatal(self, _: WorkerSession, request: dict[str, Any]) -> Reply:
        if self.on_fatal is not None:
            self.on_fatal(int(request["rank"]), str(request["message"]))
        return {}, ()

    def _on_status(self, *_: Any) -> Reply:
        return self.status(), ()

    def _on_stop(self, *_: Any) -> Reply:
        threading.Timer(0.05, self.close).start()  # let the answer out first
        return {}, ()

    def _leave_when_idle(self) -> None:
        timeout = self.settings.idle_timeout_s or 0.0
        while not self.closed.wait(min(1.0, timeout / 4)):
            if self._workers:
                self._last_seen = time.monotonic()
            elif time.monotonic() - self._last_seen > timeout:
                log.warning("no worker for %.0f s: freeing the memory of job %s", timeout, self.settings.job)
                self.close()


def _joined(session: WorkerSession) -> int:
    if session.rank is None:
        raise ProtocolError("only a worker that joined has a shard")
    return session.rank
