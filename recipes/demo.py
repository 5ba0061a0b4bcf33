"""``make demo``: the recipe three times, the last time under SIGKILL, and the proof that nothing was lost.

    python recipes/demo.py                  # failures at steps drawn from a new seed, which is printed
    python recipes/demo.py --seed 0x2a      # the very same failures again
    python recipes/demo.py optimizer.zero_stage=2 trainer.max_steps=90      # any setting of the recipe

Four machines made on this one train GPT-2 on Wikipedia text: without checkpoints; with one every iteration; and so
again while a worker, then a node, then all nodes of a placement group are killed. Exits with 1 unless the three loss
curves agree bit for bit and every recovery came from where it should. Results: ``report.json``, ``timeline.png`` and
``events.jsonl`` under ``runs/demo/``.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import timeline
from hydra.errors import HydraException
from launched import cpu_environment, end
from omegaconf import DictConfig, OmegaConf
from progress import Progress, Screen
from report import (
    IncompleteRunError,
    Run,
    checkpoint_cost,
    differences,
    faults,
    mean_losses,
    read_run,
)
from settings import settings
from verdict import costs, problems, table

from lightning_gemini.config import CheckpointConfig
from lightning_gemini.controlplane.faults import FaultDriver
from lightning_gemini.controlplane.faults.models import make_model
from lightning_gemini.controlplane.run_directory import find_job
from lightning_gemini.core.failure_model import TraceModel
from lightning_gemini.core.fault import PlannedFault, Targets
from lightning_gemini.core.placement import plan_placement
from lightning_gemini.errors import ConfigurationError, GeminiError

RECIPE = Path(__file__).resolve().with_name("gpt2.py")
EXPERIMENT = "experiment=demo"
PRELOAD = "hydra,transformers.models.gpt2.modeling_gpt2"
RUN_TIMEOUT_S = 600.0
_POLL_S = 0.1
_FAILED_LINES = 25


class DemoError(Exception):
    """The demo cannot go on, or shows what it must not."""


class Demo:
    """The three runs and their comparison.

    Args:
        folder: Takes the run directories and the results.
        overrides: Settings of the recipe besides the experiment's.
        seed: Of the failures.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], seed: int) -> None:
        self.folder, self.overrides, self.seed = folder, list(overrides), seed
        self.cfg = settings(EXPERIMENT, *overrides)

    def run(self) -> dict[str, Any]:
        """Trains three times; returns the report, which is also on disk then."""
        began = time.monotonic()
        planned = planned_faults(self.cfg, self.seed)
        print(
            f"seed {self.seed:#x}: " + "; ".join(f"{f.kind} failure at step {f.at_step}" for f in planned), flush=True
        )
        without = self._train("without", ["gemini.checkpoint_every=0"], "1 of 3: no checkpoints", [])
        undisturbed = self._train("undisturbed", [], "2 of 3: a checkpoint every iteration", [])
        interrupted = self._train("interrupted", [], "3 of 3: the same, and failures", planned)
        shutil.copyfile(interrupted.folder / "events.jsonl", self.folder / "events.jsonl")
        report = self._report(without, undisturbed, interrupted)
        report["demo_s"] = time.monotonic() - began
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        timeline.draw(interrupted, faults(interrupted), self.folder / "timeline.png")
        return report

    def _train(self, name: str, overrides: list[str], title: str, planned: Sequence[PlannedFault]) -> Run:
        run_dir = self.folder / name
        _clear(run_dir)
        faults = FaultDriver(run_dir, TraceModel(tuple(planned)), self.seed)
        with (self.folder / f"{name}.log").open("w") as log:
            launcher = subprocess.Popen(
                self._command(run_dir, overrides), stdout=log, stderr=log, env=cpu_environment()
            )
            try:
                faults.start()
                self._watch(launcher, Progress(run_dir, int(self.cfg.trainer.max_steps)), Screen(title))
            finally:
                counts = faults.close()
                end(launcher)
        if launcher.returncode != 0:
            raise DemoError(
                f"run {name!r} failed with exit code {launcher.returncode}:\n{_tail(self.folder / f'{name}.log')}"
            )
        if counts.injected.total() < len(planned):
            raise DemoError(f"the run ended before all {len(planned)} failures could be injected: {counts}")
        return read_run(run_dir)

    def _command(self, run_dir: Path, overrides: list[str]) -> list[str]:
        operator = self.cfg.gemini.operator
        cluster = ["--local-nodes", str(operator.nodes), "--nproc-per-node", str(operator.nproc_per_node)]
        launch = [sys.executable, "-m", "lightning_gemini.cli", "run", *cluster, "--run-dir", str(run_dir)]
        return [*launch, "--preload", PRELOAD, str(RECIPE), EXPERIMENT, *self.overrides, *overrides]

    def _watch(self, launcher: subprocess.Popen[bytes], progress: Progress, screen: Screen) -> None:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while launcher.poll() is None:
            for line in progress.update():
                screen.say(line)
            screen.show(progress.line())
            if time.monotonic() > deadline:
                raise DemoError(
                    f"a run did not end within {RUN_TIMEOUT_S:.0f} s; the last it showed: {progress.line()}"
                )
            time.sleep(_POLL_S)
        for line in progress.update():
            screen.say(line)
        screen.done(progress.line())

    def _report(self, without: Run, undisturbed: Run, interrupted: Run) -> dict[str, Any]:
        cfg, operator = self.cfg, self.cfg.gemini.operator
        differing = differences(interrupted, undisturbed) + differences(interrupted, without)
        return {
            "nodes": operator.nodes,
            "world_size": operator.nodes * operator.nproc_per_node,
            "zero_stage": cfg.optimizer.zero_stage,
            "steps": cfg.trainer.max_steps,
            "checkpoint_every": cfg.gemini.checkpoint_every,
            "replicas": replicas(cfg),
            "seed": self.seed,
            "failures": [fault.record for fault in faults(interrupted)],
            "loss": {
                "uninterrupted": mean_losses(undisturbed),
                "interrupted": mean_losses(interrupted),
                "bit_identical": not differing,
                "differences": differing[:10],
            },
            "checkpoint": checkpoint_cost(undisturbed, without),
        }


