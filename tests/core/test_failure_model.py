from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.core.failure_model import (
    SECONDS_PER_DAY,
    FailureModel,
    PoissonModel,
    SequenceModel,
    SoakModel,
    TraceModel,
)
from lightning_gemini.core.fault import KINDS, LASTING, PlannedFault, Targets
from lightning_gemini.core.fault_trace import format_trace, parse_trace
from lightning_gemini.errors import ConfigurationError

TARGETS = Targets(6, 2, ("a", "a", "b", "b", "c", "c"), ((0, 1), (2, 3), (4, 5)), etcd_members=3)
EVERYTHING = dict.fromkeys(KINDS, 1.0)
MODELS: list[FailureModel] = [
    SequenceModel(tuple(KINDS), repeat=5),
    PoissonModel(EVERYTHING),
    SoakModel(EVERYTHING),
    TraceModel(tuple(PlannedFault(kind, time_s=1.0) for kind in KINDS)),
]


def planned(model: FailureModel, seed: int, count: int = 300, targets: Targets = TARGETS) -> list[PlannedFault]:
    return list(itertools.islice(model.faults(targets, random.Random(seed)), count))


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_faults_and_others_give_others(model: FailureModel) -> None:
    assert planned(model, 7) == planned(model, 7)
    assert len({tuple(planned(model, seed, 20)) for seed in range(10)}) == 10


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_comes_and_hits_what_there_is(model: FailureModel) -> None:
    faults = planned(model, 1)
    assert {fault.kind for fault in faults} == set(KINDS) == set(model.kinds)
    for fault in faults:
        assert all(0 <= victim < (3 if fault.kind == "etcd" else 6) for victim in fault.victims)
        assert bool(fault.victims) == (fault.kind != "root")
        assert fault.kind not in ("group", "correlated") or fault.victims in TARGETS.groups
        assert (fault.rank is not None) == (fault.kind == "software")
        assert fault.rank is None or fault.rank // 2 == fault.victims[0]


def test_poisson_rates_come_out_right() -> None:
    rates = {"software": 40.0, "hardware": 10.0, "correlated": 5.0, "etcd": 2.0, "link": 0.0}
    model, days = PoissonModel(rates), 60.0
    faults = list(itertools.takewhile(lambda fault: fault.time_s < days * SECONDS_PER_DAY, _forever(model)))
    counts = Counter(fault.kind for fault in faults)
    expected = {"software": 40 * 6, "hardware": 10 * 6, "correlated": 5 * 3, "etcd": 2 * 3}  # a day
    assert set(counts) == set(expected)
    for kind, a_day in expected.items():
        assert counts[kind] == pytest.approx(a_day * days, abs=4 * math.sqrt(a_day * days))  # four standard deviations
    victims = Counter(fault.victims[0] for fault in faults if fault.kind == "software")
    assert min(victims.values()) > 0.9 * max(victims.values())


def test_poisson_gaps_are_exponential_over_the_whole_job() -> None:
    model = PoissonModel({"software": 100.0})
    times = [0.0, *(fault.time_s or 0.0 for fault in itertools.islice(_forever(model), 20_000))]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = SECONDS_PER_DAY / 600
    assert sum(gaps) / len(gaps) == pytest.approx(mean, rel=0.03)
    for multiple in (0.5, 1.0, 2.0):
        longer = sum(gap > multiple * mean for gap in gaps) / len(gaps)
        assert longer == pytest.approx(math.exp(-multiple), abs=0.015)


def _forever(model: FailureModel) -> itertools.chain[PlannedFault]:
    return itertools.chain(model.faults(TARGETS, random.Random(11)))


