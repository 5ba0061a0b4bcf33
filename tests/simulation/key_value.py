"""A simulated key-value store: linearizable, with leases, behind a network that loses questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_gemini.controlplane.kv.base import KeyChange, KeyValue, StoreUnavailableError, WatchCallback
from tests.simulation.network import Network
from tests.simulation.scheduler import Process, Scheduler, this_process

TIMEOUT_S = 2.0
_RECONNECT_S = 0.2
_EXPIRY_LAG_S = 0.5
_REFUSED_CHANCE = 0.8


@dataclass(slots=True)
class Lease:
    """A lease and the keys below it."""

    id: int
    ttl_s: float
    expires_s: float
    keys: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with the lease that it is under."""

    entry: KeyValue
    lease: int | None


class KeyValueServer:
    """The store itself; it loses nothing when it is down, and gives every lease its full time when it is back.

    Attributes:
        up: Whether it answers.
        forgetful: Chance that an answer is lost although the question was served.
        observe: Told of every write: writer, key, the change.
    """

    def __init__(self, scheduler: Scheduler, network: Network) -> None:
        self.scheduler, self.network = scheduler, network
        self.silent = False
        self.up, self.forgetful = True, 0.0
        self.revision = 0
        self.keys: dict[str, StoredKey] = {}
        self.log: list[KeyChange] = []
        self.watches: list[Watch] = []
        self.observe: Callable[[Process | None, str, KeyValue | None], None] = lambda writer, key, now: None
        self._leases: dict[int, Lease] = {}
        self._next_lease = 0

    def __repr__(self) -> str:
        return "the store"

    def stop(self) -> None:
        """Answers nobody from now on."""
        self.up = False

    def start(self) -> None:
        """Answers again."""
        self.up = True
        for lease in self._leases.values():
            self._extend(lease)

    # -- requests, served at one instant each --------------------------------------------------------------------------

    def put(self, writer: Process, key: str, value: str, lease: int | None = None) -> None:
        if lease is not None and lease not in self._leases:
            raise StoreUnavailableError(f"requested lease not found: {lease}")
        before = self.keys.get(key)
        if before is not None and before.lease is not None and before.lease in self._leases:
            self._leases[before.lease].keys.discard(key)
        self.revision += 1
        created = self.revision if before is None else before.entry.create_revision
        entry = KeyValue(key, value, created)
        self.keys[key] = StoredKey(entry, lease)
        if lease is not None:
            self._leases[lease].keys.add(key)
        self.observe(writer, key, entry)
        self._publish(KeyChange(key, entry))

    def put_if_absent(self, writer: Process, key: str, value: str, lease: int | None = None) -> int | None:
        if key in self.keys:
            return None
        self.put(writer, key, value, lease)
        return self.revision

    def put_guarded(self, writer: Process, key: str, value: str, guard: str, guard_revision: int) -> bool:
        held = self.keys.get(guard)
        if held is None or held.entry.create_revision != guard_revision:
            return False
        self.put(writer, key, value)
        return True

    def get(self, _: Process, key: str) -> KeyValue | None:
        found = self.keys.get(key)
        return None if found is None else found.entry

    def get_prefix(self, _: Process, prefix: str) -> list[KeyValue]:
        return [stored.entry for key, stored in sorted(self.keys.items()) if key.startswith(prefix)]

    def delete(self, writer: Process | None, key: str) -> bool:
        stored = self.keys.pop(key, None)
        if stored is None:
            return False
        if stored.lease is not None and stored.lease in self._leases:
            self._leases[stored.lease].keys.discard(key)
        self.revision += 1
        self.observe(writer, key, None)
        self._publish(KeyChange(key, None))
        return True

    def grant(self, _: Process, ttl_s: int) -> int:
        self._next_lease += 1
        lease = self._leases[self._next_lease] = Lease(self._next_lease, ttl_s, 0.0)
        self._extend(lease)
        return lease.id

    def keep_alive(self, _: Process, lease: int) -> bool:
        if lease not in self._leases:
            return False
        self._extend(self._leases[lease])
        return True

    def revoke(self, _: Process, lease: int) -> None:
        self._end_lease(lease)

    def _extend(self, lease: Lease) -> None:
        lag_s = self.scheduler.random.random() * _EXPIRY_LAG_S
        lease.expires_s = self.scheduler.now + lease.ttl_s + lag_s
        self.scheduler.call(lease.ttl_s + lag_s + 1e-6, self._expire, lease)

    def _expire(self, lease: Lease) -> None:
        if self.up and lease.expires_s <= self.scheduler.now:
            self._end_lease(lease.id)

    def _end_lease(self, number: int) -> None:
        lease = self._leases.pop(number, None)
        for key in sorted(lease.keys) if lease is not None else ():
            self.delete(None, key)

    def _publish(self, change: KeyChange) -> None:
        self.log.append(change)
        for watch in self.watches:
            watch.announce()


