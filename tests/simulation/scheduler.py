"""Who runs next: fibers of simulated processes, one at a time, on a virtual clock and in an order drawn from a seed."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

_SLOW_WAKE_S = 0.003
_SLOW_WAKE_CHANCE = 0.03
_PREEMPTION_CHANCE = 0.05


class Fiber(greenlet):
    """A thread of a simulated process.

    Attributes:
        process: Where it runs.
        name: For people.
        token: Counts its waits, so that a late timer or wake-up of an earlier one is ignored.
    """

    def __init__(self, target: Callable[[], None], process: Process, name: str, parent: greenlet) -> None:
        super().__init__(target, parent)
        self.process, self.name, self.token = process, name, 0


class Process:
    """A simulated operating system process.

    Attributes:
        name: For people, and in the trace.
        machine: Where it runs.
        pid: Unique in the simulation.
        alive: Whether it may still run; a dead process never does anything again, not even clean up.
        environ: Its variables.
        exit_code: How it ended by itself.
        ended: Called, on nobody's thread, when it is gone.
        sockets: Open endpoints, closed by the kernel when it ends.
    """

    def __init__(self, name: str, machine: Any, pid: int, environ: dict[str, str] | None = None) -> None:
        self.name, self.machine, self.pid = name, machine, pid
        self.environ = environ or {}
        self.alive, self.paused = True, False
        self.exit_code: int | None = None
        self.ended: list[Callable[[Process], None]] = []
        self.sockets: dict[int, Any] = {}
        self.frozen: list[tuple[Fiber, int, Any]] = []
        self.agent: Any = None

    def __repr__(self) -> str:
        return self.name


class Scheduler:
    """The virtual clock, and all that is due on it.

    Args:
        seed: Of every choice that anybody makes in this simulation.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.current: Fiber | None = None
        self.closing = False
        self.dispatched = 0
        self.fingerprint = 0
        self.died: Callable[[Fiber, BaseException], None] = lambda fiber, error: None
        self._hub = getcurrent()
        self._due: list[tuple[float, float, Any, int, Any]] = []
        self._fibers: list[Fiber] = []
        self._draw = self.random.random

    # -- for the hub ---------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool]) -> None:
        """Lets time pass until ``until()``, or until nothing is ever due again."""
        due, pop = self._due, heapq.heappop
        while due:
            if until():
                return
            when, tie, target, token, value = pop(due)
            self.now = when
            if target.__class__ is not Fiber:
                target(*value)
                continue
            process = target.process
            if token != target.token or not process.alive:
                continue
            if process.paused:
                process.frozen.append((target, token, value))
                continue
            self.dispatched += 1
            self.fingerprint = hash((self.fingerprint, when, tie))
            target.token = token + 1
            self.current = target
            target.switch(value)
            self.current = None

    def call(self, delay_s: float, target: Callable[..., None], *arguments: Any) -> None:
        """Calls something later, outside every process: what wires and kernels do."""
        heapq.heappush(self._due, (self.now + delay_s, self._draw(), target, 0, arguments))

    def spawn(self, process: Process, target: Callable[[], Any], name: str) -> Fiber:
        """Starts a thread of a process."""
        fiber: Fiber

        def run(_: Any = None) -> None:
            try:
                target()
            except GreenletExit:
                pass
            except BaseException as error:
                if not self.closing:
                    self.died(fiber, error)

        fiber = Fiber(run, process, name, self._hub)
        self._fibers.append(fiber)
        self.wake(fiber)
        return fiber

    def end(self, process: Process) -> None:
        """Nothing of the process ever runs again."""
        process.alive = False
        process.frozen.clear()

    def pause(self, process: Process) -> None:
        """SIGSTOP."""
        process.paused = True

    def resume(self, process: Process) -> None:
        """SIGCONT: everything that came due meanwhile is due now."""
        process.paused = False
        frozen, process.frozen = process.frozen, []
        for fiber, token, value in frozen:
            heapq.heappush(self._due, (self.now, self._draw(), fiber, token, value))

    def close(self) -> None:
        """Unwinds every fiber, so that nothing of the simulation stays alive."""
        self.closing = True
        for fiber in self._fibers:
            if fiber and not fiber.dead:
                self.current = fiber
                try:
                    fiber.throw(GreenletExit)
                except BaseException:  # what cleaning up meets in a world that is over
                    continue
        self.current = None
        self._fibers.clear()
        self._due.clear()

    # -- for fibers ----------------------------------------------------------------------------------------------------

    def block(self, timeout_s: float | None = None) -> Any:
        """Waits for `wake`; returns the value that came with it, or ``None`` when the time was up."""
        if self.closing:
            raise GreenletExit
        fiber = self.current
        assert fiber is not None, "only a simulated thread can wait"
        if timeout_s is not None:
            heapq.heappush(self._due, (self.now + max(0.0, timeout_s), self._draw(), fiber, fiber.token, None))
        value = self._hub.switch()
        if self.closing:
            raise GreenletExit
        return value

    def wake(self, fiber: Fiber, value: Any = True) -> None:
        """Lets a waiting fiber go on, now or, as threads are, a little late."""
        draw = self._draw
        late = draw() * _SLOW_WAKE_S if draw() < _SLOW_WAKE_CHANCE else 0.0
        heapq.heappush(self._due, (self.now + late, draw(), fiber, fiber.token, value))

    def sleep(self, duration_s: float) -> None:
        """Lets time pass for the calling fiber."""
        self.block(duration_s)

    def preempt(self) -> None:
        """A place where the kernel may run another thread first."""
        if self.current is not None and not self.closing and self._draw() < _PREEMPTION_CHANCE:
            self.block(self._draw() * _SLOW_WAKE_S)


class Active:
    """The simulation that this (real) process is running."""

    scheduler: Scheduler


def scheduler() -> Scheduler:
    """The scheduler of the running simulation."""
    return Active.scheduler


def this_process() -> Process:
    """The simulated process that is running."""
    fiber = Active.scheduler.current
    assert fiber is not None, "no simulated process is running"
    return fiber.process
