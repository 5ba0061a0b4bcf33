"""The pacer on a virtual clock, with a link that carries what the plan says.

Nothing outlasts its span, nothing waits for ever, and what a span carries is what Algorithm 2 puts into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.schedule import schedule_chunks
from lightning_gemini.dataplane import pace_page
from lightning_gemini.dataplane.pace_page import Pace, PacePage
from lightning_gemini.dataplane.pacer import UNLIMITED, Pacer, Underway

MS = 1_000_000
POLL_NS = MS // 2
RATE = 100_000_000  # bytes/s: 100 bytes a microsecond
ALL = 10**9
Field = float | bool | tuple[float, ...]


@dataclass
class World:
    """A clock, a page and a link of exactly the planned speed."""

    page: PacePage = field(default_factory=PacePage.private)
    now_ns: int = 10**12
    sent: int = 0
    busy_until_ns: int = 0

    def __post_init__(self) -> None:
        self.pacer = Pacer(self.page, lambda: self.now_ns)

    def plan(self, *usable_ms: float, chunk: int = 10**6, window: int = 4 * 10**6, **fields: Field) -> None:
        given = {"bandwidth_bytes_per_s": RATE, "startup_s": 0.0, **fields}
        usable_s = [length / 1000 for length in usable_ms]
        self.page.set_plan(usable_s, chunk_bytes=chunk, window_bytes=window, **given)  # type: ignore[arg-type]
        self.page.set_pace(Pace.PACED)

    def open(self, index: int) -> None:
        self.page.open_span(index)
        self.page.span_words[1] = self.now_ns  # not the real clock's time

    def in_flight(self) -> int:
        return max(0, self.busy_until_ns - self.now_ns) * RATE // 10**9

    def ask(self, left: int = ALL, in_flight: int = 0, link: int = 0, queued: int | None = None) -> int:
        underway = Underway(in_flight, in_flight if queued is None else queued)
        return self.pacer.allowance(left, underway, link)

    def pass_ms(self, duration: float) -> None:
        self.now_ns += int(duration * MS)

    def send_for(self, duration_ns: int, left: int) -> int:
        """What goes in this time, asked for as a sender does."""
        end_ns, sent = self.now_ns + duration_ns, 0
        while self.now_ns < end_ns:
            while size := self.ask(left - sent, self.in_flight()):
                self.busy_until_ns = max(self.busy_until_ns, self.now_ns) + size * 10**9 // RATE
                sent += size
            self.now_ns += min(POLL_NS, end_ns - self.now_ns)
        return sent

    def polls(self, duration_ms: float) -> Iterator[None]:
        for _ in range(int(duration_ms * MS) // POLL_NS):
            self.now_ns += POLL_NS
            yield


@pytest.fixture
def world() -> World:
    return World()


# -- when everything goes at once --------------------------------------------------------------------------------------


def test_without_a_word_of_the_worker_everything_goes(world: World) -> None:
    assert world.ask() == ALL
    assert world.pacer.ahead_bytes() == UNLIMITED
    assert world.pacer.still_allowed()


def test_a_rush_lets_everything_go_whatever_the_span(world: World) -> None:
    world.plan(5.0)
    assert world.ask() == 0
    world.page.rush(True)
    assert world.ask() == ALL
    assert world.pacer.still_allowed()
    world.page.rush(False)
    assert not world.pacer.still_allowed()
    assert world.ask() == 0


def test_nothing_is_left_nothing_is_allowed(world: World) -> None:
    assert (world.ask(0), world.ask(-5)) == (0, 0)


# -- spans -------------------------------------------------------------------------------------------------------------


def test_only_an_open_span_carries_anything_and_only_for_its_usable_length(world: World) -> None:
    world.plan(2.0)
    assert world.ask() == 0
    world.open(0)
    assert world.ask() == 2 * MS * RATE // 10**9
    assert world.pacer.still_allowed()
    world.page.close_span()
    assert not world.pacer.still_allowed()
    assert world.ask() == 0
    world.open(0)
    world.pass_ms(1.5)
    assert world.ask() == MS // 2 * RATE // 10**9
    world.pass_ms(0.5)
    assert not world.pacer.still_allowed()
    assert world.ask() == 0


def test_the_beginning_of_a_span_is_left_alone(world: World) -> None:
    world.plan(2.0, lead=0.25)
    world.open(0)
    assert world.ask() == 0
    world.pass_ms(0.4)
    assert world.ask() == 0
    world.pass_ms(0.1)
    assert world.ask() == 2 * MS * RATE // 10**9
    world.pass_ms(1.5)
    assert world.ask() == MS // 2 * RATE // 10**9
    world.pass_ms(0.5)
    assert world.ask() == 0


def test_startup_and_what_is_on_its_way_take_their_time(world: World) -> None:
    world.plan(2.0, startup_s=0.0005)
    world.open(0)
    assert world.ask() == 150_000
    assert world.ask(in_flight=100_000) == 50_000
    assert world.ask(in_flight=150_000) == 0


def test_what_has_left_takes_no_time_of_the_span_but_room_in_the_window(world: World) -> None:
    world.plan(2.0, chunk=150_000, window=160_000, startup_s=0.0005)
    world.open(0)
    assert world.ask(in_flight=100_000, queued=0) == 0  # 150,000 more would be too many in flight
    world.plan(2.0, chunk=150_000, window=500_000, startup_s=0.0005)
    assert world.ask(in_flight=100_000, queued=20_000) == 130_000
    assert world.ask(left=90_000, in_flight=0, queued=0, link=1) == 0  # link 0 has 150,000 queued by now
    world.pacer.finish()
    assert world.ask(in_flight=100_000, queued=0) == 150_000
    world.pacer.finish()
    assert world.ask(left=90_000, in_flight=0, queued=0, link=1) == 90_000


def test_what_the_link_cannot_have_carried_yet_counts_wherever_it_is(world: World) -> None:
    """The slowest part of the way may be a switch: this machine has nothing queued then."""
    world.plan(2.0)
    world.open(0)
    assert world.ask() == 200_000
    world.pass_ms(1.0)
    assert world.ask(in_flight=200_000, queued=0) == 0
    assert world.ask(in_flight=40_000, queued=0) == 60_000  # what is acknowledged has been carried
    world.pass_ms(0.5)
    assert world.ask(in_flight=300_000, queued=0) == 0


def test_a_sender_whose_window_is_full_waits_for_acknowledgements(world: World) -> None:
    world.plan(1000.0, chunk=300_000, window=600_000)
    world.open(0)
    assert world.ask() == 300_000
    world.pass_ms(10.0)
    assert wait_ms(world, in_flight=600_000, queued=0) == pytest.approx(2.0)
    assert wait_ms(world, in_flight=300_000, queued=0) == pytest.approx(1.0)
    world.ask(left=1, in_flight=300_000, queued=0)
    assert wait_ms(world, in_flight=300_000, queued=0) == pytest.approx(0.5)


def test_a_span_beyond_the_plan_has_no_length(world: World) -> None:
    world.plan(2.0)
    world.open(1)
    assert world.ask() == 0


def test_pieces_are_chunks_and_the_window_bounds_them(world: World) -> None:
    world.plan(1000.0, chunk=300, window=1000)
    world.open(0)
    assert [world.ask(in_flight=flying) for flying in (0, 300, 600, 700, 701, 900)] == [300, 300, 300, 300, 0, 0]
    assert world.ask(left=50, in_flight=900) == 50


def test_a_single_buffer_must_be_empty_before_the_next_piece(world: World) -> None:
    world.plan(1000.0, chunk=1000, window=1000)
    world.open(0)
    assert world.ask() == 1000
    assert world.ask(left=1, in_flight=1) == 0
    assert world.ask(left=1) == 1


def test_crumbs_wait_for_a_better_span(world: World) -> None:
    world.plan(0.05)  # 5000 bytes
    world.open(0)
    assert world.ask(in_flight=500) == 4500
    assert world.ask(in_flight=1000) == 0
    assert world.ask(left=100, in_flight=1000) == 100  # but for the last ones


def test_one_chunk_a_span_as_large_as_fits(world: World) -> None:
    world.plan(20.0, 10.0, chunk=100, window=100, one_chunk=True)
    for index, expected in ((0, 2_000_000), (1, 1_000_000), (0, 2_000_000)):
        world.open(index)
        assert world.ask() == expected
        assert world.ask() == 0
        world.pass_ms(20.0)
        world.page.close_span()
        assert world.ask() == 0
    assert world.page.take_peak() == 2_000_000


def test_links_of_an_owner_share_what_it_may_send(world: World) -> None:
    world.plan(2.0)
    world.open(0)
    assert world.ask(left=50_000, link=1) == 50_000
    assert world.ask(link=2) == 150_000
    assert world.ask(left=10_000, in_flight=50_000, link=1) == 0
    assert world.page.take_peak() == 200_000
    world.pacer.finish(2)
    assert world.ask(left=10_000, in_flight=50_000, link=1) == 10_000
    world.pacer.finish(1)
    assert world.ask(link=2) == 200_000


def test_little_runs_ahead_of_the_link(world: World) -> None:
    world.plan(1000.0, chunk=10**8, window=10**8)
    world.open(0)
    assert world.ask() == 10**8
    assert world.pacer.ahead_bytes() == 10 * RATE // 1000


def test_outside_spans_looks_are_rarer_where_spans_are_long(world: World) -> None:
    for usable_ms, expected_s in ((1.0, 0.0005), (20.0, 0.001), (1000.0, 0.004)):
        world.plan(usable_ms, 0.001, 0.001)
        world.page.close_span()
        assert world.ask() == 0
        assert world.pacer.is_shut()
        assert world.pacer.pause_s(Underway()) == pytest.approx(expected_s, rel=0.01)
        world.open(0)
        assert not world.pacer.is_shut()
        assert world.ask()
        assert world.pacer.pause_s(Underway()) == 0.0005
        world.pass_ms(usable_ms)
        assert world.pacer.pause_s(Underway()) == pytest.approx(expected_s, rel=0.01)


def test_inside_spans_a_third_of_what_is_in_flight_may_arrive_before_the_next_look(world: World) -> None:
    world.plan(1000.0)
    world.open(0)
    assert world.ask()
    waits = [
        world.pacer.pause_s(Underway(size, size))
        for size in (RATE * milliseconds // 1000 for milliseconds in (0, 3, 9, 100))
    ]
    assert waits == pytest.approx([0.0005, 0.001, 0.003, 0.016])


def test_what_a_short_look_calls_shut_a_long_one_refuses(world: World) -> None:
    world.plan(10.0)
    for steps in ("close", "open", "rush", "close", "calm", "free", "open"):
        match steps:
            case "close":
                world.page.close_span()
            case "open":
                world.open(0)
            case "rush" | "calm":
                world.page.rush(steps == "rush")
            case "free":
                world.page.set_pace(Pace.FREE)
        assert world.pacer.is_shut() == (not world.ask())


# -- a device that says where training is, but not since when ----------------------------------------------------------


def device_opens(world: World, index: int) -> None:
    world.page.span_words[1] = 0
    world.page.span_words[0] = PacePage.encode_span(index, True)


def test_who_watches_knows_when_a_span_began(world: World) -> None:
    world.plan(2.0, 2.0)
    assert world.ask() == 0
    world.pass_ms(0.5)
    device_opens(world, 1)
    assert world.ask() == 200_000
    world.pass_ms(0.5)
    assert world.ask() == 150_000


def test_a_span_that_nobody_saw_beginning_is_not_used(world: World) -> None:
    world.plan(2.0, 2.0)
    device_opens(world, 1)
    for _ in world.polls(5.0):
        assert world.ask() == 0
    world.page.close_span()
    for _ in world.polls(50.0):
        assert world.pacer.is_shut()
    device_opens(world, 0)
    assert world.ask() == 200_000


# -- asleep till the next span -----------------------------------------------------------------------------------------


def wait_ms(world: World, in_flight: int = 0, queued: int | None = None) -> float:
    return 1000 * world.pacer.pause_s(Underway(in_flight, in_flight if queued is None else queued))


def closed(world: World, index: int, *usable_ms: float, periods_s: tuple[float, ...], **fields: Field) -> None:
    """A span of that index that has just opened and closed, with a sender that asked meanwhile."""
    world.plan(*usable_ms, periods_s=periods_s, **fields)
    world.open(index)
    world.ask()
    world.page.close_span()
    assert world.ask() == 0


def test_out_of_spans_a_sender_sleeps_most_of_the_time_till_the_next(world: World) -> None:
    closed(world, 0, 10.0, 10.0, periods_s=(0.012, 0.064))
    assert wait_ms(world) == pytest.approx(10.5)  # 7/8
    world.pass_ms(4.0)
    assert wait_ms(world) == pytest.approx(6.5)
    for passed_ms in (6.4, 1.0, 2.0, 100.0):  # it may come any moment
        world.pass_ms(passed_ms)
        assert wait_ms(world) == pytest.approx(0.5)
    closed(world, 1, 10.0, 10.0, periods_s=(0.012, 0.064))
    for expected_ms in (16.0, 16.0, 16.0, 8.0, 0.5):  # the last span's is the time till the next iteration
        assert wait_ms(world) == pytest.approx(expected_ms)
        assert world.pacer.is_shut()
        world.pass_ms(expected_ms)


def test_a_span_that_is_used_up_is_slept_over(world: World) -> None:
    world.plan(2.0, periods_s=(0.016,))
    world.open(0)
    assert world.ask()
    assert wait_ms(world) == 0.5
    world.pass_ms(2.0)
    assert wait_ms(world) == pytest.approx(12.0)
    world.open(0)
    assert wait_ms(world) == 0.5  # before anybody asked what the new span carries
    assert world.ask()
    assert wait_ms(world, in_flight=RATE * 3 // 1000) == pytest.approx(1.0)


def test_a_span_that_carries_one_piece_is_slept_over_when_that_has_arrived(world: World) -> None:
    world.plan(4.0, chunk=100, window=100, one_chunk=True, periods_s=(0.016,))
    world.open(0)
    assert wait_ms(world) == 0.5
    assert world.ask()
    assert wait_ms(world, in_flight=RATE * 3 // 1000) == pytest.approx(1.0)
    assert wait_ms(world) == pytest.approx(14.0)


def test_the_part_of_a_span_that_is_left_alone_is_slept_over(world: World) -> None:
    world.plan(20.0, lead=0.25)
    world.open(0)
    assert world.ask() == 0
    assert wait_ms(world) == pytest.approx(5.0)
    world.pass_ms(5.0)
    assert world.ask()


def test_spans_that_carry_nothing_are_slept_over(world: World) -> None:
    # Number 1 is between collectives that overlap, number 2 too short for a piece, the last one for any after startup.
    for index, expected_ms in ((0, 11.375), (1, 7.875), (2, 5.25), (3, 5.25), (4, 3.5)):
        world = World()
        closed(world, index, 1.0, 0.0, 0.03, 1.0, 0.1, periods_s=(0.004, 0.003, 0.006, 0.002, 0.004), startup_s=0.0001)
        assert wait_ms(world) == pytest.approx(expected_ms)
    closed(world, 0, 0.0, 0.0, periods_s=(0.5, 0.5))  # nothing anywhere
    assert wait_ms(world) == 16.0


def test_a_sender_sleeps_only_where_it_knows_since_when_and_till_when(world: World) -> None:
    closed(world, 0, 10.0, periods_s=(0.016,))
    assert wait_ms(world) == pytest.approx(14.0)
    began_ns, world.page.span_words[1] = world.page.span_words[1], 0  # as a device says it
    assert wait_ms(world) == 0.5
    world.page.span_words[1] = began_ns
    for write in (world.page.rush, lambda on: world.page.set_pace(Pace.FREE if on else Pace.PACED)):
        write(True)
        assert wait_ms(world) == 0.5
        write(False)
        assert wait_ms(world) == pytest.approx(14.0)
    closed(world, 1, 10.0, periods_s=(0.016,))  # no span of the plan
    assert wait_ms(world) == 0.5
    closed(world, 0, 10.0, periods_s=())
    assert wait_ms(world) == 0.5


def test_a_damaged_table_is_no_plan_and_nobody_sleeps(world: World) -> None:
    world.plan(10.0, periods_s=(0.016,))
    world.page._bytes[8 * 32 + 4] ^= 1  # of the period
    world.open(0)
    world.page.close_span()
    assert world.page.plan() is None
    assert world.ask() == 0
    assert wait_ms(world) == 0.5


def test_who_slept_till_a_span_was_open_did_not_see_it_begin(world: World) -> None:
    closed(world, 0, 2.0, 2.0, periods_s=(0.016, 0.016))
    assert world.pacer.is_shut()
    world.pass_ms(wait_ms(world))
    device_opens(world, 1)
    assert world.ask() == 0


def looks(world: World, spans_ms: list[tuple[int, int]], speed: float) -> list[int]:
    """Two iterations of spans and collectives of these lengths over ``speed``; returns when the sender looked."""
    times_ns, then_ns = [], world.now_ns
    for index, (idle, busy) in [*enumerate(spans_ms)] * 2:
        for is_open, length in ((True, idle), (False, busy)):
            world.now_ns, again_ns = then_ns, world.now_ns
            world.open(index) if is_open else world.page.close_span()
            world.now_ns, then_ns = max(then_ns, again_ns), then_ns + int(length * MS / speed)
            while world.now_ns < then_ns:
                times_ns.append(world.now_ns)
                world.ask()
                world.now_ns += int(world.pacer.pause_s(Underway()) * 1e9)
    return times_ns


span_and_collective_ms = st.tuples(st.sampled_from([0, 0, 1, 5, 60]), st.integers(1, 60))


@given(spans_ms=st.lists(span_and_collective_ms, min_size=1, max_size=6), speed=st.floats(0.5, 1.1))
def test_a_sleeper_is_awake_when_a_span_begins(spans_ms: list[tuple[int, int]], speed: float) -> None:
    world = World()
    periods_s = tuple((idle + busy) / 1000 for idle, busy in spans_ms)
    world.plan(*(0.8 * idle for idle, _ in spans_ms), periods_s=periods_s)
    begin_ns = world.now_ns
    times_ns = looks(world, spans_ms, speed)
    poll_ns = int(world.pacer._poll_s * 1e9)
    for idle, busy in 2 * spans_ms:
        if idle:
            assert min(time_ns for time_ns in times_ns if time_ns >= begin_ns) - begin_ns <= poll_ns
        begin_ns += int(idle * MS / speed) + int(busy * MS / speed)


def test_who_knows_the_periods_looks_a_quarter_as_often() -> None:
    """Ten spans an iteration, each used up at half its length, before collectives three times as long."""
    spans_ms = [(40, 120)] * 10
    counts = []
    for periods_s in ((), (0.16,) * 10):
        world = World()
        world.plan(*[20.0] * 10, one_chunk=True, periods_s=periods_s)
        counts.append(len(looks(world, spans_ms, speed=1.0)))
    assert counts[1] < counts[0] / 4, counts


# -- what cannot be trusted --------------------------------------------------------------------------------------------


def test_a_worker_that_died_in_a_span_or_outside_holds_nothing_for_ever(world: World) -> None:
    for is_open in (True, False):
        world.plan(2.0, iteration_s=0.5)
        world.open(0)
        if not is_open:
            world.page.close_span()
        waited = [world.ask() for _ in world.polls(2100.0)]
        assert waited[-1] == ALL
        assert not any(waited[int(2.0 * MS) // POLL_NS + 1 : int(1990 * MS) // POLL_NS])


def test_a_sender_that_did_not_look_for_long_is_patient_again(world: World) -> None:
    world.plan(2.0)
    world.open(0)
    assert world.ask()
    world.pass_ms(60_000)
    assert world.ask() == 0


def test_no_plan_is_waited_for_a_moment_only(world: World) -> None:
    world.page.set_pace(Pace.PACED)
    world.open(0)
    assert world.ask() == 0
    world.pass_ms(101)
    assert world.ask() == ALL


def test_while_a_plan_is_written_the_last_one_counts(world: World) -> None:
    world.plan(2.0)
    world.open(0)
    assert world.ask() == 200_000
    sequence = world.page.words[16]
    world.page.words[16] = sequence + 1
    world.page.words[pace_page._CHECKSUM] = 0
    assert world.ask() == 200_000
    world.plan(1.0)
    assert world.ask() == 100_000
    world.page.words[16] += 1  # and this one is never finished
    world.page.words[pace_page._CHECKSUM] = 0
    assert world.ask() == 100_000
    world.pass_ms(101)
    assert world.ask() == ALL


def test_a_time_that_is_still_to_come_gains_nothing(world: World) -> None:
    world.plan(2.0)
    world.open(0)
    world.page.span_words[1] = 2**63
    assert world.ask() == 200_000


@given(place=st.integers(0, 8 * 4 - 1), bit=st.integers(0, 7), is_open=st.booleans())
def test_a_flipped_bit_delays_by_the_grace_at_most(place: int, bit: int, is_open: bool) -> None:
    world = World()
    world.plan(2.0)
    world.open(0)
    if not is_open:
        world.page.close_span()
    world.page._bytes[place] ^= 1 << bit
    assert any(world.ask() for _ in world.polls(1100.0))


# -- against the schedule ----------------------------------------------------------------------------------------------

spans_ms = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@given(
    idle_ms=spans_ms,
    busy_ms=st.integers(1, 20),
    checkpoint=st.integers(1, 20_000_000),
    chunk=st.integers(RATE * POLL_NS // 10**9 + 1, 2_000_000),  # or the link would idle from look to look
    sub_buffers=st.integers(1, 4),
)
def test_a_span_carries_what_algorithm_2_puts_into_it(
    idle_ms: list[int], busy_ms: int, checkpoint: int, chunk: int, sub_buffers: int
) -> None:
    """To a chunk, and to what the link could carry between two looks at the page."""
    safety, left = 0.8, checkpoint
    expected = schedule_chunks(
        [length / 1000 for length in idle_ms],
        checkpoint,
        replicas=2,
        bandwidth_bytes_per_s=RATE,
        startup_s=0.0,
        buffer_bytes=chunk * sub_buffers,
        sub_buffers=sub_buffers,
        safety=safety,
    )
    world, carried = World(), []
    world.plan(*(safety * length for length in idle_ms), chunk=chunk, window=chunk * sub_buffers)
    for index, length in enumerate(idle_ms):
        world.open(index)
        end_ns = world.now_ns + int(safety * length * MS)
        carried.append(world.send_for(length * MS, left))
        left -= carried[-1]
        assert world.busy_until_ns <= max(end_ns, world.now_ns - length * MS)  # the link is free again in time
        world.page.close_span()
        assert world.send_for(busy_ms * MS, left) == 0
    if sub_buffers > 1 and expected.overrun_s == 0:
        scheduled = [sum(piece.size_bytes for piece in span) for span in expected.spans]
        slack = chunk + 2 * POLL_NS * RATE // 10**9 + 4096
        behind = 0
        for index, (sent, meant) in enumerate(zip(carried, scheduled, strict=True)):
            behind += meant - sent
            assert abs(behind) <= slack * (index + 1), (carried, scheduled)
    world.page.rush(True)
    assert world.ask(left) == left  # and what is left goes at the end
