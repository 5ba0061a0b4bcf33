"""A stand-in for the module ``socket``: streams between simulated processes, TCP and unix."""

from __future__ import annotations

import itertools
import socket as real_socket
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tests.simulation import memory
from tests.simulation.scheduler import Active, Fiber, Process, this_process

_serials = itertools.count(1)
CONNECT_TIMEOUT_S = 5.0


class Endpoint:
    """One end of a connection, as the kernel keeps it; handles of several processes may refer to it."""

    def __init__(self, process: Process) -> None:
        self.machine = process.machine
        self.peer: Endpoint | None = None
        self.received: deque[tuple[bytes, Sequence[int]]] = deque()
        self.in_flight: deque[tuple[bytes, Sequence[int]] | None] = deque()
        self.ended = False  # the peer will say nothing more
        self.shut = False  # this side wants nothing more
        self.broken = False
        self.readers: list[Fiber] = []
        self.handles = 0
        self._last_arrival_s = 0.0

    def send(self, item: tuple[bytes, Sequence[int]] | None) -> None:
        """Puts data, or the end of it, on its way to the peer."""
        network, scheduler, peer = self.machine.network, Active.scheduler, self.peer
        assert peer is not None
        peer.in_flight.append(item)
        size = len(item[0]) if item else 0
        arrival_s = scheduler.now + network.delay_s(self.machine, peer.machine, size)
        peer._last_arrival_s = max(peer._last_arrival_s, arrival_s)
        scheduler.call(peer._last_arrival_s - scheduler.now, peer.arrive)

    def arrive(self) -> None:
        """The oldest thing on its way is here, unless the network holds it."""
        peer, scheduler = self.peer, Active.scheduler
        assert peer is not None
        until_s = self.machine.network.blocked_until(peer.machine, self.machine)
        if until_s:
            scheduler.call(until_s - scheduler.now + self.machine.network.latency_s, self.arrive)
            return
        item = self.in_flight.popleft()
        if item is None:
            self.ended = True
        elif self.handles and not self.broken:
            self.received.append(item)
        elif not self.machine.silent:  # nobody is here any more: the sender is told so
            peer.break_off()
            return
        self.notify()

    def break_off(self) -> None:
        """The connection is gone: whoever uses this end gets an error."""
        if self.handles:
            self.broken = True
            self.notify()

    def shut_down(self) -> None:
        """``shutdown(SHUT_RDWR)``."""
        if not self.shut:
            self.shut = True
            if not self.machine.silent and not self.broken:
                self.send(None)
            self.notify()

    def notify(self) -> None:
        readers, self.readers = self.readers, []
        for fiber in readers:
            Active.scheduler.wake(fiber)


class Listener:
    """A socket that accepts."""

    def __init__(self) -> None:
        self.backlog: deque[Endpoint] = deque()
        self.waiting: list[Fiber] = []
        self.closed = False


class Socket:
    """A handle on an endpoint or a listener."""

    def __init__(self, family: int = real_socket.AF_INET, kind: int = real_socket.SOCK_STREAM, *_: Any) -> None:
        self._process = this_process()
        self._serial = next(_serials)
        self._endpoint: Endpoint | None = None
        self._listener: Listener | None = None
        self._address: Any = None
        self._timeout_s: float | None = None
        self._closed = False

    def __hash__(self) -> int:  # sets of sockets must be in the same order in every run
        return self._serial

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- connecting ----------------------------------------------------------------------------------------------------

    def attach(self, endpoint: Endpoint) -> Socket:
        self._endpoint = endpoint
        endpoint.handles += 1
        self._process.sockets[self._serial] = self
        return self

    def listen_at(self, address: Any) -> Socket:
        self._listener, self._address = Listener(), address
        self._process.machine.listeners[address] = self
        self._process.sockets[self._serial] = self
        return self

    def connect(self, address: str) -> None:
        _connect(self, self._process.machine, address, self._timeout_s)

    def connect_ex(self, address: str) -> int:
        try:
            self.connect(address)
        except OSError as error:
            return error.errno or 1
        return 0

    def accept(self) -> tuple[Socket, Any]:
        listener = self._listener
        assert listener is not None
        while not listener.backlog:
            if listener.closed:
                raise OSError(9, "the listener is closed")
            fiber = Active.scheduler.current
            assert fiber is not None
            listener.waiting.append(fiber)
            Active.scheduler.block()
        endpoint = listener.backlog.popleft()
        handle = Socket().attach(endpoint)
        endpoint.handles -= 1  # the backlog's
        return handle, None

    # -- talking -------------------------------------------------------------------------------------------------------

    def sendall(self, data: Any) -> None:
        if len(data):
            self.sendmsg([data])

    def sendmsg(self, parts: Sequence[Any], ancillary: Sequence[Any] = ()) -> int:
        endpoint = self._open()
        if endpoint.broken or endpoint.shut:
            raise BrokenPipeError(32, "Broken pipe")
        data = b"".join(bytes(part) for part in parts)
        descriptors = [memory.duplicate(fd) for _, _, fds in ancillary for fd in fds]
        endpoint.send((data, descriptors))
        return len(data)

    def recv(self, size: int) -> bytes:
        return self._take(size)[0]

    def recv_into(self, target: memoryview) -> int:
        data, _ = self._take(len(target))
        target[: len(data)] = data
        return len(data)

    def receive(self, size: int) -> tuple[bytes, Sequence[int]]:
        return self._take(size)

    def _take(self, size: int) -> tuple[bytes, Sequence[int]]:
        endpoint, scheduler = self._open(), Active.scheduler
        deadline = None if self._timeout_s is None else scheduler.now + self._timeout_s
        while not endpoint.received:
            if endpoint.broken:
                raise ConnectionResetError(104, "Connection reset by peer")
            if endpoint.ended or endpoint.shut:
                return b"", ()
            left = None if deadline is None else deadline - scheduler.now
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            fiber = scheduler.current
            assert fiber is not None
            endpoint.readers.append(fiber)
            scheduler.block(left)
            if fiber in endpoint.readers:
                endpoint.readers.remove(fiber)
            if self._closed:
                raise OSError(9, "Bad file descriptor")
        data, descriptors = endpoint.received.popleft()
        if len(data) > size:
            endpoint.received.appendleft((data[size:], ()))
        return data[:size], descriptors

    # -- the rest ------------------------------------------------------------------------------------------------------

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s

    def setsockopt(self, *_: Any) -> None:
        self._open()

    def getpeername(self) -> tuple[str, int]:
        endpoint = self._open()
        if endpoint.broken or endpoint.peer is None:
            raise OSError(107, "Transport endpoint is not connected")
        return endpoint.peer.machine.host, 0

    def getsockname(self) -> Any:
        return self._address

    def fileno(self) -> int:
        return self._serial

    def shutdown(self, _: int = 2) -> None:
        if self._listener is not None:
            self._close_listener(self._listener)
        elif self._closed:
            raise OSError(9, "Bad file descriptor")
        elif self._endpoint is not None:
            self._endpoint.shut_down()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._process.sockets.pop(self._serial, None)
        if self._listener is not None:
            self._close_listener(self._listener)
        if self._endpoint is not None:
            self._endpoint.handles -= 1
            if not self._endpoint.handles:
                self._endpoint.shut_down()

    def _close_listener(self, listener: Listener) -> None:
        listener.closed = True
        if self._process.machine.listeners.get(self._address) is self:
            del self._process.machine.listeners[self._address]
        for fiber in listener.waiting:
            Active.scheduler.wake(fiber)
        for endpoint in listener.backlog:
            assert endpoint.peer is not None
            endpoint.handles = 0
            if not self._process.machine.silent:
                endpoint.peer.break_off()

    def _open(self) -> Endpoint:
        if self._closed or self._endpoint is None:
            raise OSError(9, "Bad file descriptor")
        return self._endpoint


