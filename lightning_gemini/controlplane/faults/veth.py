"""Finds and switches our end of the virtual cable (veth) to a machine in a network namespace of its own.

It asks the kernel itself (rtnetlink) rather than ``ip``: the launcher takes unknown children of its own for orphans of
dead machines.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_RTM_GETLINK, _NLMSG_DONE = 18, 3
_REQUEST_DUMP = 0x301
_IFLA_IFNAME, _IFLA_LINK = 3, 5
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1
_MESSAGE = struct.Struct("=IHHII")  # nlmsghdr
_LINK = struct.Struct("=BxHiII")  # ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")  # rtattr


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface: its index, the index of what it is tied to (of a veth: its other end), and its name."""

    index: int
    peer: int
    name: str


def in_other_namespace(pid: int) -> bool:
    """Says whether a process has another network namespace than we.

    Raises:
        OSError: The process is gone, or not ours to look at.
    """
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def outer_end(pid: int) -> str:
    """Returns the name of the interface here whose other end is in the namespace of process ``pid``.

    Raises:
        OSError: There is none here, or we may not look.
    """
    with _netlink_of(pid) as there, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as here:
        inside = {(link.peer, link.index) for link in _links(there)}
        for link in _links(here):
            if (link.index, link.peer) in inside and link.name != "lo":
                return link.name
    raise OSError(f"found no veth here that leads to the network namespace of pid {pid}: run this where its cable ends")


def set_link(interface: str, up: bool) -> None:
    """Takes an interface up or down.

    Raises:
        OSError: It is gone, or we may not.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, _GET_FLAGS, request), 16)
        flags = flags | _UP if up else flags & ~_UP
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh14x", interface.encode(), flags))


def _netlink_of(pid: int) -> socket.socket:
    """Opens a socket to the kernel in another namespace; a thread of its own enters it, for it could not come back."""
    opened: list[socket.socket | OSError] = []

    def enter() -> None:
        try:
            with open(f"/proc/{pid}/ns/net", "rb") as namespace:
                kernel = ctypes.CDLL(None, use_errno=True)
                if kernel.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network namespace of pid {pid}: be root")
            opened.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=enter, name="namespace")
    thread.start()
    thread.join()
    if isinstance(opened[0], OSError):
        raise opened[0]
    return opened[0]


def _links(kernel: socket.socket) -> Iterator[Link]:
    kernel.settimeout(5.0)
    kernel.sendto(
        _MESSAGE.pack(_MESSAGE.size + _LINK.size, _RTM_GETLINK, _REQUEST_DUMP, 1, 0) + _LINK.pack(0, 0, 0, 0, 0), (0, 0)
    )
    while True:
        received, place = kernel.recv(1 << 17), 0
        while place < len(received):
            size, kind, *_ = _MESSAGE.unpack_from(received, place)
            if kind == _NLMSG_DONE or size < _MESSAGE.size:
                return
            yield _link(received[place + _MESSAGE.size : place + size])
            place += (size + 3) & ~3


def _link(message: bytes) -> Link:
    index, place = _LINK.unpack_from(message)[2], _LINK.size
    peer, name = 0, ""
    while place + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, place)
        value = message[place + _ATTRIBUTE.size : place + size]
        if kind == _IFLA_IFNAME:
            name = value.rstrip(b"\0").decode()
        elif kind == _IFLA_LINK:
            (peer,) = struct.unpack("=I", value)
        place += max(4, (size + 3) & ~3)
    return Link(index, peer, name)
