"""Who takes part: one record for each machine rank, held by its agent's lease; and the names of all keys of a job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from lightning_gemini.controlplane.kv.base import KeyValueStore


@dataclass(frozen=True, slots=True)
class Member:
    """An agent as the others see it.

    Attributes:
        machine: Machine rank (slot).
        host: Address that peers and workers reach it at.
        replica_port: Port of its replica server.
        pid: Its process id.
        incarnation: Name of this very agent process; a replacement on the same slot has another one.
    """

    machine: int
    host: str
    replica_port: int
    pid: int
    incarnation: str


def member_from_json(text: str) -> Member:
    """Reads a member record."""
    return Member(**json.loads(text))


@dataclass(frozen=True, slots=True)
class JobKeys:
    """Names of a job's keys in the store.

    ======================  ==============================  ==================================================
    key                     written by                      content
    ======================  ==============================  ==================================================
    ``root``                the elected agent               who leads; its create revision guards the orders
    ``members/<slot>``      the slot's agent, with lease    `Member`
    ``order``               the root                        the newest order, with generation and phase
    ``reports/<slot>``      the slot's agent, with lease    its answer to a ``report`` order
    ``outcomes/<slot>``     the slot's agent, with lease    how the workers of a generation ended, so far
    ``replace/<slot>``      the root                        a machine is wanted for the slot
    ``result``              the root                        how the job ended
    ======================  ==============================  ==================================================
    """

    job: str

    @property
    def prefix(self) -> str:
        """What all keys of the job start with."""
        return f"/gemini/{self.job}/"

    @property
    def root(self) -> str:
        """The root's key."""
        return f"{self.prefix}root"

    @property
    def order(self) -> str:
        """The newest order."""
        return f"{self.prefix}order"

    @property
    def result(self) -> str:
        """How the job ended."""
        return f"{self.prefix}result"

    def member(self, slot: int) -> str:
        """The member record of a slot."""
        return f"{self.prefix}members/{slot}"

    def report(self, slot: int) -> str:
        """The report of a slot."""
        return f"{self.prefix}reports/{slot}"

    def outcome(self, slot: int) -> str:
        """The outcome of a slot's workers."""
        return f"{self.prefix}outcomes/{slot}"

    def replace(self, slot: int) -> str:
        """The wish for a replacement."""
        return f"{self.prefix}replace/{slot}"

    def split(self, key: str) -> tuple[str, int | None]:
        """Returns a key's kind and slot: ``members/3`` is ``("members", 3)``, ``order`` is ``("order", None)``."""
        kind, _, slot = key.removeprefix(self.prefix).partition("/")
        return kind, int(slot) if slot else None


@dataclass(frozen=True, slots=True)
class Membership:
    """This agent's own membership."""

    store: KeyValueStore
    keys: JobKeys
    member: Member

    def register(self, lease: int) -> bool:
        """Takes the slot; returns False where another incarnation holds it (its lease may still have to end)."""
        key = self.keys.member(self.member.machine)
        value = json.dumps(asdict(self.member))
        if self.store.put_if_absent(key, value, lease) is not None:
            return True
        held = self.store.get(key)
        if held is None or member_from_json(held.value).incarnation != self.member.incarnation:
            return False
        self.store.put(key, value, lease)
        return True
