"""One end of a link, in a process of its own.

``serve HOST`` serves until its input ends, and says when nobody sends a shard any more; ``measure HOST PORT`` prints
what it measured; ``begin HOST PORT`` begins to send a shard, says so, and falls silent.
"""

from __future__ import annotations

import json
import sys

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer
from lightning_gemini.dataplane.wire import Frame, Kind
from tests.dataplane.machines import JOB, SECRET
from tests.dataplane.waiting import wait_until

SIZE = 1 << 20


def serve(host: str) -> None:
    store = ShardStore(1)
    store.enter_generation(1, 2, 1)
    store.set_replication(2, "mixed")
    server = ReplicaServer(host, JOB, SECRET, store)
    server.start()
    print(server.address[1], flush=True)
    if sys.stdin.readline():
        wait_until(lambda: not server._connections and not store.writer(0).locked(), "the sender is given up")
        print("given up", flush=True)
    server.close()


def measure(host: str, port: int) -> None:
    transport = TcpTransport(Peer(1, (host, port)), JOB, SECRET, 0, 1)
    found = transport.measure()
    transport.close()
    print(json.dumps([found.bandwidth_bytes_per_s, found.startup_s]), flush=True)


def begin(host: str, port: int) -> None:
    with wire.connect((host, port), JOB, SECRET, 0, timeout_s=10.0) as sock:
        wire.send(sock, Frame(Kind.BEGIN, 0, VersionId(1, 1), SIZE, SIZE, sender_generation=1))
        assert wire.receive(sock).kind is Kind.WANT
        wire.send(sock, Frame(Kind.CHUNK, 0, VersionId(1, 1), 0, 0, SIZE), bytes(SIZE // 2))
        print("begun", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    if len(sys.argv) > 4:  # an impatient kernel
        wire.DEAD_AFTER_S, wire._BETWEEN_PROBES_S, wire._PROBES = 2, 1, 1  # type: ignore[misc]
    act, host, *port = sys.argv[1:4]
    if act == "serve":
        serve(host)
    else:
        {"measure": measure, "begin": begin}[act](host, int(port[0]))
