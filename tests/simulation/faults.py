"""What goes wrong in a schedule, and when."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.simulation.processes import kill
from tests.simulation.scheduler import Process

_WEIGHTS = {
    "worker killed": 5,
    "machine lost": 5,
    "root lost": 4,
    "machines lost together": 2,
    "agent paused": 4,
    "machine paused": 2,
    "fork server killed": 1,
    "cut off from the store": 3,
    "cut off from its peers": 3,
    "cluster cut in two": 2,
    "connections reset": 3,
    "store away": 3,
    "answers of the store lost": 3,
    "network slow": 2,
    "disk slow": 1,
    "disk full": 1,
    "byte flipped": 3,
}
_PATIENCE_S = 20.0
_LOOK_S = 0.05


class Injector:
    """Injects the faults of a schedule.

    Args:
        cluster: The victim.
        dice: Of this schedule's faults.

    Attributes:
        counts: What was done, by kind.
        last_s: When the effect of the last fault is over.
    """

    def __init__(self, cluster: Any, dice: random.Random) -> None:
        self._cluster, self._dice = cluster, dice
        self.counts: Counter[str] = Counter()
        self.last_s = 0.0
        self._kinds: list[str] = []
        self._deeds: dict[str, Callable[[], bool]] = {
            "worker killed": self._kill_worker,
            "machine lost": lambda: self._lose(1),
            "root lost": self._lose_root,
            "machines lost together": lambda: self._lose(2 + (dice.random() < 0.3)),
            "agent paused": self._pause_agent,
            "machine paused": self._pause_machine,
            "fork server killed": self._kill_pool,
            "cut off from the store": self._cut_store,
            "cut off from its peers": self._cut_peers,
            "cluster cut in two": self._cut_in_two,
            "connections reset": self._reset,
            "store away": self._stop_store,
            "answers of the store lost": self._lose_answers,
            "network slow": self._slow_network,
            "disk slow": self._slow_disk,
            "disk full": self._fill_disk,
            "byte flipped": self._flip,
        }

    @property
    def over(self) -> bool:
        """Whether everything was injected."""
        return not self._kinds

    def start(self) -> None:
        """Begins: mostly when the job has got to some step, sometimes while it is still coming up."""
        parameters, dice = self._cluster.parameters, self._dice
        self._kinds = dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=parameters.faults)
        booted_s = parameters.machine_boot_s + parameters.pool_boot_s
        if dice.random() < 0.2:
            self._cluster.scheduler.call(dice.random() * booted_s, self._inject)
        else:
            self._wait_for(dice.randint(0, parameters.steps // 2))

    def _plan_next(self) -> None:
        """The next one often comes while the job recovers from the last."""
        parameters, dice = self._cluster.parameters, self._dice
        if dice.random() < 0.7:
            self._cluster.scheduler.call(dice.expovariate(1.5), self._inject)
        else:
            self._wait_for(self._cluster.checks.steps[0] + dice.randint(1, max(1, parameters.steps // 3)))

    def _wait_for(self, step: int, waited_s: float = 0.0) -> None:
        arrived = self._cluster.checks.steps[0] >= min(step, self._cluster.parameters.steps - 1)
        if arrived or waited_s > _PATIENCE_S:
            self._cluster.scheduler.call(self._dice.random() * self._cluster.parameters.step_s, self._inject)
        else:
            self._cluster.scheduler.call(_LOOK_S, self._wait_for, step, waited_s + _LOOK_S)

    def _inject(self) -> None:
        kind = self._kinds.pop()
        self.last_s = max(self.last_s, self._cluster.scheduler.now)
        if self._deeds[kind]():
            self.counts[kind] += 1
        if self._kinds:
            self._plan_next()

    def _lasts(self, least_s: float, most_s: float) -> float:
        duration_s = least_s * (most_s / least_s) ** self._dice.random()
        self.last_s = max(self.last_s, self._cluster.scheduler.now + duration_s)
        return duration_s

    def _note(self, what: str) -> bool:
        self._cluster.note(f"FAULT: {what}")
        return True

    # -- processes and machines ----------------------------------------------------------------------------------------

    def _agent(self) -> Process | None:
        agents = self._cluster.agents()
        return self._dice.choice(agents) if agents else None

    def _kill_worker(self) -> bool:
        workers = [p for p in self._cluster.processes.values() if p.alive and "RANK" in p.environ]
        if not workers:
            return False
        victim = self._dice.choice(workers)
        self._note(f"{victim} killed")
        kill(victim)
        return True

    def _kill_pool(self) -> bool:
        pools = [p for p in self._cluster.processes.values() if p.alive and p.name.endswith("/pool")]
        if not pools:
            return False
        victim = self._dice.choice(pools)
        self._note(f"{victim} killed")
        kill(victim)
        return True

    def _lose(self, number: int) -> bool:
        agents = self._cluster.agents()
        victims = [p.machine for p in self._dice.sample(agents, min(number, len(agents)))]
        return bool(victims) and self._power_off(victims)

    def _lose_root(self) -> bool:
        root = self._cluster.checks.root
        return root is not None and self._power_off([root.machine])

    def _power_off(self, machines: list[Any]) -> bool:
        silent = self._dice.random() < 0.5
        self._note(f"{machines} lost{' silently' if silent else ''}")
        self._cluster.lose(machines, silent=silent)
        return True

    def _pause_agent(self) -> bool:
        root = self._cluster.checks.root
        agent = root if root is not None and self._dice.random() < 0.4 else self._agent()
        return agent is not None and self._pause([agent])

    def _pause_machine(self) -> bool:
        agent = self._agent()
        return agent is not None and self._pause(list(agent.machine.processes))

    def _pause(self, processes: list[Process]) -> bool:
        scheduler, duration_s = self._cluster.scheduler, self._lasts(0.3, 10.0)
        self._note(f"{processes} paused for {duration_s:.2f} s")
        for process in processes:
            scheduler.pause(process)
            scheduler.call(duration_s, scheduler.resume, process)
        return True

    # -- network -------------------------------------------------------------------------------------------------------

    def _cut(self, some: list[Any], others: list[Any]) -> bool:
        duration_s, both_ways = self._lasts(0.1, 8.0), self._dice.random() < 0.8
        self._note(f"{some} cut off from {others} for {duration_s:.2f} s{'' if both_ways else ' (one way)'}")
        self._cluster.network.cut(some, others, duration_s, both_ways=both_ways)
        return True

    def _cut_store(self) -> bool:
        agent = self._agent()
        return agent is not None and self._cut([agent.machine], [self._cluster.store])

    def _cut_peers(self) -> bool:
        agent = self._agent()
        others = [p.machine for p in self._cluster.agents() if p is not agent]
        return agent is not None and self._cut([agent.machine], others)

    def _cut_in_two(self) -> bool:
        machines = [p.machine for p in self._cluster.agents()]
        if len(machines) < 2:
            return False
        some = self._dice.sample(machines, self._dice.randint(1, len(machines) - 1))
        others = [machine for machine in machines if machine not in some]
        return self._cut(some, [*others, self._cluster.store])

    def _reset(self) -> bool:
        agent = self._agent()
        if agent is None:
            return False
        self._note(f"connections of {agent.machine} reset")
        for handle in list(agent.sockets.values()):
            endpoint = handle._endpoint
            if endpoint is not None and endpoint.peer.machine is not agent.machine:
                endpoint.break_off()
                endpoint.peer.break_off()
        return True

    def _slow_network(self) -> bool:
        self._cluster.network.slow_until_s = self._cluster.scheduler.now + self._lasts(0.5, 8.0)
        return self._note("network slow")

    # -- store and disk ------------------------------------------------------------------------------------------------

    def _stop_store(self) -> bool:
        store, duration_s = self._cluster.store, self._lasts(0.1, 8.0)
        self._note(f"store away for {duration_s:.2f} s")
        store.stop()
        self._cluster.scheduler.call(duration_s, store.start)
        return True

    def _lose_answers(self) -> bool:
        store, duration_s = self._cluster.store, self._lasts(0.5, 8.0)
        self._note(f"answers of the store lost for {duration_s:.2f} s")
        store.forgetful = 0.2 + 0.6 * self._dice.random()
        self._cluster.scheduler.call(duration_s, self._remember)
        return True

    def _remember(self) -> None:
        self._cluster.store.forgetful = 0.0

    def _slow_disk(self) -> bool:
        self._cluster.disk.slow_until_s = self._cluster.scheduler.now + self._lasts(1.0, 10.0)
        return self._note("disk slow")

    def _fill_disk(self) -> bool:
        self._cluster.disk.failing_until_s = self._cluster.scheduler.now + self._lasts(1.0, 10.0)
        return self._note("disk full")

    # -- memory --------------------------------------------------------------------------------------------------------

    def _flip(self) -> bool:
        """One byte of a complete version changes in somebody's memory."""
        checks, dice = self._cluster.checks, self._dice
        held = sorted(checks.replicas_held(), key=lambda found: found[:3])
        if not held:
            return False
        slot, owner, version, buffer = dice.choice(held)
        self._note(f"a byte of {version} of rank {owner} flipped at slot {slot}")
        checks.before_loss()
        buffer.data[dice.randrange(buffer.data_bytes)] ^= 1 << dice.randrange(8)
        checks.corrupt(slot, owner, version)
        return True
