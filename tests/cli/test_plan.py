"""`lightning-gemini plan`: what it prints is what the core computes."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from lightning_gemini.cli import main
from lightning_gemini.core.placement import placement_from_json, plan_placement
from lightning_gemini.core.survival import domain_recovery_probability, recovery_probability

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def as_json(capsys: Capture, *words: str) -> Any:
    return json.loads(shown(capsys, "--json", *words))


def row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_the_default_placement_of_16_machines(capsys: Capture) -> None:
    text = shown(capsys, "--machines", "16", "--replicas", "2")
    assert "16 machines, replicas 2, placement mixed: 8 holder sets" in text
    assert "[0 1] [2 3]" in text
    assert row(text, "2   ") == ["2", "14/15", "0.933333", "0.933333"]
    assert row(text, "3   ") == ["3", "4/5", "0.800000", "0.800000"]
    assert row(text, "4   ") == ["4", "8/13", "0.615385", "0.600000"]
    assert " ".join(row(text, "2 * ")[2:]) == "mixed, group, compact 8 1 0.933333 0.800000 0.615385 4 shares"
    assert " ".join(row(text, "2         ring")) == "2 ring 16 1 0.866667 0.628571 0.362637 4 shares"


def test_a_ring_is_not_covered_by_the_corollary(capsys: Capture) -> None:
    assert "Corollary" not in shown(capsys, "--machines", "16", "--placement", "ring")


def test_the_ring_of_the_leftovers_is_shown(capsys: Capture) -> None:
    text = shown(capsys, "--machines", "5", "--replicas", "2")
    assert "groups  [0 1] [2 3 4]" in text
    assert "shards of machine 4: on 4, 2" in text


def test_racks(capsys: Capture) -> None:
    words = ("--machines", "16", "--racks", "4", "--placement", "rack")
    domains = [f"rack{machine // 4}" for machine in range(16)]
    found = as_json(capsys, *words)
    placement = plan_placement(16, 2, "rack", domains)
    assert found["domains"] == domains
    assert placement_from_json(found["placement"]) == placement
    for entry in found["domain_recovery"]:
        expected = domain_recovery_probability(placement, domains, entry["failed_domains"])
        assert Fraction(entry["exact"]) == expected
    text = shown(capsys, *words)
    assert "holders of a shard are in 2 to 2 of 4 failure domains" in text
    assert "domains lost" in text
    named = as_json(capsys, "--machines", "4", "--domains", "a, b,a,b", "--placement", "rack")
    assert named["domains"] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("words", "expected_bytes"),
    [
        (["--params", "1.5B"], 2 * 2 * 12 * 1_500_000_000 // 16),
        (["--params", "350M"], 2 * 2 * 12 * 350_000_000 // 16),
        (["--checkpoint-bytes", "16GiB"], 2 * 2 * 2**30),
        (["--checkpoint-bytes", "32000"], 2 * 2 * 2000),
        (["--checkpoint-bytes", "32KB"], 2 * 2 * 2000),
    ],
)
def test_host_memory(capsys: Capture, words: list[str], expected_bytes: int) -> None:
    assert as_json(capsys, "--machines", "16", *words)["host_memory_bytes"] == expected_bytes
    assert "host memory  2 buffers x 2 replicas x " in shown(capsys, "--machines", "16", *words)


def test_json_has_exact_fractions_and_alternatives(capsys: Capture) -> None:
    found = as_json(capsys, "--machines", "11", "--replicas", "3", "--failures", "5")
    placement = plan_placement(11, 3)
    assert [Fraction(entry["exact"]) for entry in found["recovery"]] == [
        recovery_probability(placement, failed) for failed in range(1, 6)
    ]
    assert {choice["replicas"] for choice in found["alternatives"]} == {2, 3, 4}
    (compact,) = [c for c in found["alternatives"] if c["replicas"] == 3 and c["strategies"] == ["compact"]]
    at_3 = {entry["failed_machines"]: Fraction(entry["exact"]) for entry in compact["recovery"]}
    assert at_3[3] == Fraction(159, 165)


def test_a_thousand_machines_take_no_time_and_no_torch() -> None:
    command = [sys.executable, "-m", "lightning_gemini.cli", "plan", "--machines", "1000", "--replicas", "3"]
    done = subprocess.run([*command, "--racks", "50"], capture_output=True, text=True, timeout=30, check=True)
    assert "1000 machines, replicas 3" in done.stdout
    assert "and 317 more" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 240


@pytest.mark.parametrize("machines", [1, 2, 3])
def test_small_jobs(capsys: Capture, machines: int) -> None:
    assert as_json(capsys, "--machines", str(machines), "--replicas", "1")["recovery"]
    assert f"{machines} machines, replicas 1" in shown(capsys, "--machines", str(machines), "--replicas", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--machines", "5", "--replicas", "6"], "set replicas to 5 or less, or add 1 machine"),
        (["--machines", "0"], "needs at least 1 machine"),
        (["--machines", "5", "--placement", "group"], "use placement='mixed', or 4 or 6 machines"),
        (["--machines", "4", "--placement", "rack"], "give domains"),
        (["--machines", "4", "--domains", "a,b"], "got 2 for 4 machines"),
        (["--machines", "4", "--racks", "5"], "--racks must be between 1 and 4"),
        (["--machines", "4", "--racks", "0"], "--racks must be between 1 and 4"),
        (["--machines", "4", "--params", "many"], "--params must be a positive number"),
        (["--machines", "4", "--params", "3GiB"], "perhaps with a unit (1.5B or 350M)"),
        (["--machines", "4", "--checkpoint-bytes", "0"], "--checkpoint-bytes must be a positive number"),
        (["--machines", "4", "--nproc-per-node", "0"], "--nproc-per-node must be 1 or more"),
        (["--machines", "4", "--failures", "0"], "--failures must be 1 or more"),
    ],
)
def test_impossible_requests_are_refused(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
