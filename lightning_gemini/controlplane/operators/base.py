"""What the launcher asks of whoever provides machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine as its provider sees it.

    Attributes:
        slot: Machine rank that it was started for.
        incarnation: Name of the agent on it.
        pid: Process id of the agent, where the provider knows one.
        returncode: How its agent ended, as `subprocess` counts (negative: the signal); None while it runs.
    """

    slot: int
    incarnation: str
    pid: int | None
    returncode: int | None


class Operator(Protocol):
    """Provides machines with an agent on them."""

    def start_machine(self, slot: int) -> Machine:
        """Starts a machine for a slot, in place of the one before; returns at once."""

    def machines(self) -> list[Machine]:
        """Returns the newest machine of each slot, dead ones included."""

    def destroy_machine(self, slot: int) -> None:
        """Ends a slot's machine without asking it."""

    def close(self) -> None:
        """Ends all machines, gently first; bounded in time."""