def close_all(process: Process) -> None:
    """What the kernel does when a process ends."""
    for handle in list(process.sockets.values()):
        handle.close()


def pair() -> tuple[Socket, Socket]:
    """``socketpair``."""
    process = this_process()
    one, other = Endpoint(process), Endpoint(process)
    one.peer, other.peer = other, one
    return Socket().attach(one), Socket().attach(other)


def inherit(handle: Socket, process: Process) -> Socket:
    """The same end in a child process."""
    assert handle._endpoint is not None
    copy = Socket()
    copy._process = process
    return copy.attach(handle._endpoint)


def _connect(handle: Socket, machine: Any, address: Any, timeout_s: float | None) -> None:
    """Connects to a listener on ``machine``: refused where nobody listens, silence where nothing gets through."""
    scheduler, here = Active.scheduler, handle._process.machine
    network = here.network
    scheduler.sleep(network.delay_s(here, machine) + network.delay_s(machine, here))
    if machine is not here and (machine.silent or not network.reachable(here, machine)):
        scheduler.sleep(timeout_s or CONNECT_TIMEOUT_S)
        raise TimeoutError("timed out")
    listening = machine.listeners.get(address)
    if listening is None:
        raise ConnectionRefusedError(111, "Connection refused")
    mine, theirs = Endpoint(handle._process), Endpoint(listening._process)
    mine.peer, theirs.peer = theirs, mine
    theirs.handles += 1  # the backlog's, until somebody accepts
    handle.attach(mine)
    listening._listener.backlog.append(theirs)
    for fiber in listening._listener.waiting:
        scheduler.wake(fiber)
    listening._listener.waiting.clear()


def _create_connection(address: tuple[str, int], timeout: float | None = None) -> Socket:
    handle = Socket()
    handle.settimeout(timeout)
    machine = handle._process.machine.cluster.machine_at(address[0])
    _connect(handle, machine, address, timeout)
    return handle


def _create_server(address: tuple[str, int], **_: Any) -> Socket:
    machine = this_process().machine
    return Socket().listen_at((machine.host, address[1] or machine.free_port()))


def _recv_fds(handle: Socket, size: int, _: int) -> tuple[bytes, list[int], int, None]:
    data, descriptors = handle.receive(size)
    return data, list(descriptors), 0, None


socket = SimpleNamespace(
    AF_INET=real_socket.AF_INET,
    AF_UNIX=real_socket.AF_UNIX,
    IPPROTO_TCP=real_socket.IPPROTO_TCP,
    SCM_RIGHTS=real_socket.SCM_RIGHTS,
    SHUT_RDWR=real_socket.SHUT_RDWR,
    SOCK_STREAM=real_socket.SOCK_STREAM,
    SOL_SOCKET=real_socket.SOL_SOCKET,
    SO_KEEPALIVE=real_socket.SO_KEEPALIVE,
    TCP_KEEPCNT=real_socket.TCP_KEEPCNT,
    TCP_KEEPIDLE=real_socket.TCP_KEEPIDLE,
    TCP_KEEPINTVL=real_socket.TCP_KEEPINTVL,
    TCP_NODELAY=real_socket.TCP_NODELAY,
    create_connection=_create_connection,
    create_server=_create_server,
    recv_fds=_recv_fds,
    socket=Socket,
    socketpair=pair,
)
