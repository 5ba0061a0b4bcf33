"""Breaks established TCP connections of another process, as a network that forgets them would."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

_PIDFD_GETFD = 438  # the number is the same on all architectures
_ESTABLISHED = "01"


def cut_connections(pid: int, spared: Collection[str] = ()) -> int:
    """Shuts down, in both directions, every established TCP connection of a process; both ends notice at once.

    Args:
        pid: The process; ours, or we are root.
        spared: ``HOST:PORT`` of remote ends that are left alone.

    Returns:
        How many were cut; none if the process is gone.

    Raises:
        OSError: The kernel does not let us at the process's descriptors.
    """
    try:
        holder = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        inodes = {inode for inode, remote in _established(pid) if remote not in spared}
        return sum(_shut_down(holder, descriptor) for descriptor in _descriptors(pid, inodes))
    finally:
        os.close(holder)


def _established(pid: int) -> Iterator[tuple[int, str]]:
    """Yields inode and remote ``HOST:PORT`` of the connections in the process's network namespace."""
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _ESTABLISHED:
                    yield int(fields[9]), _address(family, fields[2])


def _address(family: socket.AddressFamily, text: str) -> str:
    """Reads the kernel's notation: 32-bit words in host order, in hexadecimal."""
    host, _, port = text.partition(":")
    packed = b"".join(bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8))
    name = socket.inet_ntop(family, packed)
    return f"{name.removeprefix('::ffff:')}:{int(port, 16)}"


def _descriptors(pid: int, inodes: Collection[int]) -> Iterator[int]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{entry}") in wanted:
                    yield int(entry)


def _shut_down(holder: int, descriptor: int) -> bool:
    """A copy of the descriptor is enough: the connection itself is shut down for all who hold it."""
    kernel = ctypes.CDLL(None, use_errno=True)
    copy = kernel.syscall(_PIDFD_GETFD, holder, descriptor, 0)
    if copy < 0:
        code = ctypes.get_errno()
        if code in (errno.EBADF, errno.ESRCH):
            return False  # closed meanwhile
        raise OSError(code, f"cannot take over a connection ({os.strerror(code)}): be root, or the job's user")
    with socket.socket(fileno=copy) as connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
        return True
    return False
