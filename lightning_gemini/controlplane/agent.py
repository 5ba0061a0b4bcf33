"""The machine's agent: owns the memory, serves its workers on a unix socket, and replicates to its peers.

It imports no torch: it starts in well under a second, stays small, and outlives every trainer. The cluster side (who is
dead, which generation it is) is :mod:`lightning_gemini.controlplane.worker_agent`; this class does not know of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.messages import receive_message, send_message
from lightning_gemini.core.recovery import (
    Fetch,
    fetch_from_json,
    inventory_to_json,
    version_from_json,
)
from lightning_gemini.dataplane.replicator import Replicator
from lightning_gemini.dataplane.slab import BufferState
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.tcp import ReplicaServer
from lightning_gemini.errors import AgentError, GeminiError, ProtocolError
from lightning_gemini.version import __version__

log = logging.getLogger(__name__)


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
        self._peers: dict[int, Peer] = {}
        self._control: socket.socket | None = None
        self._workers: dict[int, int] = {}  # global rank -> pid
        self._last_seen = time.monotonic()
        self._retrieving = threading.Lock()  # the root orders retrievals ahead, workers ask for what is still missing

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the sockets.

        Raises:
            AgentError: Another agent serves this socket.
            OSError: The interface or the socket's directory cannot be used.
        """
        self._control = _listen(self.settings.socket_path)
        self._server.start()
        threading.Thread(target=self._accept, name="control", daemon=True).start()
        if self.settings.idle_timeout_s is not None:
            threading.Thread(target=self._leave_when_idle, name="idle", daemon=True).start()

    def close(self) -> None:
        """Close the sockets and free the memory; idempotent."""
        if self.closed.is_set():
            return
        self.closed.set()
        control, self._control = self._control, None
        if control is not None:
            self.settings.socket_path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)
            control.close()
        self._replicator.close()
        self._server.close()
        self._store.clear()

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
            "nproc": self._store.nproc_per_machine,
            "progress": {str(rank): step for rank, step in self.progress().items()},
        }

    def set_peers(self, generation: int, nproc_per_node: int, addresses: Sequence[tuple[str, int]]) -> None:
        """Enter a generation: these are the machines now, in rank order; older generations are refused.

        Raises:
            LayoutMismatchError: Memory holds a job of another shape.
        """
        self._store.enter_generation(generation, len(addresses), nproc_per_node)
        for rank in self._store.own_ranks():
            self._store.abandon_unfinished(rank)
            slab = self._store.slab(rank)
            for buffer in slab.buffers if slab else ():
                buffer.forget_peers()
        me = self.settings.machine
        self._peers = {rank: Peer(rank, (host, port)) for rank, (host, port) in enumerate(addresses) if rank != me}
        self._replicator.start(list(self._peers.values()))

    def retrieve(self, fetches: Sequence[Fetch]) -> tuple[int, float]:
        """Fetch shards from peers into this machine's memory.

        Returns:
            Bytes received, and seconds taken.

        Raises:
            GeminiError: A shard could not be fetched.
            OSError: A peer could not be reached.
        """
        with self._retrieving:
            return self._retrieve(fetches)

    def _retrieve(self, fetches: Sequence[Fetch]) -> tuple[int, float]:
        began, total = time.monotonic(), 0
        for fetch in fetches:
            if fetch.target != self.settings.machine or self._store.complete_buffer(fetch.owner, fetch.id):
                continue
            peer = self._peers.get(fetch.source)
            if peer is None:
                raise ProtocolError(f"machine {fetch.source} is not in this generation any more")
            transport = self._connect(peer)
            try:
                total += transport.fetch(
                    fetch.owner,
                    fetch.id,
                    lambda size, fetch=fetch: self._store.retrieval_target(fetch.owner, fetch.id, size),  # type: ignore[misc]
                )
            finally:
                transport.close()
        return total, time.monotonic() - began

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
            "holdings": [self._describe(buffer) for slab in self._store.slabs() for buffer in slab.buffers if buffer.id],
            "memory_bytes": self._store.total_bytes,
            "progress": {str(rank): step for rank, step in self.progress().items()},
            "workers": [{"rank": rank, "pid": pid} for rank, pid in sorted(self._workers.items())],
            **self.status_extra(),
        }

    def _describe(self, buffer: Any) -> dict[str, Any]:
        return {
            "owner": buffer.owner,
            "generation": buffer.id.generation,
            "version": buffer.id.version,
            "complete": buffer.state is BufferState.COMPLETE,
            "bytes": buffer.data_bytes,
            "role": "owner" if buffer.owner in self._store.own_ranks() else "replica",
        }

    def _connect(self, peer: Peer) -> TcpTransport:
        return TcpTransport(peer, self.settings.job, self._secret, self.settings.machine, self._store.generation)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        control = self._control
        while control is not None and not self.closed.is_set():
            try:
                sock, _ = control.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), name="worker-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        session = _WorkerSession()
        with sock:
            try:
                while True:
                    request, _ = receive_message(sock)
                    self._last_seen = time.monotonic()
                    self._answer(sock, session, request)
            except (EOFError, OSError):
                pass
            finally:
                self._worker_left(session)

    def _answer(self, sock: socket.socket, session: _WorkerSession, request: dict[str, Any]) -> None:
        try:
            handler = getattr(self, f"_on_{request.get('request')}", None)
            if handler is None:
                raise ProtocolError(f"unknown request {request.get('request')!r}")
            reply, descriptors = handler(session, request)
        except (GeminiError, OSError) as error:
            reply, descriptors = {"error": str(error), "kind": type(error).__name__}, ()
        except (KeyError, TypeError, ValueError) as error:
            reply, descriptors = {"error": f"malformed request: {error!r}", "kind": "ProtocolError"}, ()
        if reply is not None:
            send_message(sock, reply, descriptors)

    def _worker_left(self, session: _WorkerSession) -> None:
        if session.rank is not None and self._workers.get(session.rank) == session.pid:
            del self._workers[session.rank]
            self._store.abandon_unfinished(session.rank)

    def _on_hello(self, session: _WorkerSession, request: dict[str, Any]) -> Any:
        if request["job"] != self.settings.job:
            raise AgentError(
                f"this agent (pid {os.getpid()}) serves job {self.settings.job}, not {request['job']}: "
                "unset LIGHTNING_GEMINI_AGENT or stop that agent"
            )
        if request["version"] != __version__:
            raise AgentError(
                f"this agent (pid {os.getpid()}) is lightning-gemini {__version__}, the caller {request['version']}: "
                "run 'lightning-gemini stop' with the agent's version, then start again"
            )
        session.pid = int(request["pid"])
        return {
            "machine": self.settings.machine,
            "pid": os.getpid(),
            "generation": self._store.generation,
            "secret": self._secret.hex(),
            "address": list(self.replica_address),
        }, ()

    def _on_secret(self, _: _WorkerSession, request: dict[str, Any]) -> Any:
        """Plain mode: the agents that a job's ranks started agree on the first one's secret."""
        self._secret = bytes.fromhex(request["secret"])
        self._server.set_secret(self._secret)
        return {}, ()

    def _on_peers(self, _: _WorkerSession, request: dict[str, Any]) -> Any:
        addresses = [(str(host), int(port)) for host, port in request["addresses"]]
        self.set_peers(int(request["generation"]), int(request["nproc"]), addresses)
        return {}, ()

    def _on_join(self, session: _WorkerSession, request: dict[str, Any]) -> Any:
        self._store.set_replication(int(request["replicas"]), str(request["placement"]))
        session.rank = int(request["rank"])
        self._workers[session.rank] = session.pid
        return self.report(), ()

    def _on_attach(self, session: _WorkerSession, request: dict[str, Any]) -> Any:
        assert session.rank is not None
        existing = self._store.slab(session.rank)
        if existing is None and not request.get("create", True):
            return {"found": False}, ()
        slab = existing or self._store.own(session.rank, int(request["bytes"]))
        return {"found": True}, tuple(buffer.fd for buffer in slab.buffers)

    def _on_report(self, *_: Any) -> Any:
        return self.report(), ()

    def _on_retrieve(self, _: _WorkerSession, request: dict[str, Any]) -> Any:
        received, seconds = self.retrieve([fetch_from_json(fetch) for fetch in request["fetches"]])
        return {"bytes": received, "seconds": seconds}, ()

    def _on_resume_from(self, _: _WorkerSession, request: dict[str, Any]) -> Any:
        version = request["id"]
        self._store.resume_from(None if version is None else version_from_json(version))
        return {}, ()

    def _on_discard(self, session: _WorkerSession, request: dict[str, Any]) -> Any:
        assert session.rank is not None
        self._store.discard(session.rank, version_from_json(request["id"]))
        return {}, ()

    def _on_notify(self, *_: Any) -> Any:
        self._replicator.notify()
        return None, ()

    def _on_fatal(self, session: _WorkerSession, request: dict[str, Any]) -> Any:
        if self.on_fatal is not None:
            self.on_fatal(session.rank if session.rank is not None else -1, str(request["message"]))
        return {}, ()

    def _on_status(self, *_: Any) -> Any:
        return self.status(), ()

    def _on_stop(self, *_: Any) -> Any:
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


@dataclass(slots=True)
class _WorkerSession:
    rank: int | None = None
    pid: int = 0


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        if path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise AgentError(f"another agent serves {path}: stop it ('lightning-gemini stop') or use another run dir")
            path.unlink()  # left behind by an agent that was killed
        sock.bind(str(path))
        sock.listen(64)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(old_mask)
    return sock
