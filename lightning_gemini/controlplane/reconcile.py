"""Keeps as many machines alive as a job needs, whoever provides them."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass

from lightning_gemini.controlplane.agent_settings import EXIT_FENCED
from lightning_gemini.controlplane.job_view import JobView
from lightning_gemini.controlplane.operators.base import Machine, MachineState, Operator
from lightning_gemini.errors import OperatorError

_log = logging.getLogger(__name__)
_MAX_STILLBORN = 3
_BACKOFF_S = (1.0, 30.0)  # first and longest pause after a provider refused
_ABSENT_S = 8.0  # for a machine that lost its lease to come back; longer than the root awaits it
_BOOT_S = 600.0  # from running to the agent's first word


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended."""

    success: bool
    reason: str
    exit_code: int


class Reconciler:
    """Compares what there is with what is wanted, each time it is asked, and asks the operator for the difference.

    It gives out no slots: that is the root's business.

    Args:
        operator: Provides the machines.
        view: The job as its agents see it.
        lease_ttl_s: Seconds of silence after which a machine counts as dead.
    """

    def __init__(self, operator: Operator, view: JobView, lease_ttl_s: float) -> None:
        self._operator, self._view = operator, view
        self._absent_s = max(_ABSENT_S, 2 * lease_ttl_s)
        self._silent_since: dict[str, float] = {}
        self._stillborn = 0
        self._refusal: str | None = None
        self._backoff_s = 0.0
        self._retry_at = float("-inf")

    def step(self, wanted: int) -> JobEnd | None:
        """Replaces what is dead, and starts what is missing; returns how the job ended when no machine can help."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            end = self._step(wanted)
        except OperatorError as error:
            self._back_off(str(error))
            return None
        self._refusal, self._backoff_s = None, 0.0
        return end

    def _step(self, wanted: int) -> JobEnd | None:
        live = 0
        for machine in self._operator.machines():
            if machine.state is MachineState.ENDED:
                end = self._how_it_ends(machine)
                if end is not None:
                    return end
                self._destroy(machine, _describe_end(machine))
                if self._stillborn > _MAX_STILLBORN:
                    raise OperatorError(f"its machines end before their agents say a word ({machine.detail})")
            elif (why := self._given_up(machine)) is not None:
                self._destroy(machine, why)
            else:
                live += 1
        for _ in range(wanted - live):
            self._operator.start_machine()
            self._backoff_s = 0.0  # it gives something
        return None

    def _how_it_ends(self, machine: Machine) -> JobEnd | None:
        """A killed machine is replaced; one that was stopped, or that cannot run an agent, ends the job."""
        code = machine.returncode
        if code is not None and code >= 0 and code != EXIT_FENCED:
            why = machine.detail or "see its log"
            return JobEnd(False, f"the agent of {machine.name} ended ({why if code else 'somebody stopped it'})", 1)
        if machine.name in self._view.seen:
            self._stillborn = 0
            return None
        self._stillborn += 1
        if self._stillborn <= _MAX_STILLBORN or code is None:
            return None
        return JobEnd(
            False, f"the agent of {machine.name} was killed at its start, again and again ({machine.detail})", 1
        )

    def _given_up(self, machine: Machine) -> str | None:
        """Says why a machine that its provider takes for alive is of no use any more."""
        if machine.name in self._view.evicted:
            return "does not answer"
        if machine.state is MachineState.PENDING or machine.name in self._view.present:
            self._silent_since.pop(machine.name, None)
            return None
        patience_s = self._absent_s if machine.name in self._view.seen else _BOOT_S
        since = self._silent_since.setdefault(machine.name, time.monotonic())
        silent_s = time.monotonic() - since
        return f"gave no sign of life for {silent_s:.0f} s" if silent_s > patience_s else None

    def _destroy(self, machine: Machine, why: str) -> None:
        _log.warning("%s %s; starting another machine", machine.name, why)
        self._operator.destroy_machine(machine.name)
        self._silent_since.pop(machine.name, None)

    def _back_off(self, refusal: str) -> None:
        first_s, longest_s = _BACKOFF_S
        self._backoff_s = min(2 * self._backoff_s, longest_s) if self._backoff_s else first_s
        self._retry_at = time.monotonic() + self._backoff_s
        if refusal != self._refusal:
            _log.warning("the provider of machines refuses; trying again: %s", refusal)
        self._refusal = refusal


def _describe_end(machine: Machine) -> str:
    code = machine.returncode
    if code is None:
        return f"ended ({machine.detail})" if machine.detail else "ended"
    if code == EXIT_FENCED:
        return "had lost its slot and ended"
    return f"was killed by {signal.Signals(-code).name}"
