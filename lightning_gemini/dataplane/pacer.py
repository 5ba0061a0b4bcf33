"""Lets bytes go while training leaves the network alone: GEMINI's Algorithm 2 (SOSP '23), run against the clock."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lightning_gemini.dataplane.pace_page import PACE_WORD, RUSH_WORD, SPAN_WORD, Pace, PacePage, Plan

UNLIMITED = sys.maxsize
_SMALLEST_BYTES = 4096  # less is not worth its startup cost, but for what is left
_PATIENCE_NS = 1_000_000_000  # with a span that does not change, besides two iterations
_UNREADABLE_NS = 100_000_000  # a plan is being written for far less
_FRESH_POLLS = 4  # who looked so lately saw the change happen
_AHEAD_NS = 10_000_000  # how much the kernel may hold of what is on its way, in time on the link
_LEAST_AHEAD_BYTES = 128 * 1024
_POLL_S, _LONGEST_POLL_S = 0.0005, 0.004
_POLLS_A_SPAN = 20
_LONGEST_SLEEP_S = 0.016  # or a rush and a change of pace would be noticed late
_SLEPT_PARTS = 7, 8  # of the time till the next span: some come sooner than they do on average


class Underway(NamedTuple):
    """What a link was given and is not through with.

    Attributes:
        in_flight_bytes: What the peer has not acknowledged: R bounds it.
        queued_bytes: The part of it that has not left this machine. An acknowledgement may be late, as it waits behind
            what the peer sends itself; then this is less.
    """

    in_flight_bytes: int = 0
    queued_bytes: int = 0


_NOTHING = Underway()


@dataclass(slots=True)
class _Permit:
    """What a link was last allowed, and under which conditions."""

    underway: Underway = _NOTHING
    carrying_bytes: int = 0
    carrying_ns: int = 0
    conditions: tuple[int, bool, int] = 0, False, 0
    from_ns: int = 0
    until_ns: int = 0
    ahead_bytes: int = UNLIMITED


class Pacer:
    """Says how many bytes of one owner's shard may go now; the links to its holders share what it allows. Thread-safe.

    Args:
        page: What the worker says.
        now_ns: The monotonic clock of the page.
    """

    def __init__(self, page: PacePage, now_ns: Callable[[], int] | None = None) -> None:
        self.page = page
        self._now_ns = now_ns or (lambda: time.monotonic_ns())
        self._lock = threading.Lock()
        self._permits: dict[int, _Permit] = {}
        self._word = -1
        self._changed_ns = self._seen_ns = 0
        self._looked_ns = -(10**18)
        self._served = False
        self._plan: Plan | None = None
        self._grace_ns, self._poll_s = _PATIENCE_NS, _POLL_S
        self._gaps_ns: tuple[int, ...] = ()
        self._unreadable_since_ns: int | None = None

    def allowance(self, left_bytes: int, underway: Underway, link: int = 0) -> int:
        """How many of ``left_bytes`` may go now; 0: ask again soon.

        Args:
            left_bytes: What could be sent now.
            underway: What this link sent before.
            link: Which of the owner's links asks, by its machine.
        """
        if left_bytes <= 0:
            return 0
        with self._lock:
            permit = self._permits.setdefault(link, _Permit())
            permit.underway = underway = self._on_the_link(permit, underway)
            shared = Underway(*map(sum, zip(*(other.underway for other in self._permits.values()), strict=True)))
            size = min(left_bytes, self._room(permit, left_bytes, shared))
            permit.underway = Underway(underway.in_flight_bytes + size, underway.queued_bytes + size)
            permit.carrying_bytes += size
            if size and permit.ahead_bytes != UNLIMITED:
                self._served = True
                self.page.note_in_flight(shared.in_flight_bytes + size)
            return size

    def still_allowed(self, link: int = 0) -> bool:
        """Whether what was allowed last may still go: the span lasts, its usable part too."""
        with self._lock:
            permit = self._permits.get(link)
            page = self.page
            if permit is None or permit.conditions != (page.pace, page.rushing, page.marks()[0]):
                return False
            return permit.ahead_bytes == UNLIMITED or self._now_ns() < permit.until_ns

    def ahead_bytes(self, link: int = 0) -> int:
        """How much of what was allowed a link may have queued at once, so that little follows a span's end."""
        permit = self._permits.get(link)
        return UNLIMITED if permit is None else permit.ahead_bytes

    def pause_s(self, underway: Underway, link: int = 0) -> float:
        """How long to wait before asking again: every look costs time, and training may need the processor.

        Inside a span until the link has carried a third of what it has, outside until shortly before the next span that
        can carry something; from then on, and where nobody knows when that is, a small part of what spans last.
        """
        permit, plan, page = self._permits.get(link), self._plan, self.page
        if permit is None or plan is None:
            return self._poll_s
        now_ns, (word, began_ns) = self._now_ns(), page.marks()
        fresh = word & 1 and word != permit.conditions[2]  # it opened since the last question
        in_flight_bytes, queued_bytes = underway
        awaited_bytes = max(queued_bytes, min(in_flight_bytes, permit.carrying_bytes))
        if in_flight_bytes + plan.chunk_bytes > plan.window_bytes:
            awaited_bytes = in_flight_bytes  # their acknowledgements
        served = plan.one_chunk and self._served and not queued_bytes
        if word & 1 and not fresh and not served and now_ns < permit.until_ns:
            third_s = awaited_bytes / 3 / plan.bandwidth_bytes_per_s
            return min(max(third_s, (permit.from_ns - now_ns) / 1e9, _POLL_S), _LONGEST_SLEEP_S)
        if fresh or page.rushing or page.pace is not Pace.PACED:
            return self._poll_s
        return min(max(self._sleep_ns(now_ns, word, began_ns) / 1e9, self._poll_s), _LONGEST_SLEEP_S)

    def is_shut(self) -> bool:
        """Whether nothing may go now: an answer for less than :meth:`allowance` takes, which is asked now and then."""
        words = self.page.words
        if words[SPAN_WORD] & 1 or words[RUSH_WORD] or words[PACE_WORD] != Pace.PACED:
            return False
        self._looked_ns = self._now_ns()
        return True

    def finish(self, link: int = 0) -> None:
        """A link has nothing in flight any more."""
        with self._lock:
            self._permits.pop(link, None)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _on_the_link(self, permit: _Permit, underway: Underway) -> Underway:
        """Counts as queued what the link cannot have carried yet, in whoever's queue it is.

        Where the slowest part of the way is in a switch or a hypervisor, this machine has nothing queued.
        """
        now_ns, plan = self._now_ns(), self._plan
        if plan is not None:
            carried_bytes = plan.bandwidth_bytes_per_s * (now_ns - permit.carrying_ns) // 10**9
            permit.carrying_bytes = max(0, permit.carrying_bytes - carried_bytes)
        permit.carrying_ns = now_ns
        in_flight_bytes, queued_bytes = underway
        return Underway(in_flight_bytes, max(queued_bytes, min(in_flight_bytes, permit.carrying_bytes)))

    def _room(self, permit: _Permit, left_bytes: int, underway: Underway) -> int:
        page, now_ns = self.page, self._now_ns()
        pace, rushing = page.pace, page.rushing
        word, began_ns = page.marks()
        permit.conditions = pace, rushing, word
        permit.ahead_bytes = UNLIMITED
        if pace is Pace.FREE or rushing:
            return left_bytes
        plan = self._current_plan(now_ns)
        began_ns = self._watch(now_ns, word, began_ns)
        if plan is None:
            return left_bytes if self._unreadable_for(now_ns) > _UNREADABLE_NS else 0
        if now_ns - self._changed_ns > self._grace_ns:  # training does something else, or nothing
            return left_bytes
        if not word & 1 or not began_ns:
            return 0
        index = PacePage.index_of(word)
        usable_ns = plan.usable_ns[index] if index < len(plan.usable_ns) else 0
        began_ns = min(began_ns, now_ns) + usable_ns * plan.lead_ppm // 10**6  # a damaged clock gains nothing
        permit.from_ns, permit.until_ns = began_ns, began_ns + usable_ns
        if now_ns < began_ns:
            return 0
        permit.ahead_bytes = max(_LEAST_AHEAD_BYTES, plan.bandwidth_bytes_per_s * _AHEAD_NS // 10**9)
        return self._piece(plan, permit.until_ns - now_ns, left_bytes, underway)

    def _piece(self, plan: Plan, left_ns: int, left_bytes: int, underway: Underway) -> int:
        """Algorithm 2's inner loop: the piece that fits in what is left of the span."""
        in_flight_bytes, queued_bytes = underway
        fits = (left_ns - plan.startup_ns) * plan.bandwidth_bytes_per_s // 10**9 - queued_bytes
        if plan.one_chunk:
            size = 0 if self._served else min(left_bytes, fits)
        else:
            size = min(left_bytes, fits, plan.chunk_bytes)
            alone = plan.window_bytes < 2 * plan.chunk_bytes  # a single buffer: it must be empty
            if in_flight_bytes + size > plan.window_bytes or (alone and in_flight_bytes):
                return 0
        return size if size >= min(left_bytes, _SMALLEST_BYTES, plan.chunk_bytes) else 0

    def _sleep_ns(self, now_ns: int, word: int, began_ns: int) -> int:
        """How long no span is to be expected; 0 or less where one is, and where nobody knows."""
        index, gaps_ns = PacePage.index_of(word), self._gaps_ns
        if not began_ns or index >= len(gaps_ns):
            return 0
        part, of = _SLEPT_PARTS
        return began_ns + gaps_ns[index] * part // of - now_ns

    def _watch(self, now_ns: int, word: int, began_ns: int) -> int:
        """Notes whether the span changed; returns when it began, 0 where nobody can know."""
        away_ns = now_ns - self._looked_ns
        self._looked_ns = now_ns
        if word != self._word:
            self._word, self._served, self._changed_ns = word, False, now_ns
            self._seen_ns = now_ns if away_ns <= _FRESH_POLLS * self._poll_s * 1e9 else 0
        elif away_ns > _PATIENCE_NS:
            self._changed_ns = now_ns  # who knows what happened meanwhile
        return began_ns or self._seen_ns

    def _current_plan(self, now_ns: int) -> Plan | None:
        """The plan; for a moment, while the next one is written, the last one."""
        found = self.page.plan()
        if found is None:
            return self._plan if self._unreadable_for(now_ns) <= _UNREADABLE_NS else None
        self._unreadable_since_ns = None
        if found is not self._plan:
            self._plan = found
            self._grace_ns = _PATIENCE_NS + 2 * max(found.iteration_ns, sum(found.usable_ns))
            self._poll_s, self._gaps_ns = _poll_s(found), _gaps_ns(found)
        return found

    def _unreadable_for(self, now_ns: int) -> int:
        if self._unreadable_since_ns is None:
            self._unreadable_since_ns = now_ns
        return now_ns - self._unreadable_since_ns


def _gaps_ns(plan: Plan) -> tuple[int, ...]:
    """From every span's beginning to that of the next one that can carry something; the first follows the last."""
    smallest = min(_SMALLEST_BYTES, plan.chunk_bytes)
    least_ns = max(1, plan.startup_ns + smallest * 10**9 // plan.bandwidth_bytes_per_s)
    gaps_ns, gap_ns = [0] * len(plan.period_ns), 0
    for index in 2 * [*reversed(range(len(gaps_ns)))]:
        gap_ns += plan.period_ns[index]
        gaps_ns[index] = gap_ns
        if plan.usable_ns[index] >= least_ns:
            gap_ns = 0
    return tuple(gaps_ns)


def _poll_s(plan: Plan) -> float:
    """A small part of the spans in which most bytes go."""
    typical_ns = sum(length * length for length in plan.usable_ns) / max(1, sum(plan.usable_ns))
    return min(max(typical_ns / 1e9 / _POLLS_A_SPAN, _POLL_S), _LONGEST_POLL_S)
