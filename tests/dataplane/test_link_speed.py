"""How fast links are, measured on real ones: loopback, and cables that a token bucket limits."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.controlplane.link_survey import LinkSurvey
from lightning_gemini.dataplane import link_speed, wire
from lightning_gemini.dataplane.link_speed import Quantity
from lightning_gemini.dataplane.transport import Peer, TcpTransport
from lightning_gemini.dataplane.wire import Frame, Kind
from lightning_gemini.errors import ProtocolError
from tests.dataplane.machines import JOB, SECRET, Machine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast link is known after less: these tests are about the rest."""
    monkeypatch.setattr(link_speed, "_ENOUGH_BYTES", 1 << 20)
    monkeypatch.setattr(link_speed, "_ENOUGH_S", 0.0)


def test_a_fast_link_is_measured_without_much_traffic() -> None:
    with Machine(1) as holder, Machine(0) as sender:
        transport = sender.transport_to(holder.peer)
        sent = []
        real = wire.send
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                wire, "send", lambda sock, frame, payload=b"": (sent.append(len(payload)), real(sock, frame, payload))
            )
            bandwidth = transport.measure(Quantity.BANDWIDTH)
            assert 0 < transport.measure(Quantity.STARTUP) < 0.1
        transport.close()
    assert bandwidth > 10e6
    assert sum(sent) < 4 * max(link_speed._ENOUGH_BYTES, bandwidth * link_speed._ENOUGH_S)
    assert max(sent) <= link_speed._LARGEST_PROBE_BYTES <= wire.MAX_PROBE_BYTES


@pytest.mark.usefixtures("quick")
def test_a_connection_that_was_measured_carries_shards_as_before() -> None:
    with Machine(1) as holder, Machine(0) as sender:
        transport = sender.transport_to(holder.peer)
        transport.measure(Quantity.STARTUP)
        transport.measure(Quantity.BANDWIDTH)
        with pytest.raises(ProtocolError, match="refused"):
            transport.fetch(0, wire._NO_VERSION, sender.retrieval(0, wire._NO_VERSION))
        transport.measure(Quantity.STARTUP)
        transport.close()


@given(rate=st.floats(1e5, 1e10), burst=st.integers(0, 10**7), count=st.integers(2, 200))
def test_what_a_burst_lets_through_is_not_taken_for_the_rate(rate: float, burst: int, count: int) -> None:
    """A bucket that holds ``burst`` bytes at first, and then ``rate``: after half the time it is empty."""
    step_s = 0.8 / count
    arrivals = [(0.0, 0)]
    for index in range(1, count + 1):
        now_s = index * step_s
        through = burst + rate * now_s if now_s > 0.2 else (burst + rate * 0.2) * now_s / 0.2
        arrivals.append((now_s, int(through)))
    if count >= 8:
        assert link_speed._rate(arrivals) == pytest.approx(rate, rel=0.01, abs=1000 * count)
    else:
        assert link_speed._rate(arrivals) > 0


class OddPeer:
    """A peer that lets everybody in and answers a probe with a frame of its own, or hangs up."""

    def __init__(self, answer: Frame | None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve, args=(answer,))
        self.thread.start()
        self.peer = Peer(1, self.listener.getsockname())

    def _serve(self, answer: Frame | None) -> None:
        sock, _ = self.listener.accept()
        with sock, contextlib.suppress(OSError, EOFError):
            wire.accept(sock, JOB, SECRET, timeout_s=10.0)
            wire.receive(sock)
            sock.recv(1)
            if answer is not None:
                wire.send(sock, answer)
                sock.recv(1 << 20)

    def close(self) -> None:
        self.thread.join(10.0)
        self.listener.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(None, "closed the connection while the link was measured"), (Frame(Kind.HAVE), "was answered HAVE")],
    ids=["nothing", "something else"],
)
def test_a_probe_that_is_not_answered_is_an_error(answer: Frame | None, message: str) -> None:
    server = OddPeer(answer)
    transport = TcpTransport(server.peer, JOB, SECRET, 0, 1)
    with pytest.raises(OSError, match=message):
        transport.measure(Quantity.STARTUP)
    transport.close()
    server.close()


# -- all links of a machine --------------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Machine(rank, 3)) for rank in range(3)]


@pytest.mark.usefixtures("quick")
def test_links_are_measured_side_by_side_and_once(machines: list[Machine]) -> None:
    together = threading.Barrier(2)
    measured: list[int] = []

    class Meeting(TcpTransport):
        def measure(self, quantity: Quantity) -> float:
            together.wait(10.0)
            measured.append(self._peer.machine)
            return super().measure(quantity)

    survey = LinkSurvey(lambda peer: Meeting(peer, JOB, SECRET, 0, 1))
    peers = [machines[1].peer, machines[2].peer]
    first = survey.measure(peers, Quantity.STARTUP)
    assert sorted(first) == sorted(measured) == [1, 2]
    assert survey.measure(peers, Quantity.STARTUP) == first
    assert survey.measure(peers[1:], Quantity.STARTUP) == {2: first[2]}
    assert len(measured) == 2
    survey.measure(peers, Quantity.STARTUP, again=True)
    assert sorted(measured) == [1, 1, 2, 2]
    assert survey.measure(peers, Quantity.BANDWIDTH) != first
    assert sorted(measured) == [1, 1, 1, 2, 2, 2]


@pytest.mark.usefixtures("quick")
def test_a_link_that_cannot_be_measured_is_left_out(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_gemini.controlplane.link_survey._PATIENCE_S", 0.2)
    machines[2].server.close()
    survey = LinkSurvey(machines[0].transport_to)
    assert list(survey.measure([machines[1].peer, machines[2].peer], Quantity.STARTUP)) == [1]
    assert "cannot measure the link to machine 2" in caplog.text
