"""A worker that dies: publishes a version, lets a little of it travel in one span, says so, and waits for its end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.pace_page import Pace
from tests.controlplane.agents import JOB
from tests.dataplane.machines import write_version
from tests.dataplane.waiting import DEADLINE_S


def main() -> None:
    path, number, size, written = Path(sys.argv[1]), *(int(word) for word in sys.argv[2:])
    client = AgentClient(path, JOB)
    client.join(0, 2, "mixed")
    slab = client.attach(size)
    page = slab.pace
    page.set_plan([1000.0], bandwidth_bytes_per_s=1e9, startup_s=0.0, chunk_bytes=10_000, window_bytes=10_000)
    page.set_pace(Pace.PACED)
    page.restart_sent()
    newest = slab.newest_started()
    buffer = slab.buffers[1] if newest is slab.buffers[0] else slab.buffers[0]
    write_version(buffer, VersionId(1, number), size, until_byte=None if written == size else written)
    client.notify()
    page.open_span(0)
    deadline = time.monotonic() + DEADLINE_S
    while page.sent < 50_000 and time.monotonic() < deadline:
        time.sleep(0.001)
    page.close_span()
    print(page.sent, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
