"""``make soak``: six machines made on this one, everything that can happen to them, and the proof that all is right.

    python recipes/soak.py                          # 20 minutes, a new seed, which is printed
    python recipes/soak.py --minutes 3 --seed 0x2a  # shorter; the same faults in the same order
    python recipes/soak.py --failure soak,etcd=10   # other weights (conf/gemini/failure/soak.yaml)

Kills workers, machines, roots, etcd members and now and then all holders of a shard, stops agents, cuts connections
and flips bytes, as fast as the job recovers. Then it lets the job finish, trains the same steps again undisturbed, and
exits with 1 unless all losses of all ranks and the final weights agree bit for bit and no invariant
(recipes/invariants.py) was broken. ``runs/soak/summary.json`` has the numbers, ``runs/soak/interrupted`` the run's
events and logs.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invariants import violations
from launched import cpu_environment, end
from report import IncompleteRunError, Run, differences, read_run
from soak_summary import summarise, text

from lightning_gemini.cli.choices import load_choice
from lightning_gemini.controlplane.faults import FaultDriver
from lightning_gemini.controlplane.faults.models import make_model
from lightning_gemini.core.placement import plan_placement
from lightning_gemini.errors import GeminiError

SCRIPT = Path(__file__).resolve().with_name("soak_training.py")
NODES, STANDBY, REPLICAS, ETCD_MEMBERS = 6, 1, 2, 3
PRELOAD = "deepspeed.runtime.zero.muon.muon_optimizer"
LAST_STEPS = 20
_POLL_S = 0.5
_START_S = 300.0
_PATIENCE_S = 150.0
"""So long may the job make no step: a recovery takes seconds, several of them in a row under load much more."""


class SoakError(Exception):
    """The job did not survive."""


class Soak:
    """The disturbed run, the undisturbed one, and their comparison.

    Args:
        folder: Takes both run directories and the summary.
        minutes: How long faults come.
        failure: Choice of the failure model.
        seed: Of the faults.
        step_s: Sleep in every disturbed step.
        nodes: Machines of the job.
        options: More words for the disturbed ``lightning-gemini run``, such as where machines come from.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        failure: str,
        seed: int,
        step_s: float,
        *,
        nodes: int = NODES,
        options: Sequence[str] = (),
    ) -> None:
        self.folder, self.minutes, self.seed, self.step_s = folder.absolute(), minutes, seed, step_s
        self.nodes, self.options = nodes, options
        self.model = make_model(load_choice("failure", failure)[1])

    def run(self) -> dict[str, Any]:
        """Returns the summary, which is also on disk then; ``violations`` is what went wrong.

        Raises:
            SoakError: A run failed, or hung.
        """
        began = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        last_step = self._disturb()
        self._undisturbed(last_step)
        disturbed, reference = _read(self.folder, "interrupted"), _read(self.folder, "undisturbed")
        placement = plan_placement(self.nodes, REPLICAS)
        found = violations(disturbed, [placement.holders(machine) for machine in range(self.nodes)])
        found += [f"losses differ: {difference}" for difference in differences(disturbed, reference)[:20]]
        found += _final_differences(self.folder, self.nodes)
        summary = {"seed": self.seed, "minutes": self.minutes, **summarise(disturbed), "violations": found}
        summary["seconds"] = time.monotonic() - began
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    def _disturb(self) -> int:
        """Trains under faults; returns the last step, which the other run must train to as well."""
        cluster = ["--nodes", str(self.nodes), "--standby", str(STANDBY), "--etcd-members", str(ETCD_MEMBERS)]
        run_dir = self.folder / "interrupted" / "run"
        driver = FaultDriver(run_dir, self.model, self.seed, until_s=60.0 * self.minutes, patience_s=20.0)
        with self._launch("interrupted", [*cluster, "--max-failures", "1000", *self.options], self.step_s, 1) as job:
            try:
                self._watch(job, self._step, "the start")  # its time is not the faults'
                driver.start()
                self._watch(job, driver.over.is_set, "faults")
                last_step = self._step() + LAST_STEPS
                (self.folder / "interrupted" / "last_step").write_text(str(last_step))
                print(f"{driver.counts}; now undisturbed to step {last_step}", flush=True)
                self._watch(job, lambda: False, "the last steps")
            finally:
                driver.close()
                end(job)
            if driver.counts.error is not None:
                raise SoakError(f"no more faults: {driver.counts.error}")
            self._require_success(job, "interrupted")
        return last_step

    def _undisturbed(self, last_step: int) -> None:
        """The same ranks as processes of one machine, without checkpoints: that must make no difference."""
        (self.folder / "undisturbed").mkdir(parents=True)
        (self.folder / "undisturbed" / "last_step").write_text(str(last_step))
        with self._launch("undisturbed", ["--nproc-per-node", str(self.nodes)], 0.0, 0) as job:
            try:
                job.wait(_START_S + 2.0 * last_step)
            except subprocess.TimeoutExpired as error:
                raise SoakError("the undisturbed run hangs") from error
            finally:
                end(job)
            self._require_success(job, "undisturbed")

    def _launch(self, name: str, options: list[str], step_s: float, checkpoint_every: int) -> subprocess.Popen[bytes]:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        launch = [sys.executable, "-m", "lightning_gemini.cli", "run", "--run-dir", str(folder / "run"), *options]
        command = [*launch, "--preload", PRELOAD, str(SCRIPT), str(folder), str(step_s), str(checkpoint_every)]
        environment = cpu_environment(OMP_NUM_THREADS="1")
        with (folder / "terminal.txt").open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def _watch(self, job: subprocess.Popen[bytes], done: Any, phase: str) -> None:
        """Waits until ``done`` or the end of the job; no step for long is a failure."""
        step, moved = -1, time.monotonic()
        while job.poll() is None and not done():
            if (now := self._step()) != step:
                step, moved = now, time.monotonic()
            patience_s = _PATIENCE_S if step > 0 else _START_S
            if time.monotonic() - moved > patience_s:
                raise SoakError(f"no step for {patience_s:.0f} s during {phase}; the last was {step}")
            time.sleep(_POLL_S)
        if job.poll() is not None and phase == "faults":
            self._require_success(job, "interrupted")
            raise SoakError("the job ended before the faults did")

    def _step(self) -> int:
        """The highest step that any rank ever completed."""
        last = [_last_line(path) for path in (self.folder / "interrupted" / "steps").glob("rank*.jsonl")]
        return max((int(json.loads(line)["step"]) for line in last if line), default=0)

    def _require_success(self, job: subprocess.Popen[bytes], name: str) -> None:
        if job.returncode != 0:
            shown = (self.folder / name / "terminal.txt").read_text(errors="replace").splitlines()[-15:]
            raise SoakError("\n".join([f"run {name!r} failed with exit code {job.returncode}:", *shown]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description="Everything that can happen to a job, and whether it is right after.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults come (default: %(default)s)")
    parser.add_argument("--seed", type=lambda text: int(text, 0), help="of the faults (default: drawn now)")
    parser.add_argument("--failure", default="soak", help="NAME[,K=V…] of conf/gemini/failure (default: %(default)s)")
    parser.add_argument("--step-s", type=float, default=0.05, help="sleep in every step (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"), help="results (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
    command = f"python recipes/soak.py --minutes {chosen.minutes:g} --seed {seed:#x} --failure {chosen.failure}"
    print(command, flush=True)
    try:
        soak = Soak(chosen.dir, chosen.minutes, chosen.failure, seed, chosen.step_s)
        summary = {"command": command, **soak.run()}
    except (SoakError, IncompleteRunError, GeminiError) as error:
        print(f"soak: {error}\nrepeat with: {command}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    (chosen.dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(text(summary))
    for violation in summary["violations"]:
        print(f"soak: {violation}", file=sys.stderr)
    return 1 if summary["violations"] else 0


def _read(folder: Path, name: str) -> Run:
    """Joins what the job and what the script wrote."""
    run_dir = folder / name / "run"
    if not (run_dir / "steps").exists():
        shutil.copytree(folder / name / "steps", run_dir / "steps")
    return read_run(run_dir)


def _final_differences(folder: Path, nodes: int) -> list[str]:
    found = []
    for rank in range(nodes):
        ends = [folder / name / "final" / f"rank{rank}.json" for name in ("interrupted", "undisturbed")]
        disturbed, reference = (json.loads(path.read_text()) if path.exists() else None for path in ends)
        if disturbed is None or disturbed != reference:
            found.append(f"rank {rank} ends with {disturbed}, undisturbed with {reference}")
    return found


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        whole = [line for line in file.read().splitlines(keepends=True)[-2:] if line.endswith(b"\n")]
    return whole[-1].decode() if whole else ""


if __name__ == "__main__":
    sys.exit(main())
