"""Tells the agent that a worker refuses to train, so that nobody restarts it in vain."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.errors import (
    CapacityError,
    ConfigurationError,
    GeminiError,
    LayoutMismatchError,
    PersistError,
)

REFUSALS = (ConfigurationError, CapacityError, LayoutMismatchError, PersistError)
"""Errors that the next attempt would meet again, whatever machines it runs on."""


def report_refusal(error: BaseException) -> None:
    """Tell this worker's agent, if `lightning-gemini run` started it and the error is one that stays."""
    socket_path = os.environ.get("LIGHTNING_GEMINI_AGENT")
    if socket_path is None or not isinstance(error, REFUSALS):
        return
    with (
        contextlib.suppress(GeminiError),
        AgentClient(Path(socket_path), os.environ["LIGHTNING_GEMINI_JOB"]) as agent,
    ):
        agent.fatal(int(os.environ.get("RANK", "-1")), str(error))
