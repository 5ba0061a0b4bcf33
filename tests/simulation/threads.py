"""Stand-ins for the modules ``threading``, ``queue`` and ``time``."""

from __future__ import annotations

import queue as real_queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from tests.simulation.scheduler import Active, Fiber

EPOCH_S = 1_700_000_000.0


class Lock:
    """``threading.Lock``; acquiring is a place where another thread may run first."""

    __slots__ = ("_count", "_owner", "_waiting")
    reentrant = False

    def __init__(self) -> None:
        self._owner: Fiber | None = None
        self._count = 0
        self._waiting: deque[Fiber] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler = Active.scheduler
        scheduler.preempt()
        fiber = scheduler.current
        if self._owner is None or (self.reentrant and self._owner is fiber):
            self._owner, self._count = fiber, self._count + 1
            return True
        if not blocking:
            return False
        assert fiber is not None
        self._waiting.append(fiber)
        scheduler.block(None if timeout < 0 else timeout)
        if self._owner is fiber:  # handed over, perhaps in the very moment in which the time was up
            return True
        self._waiting.remove(fiber)
        return False

    def release(self) -> None:
        self._count -= 1
        if self._count:
            return
        self._owner = self._waiting.popleft() if self._waiting else None
        if self._owner is not None:
            self._count = 1
            Active.scheduler.wake(self._owner)

    def locked(self) -> bool:
        return self._owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    """``threading.RLock``."""

    __slots__ = ()
    reentrant = True


class Condition:
    """``threading.Condition``."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = lock or RLock()
        self._waiting: list[Fiber] = []

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        scheduler = Active.scheduler
        fiber = scheduler.current
        assert fiber is not None
        held, self._lock._count = self._lock._count, 1
        self._waiting.append(fiber)
        self._lock.release()
        scheduler.block(timeout)
        notified = fiber not in self._waiting
        if not notified:
            self._waiting.remove(fiber)
        self._lock.acquire()
        self._lock._count = held
        return notified

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        deadline = None if timeout is None else Active.scheduler.now + timeout
        while not predicate():
            left = None if deadline is None else deadline - Active.scheduler.now
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify(self, n: int = 1) -> None:
        for fiber in self._waiting[:n]:
            self._waiting.remove(fiber)
            Active.scheduler.wake(fiber)

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """``threading.Event``."""

    __slots__ = ("_set", "_waiting")

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Fiber] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            Active.scheduler.wake(fiber)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if self._set:
            return True
        fiber = Active.scheduler.current
        assert fiber is not None
        self._waiting.append(fiber)
        Active.scheduler.block(timeout)
        if fiber in self._waiting:
            self._waiting.remove(fiber)
        return self._set


class SimpleQueue:
    """``queue.SimpleQueue``."""

    __slots__ = ("_items", "_waiting")

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiting: deque[Fiber] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiting:
            Active.scheduler.wake(self._waiting.popleft())

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        scheduler = Active.scheduler
        deadline = None if timeout is None else scheduler.now + timeout
        while not self._items:
            left = None if deadline is None else deadline - scheduler.now
            if not block or (left is not None and left <= 0):
                raise real_queue.Empty
            fiber = scheduler.current
            assert fiber is not None
            self._waiting.append(fiber)
            scheduler.block(left)
            if fiber in self._waiting:
                self._waiting.remove(fiber)
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class Thread:
    """``threading.Thread``, of the simulated process that starts it."""

    def __init__(
        self,
        target: Callable[..., Any] | None = None,
        name: str = "thread",
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        daemon: bool | None = None,
    ) -> None:
        self._target, self.name, self.daemon = target, name, daemon
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        self._fiber: Fiber | None = None
        self._ended = Event()

    def start(self) -> None:
        scheduler = Active.scheduler
        assert scheduler.current is not None
        process = scheduler.current.process
        self._fiber = scheduler.spawn(process, self._run, f"{process.name}/{self.name}")
        self._fiber.thread = self

    def _run(self) -> None:
        try:
            self.run()
        finally:
            self._ended.set()

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._args, **self._kwargs)

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def is_alive(self) -> bool:
        return self._fiber is not None and not self._ended.is_set()


class Timer(Thread):
    """``threading.Timer``."""

    def __init__(self, interval: float, function: Callable[..., Any]) -> None:
        super().__init__(target=function, name="timer")
        self._interval = interval
        self._cancelled = Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self) -> None:
        if not self._cancelled.wait(self._interval):
            super().run()


def current_thread() -> Any:
    """``threading.current_thread``."""
    return getattr(Active.scheduler.current, "thread", None)


def _monotonic() -> float:
    return Active.scheduler.now


def _monotonic_ns() -> int:
    return int(Active.scheduler.now * 1e9)


def _time() -> float:
    """Wall clocks of machines differ."""
    scheduler = Active.scheduler
    skew_s = scheduler.current.process.machine.skew_s if scheduler.current is not None else 0.0
    return EPOCH_S + scheduler.now + skew_s


def _sleep(duration_s: float) -> None:
    Active.scheduler.block(duration_s)


threading = SimpleNamespace(
    Condition=Condition,
    Event=Event,
    Lock=Lock,
    RLock=RLock,
    Thread=Thread,
    Timer=Timer,
    current_thread=current_thread,
)
queue = SimpleNamespace(Empty=real_queue.Empty, SimpleQueue=SimpleQueue)
time = SimpleNamespace(
    monotonic=_monotonic, monotonic_ns=_monotonic_ns, perf_counter=_monotonic, sleep=_sleep, time=_time
)
