"""Structured logs: one JSON object a line with time, node, rank and generation on every record, one file a process."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_gemini.controlplane.events import append_line

PACKAGE_LOGGER = "lightning_gemini"


class JsonLinesHandler(logging.Handler):
    """Writes records as JSON lines.

    Attributes:
        generation: Stamped on every record; the owner raises it when a new generation starts.
    """

    def __init__(self, path: Path, *, node: int | None = None, rank: int | None = None, generation: int = 0) -> None:
        super().__init__(logging.DEBUG)
        self.path, self.node, self.rank, self.generation = path, node, rank, generation

    def emit(self, record: logging.LogRecord) -> None:
        """Appends one record; a full or vanished disk must not end the process that logs."""
        try:
            append_line(self.path, json.dumps(self.as_fields(record), default=str))
        except Exception:
            self.handleError(record)

    def as_fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Returns what one line holds."""
        fields: dict[str, Any] = {
            "time": record.created,
            "node": self.node,
            "rank": self.rank,
            "generation": self.generation,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        return fields


def setup_logging(
    path: Path,
    *,
    node: int | None = None,
    rank: int | None = None,
    generation: int = 0,
    level: int = logging.INFO,
) -> JsonLinesHandler:
    """Sends every record of this package to ``path``; a second call replaces the first.

    Returns:
        The handler, whose ``generation`` the caller keeps up to date.
    """
    logger = logging.getLogger(PACKAGE_LOGGER)
    for old in [handler for handler in logger.handlers if isinstance(handler, JsonLinesHandler)]:
        logger.removeHandler(old)
    handler = JsonLinesHandler(path, node=node, rank=rank, generation=generation)
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler


def setup_worker_logging(environment: Mapping[str, str] | None = None) -> JsonLinesHandler | None:
    """Opens the structured log of a worker that ``lightning-gemini run`` started; ``None`` for any other process.

    The fork server calls it before the user's script runs.
    """
    env = os.environ if environment is None else environment
    run_dir, node, rank = (env.get(name) for name in ("LIGHTNING_GEMINI_RUN_DIR", "LIGHTNING_GEMINI_NODE", "RANK"))
    if not run_dir or not node or not rank:
        return None
    path = Path(run_dir) / "logs" / f"node{node}-rank{rank}.jsonl"
    generation = int(env.get("LIGHTNING_GEMINI_GENERATION", "0"))
    return setup_logging(path, node=int(node), rank=int(rank), generation=generation)
