"""A root that the store cannot hear any more, though its workers and its peers can."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_gemini.controlplane.kv.cluster import EtcdCluster
from lightning_gemini.controlplane.processes import wait_gone
from tests.cli.conftest import Run
from tests.cli.scripts import UNTIL_FILE
from tests.cli.watched import Watched

pytestmark = pytest.mark.timeout(120)
MACHINES = 4  # two, a standby, and the one that replenishes it


class Cable:
    """Carries one machine's connections to the store, until it is cut."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ends: set[socket.socket] = set()
        self.is_cut = self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            with suppress(OSError):
                near, _ = self._listener.accept()
                if self.is_cut:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                for source, sink in ((near, far), (far, near)):
                    self._ends.add(source)
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.discard(source)
        source.close()


@pytest.fixture
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path_factory.mktemp("etcd"))
    cluster.start()
    yield cluster
    cluster.close()


def test_a_root_without_the_store_is_replaced_and_ends_itself_when_it_hears_of_it(
    start: Callable[..., Run], watch: Callable[[Run], Watched], etcd: EtcdCluster, tmp_path: Path
) -> None:
    cables = [Cable(etcd.endpoint) for _ in range(MACHINES)]
    for index, cable in enumerate(cables):
        (tmp_path / f"cable{index}").write_text(f"127.0.0.1:{cable.port}")
    command = f"exec {{agent}} --etcd $(cat {tmp_path}/cable{{index}})"
    enough = tmp_path / "enough"
    run = start(UNTIL_FILE, str(enough), standby="1", operator=f"command,command='{command}'", etcd=etcd.endpoint)
    try:
        run.until_running(1)
        watched = watch(run)
        watched.standbys(1)
        root = watched.root()
        cable = cables[int(root["name"].removeprefix("machine-"))]
        cable.cut()
        run.until(lambda: (found := watched.read(watched.keys.root)) and found["name"] != root["name"])
        run.until(lambda: any(event["generation"] > 1 for event in run.events("generation_started")))
        cable.mend()
        assert not wait_gone([root["pid"]], 20), "its slot is another's"
        enough.touch()
        assert run.wait() == 0, run.output.read_text()
    finally:
        for each in cables:
            each.close()
    run.assert_nothing_left()
    starts = [event["generation"] for event in run.events("generation_started")]
    assert starts == sorted(set(starts)), "one root for each generation"
    assert watched.store.get_prefix(watched.keys.prefix) == [], "no key of the job stays in the user's etcd"
