"""What counts as a change of training, on iterations that are written here."""

from __future__ import annotations

import random

import pytest

from lightning_gemini.core.drift import DriftWatch, overhead
from lightning_gemini.core.idle_spans import Collective, IdleProfile, IterationTrace, average

NOISE = 0.02  # standard deviation of an iteration of 1 s


def iteration(duration_s: float) -> IterationTrace:
    return IterationTrace(0.0, duration_s, 1, (Collective("all_gather", 1000, 0.2, 0.4),))


def profile_of(dice: random.Random, iterations: int = 20) -> IdleProfile:
    return average([iteration(dice.gauss(1.0, NOISE)) for _ in range(iterations)])


def test_the_overhead_is_what_is_longer_less_what_may_be_chance() -> None:
    exact = average([iteration(1.0)] * 5)
    assert overhead([1.03] * 10, exact) == pytest.approx(0.03)
    assert overhead([1.0] * 10, exact) == pytest.approx(0.0)
    profile = average([iteration(duration_s) for duration_s in (0.9, 1.0, 1.1)])
    assert profile.iteration_std_s == pytest.approx(0.1)
    standard_error = (0.1**2 / 3 + 0.1**2 / 4 * 4 / 3) ** 0.5
    assert overhead([1.1, 1.1, 1.3, 1.3], profile) == pytest.approx(0.2 - 3 * standard_error)


def test_chance_is_hardly_ever_taken_for_an_overhead_and_a_real_one_is_found(seed: int) -> None:
    dice = random.Random(seed)
    false = found = 0
    for _ in range(300):
        profile = profile_of(dice)
        false += overhead([dice.gauss(1.01, NOISE) for _ in range(64)], profile) > 0.01
        found += overhead([dice.gauss(1.04, NOISE) for _ in range(64)], profile) > 0.01
    assert false <= 10
    assert found >= 290


@pytest.mark.parametrize("patience", [8, 64])
def test_durations_are_compared_whenever_there_are_enough_of_them(patience: int) -> None:
    watch = DriftWatch(average([iteration(1.0)] * 5), 1, 0.01, patience)
    reasons = [watch.take_iteration(iteration(1.05)) for _ in range(2 * patience + 7)]
    told = [index for index, reason in enumerate(reasons) if reason is not None]
    assert told == [patience + 6, 2 * patience + 6]  # the first eight only fill the median
    assert reasons[told[0]] == "iterations take 5.0% longer than profiled ones, the budget is 1.0%"


def test_a_long_validation_is_no_overhead() -> None:
    watch = DriftWatch(average([iteration(1.0)] * 5), 1, 0.01, 64)
    assert not any(watch.take_iteration(iteration(30.0 if index == 40 else 1.0)) for index in range(300))


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_budget_is_kept_to_the_letter(budget: float) -> None:
    watch = DriftWatch(average([iteration(1.0)] * 5), 1, budget, 8)
    assert any(watch.take_iteration(iteration(1.001)) for _ in range(40)) == (budget == 0.0)
