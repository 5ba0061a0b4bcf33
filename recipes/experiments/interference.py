"""What checkpoints cost training, by the way they travel: GEMINI's ablation (SOSP '23, section 7.4), at small scale.

    sudo python recipes/experiments/interference.py                 # about an hour
    sudo python recipes/experiments/interference.py quick=true      # two link speeds, under five minutes
    sudo python recipes/experiments/interference.py full.links_mbit=[100,50] gemini/transport=p2p    # as in conf/

Four machines made of network namespaces train with ZeRO-3 over gloo; their links are as fast as ``tc tbf`` lets them
be. At every speed all schemes take turns in one run, in an order drawn anew for each round. Where an accelerator would
compute, training waits for a set time; communication, optimizer, checkpoints and their traffic are real. Checkpoints
are taken every iteration, also where they do not fit the idle time. Results: ``result.json`` and figures in
``runs/interference``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from figures import draw
from hydra.core.hydra_config import HydraConfig
from measured import CONFIDENCE, HIGH, LOW, REFERENCE, IncompleteError, measured_rows, read_lines
from namespace_job import JobError, NamespaceJob
from namespaces import Namespaces, why_not
from omegaconf import DictConfig, OmegaConf
from progress import Screen
from result_rows import break_point, read_rows
from settings import conf_dir

from lightning_gemini.config import SCHEDULES, CheckpointConfig
from lightning_gemini.errors import GeminiError

TRAINING = Path(__file__).resolve().with_name("interference_training.py")
NOTE = "the accelerator's compute is a timed wait; communication, optimizer, checkpoints and their traffic are real"
_POLL_S = 0.2
_START_S = 180.0
_ITERATION_S = 30.0


class Experiment:
    """One run of the experiment.

    Args:
        cfg: ``conf/interference.yaml``.

    Raises:
        GeminiError: A setting is impossible.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.folder).absolute()
        self.extent = cfg.short if cfg.quick else cfg.full
        fields = [field.name for field in dataclasses.fields(CheckpointConfig)]
        self.gemini = {name: cfg.gemini[name] for name in fields if name != "persist_dir"}
        self.gemini["profile_iterations"] = self.extent.profile_iterations
        self.gemini = OmegaConf.to_container(OmegaConf.create(self.gemini))
        CheckpointConfig(**self.gemini)  # refuses what is impossible before anything starts

    def run(self) -> list[dict[str, Any]]:
        """Measures at every link speed; returns the rows."""
        rows: list[dict[str, Any]] = []
        for number, mbit in enumerate(self.extent.links_mbit):
            title = f"{mbit} Mbit/s, {number + 1} of {len(self.extent.links_mbit)}"
            folder = self._measure(mbit, Screen(title))
            measured = measured_rows(folder, mbit, self.cfg.seed)
            found = sorted(measured, key=lambda row: list(self.cfg.schemes).index(row["scheme"]))
            rows += found
            print(_table(found, folder), flush=True)
        return rows

    def _measure(self, mbit: float, screen: Screen) -> Path:
        folder = self.folder / f"{mbit:g}mbit"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = folder / "settings.json"
        settings.write_text(json.dumps(self._settings(folder)))
        script = [str(TRAINING), str(settings)]
        with (
            Namespaces(self.cfg.machines, f"{mbit}mbit", self.extent.burst) as net,
            NamespaceJob(net, folder, script, priority=self.cfg.priority) as job,
        ):
            self._watch(job, folder, screen)
        return folder

    def _settings(self, folder: Path) -> dict[str, Any]:
        turns = {name: self.extent[name] for name in ("rounds", "counted", "settling")}
        return {
            "folder": str(folder),
            "machines": self.cfg.machines,
            "verify_all": self.cfg.verify_all,
            "model": {**OmegaConf.to_container(self.cfg.model), "wait_s": self.extent.wait_s},
            "turns": {**turns, "schemes": list(self.cfg.schemes), "seed": self.cfg.seed},
            "gemini": self.gemini,
        }

    def _watch(self, job: NamespaceJob, folder: Path, screen: Screen) -> None:
        """Shows how far it is until it ends; no iteration for long is a failure."""
        total = self.extent.rounds * len(self.cfg.schemes) * (self.extent.counted + self.extent.settling)
        done, moved, began = 0, time.monotonic(), time.monotonic()
        while job.running:
            lines = read_lines(folder / "iterations.jsonl")
            if not lines:
                job.prioritise()
            if len(lines) > done:
                done, moved = len(lines), time.monotonic()
            screen.show(_state(lines, total, time.monotonic() - began))
            if time.monotonic() - moved > (_ITERATION_S if done else _START_S + _ITERATION_S):
                raise JobError(f"no iteration for {time.monotonic() - moved:.0f} s; see the logs in {folder}")
            time.sleep(_POLL_S)
        screen.done(_state(read_lines(folder / "iterations.jsonl"), total, time.monotonic() - began))


