"""Ties the lives of processes together, so that nothing outlives the job (Linux ``prctl``)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
PROTOBUF_VARIABLE = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"

# The kernel's link between a process and its parent survives exec, so this also binds programs that are not ours.
_BOUND_EXEC = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9,0,0,0);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);os.execv(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel SIGKILL this process when its parent ends, however it ends.

    The kernel watches the parent's *thread*: a parent must start such children from a thread that lives as long as
    they should, its main thread.

    Args:
        parent_pid: The expected parent; if it is gone already this process ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def bound_command(command: Sequence[str]) -> list[str]:
    """Returns a command line that runs ``command`` (absolute path first) bound to the life of this process."""
    return [sys.executable, "-I", "-S", "-c", _BOUND_EXEC, str(os.getpid()), *command]


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that it can end them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """Returns the direct children of a process, dead ones that nobody waited for included."""
    children: list[int] = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    children.append(int(entry))
    return children


def environment_of(pid: int) -> dict[str, str]:
    """Returns the variables that a process was started with; empty if it is gone or not ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as content:
            items = content.read().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def start_time(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot: with its pid that names it for good."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def identity_of(pid: int) -> str:
    """Names a process of this host for good, also against reuse of its pid and against other hosts."""
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return f"{pid},{start_time(pid)},{boot_id.read().strip()}"


def watch_process(identity: str, ended: Callable[[], None]) -> None:
    """Calls ``ended`` on a thread of its own when the process of that name ends; never if it is not of this host."""
    pid = int(identity.partition(",")[0])
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    if identity_of(pid) != identity:
        os.close(descriptor)
        return

    def wait() -> None:
        select.select([descriptor], [], [])
        os.close(descriptor)
        ended()

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def kill_group(pid: int) -> None:
    """SIGKILLs the process group that ``pid`` leads, and ``pid`` itself; it may be gone already."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def wait_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Waits until processes have ended; returns those that are still alive after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    left = [pid for pid in pids if start_time(pid) is not None]
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [pid for pid in left if start_time(pid) is not None]
    return left
