"""Faults as values: what can be done to a job, what there is to hit, and one fault to come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_gemini.errors import ConfigurationError

SOFTWARE, HARDWARE, ROOT, CORRELATED, GROUP = "software", "hardware", "root", "correlated", "group"
PAUSE, LINK, ETCD, CORRUPT = "pause", "link", "etcd", "corrupt"
KINDS = {
    SOFTWARE: "a worker process is killed",
    HARDWARE: "a machine is killed: its agent, its workers and with them its memory",
    ROOT: "the machine whose agent is the root is killed",
    CORRELATED: "all machines of one failure domain are killed at the same moment",
    GROUP: "all machines that hold the replicas of some shard are killed at the same moment",
    PAUSE: "a machine's agent is stopped (SIGSTOP) for a while",
    LINK: "a machine's connections to its peers are cut for a while",
    ETCD: "a member of the etcd that belongs to the job is killed",
    CORRUPT: "one byte of a complete version in a machine's memory is flipped",
}
LASTING = (PAUSE, LINK)


@dataclass(frozen=True, slots=True)
class Targets:
    """What there is to hit in a job.

    Attributes:
        machines: Its machines.
        nproc_per_machine: Workers on each.
        domains: Failure domain of each machine; empty where none are known.
        groups: Sets of machines of which each, lost together, loses every replica of some shard.
        etcd_members: Members of the etcd that the job started; 0 where the user brought one.
    """

    machines: int
    nproc_per_machine: int = 1
    domains: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    etcd_members: int = 1

    def domain_machines(self) -> list[tuple[int, ...]]:
        """The machines of each failure domain, in the order of the domains' first machines."""
        members: dict[str, list[int]] = {}
        for machine, domain in enumerate(self.domains):
            members.setdefault(domain, []).append(machine)
        return [tuple(machines) for domain, machines in members.items() if domain]

    def units(self, kind: str) -> int:
        """How many things there are that a fault of this kind can hit.

        Raises:
            ConfigurationError: Nothing of the job can be hit so.
        """
        counts = {CORRELATED: len(self.domain_machines()), GROUP: len(self.groups), ETCD: self.etcd_members}
        found = counts.get(kind, self.machines)
        if not found:
            remedies = {
                CORRELATED: "no machine of the job has a failure domain: give `run --domains`, or use the kind group",
                GROUP: "no placement group of the job is known",
                ETCD: "the job uses an etcd of your own: leave --etcd out to have one that may be killed",
            }
            raise ConfigurationError(f"cannot plan {kind} faults: {remedies.get(kind, 'the job has no machine')}")
        return found


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault to come. At most one of the four moments is given; without any it comes at once.

    Attributes:
        kind: One of `KINDS`.
        victims: Machine ranks, or member numbers for etcd; empty: whoever is there when it happens.
        rank: Global rank to kill (software); None: the machine's first.
        time_s: Seconds after the model was started.
        at_step: As soon as every rank has completed this optimizer step.
        calm_s: Seconds after the job has recovered from all faults before this one.
        after_s: Seconds after the fault before this one, whatever the job does meanwhile.
        lasts_s: How long a pause or a cut link lasts.
        needs_persistent: Not before a persistent checkpoint exists: memory alone may not survive this.
    """

    kind: str
    victims: tuple[int, ...] = ()
    rank: int | None = None
    time_s: float | None = None
    at_step: int | None = None
    calm_s: float | None = None
    after_s: float | None = None
    lasts_s: float | None = None
    needs_persistent: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"a fault's kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        moments = [self.time_s, self.at_step, self.calm_s, self.after_s]
        if sum(moment is not None for moment in moments) > 1:
            raise ConfigurationError(f"a fault has one moment, got {self}")
        for number in (*moments, self.lasts_s):
            if number is not None and not 0 <= number < math.inf:
                raise ConfigurationError(f"a fault's times and steps are finite and not negative, got {self}")
