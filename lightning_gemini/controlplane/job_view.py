"""The job as an agent sees it in the store."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lightning_gemini.controlplane.kv.base import KeyChange
from lightning_gemini.controlplane.membership import (
    Assignment,
    JobKeys,
    Member,
    Spare,
    assignment_from_json,
    member_from_json,
    spare_from_json,
)


@dataclass(slots=True)
class JobView:
    """The job as an agent sees it in the store; kept current with every change that the watch delivers.

    Attributes:
        keys: The job's keys.
        root_name: Machine of the root; None while there is none.
        members: By slot.
        spares: By name.
        assigned: Slots that are meant for a spare.
        ordered: Whether the root has given its first order.
        result: How the job ended, with ``success`` and ``reason``.
        seen: Names of all machines whose agent was ever there.
        evicted: Names of machines that the root gave up although they hold their lease.
    """

    keys: JobKeys
    root_name: str | None = None
    members: dict[int, Member] = field(default_factory=dict)
    spares: dict[str, Spare] = field(default_factory=dict)
    assigned: dict[int, Assignment | None] = field(default_factory=dict)
    ordered: bool = False
    result: dict[str, Any] | None = None
    seen: set[str] = field(default_factory=set)
    evicted: set[str] = field(default_factory=set)

    @property
    def present(self) -> set[str]:
        """Names of the machines whose agent is there."""
        return {member.name for member in self.members.values()} | self.spares.keys()

    def take(self, change: KeyChange) -> None:
        """Takes one change into account."""
        kind, name = self.keys.split(change.key)
        value = None if change.now is None else change.now.value
        if kind == "root":
            self.root_name = None if value is None else json.loads(value)["name"]
        elif kind == "members":
            _set(self.members, int(name), None if value is None else member_from_json(value))
        elif kind == "spares":
            _set(self.spares, name, None if value is None else spare_from_json(value))
        elif kind == "assign":
            self.assigned[int(name)] = None if value is None else assignment_from_json(value)
        elif kind == "order":
            self.ordered = value is not None
        elif kind == "result":
            self.result = None if value is None else json.loads(value)
        elif kind == "replace" and value is not None and (wish := json.loads(value))["evict"]:
            self.evicted.add(wish["name"])
        if kind in ("members", "spares") and value is not None:
            self.seen.add(json.loads(value)["name"])

    def slot_for(self, name: str, incarnation: str) -> int | None:
        """Returns the slot that is meant for an agent, if any."""
        wanted = Assignment(name, incarnation)
        return next((slot for slot, assignment in self.assigned.items() if assignment == wanted), None)

    def describe(self) -> dict[str, Any]:
        """Returns what a status shows: the root's slot (None for a standby's) and name, and the standbys."""
        root = next((slot for slot, member in self.members.items() if member.name == self.root_name), None)
        spares = [{"name": each.name, "pid": each.pid, "domain": each.domain} for each in self.spares.values()]
        return {"root": root, "root_name": self.root_name, "standbys": spares}


def _set(mapping: dict[Any, Any], key: Any, value: Any) -> None:
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value
