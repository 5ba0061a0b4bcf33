"""The unix socket on which an agent's workers, and the command line, speak to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.messages import UNANSWERED, receive_message, send_message
from lightning_gemini.errors import AgentError, GeminiError, ProtocolError

log = logging.getLogger(__name__)

_ACCEPT_RETRY_S = 0.05
_PROBE_TIMEOUT_S = 1.0

Reply = tuple[dict[str, Any], tuple[int, ...]]
"""An answer, and the file descriptors that go with it."""


@dataclass(slots=True)
class WorkerSession:
    """One connection.

    Attributes:
        pid: The process at the other end; 0 until it introduced itself.
        rank: Its global rank, once it joined as a worker.
    """

    pid: int = 0
    rank: int | None = None


class ControlSocket:
    """Serves each connection on a thread of its own; a bad request gets an error, and harms nobody else.

    Args:
        path: Where to listen.
        handle: Answers a request.
        left: Called when a connection is gone.
    """

    def __init__(
        self,
        path: Path,
        handle: Callable[[WorkerSession, dict[str, Any]], Reply],
        left: Callable[[WorkerSession], None],
    ) -> None:
        self.path, self._handle, self._left = path, handle, left
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Listen.

        Raises:
            AgentError: Another agent serves this socket.
            OSError: The directory cannot be used.
        """
        self._listener = _listen(self.path)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Remove the socket and hang up on everybody; idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the accept() of the other thread
        listener.close()
        with self._lock:
            connections = list(self._connections)
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None and self._listener is listener:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed, or short of descriptors for a moment
                time.sleep(_ACCEPT_RETRY_S)
                continue
            threading.Thread(target=self._serve, args=(sock,), name="worker-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        session = WorkerSession()
        with self._lock:
            self._connections.add(sock)
        try:
            with sock:
                while self._listener is not None and self._converse(sock, session):
                    pass
        except (EOFError, OSError):
            pass  # hung up
        finally:
            with self._lock:
                self._connections.discard(sock)
            self._left(session)

    def _converse(self, sock: socket.socket, session: WorkerSession) -> bool:
        """Answer one request; false when the conversation cannot go on."""
        try:
            request, descriptors = receive_message(sock)
        except ProtocolError as error:  # nobody knows where the next message would begin
            log.warning("refused a connection to the control socket: %s", error)
            send_message(sock, _refusal(error))
            return False
        for descriptor in descriptors:  # nothing asks for them
            os.close(descriptor)
        reply, descriptors_out = self._answer(session, request)
        if request.get("request") not in UNANSWERED:
            send_message(sock, reply, descriptors_out)
        return True

    def _answer(self, session: WorkerSession, request: dict[str, Any]) -> Reply:
        try:
            return self._handle(session, request)
        except (GeminiError, OSError) as error:
            return _refusal(error), ()
        except (KeyError, TypeError, ValueError) as error:
            return _refusal(ProtocolError(f"malformed request: {error!r}")), ()
        except Exception as error:
            log.exception("could not answer %.200r", request)
            return _refusal(AgentError(f"the agent could not answer: {error!r}; see its log")), ()


def is_served(path: Path) -> bool:
    """Whether a live process listens on this unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        # A live process that is too busy to accept gives another error than one that was killed.
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _refusal(error: Exception) -> dict[str, Any]:
    return {"error": str(error), "kind": type(error).__name__}


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _one_at_a_time(path.parent):
            if is_served(path):
                remedy = "stop it ('lightning-gemini stop') or use another run dir"
                raise AgentError(f"another agent serves {path}: {remedy}")
            path.unlink(missing_ok=True)  # left behind by an agent that was killed
            _bind(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, path: Path) -> None:
    old_mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(old_mask)
    sock.listen(64)


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Keeps two agents that start together from both taking a socket that was left behind."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems may not lock directories
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
