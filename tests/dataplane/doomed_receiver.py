"""A holder's worker that takes a version in, and waits to be killed in the middle of it."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_gemini.callbacks.replica_desk import AgentDesk
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.dataplane.transport.p2p_receiver import P2pReceiver
from lightning_gemini.dataplane.transport.pair import HOLDER
from lightning_gemini.dataplane.transport.sub_buffers import SubBuffers
from tests.dataplane.rigs import open_pair


def main() -> None:
    socket_path, job, pair = sys.argv[1:]
    desk = AgentDesk(AgentClient(Path(socket_path), job))
    P2pReceiver(lambda: open_pair(Path(pair), HOLDER), desk, SubBuffers()).run()


if __name__ == "__main__":
    main()