def main(arguments: Sequence[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="GPT-2 on a local cluster, under SIGKILL.")
    parser.add_argument(
        "--seed", type=lambda text: int(text, 0), default=None, help="of the failures (default: drawn now)"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="results (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen.dir.mkdir(parents=True, exist_ok=True)
    try:
        report = Demo(chosen.dir, chosen.overrides, secrets.randbits(32) if chosen.seed is None else chosen.seed).run()
    except (DemoError, IncompleteRunError, GeminiError, HydraException) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    found = problems(report)
    print(f"\n{table(report)}\n\n{costs(report)}", file=out)
    print(f"loss curves bit-identical on every rank: {report['loss']['bit_identical']}", file=out)
    print(f"{chosen.dir}/report.json, timeline.png, events.jsonl; {report['demo_s']:.0f} s", file=out)
    for problem in found:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if found else 0


def planned_faults(cfg: DictConfig, seed: int) -> list[PlannedFault]:
    """Draws step and victims of each failure that ``cfg.gemini.failure`` names, spread over the run."""
    chosen = OmegaConf.to_container(cfg.gemini.failure, resolve=True)
    assert isinstance(chosen, dict)
    stretch = int(cfg.trainer.max_steps) // max(len(chosen.get("kinds", ())), 1)
    model = make_model({**{str(key): value for key, value in chosen.items()}, "stretch": stretch})
    operator = cfg.gemini.operator
    groups = plan_placement(int(operator.nodes), replicas(cfg), cfg.gemini.placement).groups
    targets = Targets(int(operator.nodes), int(operator.nproc_per_node), groups=groups)
    return list(model.faults(targets, random.Random(seed)))


def replicas(cfg: DictConfig) -> int:
    """Copies of every shard, chosen by the number of nodes where the configuration does not say."""
    return CheckpointConfig(replicas=cfg.gemini.replicas).replicas_for(int(cfg.gemini.operator.nodes))


def _clear(run_dir: Path) -> None:
    try:
        alive = find_job(run_dir)["alive"]
    except ConfigurationError:
        alive = False
    if alive:
        raise DemoError(
            f"a live job uses {run_dir}: end it (`lightning-gemini stop --run-dir {run_dir}`) or give --dir"
        )
    shutil.rmtree(run_dir, ignore_errors=True)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_FAILED_LINES:])


if __name__ == "__main__":
    sys.exit(main())