@given(
    st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 4), st.lists(st.sampled_from(list(KINDS)), max_size=6)
)
def test_a_sequence_leaves_room_around_every_fault(seed: int, stretch: int, repeat: int, kinds: list[str]) -> None:
    faults = planned(SequenceModel(tuple(kinds), stretch, repeat), seed)
    assert [fault.kind for fault in faults] == kinds * repeat
    for index, fault in enumerate(faults):
        low, high = max(1, stretch // 4), max(1, stretch * 3 // 4)
        assert fault.at_step is not None
        assert low <= fault.at_step - index * stretch <= high
        assert fault.needs_persistent == (fault.kind in ("group", "correlated"))
        assert (fault.lasts_s is not None) == (fault.kind in LASTING)


def test_a_soak_waits_for_recoveries_except_when_it_overlaps_or_has_flipped_a_byte() -> None:
    faults = planned(SoakModel(EVERYTHING, overlap=0.3), 3, 2000)
    for before, fault in itertools.pairwise(faults):
        if before.kind == "corrupt":
            assert fault.after_s == 0.0
            assert fault.kind in ("software", "hardware", "root")
        if fault.kind in ("group", "correlated", "corrupt"):
            assert fault.calm_s is not None
    overlapping = sum(bool(fault.after_s) for fault in faults)
    assert 300 < overlapping < 600


FINITE = st.floats(0, 1e6, allow_nan=False).map(abs)
MOMENTS = st.one_of(
    st.builds(lambda value: {"calm_s": value}, FINITE),
    st.builds(lambda value: {"after_s": value}, FINITE),
    st.builds(lambda value: {"at_step": value}, st.integers(0, 10**6)),
    st.just({}),
)
FAULTS = st.builds(
    lambda moment, **fields: PlannedFault(**moment, **fields),
    MOMENTS,
    kind=st.sampled_from(list(KINDS)),
    victims=st.lists(st.integers(0, 99), max_size=3, unique=True).map(tuple),
    rank=st.none() | st.integers(0, 99),
    lasts_s=st.none() | FINITE,
    needs_persistent=st.booleans(),
)


@given(st.lists(FAULTS, max_size=5), st.lists(FINITE, max_size=5))
def test_traces_round_trip(faults: list[PlannedFault], times: list[float]) -> None:
    timed = [PlannedFault("software", (1,), time_s=time) for time in sorted(times)]
    assert parse_trace(format_trace([*faults, *timed])) == (*faults, *timed)


def test_a_trace_is_read_as_people_write_it() -> None:
    text = "# night of the 3rd\n\n12.5 software 3 rank=7\nstep=40 hardware 0,1  # both\n  20 pause * for=4\n"
    assert parse_trace(text) == (
        PlannedFault("software", (3,), 7, time_s=12.5),
        PlannedFault("hardware", (0, 1), at_step=40),
        PlannedFault("pause", (), time_s=20.0, lasts_s=4.0),
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("software 3", "could not convert"),
        ("12 explosion 3", "kind must be one of"),
        ("12 software three", "invalid literal"),
        ("-1 software 3", "not negative"),
        ("nan software 3", "finite"),
        ("inf software 3", "finite"),
        ("phase=2 software 3", "no such moment"),
        ("12 pause 1 until=3", "no such option"),
        ("12", "too short"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        parse_trace(f"1 software 0\n{line}\n", "faults.txt")
    assert str(caught.value).startswith("faults.txt, line 2: expected")


def test_times_that_go_back_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="must not go back"):
        parse_trace("2 software 0\n1 software 0\n")


@pytest.mark.parametrize(
    ("kind", "remedy"), [("correlated", "--domains"), ("etcd", "leave --etcd out"), ("group", "placement group")]
)
def test_what_a_job_does_not_have_cannot_be_hit(kind: str, remedy: str) -> None:
    bare = Targets(2, etcd_members=0)
    for model in (SequenceModel((kind,)), PoissonModel({kind: 1.0}), SoakModel({kind: 1.0})):
        with pytest.raises(ConfigurationError, match=remedy):
            planned(model, 0, 1, bare)


def test_a_trace_for_a_larger_job_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="victims 0 to 5 for hardware faults, got 6"):
        planned(TraceModel(parse_trace("1 hardware 6\n")), 0)
