"""One end of a link, in a process of its own.

``serve HOST`` serves until its input ends, and says when nobody sends a shard any more; ``measure HOST PORT`` prints
what it measured; ``begin HOST PORT`` begins to send a shard, says so, and falls silent; ``meet HOST PORT ROLE`` sends
8 MiB while the other end does, and prints, every few milliseconds, what is unacknowledged and what of it is still
queued on this machine.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane import wire
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.pacer import Underway
from lightning_gemini.dataplane.store import ShardStore
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.transport.paced_stream import underway
from lightning_gemini.dataplane.transport.replica_server import ReplicaServer
from lightning_gemini.dataplane.wire import Frame, Kind
from tests.dataplane.machines import JOB, SECRET
from tests.dataplane.waiting import wait_until

SIZE = 1 << 20
MEETING_BYTES = 8 << 20


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
    found = [transport.measure(quantity) for quantity in (Quantity.BANDWIDTH, Quantity.STARTUP)]
    transport.close()
    print(json.dumps(found), flush=True)


def meet(host: str, port: int, role: str) -> None:
    if role == "listen":
        with socket.create_server((host, port)) as listener:
            print("listening", flush=True)
            sock, _ = listener.accept()
    else:
        sock = socket.create_connection((host, port), timeout=10.0)
    with sock:
        sock.sendall(b"?")  # both are there: nobody begins alone
        sock.recv(1)
        reader = threading.Thread(target=wire.receive_into, args=(sock, memoryview(bytearray(MEETING_BYTES))))
        writer = threading.Thread(target=sock.sendall, args=(bytes(MEETING_BYTES),))
        reader.start()
        writer.start()
        found: list[Underway] = []
        while writer.is_alive() or not found or found[-1].in_flight_bytes:
            time.sleep(0.002)
            found.append(underway(sock))
        reader.join()
    print(json.dumps(found), flush=True)


def begin(host: str, port: int) -> None:
    with wire.connect((host, port), JOB, SECRET, 0, timeout_s=10.0) as sock:
        wire.send(sock, Frame(Kind.BEGIN, 0, VersionId(1, 1), SIZE, SIZE, sender_generation=1))
        assert wire.receive(sock).kind is Kind.WANT
        wire.send(sock, Frame(Kind.CHUNK, 0, VersionId(1, 1), 0, 0, SIZE), bytes(SIZE // 2))
        print("begun", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[4:] == ["impatient"]:  # the kernel
        wire.DEAD_AFTER_S, wire._BETWEEN_PROBES_S, wire._PROBES = 2, 1, 1  # type: ignore[misc]
    act, host, *port = sys.argv[1:4]
    if act == "serve":
        serve(host)
    elif act == "meet":
        meet(host, int(port[0]), sys.argv[4])
    else:
        {"measure": measure, "begin": begin}[act](host, int(port[0]))
