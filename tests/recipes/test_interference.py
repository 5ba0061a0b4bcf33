"""A very small run of the interference experiment on real machines in network namespaces, and how it reckons."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import measured
import pytest
from namespaces import why_not
from turns import take_turns

from lightning_gemini.config import SCHEDULES

ROOT = Path(__file__).parents[2]
EXPERIMENT = [sys.executable, str(ROOT / "recipes" / "experiments" / "interference.py")]
SMALL = [
    "folder=run",
    "quick=true",
    "verify_all=true",
    "model={layers: 2, width: 128}",
    "short={wait_s: 0.005, links_mbit: [300], burst: 64kb, rounds: 1, counted: 3, settling: 1, profile_iterations: 3}",
]
FIELDS = {"scheme", "link_mbit", "fits", "iterations", "iteration_s_median", "iteration_s_low", "iteration_s_high"}
FIELDS |= {"overhead", "idle_s", "checkpoint_s", "peak_buffer_bytes"}


@pytest.fixture
def networks() -> Any:
    """Skips where there can be no namespaces; checks that those which a test made are gone."""
    if reason := why_not():
        pytest.skip(reason)
    before = _networks()
    yield
    assert _networks() <= before


def _networks() -> set[str]:
    lines = subprocess.run("ip netns list; ip -br link", shell=True, capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in lines.splitlines() if line.startswith("gem")}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(300)
def test_every_scheme_is_measured_and_its_bytes_arrive(networks: None, tmp_path: Path, seed: int) -> None:
    command = [*EXPERIMENT, *SMALL, f"seed={seed}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("run/*/rank?.log"))
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs
    assert "timed wait" in ended.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["experiment"] == "interference"
    assert f"seed={seed}" in result["command"]
    assert {row["scheme"]: row["iterations"] for row in result["rows"]} == dict.fromkeys(SCHEDULES, 3)
    for row in result["rows"]:
        assert set(row) >= FIELDS
        assert 0 < row["iteration_s_low"] <= row["iteration_s_median"] <= row["iteration_s_high"]
        assert 0 < row["idle_s"] < row["iteration_s_median"] * 2
        taken = row["scheme"] != "none"
        assert [bool(row["versions"]), bool(row["checkpoint_s"])] == [taken] * 2, row
        assert (row["peak_buffer_bytes"] is not None) is taken, row
    _assert_replicas_compared(tmp_path / "run" / "300mbit")
    assert len(list((tmp_path / "run").glob("*.png"))) >= 3


def _assert_replicas_compared(folder: Path) -> None:
    """Every rank compared every version; the run raises where one differs."""
    begun = {line["version"]: line["scheme"] for line in _lines(folder / "iterations.jsonl")}
    taken = {line["version"] for line in _lines(folder / "stats" / "rank0.jsonl")}
    versions = {version for version in begun if version in taken and version < max(begun) - 1}  # the last are too late
    assert {begun[version] for version in versions} == set(SCHEDULES) - {"none"}
    compared = [{line["version"] for line in _lines(path)} for path in folder.glob("verified/rank*.jsonl")]
    assert [versions - seen for seen in compared] == [set()] * 4


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_it_leaves_nothing(networks: None, tmp_path: Path, number: int, code: int) -> None:
    # A shell starts what it runs in the background deaf to SIGINT: `nohup make test &`.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(
        [*EXPERIMENT, *SMALL], cwd=tmp_path, stdout=subprocess.PIPE, text=True, **listening
    ) as experiment:
        assert experiment.stdout is not None
        while not (tmp_path / "run" / "300mbit" / "rank3.log").exists():
            assert experiment.poll() is None, experiment.stdout.read()
            time.sleep(0.05)
        inside = {name: _processes(name) for name in _networks() if name[-1].isdigit()}
        assert sum(len(pids) for pids in inside.values()) >= 1
        experiment.send_signal(number)
        assert experiment.wait(timeout=60) == code
    assert not [pid for pids in inside.values() for pid in pids if Path(f"/proc/{pid}").exists()]


def _processes(network: str) -> list[str]:
    found = subprocess.run(["ip", "netns", "pids", network], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.parametrize(("schemes", "said"), [("none,often", "unknown: often"), ("eager", "'none', to compare with")])
def test_schemes_are_checked_before_anything_starts(networks: None, tmp_path: Path, schemes: str, said: str) -> None:
    command = [*EXPERIMENT, f"schemes=[{schemes}]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert said in done.stderr
    assert not [*tmp_path.rglob("rank0.log")]


def test_without_root_it_says_so() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give it away")
    code = f"import os, sys; sys.path.insert(0, {str(ROOT / 'recipes')!r}); from namespaces import why_not\n"
    code += "os.setuid(65534); print(why_not())"
    said = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert "need root" in said.stdout


def test_turns_are_fair_and_drawn_from_the_seed(seed: int) -> None:
    arguments: dict[str, Any] = {"rounds": 4, "counted": 3, "settling": 2}
    turns = take_turns(SCHEDULES, **arguments, seed=seed)
    assert turns == take_turns(SCHEDULES, **arguments, seed=seed)
    assert Counter(turn.scheme for turn in turns if turn.counted) == dict.fromkeys(SCHEDULES, 12)
    assert [turn.switched for turn in turns[:6]] == [True, False, False, False, False, True]
    assert [turn.counted for turn in turns[:5]] == [False, False, True, True, True]
    for number in range(4):
        assert {turn.scheme for turn in turns if turn.round == number} == set(SCHEDULES)
    assert len({str(take_turns(SCHEDULES, **arguments, seed=other)) for other in range(10)}) > 5


def test_the_interval_of_an_overhead_holds_what_is_true(seed: int) -> None:
    """Rounds that drift by 20 % together must not hide a cost of 3 %."""
    draw = random.Random(seed)
    reference, slower = {}, {}
    for number in range(10):
        drift = draw.uniform(1.0, 1.2)
        reference[number] = [drift * draw.gauss(1.0, 0.004) for _ in range(6)]
        slower[number] = [1.03 * drift * draw.gauss(1.0, 0.004) for _ in range(6)]
    middle, low, high = measured.overhead(slower, reference, seed)
    assert low <= middle <= high
    assert 0.0 < low < 0.03 < high + 0.02
    assert measured.overhead(reference, reference, seed) == (0.0, 0.0, 0.0)


def test_rows_are_read_from_what_ranks_wrote(tmp_path: Path) -> None:
    def write(name: str, *lines: dict[str, Any]) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')

    def iteration(version: int, scheme: str, seconds: float, counted: bool = True) -> dict[str, Any]:
        return {"version": version, "scheme": scheme, "round": 0, "counted": counted, "seconds": seconds}

    def cost(version: int, seconds: float | None, peak: int) -> dict[str, Any]:
        times = {"replica_complete_s": seconds, "stall_s": 0.001}
        return {"version": version, **times, "bytes": 100, "peak_buffer_bytes": peak}

    write(
        "iterations.jsonl",
        iteration(1, "none", 1.0),
        iteration(2, "eager", 9.0, counted=False),
        iteration(3, "eager", 1.5),
        iteration(4, "eager", 1.5),
    )
    write("plans.jsonl", {"overrun_s": 0.5}, {"overrun_s": 0.0})
    traces = [
        {"scheme": scheme, "idle_s": 0.25, "busy_s": busy_s} for scheme, busy_s in (("none", 0.5), ("eager", 0.75))
    ]
    write("traces.jsonl", *traces)
    write("stats/rank0.jsonl", cost(2, 8.0, 900), cost(3, 0.2, 10), cost(4, None, 30))
    write("stats/rank1.jsonl", cost(3, 0.3, 20), cost(4, 0.1, 20))
    none, eager = measured.measured_rows(tmp_path, 50, 1)
    assert (none["overhead"], none["checkpoint_s"], none["peak_buffer_bytes"], none["versions"]) == (0.0, None, None, 0)
    assert eager["overhead"] == pytest.approx(0.5)
    assert (none["communication_s"], eager["communication_s"]) == (0.5, 0.75)
    assert (eager["fits"], eager["idle_s"], eager["link_mbit"], eager["iterations"]) == (True, 0.25, 50, 2)
    assert (eager["versions"], eager["peak_buffer_bytes"], eager["checkpoint_bytes"]) == (2, 30, 100)
    assert eager["checkpoint_s"] == pytest.approx(0.2), "of the slowest rank, half way between two versions"
    (tmp_path / "plans.jsonl").unlink()
    with pytest.raises(measured.IncompleteError, match="a plan"):
        measured.measured_rows(tmp_path, 50, 1)
