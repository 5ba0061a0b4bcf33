"""The warm pool's process: imports the slow packages once, then forks workers that are ready in milliseconds.

A child of the agent; speaks JSON lines over an inherited socket pair. Never touches CUDA, which no fork survives.

=============================  ==================================================================
request                        meaning
=============================  ==================================================================
``fork`` token argv env log    start a worker; answered by ``started`` (token, pid)
``kill``                       SIGKILL every worker and its process group
=============================  ==================================================================

It says ``ready`` (pid, seconds, warnings) when its imports are done, and ``exited`` (pid, status) for each worker that
ends.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from lightning_gemini.controlplane.processes import die_with_parent, kill_group

DEFAULT_PRELOAD = (
    "torch",
    "lightning.pytorch",
    "deepspeed",
    "omegaconf",  # Lightning imports it for every checkpoint dictionary
    "deepspeed.runtime.zero.muon.muon_optimizer",  # deepspeed.initialize imports it: seconds, for torch's compiler
    "lightning_gemini.strategies.gemini",
    "lightning_gemini.callbacks.gemini_checkpoint",
)


class ForkServer:
    """Serves one agent until it hangs up.

    Args:
        channel: This end of the socket pair.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = b""
        self._workers: set[int] = set()
        self._wake_read, self._wake_write = os.pipe()

    def serve(self) -> None:
        """Forks and reaps until the agent closes its end, then kills what is left."""
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._channel.fileno(), self._wake_read], [], [])
            if self._wake_read in readable:
                self._drain_wakeups()
            self._reap()
            if self._channel.fileno() in readable and not self._receive():
                self._kill()
                return

    def say(self, **message: Any) -> None:
        """Sends one message to the agent."""
        self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> bool:
        received = self._channel.recv(1 << 16)
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["op"] == "fork":
                self._fork(request)
            else:
                self._kill()
        return bool(received)

    def _fork(self, request: dict[str, Any]) -> None:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_worker(parent, request)
        self._workers.add(pid)
        self.say(event="started", token=request["token"], pid=pid)

    def _become_worker(self, parent: int, request: dict[str, Any]) -> NoReturn:
        code = 1
        try:
            die_with_parent(parent)
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._channel.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            code = run_worker(request["argv"], request["env"], request["log"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._workers:
                self._workers.discard(pid)
                kill_group(pid)  # data loaders that the worker can no longer end
                self.say(event="exited", pid=pid, status=status)

    def _kill(self) -> None:
        for pid in self._workers:
            kill_group(pid)

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 512):
                pass


def run_worker(argv: list[str], env: dict[str, str], log: str) -> int:
    """Runs the user's script in this (just forked) process as ``python SCRIPT ARGS`` would have; returns its code."""
    from lightning_gemini.controlplane.script import exit_code_of, finish_interpreter, reseed, run_script

    redirect_output(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.update(env)
    reseed()
    try:
        code = exit_code_of(lambda: run_script(argv))
    finally:
        finish_interpreter()
    return code


def redirect_output(path: str) -> None:
    """Appends everything that this process prints to a file from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def preload(modules: list[str]) -> list[str]:
    """Imports ``modules``; returns a warning for each that could not be imported."""
    warnings = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            warnings.append(f"cannot preload {name}: {type(error).__name__}: {error}; workers import it themselves")
    gc.collect()
    gc.freeze()  # keeps the collector from copying the pages that workers share with this process
    return warnings


def serve_agent(channel: socket.socket, seconds: float, warnings: list[str]) -> None:
    """Serves an agent to its end, with all imports done; they took ``seconds``."""
    server = ForkServer(channel)
    try:
        server.say(event="ready", pid=os.getpid(), seconds=seconds, warnings=warnings)
        server.serve()
    except OSError:
        os._exit(1)  # the agent is gone in the middle of a message; the kernel ends the workers with this process


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("modules", nargs="*")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started = time.monotonic()
    warnings = preload(arguments.modules)
    serve_agent(socket.socket(fileno=arguments.channel), time.monotonic() - started, warnings)


if __name__ == "__main__":
    main()
