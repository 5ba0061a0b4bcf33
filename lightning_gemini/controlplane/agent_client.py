"""The other end of the agent's unix socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_gemini.errors as errors
from lightning_gemini.controlplane.messages import receive_message, send_message
from lightning_gemini.core.recovery import Fetch, VersionId, fetch_to_json, version_to_json
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.slab import Buffer, Slab
from lightning_gemini.errors import AgentError, GeminiError
from lightning_gemini.version import __version__

_MEASURE_TIMEOUT_S = 60.0
_NEW_MEMORY_BYTES_PER_S = 100e6
"""How fast, at the least, an agent makes memory, or reads that of a replica."""


class AgentClient:
    """One connection to a machine's agent; thread-safe.

    Args:
        socket_path: The agent's socket.
        job: The job that the agent must serve.
        timeout_s: Longest wait for an answer that is not a retrieval.

    Raises:
        AgentError: Nobody listens, or the agent is of another job or version.
    """

    def __init__(self, socket_path: Path, job: str, timeout_s: float = 10.0) -> None:
        self.socket_path, self.job = socket_path, job
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(str(socket_path))
        except OSError as error:
            self._sock.close()
            raise AgentError(f"no agent at {socket_path} ({error.strerror or error})") from error
        try:
            self.identity = self._request("hello", job=job, version=__version__, pid=os.getpid())
        except BaseException:
            self._sock.close()
            raise

    def another(self) -> AgentClient:
        """A second connection to the same agent: what one waits for does not hold up the other.

        Raises:
            AgentError: The agent is gone.
        """
        return AgentClient(self.socket_path, self.job, self._timeout_s)

    def close(self) -> None:
        """Hang up; idempotent."""
        self._sock.close()

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- people --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the agent holds and knows."""
        return self._request("status")

    def stop(self) -> None:
        """Ask the agent to free its memory and end."""
        self._request("stop")

    # -- workers -------------------------------------------------------------------------------------------------

    def share_secret(self, secret: str) -> None:
        """Make the agent accept peers with this secret (hex)."""
        self._request("secret", secret=secret)

    def set_peers(self, generation: int, nproc_per_node: int, addresses: Sequence[tuple[str, int]]) -> None:
        """Tell the agent who its peers are."""
        self._request("peers", generation=generation, nproc=nproc_per_node, addresses=[list(a) for a in addresses])

    def join(self, rank: int, replicas: int, placement: str, domains: Sequence[str] | None = None) -> dict[str, Any]:
        """This process is global rank ``rank``; returns the agent's report."""
        named = None if domains is None else list(domains)
        return self._request("join", rank=rank, replicas=replicas, placement=placement, domains=named)

    def report(self) -> dict[str, Any]:
        """What the machine holds."""
        return self._request("report")

    def attach(self, shard_bytes: int, slabs: int = 1) -> Slab:
        """Map this rank's slab, made for ``shard_bytes`` or more if it is new; the last of ``slabs`` like it, maybe."""
        patience_s = self._timeout_s + slabs * 2 * shard_bytes / _NEW_MEMORY_BYTES_PER_S
        slab = self._attach(patience_s, bytes=shard_bytes)
        assert slab is not None
        return slab

    def attach_existing(self) -> Slab | None:
        """Map this rank's slab if there is one."""
        return self._attach(create=False)

    def _attach(self, patience_s: float | None = None, **fields: Any) -> Slab | None:
        reply, descriptors = self._exchange({"request": "attach", **fields}, patience_s)
        return Slab(*(Buffer(descriptor) for descriptor in descriptors)) if reply["found"] else None

    def retrieve(self, fetches: Sequence[Fetch], timeout_s: float = 3600.0) -> tuple[int, float]:
        """Have the agent fetch shards from peers; (bytes, seconds)."""
        message = {"request": "retrieve", "fetches": [fetch_to_json(fetch) for fetch in fetches]}
        reply, _ = self._exchange(message, timeout_s)
        return int(reply["bytes"]), float(reply["seconds"])

    def measure_links(self, quantity: Quantity, *, again: bool = False) -> dict[int, float]:
        """Have the agent measure the links to the machines that hold this one's shards, all at the same time.

        Args:
            quantity: What of them.
            again: Whether also those that the agent has measured already.

        Returns:
            That of the links that could be measured, by machine rank; ranks share those of their machine.
        """
        request = {"request": "measure_links", "quantity": quantity.value, "again": again}
        reply, _ = self._exchange(request, _MEASURE_TIMEOUT_S)
        return {int(machine): float(found) for machine, found in reply["links"]}

    def resume_from(self, version: VersionId | None) -> None:
        """All ranks go on from this version."""
        self._request("resume_from", id=None if version is None else version_to_json(version))

    def discard(self, version: VersionId) -> None:
        """This rank's own copy of ``version`` is corrupt."""
        self._request("discard", id=version_to_json(version))

    # -- workers that replicate by themselves (transport p2p) -----------------------------------------------------

    def replica_begin(
        self, owner: int, version: VersionId, data_bytes: int, sender_generation: int, kept: VersionId | None
    ) -> int | None:
        """Ask for the buffer of a peer's shard, to write it; it stays this connection's until :meth:`replica_end`.

        Returns:
            A new file descriptor of its memory, begun; ``None`` if the version is complete there already.

        Raises:
            GeminiError: The version is not wanted, or somebody else writes this owner's shard.
        """
        message = {
            "request": "replica_begin",
            "owner": owner,
            "id": version_to_json(version),
            "bytes": data_bytes,
            "generation": sender_generation,
            "kept": None if kept is None else version_to_json(kept),
        }
        reply, descriptors = self._exchange(message, self._timeout_s + 2 * data_bytes / _NEW_MEMORY_BYTES_PER_S)
        return None if reply["have"] else descriptors[0]

    def replica_end(self) -> None:
        """This process writes that buffer no more; what is not complete is dropped."""
        self._request("replica_end")

    def note_held(self, owner: int, machine: int, version: VersionId, generation: int) -> None:
        """``machine`` has this version of the shard completely: this worker, of that generation, sent it."""
        named = version_to_json(version)
        self._request("note_held", owner=owner, machine=machine, id=named, generation=generation)

    def notify(self) -> None:
        """A version was begun or completed; does not wait for an answer."""
        with self._lock:
            try:
                send_message(self._sock, {"request": "notify"})
            except OSError as error:
                raise AgentError(f"the agent at {self.socket_path} went away ({error.strerror})") from error

    def fatal(self, rank: int, message: str) -> None:
        """This rank refuses to train; a restart cannot help."""
        self._request("fatal", rank=rank, message=message)

    def _request(self, request: str, **fields: Any) -> dict[str, Any]:
        return self._exchange({"request": request, **fields})[0]

    def _exchange(self, message: dict[str, Any], timeout_s: float | None = None) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            try:
                self._sock.settimeout(timeout_s or self._timeout_s)
                send_message(self._sock, message)
                reply, descriptors = receive_message(self._sock)
            except (EOFError, OSError) as error:
                self._sock.close()  # a late answer would be taken for that to the next request
                raise AgentError(f"the agent at {self.socket_path} went away ({error or 'closed'})") from error
        if "error" in reply:
            raise _error_named(reply["kind"], reply["error"])
        return reply, descriptors


def _error_named(kind: str, message: str) -> GeminiError:
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, GeminiError):
        return found(message)
    return AgentError(message)
