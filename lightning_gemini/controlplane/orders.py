"""What root and agents tell each other through the key-value store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_gemini.controlplane.membership import Member
from lightning_gemini.core.recovery import RecoveryPlan, plan_from_json, plan_to_json

REPORT = "report"
START = "start"


@dataclass(frozen=True, slots=True)
class Order:
    """The root's newest decision; agents obey it once, and only if it is newer than what they obeyed before.

    Attributes:
        generation: The generation that it opens.
        phase: ``report``: end your workers, accept nothing older, say what you hold; ``start``: start your workers.
        members: All members, by machine rank.
        running: Incarnation per machine rank in the last generation that started; empty before the first.
        failures: Recoveries in a row, this one included, that found no new completed step.
        last_step: Newest optimizer step completed by any rank when the generation was planned.
        plan: What everyone loads (``start`` only).
        master_port: Port of the job's process group, on machine 0 (``start`` only).
    """

    generation: int
    phase: str
    members: tuple[Member, ...]
    running: Mapping[int, str] = field(default_factory=dict)
    failures: int = 0
    last_step: int = 0
    plan: RecoveryPlan | None = None
    master_port: int = 0

    @property
    def rank(self) -> tuple[int, bool]:
        """What orders are compared by: the generation, then ``start`` after ``report``."""
        return self.generation, self.phase == START


@dataclass(frozen=True, slots=True)
class RankExit:
    """A worker that ended by itself and badly.

    Attributes:
        rank: Global rank.
        pid: Its process id.
        code: Exit code, if it exited.
        signal: Name of the signal, if one killed it.
        time: When its agent saw it, unix seconds.
    """

    rank: int
    pid: int
    code: int | None
    signal: str | None
    time: float

    def __str__(self) -> str:
        end = f"was killed by {self.signal}" if self.signal else f"exited with code {self.code}"
        return f"rank {self.rank} (pid {self.pid}) {end}"


@dataclass(frozen=True, slots=True)
class Report:
    """An agent's answer to a ``report`` order.

    Attributes:
        machine: Machine rank.
        generation: The order's.
        incarnation: The agent's.
        master_port: A port that is free on this machine.
        memory: `MachineAgent.report`: holdings, the strategy's placement, progress per rank.
        exits: Workers that ended badly since the last start.
    """

    machine: int
    generation: int
    incarnation: str
    master_port: int
    memory: Mapping[str, Any]
    exits: tuple[RankExit, ...] = ()

    def last_step(self) -> int | None:
        """Newest optimizer step that any rank of this machine completed."""
        steps = [int(step) for step in self.memory.get("progress", {}).values()]
        return max(steps, default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the workers of one machine and generation ended, so far.

    Attributes:
        machine: Machine rank.
        generation: Their generation.
        incarnation: Their agent's.
        finished: Whether all ended well.
        exits: Those that ended badly.
        fatal: Why starting again cannot help, if a worker said so.
    """

    machine: int
    generation: int
    incarnation: str
    finished: bool = False
    exits: tuple[RankExit, ...] = ()
    fatal: str | None = None


def order_to_json(order: Order) -> str:
    """Writes an order."""
    plan = None if order.plan is None else plan_to_json(order.plan)
    fields = {name: getattr(order, name) for name in ("generation", "phase", "failures", "last_step", "master_port")}
    members = [asdict(member) for member in order.members]
    return json.dumps({**fields, "members": members, "running": dict(order.running), "plan": plan})


def order_from_json(text: str) -> Order:
    """Reads an order."""
    fields = json.loads(text)
    fields["members"] = tuple(Member(**member) for member in fields["members"])
    fields["running"] = {int(slot): incarnation for slot, incarnation in fields["running"].items()}
    fields["plan"] = None if fields["plan"] is None else plan_from_json(fields["plan"])
    return Order(**fields)


def answer_to_json(answer: Report | Outcome) -> str:
    """Writes a report or an outcome."""
    return json.dumps(asdict(answer))


def report_from_json(text: str) -> Report:
    """Reads a report."""
    return Report(**_with_exits(json.loads(text)))


def outcome_from_json(text: str) -> Outcome:
    """Reads an outcome."""
    return Outcome(**_with_exits(json.loads(text)))


def _with_exits(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "exits": tuple(RankExit(**item) for item in fields["exits"])}
