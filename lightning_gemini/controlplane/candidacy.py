"""A spare's way into a slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_settings import WorkerAgentSettings
from lightning_gemini.controlplane.job_view import JobView
from lightning_gemini.controlplane.kv.base import KeyValueStore
from lightning_gemini.controlplane.membership import JobKeys, Member, Registration, Spare


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot, taken: its number, its member record, and the machine's memory, open."""

    slot: int
    registration: Registration
    memory: MachineAgent


class Candidacy:
    """Takes the slot that the root means for this agent, as soon as nobody else holds it.

    Args:
        settings: The agent's.
        store: Where slots are taken.
        spare: This agent, as the others see it so far.
        make_memory: Makes the machine's memory, which needs to know its slot.
    """

    def __init__(
        self,
        settings: WorkerAgentSettings,
        store: KeyValueStore,
        spare: Spare,
        make_memory: Callable[[AgentSettings], MachineAgent],
    ) -> None:
        self._settings, self._store, self._spare, self._make_memory = settings, store, spare, make_memory
        self._keys = JobKeys(settings.job)
        self._memory: tuple[int, MachineAgent] | None = None

    def seek(self, view: JobView, take: Callable[[Registration], bool | None]) -> Seat | None:
        """Tries once; to be called again whenever the view has changed.

        Args:
            view: The job as the agent sees it.
            take: Registers below the agent's lease; says whether it could.

        Raises:
            AgentError: The machine's memory cannot be opened: its socket is served.
            OSError: The same, for another reason.
        """
        slot = view.slot_for(self._spare.name, self._spare.incarnation)
        if self._memory is not None and self._memory[0] != slot:
            self.close()
        if slot is None or slot in view.members:
            return None
        memory = self._open_memory(slot)
        host, port = memory.replica_address
        spare = self._spare
        member = Member(slot, host, port, spare.pid, spare.incarnation, spare.name, spare.domain)
        registration = Registration(self._store, self._keys.member(slot), member)
        if not take(registration):
            return None
        self._memory = None
        return Seat(slot, registration, memory)

    def close(self) -> None:
        """Frees what was opened for a slot that was not taken; idempotent."""
        if self._memory is not None:
            self._memory[1].close()
            self._memory = None

    def _open_memory(self, slot: int) -> MachineAgent:
        if self._memory is not None:
            return self._memory[1]
        settings = self._settings
        memory = self._make_memory(
            AgentSettings(
                job=settings.job,
                machine=slot,
                socket_path=settings.socket_path,
                secret=settings.secret,
                bind_host=settings.host,
                run_dir=settings.run_dir,
            )
        )
        memory.start()
        self._memory = slot, memory
        return memory
