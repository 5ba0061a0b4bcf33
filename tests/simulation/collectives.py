"""All ranks of one generation: collectives that complete together, or fail or hang when a member is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.scheduler import Active, Fiber, Process, this_process

_FAILS_CHANCE = 0.6
_RECHECK_S = 0.05


class CollectiveError(RuntimeError):
    """What gloo raises when a member of the group is gone."""


class Rendezvous:
    """Where the ranks of a generation find each other: what torch's TCPStore is.

    Args:
        mismatch: Told when ranks that meet do not call the same thing.
    """

    def __init__(self, mismatch: Callable[[str], None]) -> None:
        self._mismatch = mismatch
        self._groups: dict[tuple[str, str, str], Group] = {}

    def join(self, environ: dict[str, str]) -> Group:
        """Finds the group of this worker; returns once all its ranks are there."""
        key = (environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["LIGHTNING_GEMINI_GENERATION"])
        world_size = int(environ["WORLD_SIZE"])
        group = self._groups.setdefault(key, Group(world_size, self._mismatch))
        group.join(int(environ["RANK"]), this_process())
        return group


class Group:
    """One generation's ranks."""

    def __init__(self, world_size: int, mismatch: Callable[[str], None]) -> None:
        self.world_size, self._mismatch = world_size, mismatch
        self.members: dict[int, Process] = {}
        self.lost = False
        self._calls: dict[tuple[str, int], Collective] = {}

    def join(self, rank: int, process: Process) -> None:
        if rank in self.members:
            self._mismatch(f"two processes are rank {rank} of one group: {self.members[rank]} and {process}")
        self.members[rank] = process
        process.ended.append(self._on_end)

    def call(self, channel: str, number: int, kind: str) -> Collective:
        """The ``number``-th collective on a communicator of this group."""
        found = self._calls.get((channel, number))
        if found is None:
            found = self._calls[channel, number] = Collective(self, kind)
        elif found.kind != kind:
            self._mismatch(f"collective {number} on {channel}: one rank calls {found.kind}, another {kind}")
        return found

    def forget(self, channel: str, number: int) -> None:
        """Everybody has read it."""
        self._calls.pop((channel, number), None)

    def _on_end(self, process: Process) -> None:
        """A member is gone: what others wait for never comes, or breaks."""
        self.lost = True
        for call in list(self._calls.values()):
            call.member_lost()

    def machines(self) -> list[Any]:
        return [process.machine for process in self.members.values()]


class Collective:
    """One collective operation; its result is there when every rank has contributed and all can talk."""

    def __init__(self, group: Group, kind: str) -> None:
        self.group, self.kind = group, kind
        self.values: dict[int, Any] = {}
        self.read = 0
        self.complete = self.broken = self.settled = self.torn = False
        self._waiting: list[Fiber] = []

    def contribute(self, rank: int, value: Any) -> None:
        self.values[rank] = value
        if len(self.values) == self.group.world_size:
            self._settle()
        elif self.group.lost:
            self.member_lost()

    def _settle(self) -> None:
        scheduler, machines = Active.scheduler, self.group.machines()
        network = machines[0].network
        if network._cuts:
            first = machines[0]
            if any(not network.reachable(one, other) for one in machines for other in (first, machines[-1])):
                scheduler.call(_RECHECK_S, self._settle)  # TCP waits for the cut to end
                return
        if self.group.lost and not self.complete:
            self.member_lost()
            return
        self.settled = True
        scheduler.call(network.delay_s(machines[0], machines[-1]) * 2, self._finish)

    def _finish(self) -> None:
        self.complete = not self.broken
        self._wake_all()

    def member_lost(self) -> None:
        """Some ranks get an error, others wait until their agent ends them; some may have the result all the same."""
        if self.settled and not self.complete:
            self.torn = True
        elif not self.complete:
            self.broken = True
            self._wake_all()

    def _wake_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        scheduler = Active.scheduler
        for fiber in waiting:
            scheduler.wake(fiber)

    def wait(self) -> dict[int, Any]:
        """Every rank's contribution, by rank.

        Raises:
            CollectiveError: A member is gone.
        """
        scheduler = Active.scheduler
        fiber = scheduler.current
        assert fiber is not None
        while not self.complete:
            if self.broken:
                _fail()
            self._waiting.append(fiber)
            scheduler.block()
        if self.torn and scheduler.random.random() < 0.5:
            _fail()
        # The last byte reaches every rank at its own time, and not those that lost the rest meanwhile.
        if scheduler.random.random() < 0.1:
            scheduler.sleep(scheduler.random.random() * 0.02)
        self.read += 1
        return self.values


def _fail() -> None:
    scheduler = Active.scheduler
    scheduler.sleep(scheduler.random.random() * 0.05)
    if scheduler.random.random() < _FAILS_CHANCE:
        raise CollectiveError("connection closed by peer")
    scheduler.block()  # for ever


class SimulatedRankGroup:
    """`RankGroup` on simulated collectives.

    Args:
        group: This generation's.
        rank: This global rank.
        channel: Name of the communicator.
    """

    def __init__(self, group: Group, rank: int, channel: str = "agree") -> None:
        self._group, self._rank, self._channel = group, rank, channel
        self._number = 0

    def gather(self, value: Any) -> list[Any]:
        values = self.start("gather", value).wait()
        return [values[rank] for rank in range(self._group.world_size)]

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def minimum(self, values: list[int]) -> list[int]:
        return [min(column) for column in zip(*self.start("min", values).wait().values(), strict=True)]

    def barrier(self) -> None:
        self.minimum([0])

    def total(self, value: int) -> int:
        """The sum over all ranks: training's own collective."""
        return sum(self.start("sum", value).wait().values())

    def start(self, kind: str, value: Any) -> Pending:
        number, self._number = self._number, self._number + 1
        call = self._group.call(self._channel, number, kind)
        call.contribute(self._rank, value)
        return Pending(self._group, self._channel, number, call)


class Pending:
    """A collective that this rank has begun."""

    def __init__(self, group: Group, channel: str, number: int, call: Collective) -> None:
        self._group, self._channel, self._number, self._call = group, channel, number, call

    def wait(self) -> dict[int, Any]:
        values = self._call.wait()
        if self._call.read == self._group.world_size:
            self._group.forget(self._channel, self._number)
        return values
