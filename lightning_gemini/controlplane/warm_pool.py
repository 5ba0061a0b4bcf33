"""The agent's handle on its fork server (`lightning_gemini.controlplane.fork_server`)."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.fork_server import DEFAULT_PRELOAD
from lightning_gemini.controlplane.processes import PROTOBUF_VARIABLE, kill_group, wait_gone
from lightning_gemini.controlplane.template import request_fork_server

_log = logging.getLogger(__name__)
NO_PRELOAD = "none"
_LOSS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """One worker to start.

    Attributes:
        token: The agent's own name for it.
        argv: The script and its arguments.
        env: Variables on top of the pool's.
        log: File that receives its standard output and error.
    """

    token: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """A worker that ended: ``code`` as it exited, or ``signal`` that killed it."""

    token: str
    pid: int
    code: int | None
    signal: str | None


@dataclass(frozen=True, slots=True)
class PoolLost:
    """The fork server itself ended, and with it every worker."""

    exits: tuple[WorkerExit, ...]


class WarmPool:
    """Starts and ends workers through a fork server.

    `start` must be called on the agent's main thread: the kernel ends the fork server with the thread that started it.
    Commands given before the fork server has finished its imports wait for it.

    Args:
        deliver: Called on the pool's reader thread with every `WorkerExit`, with `PoolLost`, and with the messages
            ``ready`` and ``started`` (dicts).
        preload: Modules to import on top of the usual ones; ``none`` among them: import nothing ahead.
        log_path: File that receives what the fork server itself prints.
        env: Variables of the pool and of all workers; the agent's own by default.
        template: Socket of this host's `lightning_gemini.controlplane.template`, if it has one: the fork server then
            comes from there, with that process's imports and variables.
    """

    def __init__(
        self,
        deliver: Callable[[WorkerExit | PoolLost | dict[str, Any]], None],
        *,
        preload: Sequence[str] = (),
        log_path: Path,
        env: Mapping[str, str] | None = None,
        template: Path | None = None,
    ) -> None:
        self._deliver = deliver
        self._modules = modules_to_preload(preload)
        self._template = template
        self._log_path = log_path
        self._env = dict(os.environ if env is None else env)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._pid: int | None = None
        self._closed = False
        self._ready = False
        self._waiting: list[WorkerCommand] = []
        self._forking: set[str] = set()
        self._running: dict[int, str] = {}
        self._idle = threading.Condition(self._lock)

    @property
    def pid(self) -> int | None:
        """Process id of the fork server, once it is known."""
        return self._pid

    def workers(self) -> dict[int, str]:
        """Returns the live workers: pid → token."""
        with self._lock:
            return dict(self._running)

    def start(self) -> None:
        """Starts the fork server, or another one after it was lost; returns at once, while it imports."""
        if self._process is not None:
            self._process.wait()
        self._channel, theirs = socket.socketpair()
        with theirs:
            if self._template is None or not request_fork_server(self._template, theirs, self._log_path):
                self._start_process(theirs)
        threading.Thread(target=self._read, args=(self._channel,), name="warm-pool", daemon=True).start()

    def _start_process(self, theirs: socket.socket) -> None:
        command = [sys.executable, "-m", "lightning_gemini.controlplane.fork_server"]
        options = ["--channel", str(theirs.fileno()), "--parent", str(os.getpid())]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options, *self._modules],
                env=pool_environment(self._env),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pid = self._process.pid

    def launch(self, commands: Sequence[WorkerCommand]) -> None:
        """Starts workers, now or as soon as the fork server is ready."""
        with self._lock:
            self._waiting.extend(commands)
            if self._ready:
                self._send_waiting()

    def kill_workers(self, timeout_s: float) -> bool:
        """SIGKILLs every worker and forgets those that wait; returns whether all were gone within ``timeout_s``."""
        with self._idle:
            self._waiting.clear()
            if self._running or self._forking:
                self._send({"op": "kill"})
            return self._idle.wait_for(lambda: not self._running and not self._forking, timeout_s)

    def close(self) -> None:
        """Ends the workers and the fork server."""
        with self._lock:
            closed, self._closed = self._closed, True
            pids = list(self._running)
        if closed or self._channel is None:
            return
        for pid in pids:
            kill_group(pid)
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)  # the fork server sees it, kills what is left, and ends
        self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(5)
        elif self._pid is not None:
            wait_gone([self._pid], 2)

    def _send_waiting(self) -> None:
        for command in self._waiting:
            self._forking.add(command.token)
            fields = {"token": command.token, "argv": command.argv, "env": dict(command.env), "log": str(command.log)}
            self._send({"op": "fork", **fields})
        self._waiting.clear()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            assert self._channel is not None
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            _log.debug("the fork server is gone; its reader reports that")

    def _read(self, channel: socket.socket) -> None:
        buffer = b""
        try:
            while received := channel.recv(1 << 16):
                *lines, buffer = (buffer + received).split(b"\n")
                for line in lines:
                    self._handle(json.loads(line))
        except OSError as error:
            _log.debug("lost the fork server: %s", error)
        self._handle_loss()

    def _handle(self, message: dict[str, Any]) -> None:
        with self._idle:
            if message["event"] == "ready":
                self._ready, self._pid = True, message["pid"]
                self._send_waiting()
            elif message["event"] == "started":
                self._forking.discard(message["token"])
                self._running[message["pid"]] = message["token"]
            else:
                ended = _worker_exit(self._running.pop(message["pid"]), message["pid"], message["status"])
                self._idle.notify_all()
                self._deliver(ended)
                return
        self._deliver(message)

    def _handle_loss(self) -> None:
        """Workers die with the fork server (the kernel sees to it): nobody is left to say how they ended."""
        with self._idle:
            self._ready, self._pid = False, None
            wait_gone(self._running, _LOSS_TIMEOUT_S)
            workers = [*self._running.items(), *((0, token) for token in self._forking)]
            exits = tuple(_worker_exit(token, pid, signal.SIGKILL) for pid, token in workers)
            self._running.clear()
            self._forking.clear()
            self._idle.notify_all()
            closed = self._closed
        if not closed:
            self._deliver(PoolLost(exits))


def modules_to_preload(more: Sequence[str]) -> list[str]:
    """Returns what a fork server imports: the usual modules and ``more``; nothing if ``none`` is among them."""
    return [] if NO_PRELOAD in more else [*DEFAULT_PRELOAD, *more]


def pool_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of the fork server and, through it, of every worker."""
    kept = {name: value for name, value in env.items() if name != PROTOBUF_VARIABLE}
    kept.setdefault("OMP_NUM_THREADS", "1")
    # Counting devices through CUDA itself would start a driver context, which no forked child can use.
    kept.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return kept


def _worker_exit(token: str, pid: int, status: int) -> WorkerExit:
    if os.WIFSIGNALED(status):
        return WorkerExit(token, pid, None, signal.Signals(os.WTERMSIG(status)).name)
    return WorkerExit(token, pid, os.WEXITSTATUS(status), None)
