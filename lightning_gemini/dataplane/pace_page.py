"""What a worker tells its machine's agent about the network, in shared memory: when to send, and how much.

The training thread writes a few words when a span without communication begins or ends, and never enters the kernel for
it. The agent reads them while it has something to send.

The worker writes all words but peak and sent, which the sender raises and the worker takes back. The page steers only
*when* bytes go: whatever it says, or a lost bit makes it say, nothing is lost or torn by it. A page of zeros says that
everything goes at once.

Layout in words (little-endian u64)::

    0   pace: free or paced
    1   rush: anything but 0 sends the rest at once
    2   span: turn << 32 | index << 1 | open
    3   monotonic time in ns at which the span began; 0: when the reader saw it
    4   held: the worker sends by itself
    8   peak: the most bytes that were in flight
    9   sent: bytes of the version under way that were handed to the network
    16  plan: sequence, spans, bandwidth, startup, chunk, window, one chunk a span, iteration, checksum
    32  the usable length of every span in µs, two in a word; behind them the period of every span likewise
"""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from lightning_gemini.errors import ConfigurationError

WORDS = 7680
PACE_WORD, RUSH_WORD, SPAN_WORD, BEGAN_WORD, HELD_WORD = range(5)
PEAK_WORD, SENT_WORD = 8, 9  # in a cache line of their own: the agent writes them
MAX_SPANS = 7000
_SEQUENCE = 16
_PLAN = struct.Struct("<8Q")
_PLAN_BYTES = slice(8 * (_SEQUENCE + 1), 8 * (_SEQUENCE + 1) + _PLAN.size)
_CHECKSUM = _SEQUENCE + 9
_TABLE_BYTE = 8 * 32
_LONGEST_US = 2**32 - 1
_U64 = 2**64 - 1
_INDEX_MASK = 2**31 - 1
_TURN_MASK = 2**32 - 1


class Pace(enum.IntEnum):
    """Whether bytes go at once, or in the spans of the plan; what is neither counts as free."""

    FREE = 0
    PACED = int.from_bytes(b"PACED...", "little")


_HELD = int.from_bytes(b"HELD....", "little")


