"""Points in time of the training, as the profiler needs them: of a device's clock, and told to the pace page."""

from __future__ import annotations

import time
from typing import Any, Protocol

from lightning_gemini.dataplane.pace_page import PacePage


class Marks(Protocol):
    """Points in time of a device, and the page's span words in step with them."""

    def mark(self) -> Any:
        """Now; for CUDA: when the device gets there."""
        ...

    def close_span(self, mark: Any) -> None:
        """The network is in use from that mark on."""
        ...

    def open_span(self, index: int, mark: Any) -> None:
        """Span ``index`` begins at that mark."""
        ...

    def fence(self) -> Any:
        """Something that has passed when all earlier marks have."""
        ...

    def passed(self, fence: Any) -> bool:
        """Whether it has; never waits."""
        ...

    def seconds(self, earlier: Any, later: Any) -> float:
        """Seconds between two marks that have passed."""
        ...

    def recycle(self, marks: list[Any]) -> None:
        """These are needed no more."""
        ...

    def close(self) -> None:
        """Write the page no more."""
        ...


class HostMarks:
    """The host's clock: a gloo collective is complete when the host sees it."""

    def __init__(self, page: PacePage | None) -> None:
        self._page = page
        self.mark = time.monotonic

    def close_span(self, mark: float) -> None:
        """See :class:`Marks`."""
        if self._page is not None:
            self._page.close_span()

    def open_span(self, index: int, mark: float) -> None:
        """See :class:`Marks`."""
        if self._page is not None:
            self._page.open_span(index)

    def fence(self) -> None:
        """See :class:`Marks`."""

    def passed(self, fence: None) -> bool:
        """See :class:`Marks`."""
        return True

    def seconds(self, earlier: float, later: float) -> float:
        """See :class:`Marks`."""
        return later - earlier

    def recycle(self, marks: list[float]) -> None:
        """See :class:`Marks`."""

    def close(self) -> None:
        """See :class:`Marks`."""
