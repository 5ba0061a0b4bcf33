"""Process entry of an agent that ``lightning-gemini run`` starts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from lightning_gemini.controlplane.agent_settings import load_settings
from lightning_gemini.controlplane.kv.etcd import EtcdKeyValueStore
from lightning_gemini.controlplane.logs import setup_logging
from lightning_gemini.controlplane.processes import die_with_parent
from lightning_gemini.controlplane.worker_agent import WorkerAgent
from lightning_gemini.errors import GeminiError

_log = logging.getLogger("lightning_gemini.agent")


def main() -> int:
    """Runs the agent until SIGTERM, SIGINT, a ``stop`` request, or the end of the launcher."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent", type=int, help="end with this process")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    settings = load_settings(arguments.config)
    log_path = settings.run_dir / "logs" / f"node{settings.machine}-agent.jsonl"
    handler = setup_logging(log_path, node=settings.machine)
    _log.info("agent %s starts (pid %d)", settings.incarnation, os.getpid())
    store = EtcdKeyValueStore(settings.etcd)
    agent = WorkerAgent(settings, store, handler)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    try:
        agent.run()
    except (GeminiError, OSError) as error:
        _log.exception("the agent failed")
        sys.stderr.write(f"agent of node {settings.machine}: {error}\n")
        return 1
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