@dataclass(frozen=True, slots=True)
class Span:
    """Where training is.

    Attributes:
        index: Number of the span in its iteration.
        began_ns: Monotonic time at which it began; 0 where only the reader's own clock can say.
        open: Whether nothing else uses the network.
    """

    index: int
    began_ns: int
    open: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits where.

    Attributes:
        usable_ns: What may be used of every span.
        bandwidth_bytes_per_s: Of the link.
        startup_ns: What every piece costs besides its bytes.
        chunk_bytes: The largest piece.
        window_bytes: The most bytes in flight.
        one_chunk: Whether a span carries a single piece, of any size (the window and the chunk do not bind it).
        iteration_ns: How long an iteration takes; 0 where that is not known.
        lead_ppm: What is left alone at a span's start, in millionths of what may be used of it.
        period_ns: From every span's beginning to that of the next one; 0 where that is not known.
    """

    usable_ns: tuple[int, ...]
    bandwidth_bytes_per_s: int
    startup_ns: int
    chunk_bytes: int
    window_bytes: int
    one_chunk: bool
    iteration_ns: int
    lead_ppm: int = 0
    period_ns: tuple[int, ...] = ()


class PacePage:
    """The page of one rank; each process makes its own object over the same memory.

    Args:
        words: ``WORDS`` words of shared memory, cast to ``Q``.
    """

    def __init__(self, words: memoryview) -> None:
        if words.format != "Q" or len(words) != WORDS:
            raise ValueError(f"a pace page is {WORDS} words of format Q, got {len(words)} of {words.format}")
        self._use(words)
        self._turn = 0
        self._known: tuple[int, Plan | None] = -1, None

    @classmethod
    def private(cls) -> PacePage:
        """A page that nobody else sees."""
        return cls(memoryview(bytearray(8 * WORDS)).cast("Q"))

    def close(self) -> None:
        """Let go of the shared memory; what is written from now on is seen by nobody. Idempotent."""
        self._use(memoryview(bytearray(8 * WORDS)).cast("Q"))

    def _use(self, words: memoryview) -> None:
        self.words = words
        self.span_words = words[SPAN_WORD : BEGAN_WORD + 1]
        """The span word and its time: what a device writes with one copy of 16 bytes."""
        self._bytes = words.cast("B")

    # -- the worker ------------------------------------------------------------------------------------------------

    def set_pace(self, pace: Pace) -> None:
        """From now on bytes go like this."""
        self.words[PACE_WORD] = pace

    def hold(self, on: bool) -> None:
        """Whether the worker sends by itself, so that the agent keeps away."""
        self.words[HELD_WORD] = _HELD if on else 0

    def reset(self) -> None:
        """Nobody steers any more: everything goes at once. The agent says so where a worker left."""
        for place in (PACE_WORD, HELD_WORD, RUSH_WORD):
            self.words[place] = 0

    def set_plan(
        self,
        usable_s: Sequence[float],
        *,
        bandwidth_bytes_per_s: float,
        startup_s: float,
        chunk_bytes: int,
        window_bytes: int,
        one_chunk: bool = False,
        iteration_s: float = 0.0,
        lead: float = 0.0,
        periods_s: Sequence[float] = (),
    ) -> None:
        """What a span of each index has room for.

        Args:
            usable_s: Seconds that may be used of each span.
            bandwidth_bytes_per_s: Of the link, or of all links together where several holders are served at once.
            startup_s: What a piece costs besides its bytes.
            chunk_bytes: The largest piece.
            window_bytes: The most bytes in flight; equal to ``chunk_bytes`` it is one piece at a time.
            one_chunk: Every span carries a single piece, as large as fits.
            iteration_s: How long an iteration takes: how patient a reader is with a span that does not change.
            lead: What is left alone at a span's start, as a part of what may be used of it: a collective ends on one
                rank sooner than on another, whose link is still in use.
            periods_s: Seconds from each span's beginning to that of the next one, so that a sender need not look before
                something may go; empty where that is not known.

        Raises:
            ConfigurationError: More than ``MAX_SPANS`` spans, or a number that is none.
            ValueError: Periods of other spans.
        """
        if len(usable_s) > MAX_SPANS:
            raise ConfigurationError(
                f"a plan has at most {MAX_SPANS} spans, this iteration has {len(usable_s)} collectives: "
                "use schedule=eager, or larger buckets (zero_optimization.reduce_bucket_size)"
            )
        if not 1 <= bandwidth_bytes_per_s < _U64 or not 1 <= chunk_bytes <= window_bytes < _U64:
            raise ConfigurationError(
                "a plan needs a bandwidth of at least 1 byte/s and 1 <= chunk <= window bytes, got "
                f"{bandwidth_bytes_per_s} bytes/s, chunk {chunk_bytes}, window {window_bytes}"
            )
        periods_s = periods_s or [0.0] * len(usable_s)
        if len(periods_s) != len(usable_s):
            raise ValueError(f"a plan of {len(usable_s)} spans needs as many periods or none, got {len(periods_s)}")
        lengths_us = [_whole(length, 1e6, _LONGEST_US) for length in (*usable_s, *periods_s)]
        table = struct.pack(f"<{len(lengths_us)}I", *lengths_us)
        numbers = (
            len(usable_s),
            int(bandwidth_bytes_per_s),
            _whole(startup_s, 1e9, _U64),
            chunk_bytes,
            window_bytes,
            int(one_chunk),
            _whole(iteration_s, 1e9, _U64),
            _whole(lead, 1e6, _LONGEST_US),
        )
        self._write_plan(_PLAN.pack(*numbers), table)

    def _write_plan(self, numbers: bytes, table: bytes) -> None:
        sequence = self.words[_SEQUENCE]
        self.words[_SEQUENCE] = (sequence | 1) & _U64  # odd: being written
        self.words[_CHECKSUM] = 0
        self._bytes[_PLAN_BYTES] = numbers
        self._bytes[_TABLE_BYTE : _TABLE_BYTE + len(table)] = table
        self.words[_CHECKSUM] = _checksum(numbers, table)
        self.words[_SEQUENCE] = ((sequence | 1) + 1) & _U64

    def open_span(self, index: int) -> None:
        """Nothing but checkpoints uses the network from now on."""
        words = self.words
        self._turn += 1
        closed = self.encode_span(index, False, self._turn)
        words[SPAN_WORD] = closed  # nobody takes the new time for the old span's
        words[BEGAN_WORD] = time.monotonic_ns()
        words[SPAN_WORD] = closed | 1

    def close_span(self) -> None:
        """Training needs the network."""
        self.words[SPAN_WORD] &= ~1 & _U64

    def rush(self, on: bool) -> None:
        """Whether what is left goes at once: training waits for it, or soon will."""
        self.words[RUSH_WORD] = int(on)

    def take_peak(self) -> int:
        """Returns the most bytes that were in flight since the last call."""
        peak = self.words[PEAK_WORD]
        self.words[PEAK_WORD] = 0
        return peak

    def restart_sent(self) -> None:
        """A new version begins: nothing of it was sent."""
        self.words[SENT_WORD] = 0

    @property
    def sent(self) -> int:
        """Bytes of the version under way that were handed to the network, to the holder that has most of it."""
        return self.words[SENT_WORD]

    # -- the sender ------------------------------------------------------------------------------------------------

    @property
    def pace(self) -> Pace:
        """How to send."""
        return Pace.PACED if self.words[PACE_WORD] == Pace.PACED else Pace.FREE

    @property
    def held(self) -> bool:
        """Whether the worker sends by itself."""
        return self.words[HELD_WORD] == _HELD

    @property
    def rushing(self) -> bool:
        """Whether the rest goes at once."""
        return self.words[RUSH_WORD] != 0

    def span(self) -> Span:
        """Where training is now."""
        word, began_ns = self.marks()
        return Span(self.index_of(word), began_ns, bool(word & 1))

    def marks(self) -> tuple[int, int]:
        """Returns the span word, and when it says that the span began; it changes with every change of either."""
        words = self.words
        word, began_ns = words[SPAN_WORD], words[BEGAN_WORD]
        # The time of the next span may be there before the span is: then this one is over.
        return (word, began_ns) if words[SPAN_WORD] == word else (word & ~1, began_ns)

    def plan(self) -> Plan | None:
        """Returns the plan; ``None`` where there is none, or while it is written, or if it is damaged."""
        sequence = self.words[_SEQUENCE]
        if sequence != self._known[0] or self._known[1] is None:
            found = self._read_plan()
            if self.words[_SEQUENCE] != sequence:
                return None
            self._known = sequence, found
        return self._known[1]

    def _read_plan(self) -> Plan | None:
        numbers = bytes(self._bytes[_PLAN_BYTES])
        count, bandwidth, startup_ns, chunk_bytes, window_bytes, one_chunk, iteration_ns, lead = _PLAN.unpack(numbers)
        if count > MAX_SPANS:
            return None
        table = bytes(self._bytes[_TABLE_BYTE : _TABLE_BYTE + 2 * 4 * count])
        if self.words[_CHECKSUM] != _checksum(numbers, table):
            return None
        lengths_ns = tuple(1000 * length for length in struct.unpack(f"<{2 * count}I", table))
        usable_ns, period_ns = lengths_ns[:count], lengths_ns[count:]
        sizes = chunk_bytes, window_bytes, bool(one_chunk)
        return Plan(usable_ns, bandwidth, startup_ns, *sizes, iteration_ns, lead, period_ns)

    @staticmethod
    def encode_span(index: int, is_open: bool, turn: int = 0) -> int:
        """Returns the word that says where training is; ``turn`` tells two visits to the same span apart."""
        return (turn & _TURN_MASK) << 32 | min(index, _INDEX_MASK) << 1 | is_open

    @staticmethod
    def index_of(word: int) -> int:
        """Returns the index of the span that such a word speaks of."""
        return word >> 1 & _INDEX_MASK

    def note_in_flight(self, size_bytes: int) -> None:
        """So many bytes are on their way."""
        if size_bytes > self.words[PEAK_WORD]:
            self.words[PEAK_WORD] = size_bytes

    def note_sent(self, size_bytes: int) -> None:
        """So many bytes of the version under way were handed to the network."""
        if size_bytes > self.words[SENT_WORD]:
            self.words[SENT_WORD] = size_bytes


def _whole(value: float, factor: float, limit: int) -> int:
    if not value >= 0:  # also what is no number
        raise ConfigurationError(f"a plan's times must be 0 s or more, got {value}")
    return int(min(value * factor, limit))


def _checksum(numbers: bytes, table: bytes) -> int:
    return xxhash.xxh3_64_intdigest(numbers + table, _SEQUENCE)
