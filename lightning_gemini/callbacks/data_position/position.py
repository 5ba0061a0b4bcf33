"""Where in an epoch a loader is, and what its order came from."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from lightning_gemini.callbacks.data_position.random_state import RandomState
from lightning_gemini.errors import RestoreError

__all__ = ["EpochState", "Origin", "Position"]


class EpochState(enum.Enum):
    """What a consumer with nothing in flight does next with a loader.

    Attributes:
        RUNNING: it goes on with the epoch.
        OVER: it begins the next epoch, and may take the iterator for that which it makes on resume.
        ENDING: it begins the next epoch, but on resume it looks for the end of this one first.
    """

    RUNNING = "running"
    OVER = "over"
    ENDING = "ending"


_REMEMBERED_FETCHES = 4


@dataclass(slots=True)
class Origin:
    """The random state that an epoch's order came from. None: that moment has not come (yet).

    Attributes:
        workers: whether worker processes load the batches, so that indices are drawn ahead of the fetches.
        persistent: whether these live on, so that the next epoch is begun without drawing their seed.
        created: before the loader's own iterator was made, which draws the seed of the workers. None for persistent
            workers that began another epoch.
        iterated: before ``iter`` of the index sampler.
        drawn: before the first index was drawn.
    """

    workers: bool
    persistent: bool = False
    created: RandomState | None = None
    iterated: RandomState | None = None
    drawn: RandomState | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two batches.

    Attributes:
        origin: the epoch, filled in while its first batch is fetched.
        delivered: batches of the epoch before this place.
        fetch: random state when the next fetch (or the next epoch) begins.
        epoch: OVER also if none has begun.
        exhausted: the iterator has reported its end, which may have drawn, too.
        later: random states when the fetches after that began, for as many as training had not drawn between.
        inner: the loader's own state here, for a loader with state.
    """

    origin: Origin
    delivered: int
    fetch: RandomState
    epoch: EpochState = EpochState.RUNNING
    exhausted: bool = False
    later: tuple[RandomState, ...] = ()
    inner: Any = None

    def to_plain(self) -> dict[str, Any]:
        """The position, without `inner`, in plain values."""
        origin = self.origin
        states = {"created": origin.created, "iterated": origin.iterated, "drawn": origin.drawn, "fetch": self.fetch}
        plain = {name: state.to_plain() if state else None for name, state in states.items()}
        later = [state.to_plain() for state in self.later]
        return {
            "delivered": self.delivered,
            "epoch": self.epoch.value,
            "exhausted": self.exhausted,
            "workers": origin.workers,
            "persistent": origin.persistent,
            "later": later,
            **plain,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], inner: Any = None) -> Position:
        """The inverse of `to_plain`.

        Raises:
            RestoreError: another version of this package wrote it.
        """
        try:
            return cls._from_fields(plain, inner)
        except (KeyError, ValueError, TypeError) as error:
            raise RestoreError(
                f"the data position in this checkpoint was written by another version of lightning-gemini ({error!r}): "
                "resume with that version, or train on from the weights alone"
            ) from error

    @classmethod
    def _from_fields(cls, plain: dict[str, Any], inner: Any) -> Position:
        states = {
            name: plain[name] and RandomState.from_plain(plain[name]) for name in ("created", "iterated", "drawn")
        }
        fetch = RandomState.from_plain(plain["fetch"])
        origin = Origin(plain["workers"], plain["persistent"], **states)
        later = tuple(RandomState.from_plain(state) for state in plain["later"])
        epoch = EpochState(plain["epoch"])
        return cls(origin, plain["delivered"], fetch, epoch, plain["exhausted"], later, inner)
