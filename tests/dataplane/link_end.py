"""One end of a link, in a process of its own: serves until its input ends, or measures and prints what it found."""

from __future__ import annotations

import json
import sys

from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer
from tests.dataplane.machines import JOB, SECRET


def serve(host: str) -> None:
    server = ReplicaServer(host, JOB, SECRET, ShardStore(1))
    server.start()
    print(server.address[1], flush=True)
    sys.stdin.read()
    server.close()


def measure(host: str, port: int) -> None:
    transport = TcpTransport(Peer(1, (host, port)), JOB, SECRET, 0, 1)
    found = transport.measure()
    transport.close()
    print(json.dumps([found.bandwidth_bytes_per_s, found.startup_s]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        measure(sys.argv[2], int(sys.argv[3]))
