"""The profiler sees real ZeRO training of two ranks: every collective, when it was in flight, and where the step is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.strategies.jobs import Job

SCRIPT = Path(__file__).with_name("profiled_training.py")
STEPS = 7
SETTLED = 3  # by then ZeRO-3 has seen its modules in order, and fetches ahead

Iterations = list[dict[str, Any]]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_profiler_sees_what_zero_sends(make_job: Callable[..., Job], stage: int) -> None:
    job = make_job(strategy={"stage": stage})
    outcome = job.run(script=SCRIPT)
    assert outcome.ended, outcome.output
    for rank in (0, 1):
        iterations = outcome.of("iteration", rank)
        runs = {name: [line for line in iterations if line["run"] == name] for name in ("plain", "larger batch")}
        accumulated = [line for line in iterations if line["run"] == "accumulated"]
        for lines in (*runs.values(), accumulated):
            assert [line["label"] for line in lines] == list(range(STEPS))
            for line in lines:
                assert_nothing_is_missed(line)
                assert_times_add_up(line)
            assert_step_divides(stage, lines[SETTLED:])
        (plain,), (larger,), (more,) = map(shapes, (*runs.values(), accumulated))
        assert plain == larger, "ZeRO sends gradients and weights, whose bytes do not depend on the batch"
        # ZeRO-1 reduces its gradients only after the last accumulated batch: time alone tells there.
        assert len(more) > len(plain) if stage > 1 else more == plain


def shapes(lines: Iterations) -> set[tuple[tuple[str, int], ...]]:
    return {tuple((name, size_bytes) for name, size_bytes in line["shape"]) for line in lines[SETTLED:]}


def assert_nothing_is_missed(line: dict[str, Any]) -> None:
    assert line["shape"], line
    assert line["shape"] == line["torch"]


def assert_times_add_up(line: dict[str, Any]) -> None:
    assert all(line["began_s"] <= start < end <= line["ended_s"] for start, end in line["times"])
    duration_s = line["ended_s"] - line["began_s"]
    assert sum(line["idle_spans_s"]) + union_s(line["times"]) == pytest.approx(duration_s, abs=1e-6)
    assert 0 < union_s(line["times"]) < duration_s
    assert line["last_span"] == [len(line["shape"]), True]


def assert_step_divides(stage: int, lines: Iterations) -> None:
    """Gradients go before the optimizer's step, new weights after it: a version has no time left by then."""
    for line in lines:
        names = [name for name, _ in line["shape"]]
        before, after = names[: line["deadline"]], names[line["deadline"] :]
        assert any("reduce" in name for name in before), names
        assert after, "the weights of the step are gathered after it"
        assert all(name.startswith("all_gather") for name in after), names
        if stage < 3:
            assert not any("gather" in name for name in before), names


def union_s(times: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for start, end in sorted(times):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
