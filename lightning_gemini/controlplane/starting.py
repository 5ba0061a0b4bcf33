"""From everyone's reports to the order that starts a generation, or to the job's end. Pure."""

from __future__ import annotations

from dataclasses import replace

from lightning_gemini.controlplane.failure import Failure, classify, plan_from_reports
from lightning_gemini.controlplane.orders import START, Order
from lightning_gemini.controlplane.root_events import Action, Announce, Finish, PutOrder
from lightning_gemini.controlplane.root_state import Phase, RootState
from lightning_gemini.core.recovery import RecoveryPlan
from lightning_gemini.errors import GeminiError

Decision = tuple[RootState, tuple[Action, ...]]


def start_generation(state: RootState, time: float) -> Decision:
    """Starts the generation that everyone has reported for, unless nothing can come of it."""
    order, reports = state.order, state.reports
    assert order is not None
    failure = classify(order, reports, time if state.lost_at is None else state.lost_at) if order.running else None
    try:
        plan = plan_from_reports(reports, state.shape.nodes, state.shape.nproc_per_node)
    except GeminiError as error:
        return _give_up(state, str(error), failure)
    last_step = max((step for report in reports.values() if (step := report.last_step()) is not None), default=0)
    failures = 0 if failure is None or _progressed(order, last_step) else order.failures + 1
    if failure is not None and failures > state.shape.max_failures_without_progress:
        reason = f"{failures} failures in a row without a new completed step (newest: {last_step}); {failure.detail}"
        return _give_up(state, reason, failure)
    order = _start_order(state, plan, failures, last_step)
    state = replace(state, phase=Phase.RUNNING, order=order, lost_at=None, finished=frozenset(), failed=False)
    return state, (PutOrder(order), Announce(order, failure))


def _start_order(state: RootState, plan: RecoveryPlan, failures: int, last_step: int) -> Order:
    assert state.order is not None
    return replace(
        state.order,
        phase=START,
        running={member.machine: member.incarnation for member in state.order.members},
        failures=failures,
        last_step=last_step,
        plan=plan,
        master_port=state.reports[0].master_port,
    )


def _progressed(order: Order, last_step: int) -> bool:
    """Says whether the failed generation completed a step that no earlier one had.

    One that restarted from the persistent tier runs behind the newest step ever seen: there any movement counts.
    """
    from_memory = order.plan is not None and order.plan.id is not None
    return last_step > order.last_step or (not from_memory and last_step != order.last_step)


def _give_up(state: RootState, reason: str, failure: Failure | None) -> Decision:
    return replace(state, phase=Phase.DONE), (Finish(False, reason, failure),)
