"""Which spare takes which vacant slot. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from lightning_gemini.controlplane.membership import Assignment, Spare
from lightning_gemini.controlplane.root_events import Action, Assign
from lightning_gemini.controlplane.root_state import RootState


def fill_vacancies(state: RootState) -> tuple[RootState, tuple[Action, ...]]:
    """Revokes what was overtaken by events, then means every vacant slot for a spare.

    Before the first order nobody is chosen until there are enough for all slots: then slots follow the failure domains
    and the machines' names, and not the order in which machines happened to come up.
    """
    kept = {slot: chosen for slot, chosen in state.assigned.items() if _stands(state, slot, chosen)}
    free = _free(state, kept)
    vacant = [slot for slot in range(state.shape.nodes) if slot not in state.members and slot not in kept]
    if state.order is None and len(free) < len(vacant):
        vacant = []
    fresh: dict[int, Assignment] = {}
    for slot in vacant:
        spare = _suited(state, slot, free)
        if spare is not None:
            free.remove(spare)
            fresh[slot] = Assignment(spare.name, spare.incarnation)
    void = [slot for slot in state.assigned if slot not in kept and slot not in fresh and not _fulfilled(state, slot)]
    actions = (*(Assign(slot, None) for slot in sorted(void)), *(Assign(slot, who) for slot, who in fresh.items()))
    return replace(state, assigned={**kept, **fresh}), actions


def natural_order(name: str) -> list[int | str]:
    """Sorts ``machine-10`` after ``machine-9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _stands(state: RootState, slot: int, chosen: Assignment) -> bool:
    spare = state.spares.get(chosen.name)
    return slot not in state.members and spare is not None and spare.incarnation == chosen.incarnation


def _fulfilled(state: RootState, slot: int) -> bool:
    member = state.members.get(slot)
    return member is not None and member.incarnation == state.assigned[slot].incarnation


def _free(state: RootState, kept: dict[int, Assignment]) -> list[Spare]:
    taken = {chosen.name for chosen in kept.values()}
    free = (spare for name, spare in state.spares.items() if name not in taken)
    return sorted(
        (spare for spare in free if spare.incarnation not in state.given_up),
        key=lambda spare: (spare.domain, natural_order(spare.name)),
    )


def _suited(state: RootState, slot: int, free: list[Spare]) -> Spare | None:
    """Prefers a machine of the failure domain that the slot had: replicas were placed by it."""
    if not free:
        return None
    before = {} if state.order is None else {member.machine: member.domain for member in state.order.members}
    same = [spare for spare in free if spare.domain == before.get(slot)]
    return same[0] if same else free[0]