class Watch:
    """Delivers changes below a prefix to a thread of the process that watches; after a cut, the differences."""

    def __init__(self, server: KeyValueServer, process: Process, prefix: str, callback: WatchCallback) -> None:
        self._server, self._process, self._prefix, self._callback = server, process, prefix, callback
        self._position = 0
        self._closed = self._scheduled = self._cut = False
        self._first = True
        self._arrived: list[Sequence[KeyChange]] = []
        self._fiber = server.scheduler.spawn(process, self._run, f"{process.name}/watch")
        self._resting = False

    def close(self) -> None:
        self._closed = True
        if self in self._server.watches:
            self._server.watches.remove(self)

    def announce(self) -> None:
        """There is something new; it is on its way soon."""
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._server.scheduler.call(self._delay_s(), self._arrive)

    def _delay_s(self) -> float:
        return self._server.network.delay_s(self._server, self._process.machine)

    def _arrive(self) -> None:
        if self._closed or not self._process.alive:
            return
        server, machine = self._server, self._process.machine
        if not server.up or not server.network.reachable(server, machine):
            self._cut = True
            server.scheduler.call(_RECONNECT_S * (0.5 + server.scheduler.random.random()), self._arrive)
            return
        self._scheduled = False
        changes, self._position = server.log[self._position :], len(server.log)
        if self._cut:  # the stream was lost: what is there now is read, and what was in between is never seen
            self._cut = False
            changes = list({change.key: change for change in changes}.values())
        self._arrived.append([change for change in changes if change.key.startswith(self._prefix)])
        if self._resting:
            self._resting = False
            server.scheduler.wake(self._fiber)

    def _run(self) -> None:
        self._position = len(self._server.log)
        self._server.watches.append(self)
        self._scheduled = True
        self._server.scheduler.call(self._delay_s(), self._catch_up)
        while not self._closed:
            while self._arrived:
                changes = self._arrived.pop(0)
                if changes or self._first:
                    self._first = False
                    self._callback(changes)
            self._resting = True
            self._server.scheduler.block()

    def _catch_up(self) -> None:
        """The first delivery: everything that exists."""
        server = self._server
        if not server.up or not server.network.reachable(server, self._process.machine):
            server.scheduler.call(_RECONNECT_S, self._catch_up)
            return
        self._scheduled = False
        self._position = len(server.log)
        found = [KeyChange(entry.key, entry) for entry in server.get_prefix(self._process, self._prefix)]
        self._arrived.append(found)
        if self._resting:
            self._resting = False
            server.scheduler.wake(self._fiber)


class SimulatedKeyValueStore:
    """A client of one process; keeps the promises of `KeyValueStore`."""

    def __init__(self, server: KeyValueServer) -> None:
        self._server = server
        self._watches: list[Watch] = []

    def put(self, key: str, value: str, lease: int | None = None) -> None:
        self._ask(self._server.put, key, value, lease)

    def put_if_absent(self, key: str, value: str, lease: int | None = None) -> int | None:
        return self._ask(self._server.put_if_absent, key, value, lease)

    def put_guarded(self, key: str, value: str, guard: str, guard_revision: int) -> bool:
        return self._ask(self._server.put_guarded, key, value, guard, guard_revision)

    def get(self, key: str) -> KeyValue | None:
        return self._ask(self._server.get, key)

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        return self._ask(self._server.get_prefix, prefix)

    def delete(self, key: str) -> bool:
        return self._ask(self._server.delete, key)

    def grant(self, ttl_s: int) -> int:
        return self._ask(self._server.grant, ttl_s)

    def keep_alive(self, lease: int) -> bool:
        return self._ask(self._server.keep_alive, lease)

    def revoke(self, lease: int) -> None:
        self._ask(self._server.revoke, lease)

    def watch_prefix(self, prefix: str, callback: WatchCallback) -> Watch:
        watch = Watch(self._server, this_process(), prefix, callback)
        self._watches.append(watch)
        return watch

    def close(self) -> None:
        for watch in self._watches:
            watch.close()

    def _ask(self, serve: Callable[..., Any], *arguments: Any) -> Any:
        """One question and its answer; both travel even if the process that asked is gone or has given up."""
        scheduler = self._server.scheduler
        fiber, process = scheduler.current, this_process()
        assert fiber is not None
        question = _Question(self._server, process, serve, arguments)
        question.fiber, question.token = fiber, fiber.token
        question.travel()
        answered = scheduler.block(TIMEOUT_S)
        if answered is not question:
            raise StoreUnavailableError(f"the store did not answer {serve.__name__} within {TIMEOUT_S} s")
        if isinstance(question.answer, Exception):
            raise question.answer
        return question.answer


class _Question:
    """A request on its way, and its answer on the way back."""

    __slots__ = ("_arguments", "_process", "_serve", "_server", "answer", "fiber", "token")

    def __init__(self, server: KeyValueServer, process: Process, serve: Callable[..., Any], arguments: Any) -> None:
        self._server, self._process, self._serve, self._arguments = server, process, serve, arguments
        self.answer: Any = None

    def travel(self) -> None:
        server = self._server
        until_s = server.network.blocked_until(self._process.machine, server)
        if until_s:  # TCP tries again when the cut is over: the question may come very late
            delay_s = until_s - server.scheduler.now + server.network.latency_s
            if server.scheduler.random.random() < 0.5:
                server.scheduler.call(delay_s, self._arrive)
            return
        server.scheduler.call(server.network.delay_s(self._process.machine, server), self._arrive)

    def _arrive(self) -> None:
        server = self._server
        if not server.up:
            if server.scheduler.random.random() < _REFUSED_CHANCE:
                self.answer = StoreUnavailableError("connection refused")
                server.scheduler.call(server.network.latency_s, self._return)
            return
        try:
            self.answer = self._serve(self._process, *self._arguments)
        except StoreUnavailableError as error:
            self.answer = error
        lost = server.forgetful and server.scheduler.random.random() < server.forgetful
        if lost or server.network.blocked_until(server, self._process.machine):
            return
        server.scheduler.call(server.network.delay_s(server, self._process.machine), self._return)

    def _return(self) -> None:
        if self.fiber.token == self.token:
            self._server.scheduler.wake(self.fiber, self)
