"""What ranks agree on along with the commit of a version."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Votes:
    """What ranks tell each other along with what is complete, so that all of them act on it at the same step.

    Attributes:
        persist: Rank 0 wishes the version on the persistent tier too.
        profile: Some rank wishes a new profile of the idle spans.
        plan: Every rank has the profile that a plan takes.
    """

    persist: bool = False
    profile: bool = False
    plan: bool = False

    def cast(self) -> list[int]:
        """As values whose minimum over all ranks says the same of all of them."""
        return [-int(self.persist), -int(self.profile), int(self.plan)]

    @staticmethod
    def counted(minima: list[int]) -> Votes:
        """The outcome."""
        persist, profile, plan = minima
        return Votes(bool(persist), bool(profile), bool(plan))
