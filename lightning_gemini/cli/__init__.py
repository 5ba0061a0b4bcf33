"""The command line: ``lightning-gemini run | status | inject | stop | plan | agent``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from lightning_gemini.errors import GeminiError
from lightning_gemini.version import __version__

__all__ = ["main"]

_COMMANDS = ("run", "status", "inject", "stop", "plan", "agent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        arguments: Command line without the program's name; the process's own by default.

    Returns:
        Exit code: 0, 1 when the job failed, 2 for impossible requests, 128 + N after signal N.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-gemini", description="Train through failures: checkpoints in memory, every step."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    words = sys.argv[1:] if arguments is None else list(arguments)
    for name in words[:1] if words[:1] and words[0] in _COMMANDS else _COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add_parser(commands)
    chosen = parser.parse_args(words)
    try:
        return int(chosen.command(chosen))
    except GeminiError as error:
        print(f"lightning-gemini: {error}", file=sys.stderr)
        return 2
