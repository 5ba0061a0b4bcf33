"""Whose turn each iteration is, when several ways to checkpoint alternate in one run of training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One iteration.

    Attributes:
        scheme: How it checkpoints.
        round: Every scheme has one block of iterations in each round.
        switched: Whether a block begins.
        counted: Whether its time counts: after a switch something may be left of the scheme before.
    """

    scheme: str
    round: int
    switched: bool
    counted: bool


def take_turns(schemes: Sequence[str], *, rounds: int, counted: int, settling: int, seed: int) -> list[Turn]:
    """Plans a run: blocks of ``settling + counted`` iterations, in another order of the schemes in every round.

    What drifts slowly, such as the load of the machine, then meets all schemes alike.

    Args:
        schemes: Their names.
        rounds: Blocks of each scheme.
        counted: Iterations of a block whose time counts.
        settling: Iterations before them whose time does not.
        seed: Of the orders; the same on every rank.
    """
    draw = random.Random(seed)
    return [
        Turn(scheme, number, index == 0, index >= settling)
        for number in range(rounds)
        for scheme in draw.sample(list(schemes), len(schemes))
        for index in range(settling + counted)
    ]
