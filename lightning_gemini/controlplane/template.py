"""One process of a host that imports for all its machines: their fork servers are forked from it.

With ``--local-nodes`` many machines share a host. Importing torch, lightning and deepspeed once, and not once a
machine, saves time and memory, and a replacement machine is warm at once, as a standby machine would be.

An agent sends one message: its end of a socket pair, its network namespace and the path of its pool's log. The fork
server made for it serves that agent alone, in the agent's network, and ends when the agent does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import NoReturn

from lightning_gemini.controlplane.fork_server import preload, redirect_output, serve_agent
from lightning_gemini.controlplane.processes import die_with_parent

_MESSAGE_BYTES = 4096
_NETWORK = "/proc/self/ns/net"
_CLONE_NEWNET = 0x40000000


def request_fork_server(template: Path, channel: socket.socket, log: Path) -> bool:
    """Asks the template for a fork server; does not wait for it.

    Args:
        template: The template's socket.
        channel: The fork server's end of a socket pair; the caller closes its own descriptor of it.
        log: File for what the fork server prints.

    Returns:
        Whether there is a template.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(template))
            with open(_NETWORK, "rb") as network:
                descriptors = [channel.fileno(), network.fileno()]
                socket.send_fds(connection, [json.dumps({"log": str(log)}).encode()], descriptors)
        except OSError:
            return False
    return True


class Template:
    """Serves agents, one fork each, until it is killed.

    Args:
        path: Where it listens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def listen(self) -> None:
        """Lets agents queue up, while the imports go on."""
        mask = os.umask(0o177)
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        os.umask(mask)
        self._listener.listen(128)

    def serve(self, seconds: float, warnings: list[str]) -> NoReturn:
        """Forks for every agent that asks."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for fork servers
        while True:
            connection, _ = self._listener.accept()
            with connection:
                message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
            if len(descriptors) < 2:
                continue
            channel, network = socket.socket(fileno=descriptors[0]), descriptors[1]
            if os.fork() == 0:
                self._become_fork_server(channel, network, json.loads(message)["log"], seconds, warnings)
            channel.close()
            os.close(network)

    def _become_fork_server(
        self, channel: socket.socket, network: int, log: str, seconds: float, warnings: list[str]
    ) -> NoReturn:
        try:
            _enter_network(network)
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._listener.close()
            redirect_output(log)
            serve_agent(channel, seconds, warnings)
        finally:
            os._exit(0)


def _enter_network(descriptor: int) -> None:
    """Moves this process, while it has one thread, to a network namespace; needs root where that is another one."""
    if os.fstat(descriptor).st_ino != os.stat(_NETWORK).st_ino:
        kernel = ctypes.CDLL(None, use_errno=True)
        if kernel.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the agent's network namespace: be root")
    os.close(descriptor)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("modules", nargs="*")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    template = Template(arguments.socket)
    template.listen()
    started = time.monotonic()
    warnings = preload(arguments.modules)
    template.serve(time.monotonic() - started, warnings)


if __name__ == "__main__":
    main()
