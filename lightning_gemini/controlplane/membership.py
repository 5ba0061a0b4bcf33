"""Who takes part: one record for each agent, held by its lease; and the names of all keys of a job."""

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
        name: The machine's name, unique in the job.
        domain: Its failure domain, such as a rack; empty where unknown.
    """

    machine: int
    host: str
    replica_port: int
    pid: int
    incarnation: str
    name: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Spare:
    """An agent without a slot: new, or standing by.

    Attributes:
        name: The machine's name, unique in the job.
        host: Address that peers and workers will reach it at.
        pid: Its process id.
        incarnation: Name of this very agent process.
        domain: Its failure domain; empty where unknown.
    """

    name: str
    host: str
    pid: int
    incarnation: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The spare that a vacant slot is meant for."""

    name: str
    incarnation: str


def member_from_json(text: str) -> Member:
    """Reads a member record."""
    return Member(**json.loads(text))


def spare_from_json(text: str) -> Spare:
    """Reads a spare's record."""
    return Spare(**json.loads(text))


def assignment_from_json(text: str) -> Assignment | None:
    """Reads an assignment; None where it was revoked."""
    fields = json.loads(text)
    return Assignment(**fields) if fields else None


@dataclass(frozen=True, slots=True)
class JobKeys:
    """Names of a job's keys in the store.

    ======================  ==============================  ==================================================
    key                     written by                      content
    ======================  ==============================  ==================================================
    ``spec``                the launcher                    what all machines must know of the job
    ``root``                the elected agent               who leads; its create revision guards the orders
    ``spares/<name>``       the machine's agent, leased     `Spare`
    ``assign/<slot>``       the root                        `Assignment`: who may take the slot; {}: nobody
    ``members/<slot>``      the slot's agent, with lease    `Member`
    ``order``               the root                        the newest order, with generation and phase
    ``reports/<slot>``      the slot's agent, with lease    its answer to a ``report`` order
    ``outcomes/<slot>``     the slot's agent, with lease    how the workers of a generation ended, so far
    ``replace/<slot>``      the root                        a machine that it gave up
    ``result``              the root, or the launcher       how the job ended
    ======================  ==============================  ==================================================
    """

    job: str

    @property
    def prefix(self) -> str:
        """What all keys of the job start with."""
        return f"/gemini/{self.job}/"

    @property
    def spec(self) -> str:
        """What all machines must know of the job."""
        return f"{self.prefix}spec"

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

    def spare(self, name: str) -> str:
        """The record of an agent without a slot."""
        return f"{self.prefix}spares/{name}"

    def assignment(self, slot: int) -> str:
        """Who may take a slot."""
        return f"{self.prefix}assign/{slot}"

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
        """The machine of a slot that the root gave up."""
        return f"{self.prefix}replace/{slot}"

    def split(self, key: str) -> tuple[str, str]:
        """Returns a key's kind and name: ``members/3`` is ``("members", "3")``, ``order`` is ``("order", "")``."""
        kind, _, name = key.removeprefix(self.prefix).partition("/")
        return kind, name


@dataclass(frozen=True, slots=True)
class Registration:
    """This agent's own record, as a spare or as a member.

    Attributes:
        store: Where it goes.
        key: Its key.
        record: What the others see.
    """

    store: KeyValueStore
    key: str
    record: Member | Spare

    def register(self, lease: int) -> bool:
        """Takes the key; returns False where another incarnation holds it (its lease may still have to end)."""
        value = json.dumps(asdict(self.record))
        if self.store.put_if_absent(self.key, value, lease) is not None:
            return True
        held = self.store.get(self.key)
        if held is None or json.loads(held.value)["incarnation"] != self.record.incarnation:
            return False
        self.store.put(self.key, value, lease)
        return True
