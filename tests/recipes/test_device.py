"""The experiment on a GPU: its arithmetic, and what it says where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import device
import pytest
import torch
from turns import Turn, take_turns

SCRIPT = Path(device.__file__)


class Moment:
    """Stands for an event, at a time in ms."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, later: Moment) -> float:
        return later.ms - self.ms


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch) -> device.Measurement:
    monkeypatch.setattr(device.Snapshotter, "_copy_tensors", device.Snapshotter._copy_tensors)  # put back afterwards
    return device.Measurement([])


def test_rows_compare_with_iterations_that_had_no_checkpoint(measurement: device.Measurement) -> None:
    lengths = {device.NONE: 100.0, device.GEMINI: 101.0, device.MEMCPY: 100.5}
    for turn in take_turns(device.SCHEMES, rounds=4, counted=5, settling=1, seed=1):
        if turn.counted:
            measurement.iterations.append((turn, Moment(7.0), Moment(7.0 + lengths[turn.scheme])))  # type: ignore[arg-type]
    for scheme, ms in ((device.GEMINI, 20.0), (device.MEMCPY, 18.0)):
        measurement.copies.append((scheme, 10**9, Moment(3.0), Moment(3.0 + ms)))  # type: ignore[arg-type]
    measurement.versions += [{"stall_s": 1e-3, "wait_s": 0.0, "copy_s": 0.05, "bytes": 10**9, "skipped": 2}]
    none, gemini, memcpy = device.rows(measurement, seed=1)
    assert (none["iterations"], none["iteration_s_median"]) == (20, pytest.approx(0.1))
    assert [row["overhead"] for row in (none, gemini, memcpy)] == [0.0, pytest.approx(0.01), pytest.approx(0.005)]
    assert none["copy_bytes_per_s"] is None
    assert gemini["copy_bytes_per_s"] / memcpy["copy_bytes_per_s"] == pytest.approx(0.9)
    assert (gemini["copy_s"], gemini["skipped"]) == (0.05, 2)


def test_all_schemes_warm_up_before_their_turns(measurement: device.Measurement) -> None:
    turns = list(device.Measurement([Turn(device.NONE, 0, True, True)])._turns)
    assert [turn.scheme for turn in turns] == [device.GEMINI] * device.WARM_UP + [device.NONE]
    assert not any(turn.counted for turn in turns[:-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "experiment=device"], capture_output=True, text=True, timeout=100, cwd="/"
    )
    assert done.returncode == 1
    assert "measures a CUDA device, and there is none here" in done.stderr
