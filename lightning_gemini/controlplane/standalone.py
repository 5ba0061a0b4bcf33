"""An agent without ``lightning-gemini run``: started by the first rank of a machine that finds none, and left behind.

It keeps the job's memory while the script is down, and goes away when the job ends, is told to, or was idle for long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from lightning_gemini.controlplane.agent import AgentSettings, MachineAgent
from lightning_gemini.controlplane.agent_client import AgentClient
from lightning_gemini.controlplane.control_socket import is_served
from lightning_gemini.errors import AgentError, ConfigurationError, GeminiError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
_SOCKET_PATH_BYTES = 107  # sun_path, without the zero at its end
_JOB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def runtime_dir() -> Path:
    """Directory for sockets of this user; mode 0700.

    Raises:
        AgentError: Somebody else owns it.
    """
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lightning-gemini-{os.getuid()}"  # noqa: S108 - checked below
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()  # a link could lead anywhere
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise AgentError(f"{path} belongs to another user; set TMPDIR to a directory of your own")
    return path


def job_id(argv: list[str], cwd: str) -> str:
    """The same command typed in the same directory is the same job; ``LIGHTNING_GEMINI_JOB`` overrides.

    Raises:
        ConfigurationError: ``LIGHTNING_GEMINI_JOB`` cannot be the name of a directory.
    """
    if given := os.environ.get("LIGHTNING_GEMINI_JOB"):
        if not _JOB_NAME.fullmatch(given):
            raise ConfigurationError(
                f"LIGHTNING_GEMINI_JOB must be up to 64 letters, digits, '.', '_' or '-', found {given!r:.80}"
            )
        return given
    line = json.dumps([cwd, os.path.abspath(argv[0]), *argv[1:]])
    return hashlib.blake2b(line.encode(), digest_size=6).hexdigest()


def socket_path(job: str, machine: int) -> Path:
    """Where the agent of a machine listens.

    Raises:
        AgentError: The path is longer than a unix socket's may be, or its directory is somebody else's.
    """
    path = runtime_dir() / job / f"agent-{machine}.sock"
    if (length := len(os.fsencode(path))) > _SOCKET_PATH_BYTES:
        raise AgentError(f"{path} has {length} bytes, {_SOCKET_PATH_BYTES} are allowed: set TMPDIR to a shorter one")
    return path


def find_or_start(job: str, machine: int, bind_host: str, idle_timeout_s: float) -> AgentClient:
    """Connect to this machine's agent of the job, starting it where there is none.

    Raises:
        AgentError: The agent there is of another job or version, or does not start.
    """
    path = socket_path(job, machine)
    if is_served(path):
        return AgentClient(path, job)
    # No agent, or one that was killed and left its socket behind.
    process = _spawn(job, machine, path, bind_host, idle_timeout_s)
    client = AgentClient(path, job)
    if client.identity["pid"] != process.pid:  # another script was faster
        process.kill()
        process.wait()
    return client


def wait_gone(pid: int) -> None:
    """Wait for an agent that was told to stop, also as its parent; for a bounded time."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)


def _spawn(job: str, machine: int, path: Path, bind_host: str, idle_timeout_s: float) -> subprocess.Popen[bytes]:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "job": job,
        "machine": machine,
        "socket_path": str(path),
        "secret": secrets.token_hex(32),
        "bind_host": bind_host,
        "idle_timeout_s": idle_timeout_s,
    }
    log_path = path.with_suffix(".log")
    with open(log_path, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_gemini.controlplane.standalone"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # outlives this script, its terminal and Ctrl-C
            cwd="/",
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its log says why
        process.stdin.write(json.dumps(settings).encode())  # not on the command line: it has the secret
        process.stdin.close()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_served(path):
        ended = process.poll() is not None or time.monotonic() > deadline
        if ended and not is_served(path):  # it also ends where another one was faster
            process.kill()
            raise AgentError(f"the agent did not start: {log_path.read_text(errors='replace').strip()[-500:]}")
        time.sleep(0.01)
    return process


def main() -> None:
    """Process entry: settings as JSON on standard input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    fields = json.load(sys.stdin)
    fields.update(socket_path=Path(fields["socket_path"]), secret=bytes.fromhex(fields["secret"]))
    agent = MachineAgent(AgentSettings(**fields))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.close())
    try:
        agent.start()
    except (GeminiError, OSError) as error:
        sys.exit(str(error))  # the starter reads it in the log
    agent.closed.wait()
    _remove_runtime_files(fields["socket_path"])


def _remove_runtime_files(path: Path) -> None:
    path.with_suffix(".log").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another machine's agent of this job may live here too
        path.parent.rmdir()


if __name__ == "__main__":
    main()
