"""The tap on DeepSpeed's collectives, in two real processes with gloo between them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_gemini.dataplane.collective_tap import COLLECTIVES

SCRIPT = Path(__file__).with_name("tapped_rank.py")
TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 saw; one start of processes for all tests."""
    folder = tmp_path_factory.mktemp("tap")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in (0, 1)
    ]
    try:
        output = ranks[0].communicate(timeout=TIMEOUT_S)[0].decode()
        assert ranks[0].returncode == 0, output[-3000:]
        assert ranks[1].wait(TIMEOUT_S) == -9, "rank 1 was to be killed"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def test_every_collective_is_reported_with_its_bytes(seen: dict[str, Any]) -> None:
    assert seen["every_kind"]["names"] == [
        ["all_reduce", 10 * 4],
        ["broadcast", 3 * 8],
        ["all_gather", 2 * 5 * 8],
        ["all_gather_into_tensor", 2 * 7 * 4],
        ["all_gather_into_tensor", 2 * 2 * 4],
        ["reduce_scatter_tensor", 2 * 4 * 4],
        ["reduce", 6 * 4],
        ["barrier", 0],
    ]


def test_each_one_begins_and_ends_once_in_that_order(seen: dict[str, Any]) -> None:
    events, names = seen["every_kind"]["events"], seen["every_kind"]["names"]
    assert all(seen["every_kind"]["complete"])
    assert sorted(events) == sorted([kind, token] for kind in ("began", "ended") for token in range(len(names)))
    assert all(events.index(["began", token]) < events.index(["ended", token]) for token in range(len(names)))
    blocking = [token for token in range(len(names)) if token != 3]
    for token in blocking:  # it has ended when the next one begins
        later = [["began", other] for other in range(token + 1, len(names))]
        assert all(events.index(["ended", token]) < events.index(event) for event in later)


def test_an_asynchronous_one_ends_when_it_is_complete_not_when_it_returns(seen: dict[str, Any]) -> None:
    late = seen["late_peer"]
    assert (late["before"], late["told"], late["after"]) == (0, True, 1)
    assert late["value"] == [2.0] * 4


def test_a_call_that_raises_ends_and_raises(seen: dict[str, Any]) -> None:
    assert seen["bad_call"]["raised"]
    assert seen["bad_call"]["ends"] == 1


@pytest.mark.parametrize("case", ["bad_began", "bad_ended", "bad_ended_late"])
def test_a_fault_of_the_listener_never_reaches_training(seen: dict[str, Any], case: str) -> None:
    assert seen[case]["sums"] == [[2.0, 2.0]] * 3
    (warning,) = seen[case]["warnings"]
    assert "a fault of the listener" in warning


def test_taps_can_be_stacked_and_removed_in_any_order(seen: dict[str, Any]) -> None:
    assert seen["two_taps"]["counts"] == [1, 2]


def test_everything_else_of_the_back_end_is_as_before(seen: dict[str, Any]) -> None:
    assert seen["attributes"] == {"same": True, "world": 2, "back": True}


def test_a_collective_whose_peer_was_killed_ends_once(seen: dict[str, Any]) -> None:
    assert seen["dead_peer"] == {"raised": True, "told": True, "ends": 1}


def test_no_collective_of_this_deepspeed_is_forgotten() -> None:
    from deepspeed.comm.torch import TorchBackend

    methods = {name for name, _ in inspect.getmembers(TorchBackend, inspect.isfunction) if not name.startswith("_")}
    silent = ("get_", "has_", "is_", "init_", "new_group", "destroy_", "enable_symm_mem")  # they ask, or make groups
    assert {name for name in methods if not name.startswith(silent)} == methods & set(COLLECTIVES)
    assert len(methods & set(COLLECTIVES)) > 15
