"""Runs a user's script in a forked process so that it cannot tell.

What ``python SCRIPT ARGS`` does before and after the script, this does too.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import random
import sys
import threading
import types
from collections.abc import Callable

from lightning_gemini.controlplane.logs import setup_worker_logging
from lightning_gemini.controlplane.refusal import report_refusal


def run_script(argv: list[str]) -> None:
    """Executes ``argv[0]`` as ``__main__``; the module stays alive for what runs at exit."""
    setup_worker_logging()
    path = os.path.abspath(argv[0])
    sys.argv = [argv[0], *argv[1:]]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    main = types.ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    with open(path, "rb") as source:
        code = compile(source.read(), path, "exec")
    exec(code, main.__dict__)  # noqa: S102 - the user asked for this script to be run


def exit_code_of(run: Callable[[], None]) -> int:
    """Calls ``run`` and returns the exit code that the interpreter would give, its traceback printed."""
    try:
        run()
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return (leave.code or 0) & 0xFF
        sys.stderr.write(f"{leave.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        report_refusal(error)
        return 1
    return 0


def finish_interpreter() -> None:
    """Does what the interpreter does last: joins threads, runs exit functions, flushes."""
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def reseed() -> None:
    """Gives ``random`` and numpy fresh entropy, as a new process has; torch starts from a constant either way."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
