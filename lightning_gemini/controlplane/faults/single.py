"""One fault to a running job, from its moment to its end."""

from __future__ import annotations

import time
from typing import Any

from lightning_gemini.controlplane.faults.injector import FaultInjector, NoVictimError
from lightning_gemini.controlplane.faults.observer import Observer
from lightning_gemini.controlplane.processes import start_time
from lightning_gemini.core.failure_model import Draws
from lightning_gemini.core.fault import PlannedFault
from lightning_gemini.errors import AgentError

_POLL_S = 0.02


def inject_fault(job: dict[str, Any], fault: PlannedFault, draws: Draws, timeout_s: float) -> dict[str, Any]:
    """Waits for the fault's step and for a victim, does it, and takes back what lasts when its time is over.

    Args:
        job: What `find_job` returned.
        fault: With ``at_step``, or now.
        draws: For what the fault leaves open.
        timeout_s: The longest wait until it can be done.

    Returns:
        The ``fault_injected`` event.

    Raises:
        AgentError: The step is not reached in time, there is no victim, or the job ended.
    """
    deadline = time.monotonic() + timeout_s
    with Observer(job) as observer, FaultInjector(job, draws) as injector:
        while True:
            seen = observer.look()
            reason = f"step {fault.at_step} not reached"
            if fault.at_step is None or seen.step >= fault.at_step:
                try:
                    event = injector.inject(fault, seen)
                    break
                except NoVictimError as error:
                    reason = str(error)
            if start_time(job["launcher_pid"]) is None:
                raise AgentError(f"the job ended at step {seen.step}, before the failure could be injected")
            if time.monotonic() > deadline:
                raise AgentError(f"{reason} in time; the job is at step {seen.step}")
            time.sleep(_POLL_S)
        while injector.lasting:
            time.sleep(_POLL_S)
            injector.poll()
    return event
