"""``make simulate``: runs schedules until one breaks a promise, or all are done."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.simulation.mutations import MUTATIONS
from tests.simulation.schedule import Outcome, run_schedule

_TRACE_LINES = 60


def main() -> int:
    """Entry point; returns the exit code."""
    arguments = _arguments()
    if os.environ.get("PYTHONHASHSEED") != "0":  # a seed must mean the same in every process
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what broke is seen at once
    if arguments.seed is not None:
        return _replay(arguments)
    return _search(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one, and print its whole trace")
    parser.add_argument("--machines", type=int, help="machines of every job (drawn from the seed by default)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="put a known bad protocol in")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    return parser.parse_args()


def _replay(arguments: argparse.Namespace) -> int:
    outcome = run_schedule(arguments.seed, arguments.machines, mutation=arguments.mutation, verbose=True)
    print("\n".join(outcome.trace))
    _report_violation(outcome, arguments)
    print(f"fingerprint {outcome.fingerprint:x}, {outcome.dispatched} switches, {outcome.virtual_s:.1f} virtual s")
    return 1 if outcome.violations else 0


def _search(arguments: argparse.Namespace) -> int:
    gc.collect()
    gc.freeze()  # what was imported is never looked at again, and stays shared with the processes
    began, total, broken, done = time.monotonic(), _Total(), 0, 0
    for outcome in _outcomes(arguments):
        done += 1
        total.add(outcome)
        if outcome.violations:
            broken += 1
            print("\n".join(outcome.trace[-_TRACE_LINES:]))
            _report_violation(outcome, arguments)
            if not arguments.keep_going:
                break
        if sys.stdout.isatty():
            print(f"\r{done} of {arguments.seeds} schedules, {broken} broken", end="", flush=True)
    total.show(done, time.monotonic() - began)
    return 1 if broken else 0


def _outcomes(arguments: argparse.Namespace) -> Iterator[Outcome]:
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    work = [(seed, arguments.machines, arguments.mutation) for seed in seeds]
    if arguments.processes == 1:
        yield from map(_run, work)
        return
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        yield from pool.imap(_run, work, chunksize=1 if arguments.machines else 8)


def _run(work: tuple[int, int | None, str | None]) -> Outcome:
    seed, machines, mutation = work
    outcome = run_schedule(seed, machines, mutation=mutation)
    if not outcome.violations:
        outcome.trace.clear()
    return outcome


def _report_violation(outcome: Outcome, arguments: argparse.Namespace) -> None:
    for invariant, what in outcome.violations:
        name = {0: "a thread died", 5: "progress"}.get(invariant, f"Invariant {invariant}")
        print(f"seed {outcome.seed}: {name}: {what}")
    if outcome.violations:
        options = [f"--seed {outcome.seed}"]
        options += [f"--machines {arguments.machines}"] if arguments.machines else []
        options += [f"--mutation {arguments.mutation}"] if arguments.mutation else []
        print(f"{outcome.parameters}\nreplay: make simulate SIMULATE_ARGS='{' '.join(options)}'\n")


class _Total:
    """What all schedules came to."""

    def __init__(self) -> None:
        self._faults: Counter[str] = Counter()
        self._recoveries: Counter[str] = Counter()
        self._checks: Counter[str] = Counter()
        self._virtual_s = 0.0
        self._switches = 0

    def add(self, outcome: Outcome) -> None:
        self._faults += outcome.faults
        self._recoveries += outcome.recoveries
        self._checks += outcome.checks
        self._virtual_s += outcome.virtual_s
        self._switches += outcome.dispatched

    def show(self, schedules: int, seconds: float) -> None:
        print(f"\n{schedules} schedules in {seconds:.1f} s: {self._virtual_s / 3600:.2f} virtual hours", end="")
        print(f", {self._switches} switches between threads")
        for title, counts in (("faults", self._faults), ("starts", self._recoveries), ("checked", self._checks)):
            print(f"{title:>8}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    sys.exit(main())
