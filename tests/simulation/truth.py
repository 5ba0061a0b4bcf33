"""What an undisturbed run computes: the state of every rank after every step, and its loss."""

from __future__ import annotations

import functools

_MASK = (1 << 61) - 1


def mix(*values: int) -> int:
    """A number that looks random and depends on every bit of all of ``values``."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
        state ^= state >> 29
    return state


def gradient(rank: int, step: int, weight: int) -> int:
    """A rank's share of the update that makes step ``step``."""
    return mix(rank, step, weight, 1)


def updated(rank: int, step: int, weight: int, total: int) -> int:
    """A rank's state after step ``step``, which depends on the states of all ranks before it."""
    return mix(rank, step, weight, total)


@functools.cache
def _states(world_size: int, step: int) -> tuple[int, ...]:
    if step == 0:
        return tuple(mix(rank) for rank in range(world_size))
    before = _states(world_size, step - 1)
    total = sum(gradient(rank, step, before[rank]) for rank in range(world_size))
    return tuple(updated(rank, step, before[rank], total) for rank in range(world_size))


def expected(world_size: int, rank: int, step: int) -> int:
    """The state of a rank after a step, in a run that nothing disturbs."""
    return _states(world_size, step)[rank]