def main(cfg: DictConfig) -> None:
    """Measures, writes, draws; ends the process with 1 where that is impossible."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if reason := why_not():
        sys.exit(f"interference: {reason}; this experiment needs root and network namespaces: try it with sudo")
    if (unknown := set(cfg.schemes) - set(SCHEDULES)) or REFERENCE not in cfg.schemes:
        wrong = f"unknown: {', '.join(sorted(unknown))}" if unknown else f"{REFERENCE!r}, to compare with, is missing"
        sys.exit(f"interference: schemes are some of {', '.join(SCHEDULES)}; {wrong}")
    began = time.monotonic()
    print(f"{NOTE}\nseed {cfg.seed}; results go to {cfg.folder}", flush=True)
    try:
        experiment = Experiment(cfg)
        rows = experiment.run()
    except (JobError, IncompleteError, GeminiError) as error:
        sys.exit(f"interference: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    command = " ".join(["python recipes/experiments/interference.py", *HydraConfig.get().overrides.task])
    result = {"experiment": "interference", "command": command, "machine": _machine(), "note": NOTE, "rows": rows}
    path = experiment.folder / "result.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    figures = draw(rows, experiment.folder)
    print(_break_point(rows))
    names = ", ".join(figure.name for figure in figures)
    print(f"{path}, {names}; {time.monotonic() - began:.0f} s")


def _state(lines: list[dict[str, Any]], total: int, seconds: float) -> str:
    if not lines:
        return f"starts, and profiles the network's idle spans  {seconds:4.0f} s"
    last = lines[-1]
    return f"round {last['round'] + 1}, {last['scheme']:<11} iteration {len(lines):4d}/{total}  {seconds:4.0f} s"


def _table(rows: list[dict[str, Any]], folder: Path) -> str:
    plan = read_lines(folder / "plans.jsonl")[-1]
    rate = 8e-6 * plan["bandwidth_bytes_per_s"]
    fits = "fits" if rows[0]["fits"] else f"does not fit, by {1e3 * plan['overrun_s']:.0f} ms"
    idle_ms = 1e3 * (rows[0]["idle_s"] or 0.0)
    head = f"link measured as {rate:.0f} Mbit/s, idle for {idle_ms:.0f} ms of an iteration; a checkpoint {fits}"
    columns = (
        f"{'scheme':<12} {'iteration':>10} {f'{LOW:.0%} to {HIGH:.0%}':>17} {'overhead':>9} "
        f"{f'{CONFIDENCE:.0%} interval':>19} {'checkpoint':>11} {'in flight':>10} {'n':>4}"
    )
    return "\n".join([head, columns, *(_line(row) for row in rows)])


def _line(row: Mapping[str, Any]) -> str:
    spread = f"{1e3 * row['iteration_s_low']:.1f} to {1e3 * row['iteration_s_high']:.1f}"
    interval = f"{row['overhead_low']:+.2%} to {row['overhead_high']:+.2%}"
    checkpoint = "-" if row["checkpoint_s"] is None else f"{1e3 * row['checkpoint_s']:.0f} ms"
    peak = "-" if row["peak_buffer_bytes"] is None else f"{row['peak_buffer_bytes'] / 2**10:.0f} KiB"
    return (
        f"{row['scheme']:<12} {1e3 * row['iteration_s_median']:>7.1f} ms {spread:>17} {row['overhead']:>+9.2%} "
        f"{interval:>19} {checkpoint:>11} {peak:>10} {row['iterations']:>4}"
    )


def _break_point(rows: list[dict[str, Any]]) -> str:
    found = break_point(read_rows(rows))
    if found is None:
        return "interleaved: no two speeds enclose the point from which on it costs more than 1 %"
    return f"interleaved costs at most 1 % at {found.within_mbit:g} Mbit/s, and more at {found.beyond_mbit:g} Mbit/s"


def _machine() -> dict[str, Any]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {"python": platform.python_version(), "torch": metadata.version("torch"), "kernel": platform.release()}
    return {"cpus": len(os.sched_getaffinity(0)), "memory_gib": round(memory_bytes / 2**30, 1), **versions}


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name="interference")(main)()
