"""Scripts that the runs of these tests train: no torch, so that a cluster is up in a second."""

from __future__ import annotations

STEADY = """
import os, signal, sys, time
rank, generation = os.environ["RANK"], int(os.environ["LIGHTNING_GEMINI_GENERATION"])
print(f"rank {rank} generation {generation}", flush=True)
until = int(sys.argv[1])  # the generation that is allowed to finish
time.sleep(0.3 if generation >= until else 300)
print(f"rank {rank} done", flush=True)
"""

ENVIRONMENT = """
import json, os, sys
json.dump({"env": dict(os.environ), "argv": sys.argv}, open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w"))
"""

FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    raise RuntimeError("the model is broken")
time.sleep(60)
"""

STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(300)
"""

UNTIL_FILE = """
import os, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
"""

WRITER = """
import os, sys, time
from pathlib import Path
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import VersionId
rank, generation = int(os.environ["RANK"]), int(os.environ["LIGHTNING_GEMINI_GENERATION"])
agent = AgentClient(Path(os.environ["LIGHTNING_GEMINI_AGENT"]), os.environ["LIGHTNING_GEMINI_JOB"])
agent.join(rank, 2, "mixed")
slab, step = agent.attach(5000), 100 * generation
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
    step += 1
    buffer = slab.buffers[step % 2]
    buffer.begin(VersionId(generation, step), 5000)
    buffer.data[:5000] = bytes([step % 256]) * 5000
    buffer.seal(5000)
    buffer.complete()
    slab.buffers[0].report_progress(step)
    agent.notify()
"""
