"""A provider's machines, asked for no more often than the provider likes."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning_gemini.controlplane.operators.base import Machine


class Listing:
    """Remembers what a provider said about its machines for a while; the launcher asks ten times a second.

    Args:
        ask: Asks the provider; may raise `OperatorError`.
        poll_s: Seconds that an answer is good for, unless `forget` is called.
    """

    def __init__(self, ask: Callable[[], list[Machine]], poll_s: float) -> None:
        self._ask, self._poll_s = ask, poll_s
        self._answer: list[Machine] = []
        self._good_until = float("-inf")

    def get(self) -> list[Machine]:
        """Returns the machines, as the provider said less than ``poll_s`` ago."""
        if time.monotonic() >= self._good_until:
            self._answer = self._ask()
            self._good_until = time.monotonic() + self._poll_s
        return list(self._answer)

    def forget(self) -> None:
        """Has the provider asked again the next time: something was changed."""
        self._good_until = float("-inf")

    def wait(self, done: Callable[[list[Machine]], bool], timeout_s: float, pause_s: float = 0.25) -> list[Machine]:
        """Asks until ``done`` or until time is up; returns the last answer."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.forget()
            machines = self.get()
            if done(machines) or time.monotonic() >= deadline:
                return machines
            time.sleep(pause_s)
