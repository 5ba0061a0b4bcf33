"""At which address the other machines reach this one, and through which network interface."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9


def address_towards(endpoint: str) -> str:
    """Returns the address that this machine shows to the first of some comma-separated ``HOST:PORT``.

    The kernel picks it as it would for a connection; nothing is sent.

    Raises:
        OSError: If there is no way there.
    """
    host, _, port = endpoint.split(",")[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port or _ANY_PORT)))
        address = str(probe.getsockname()[0])
    return "127.0.0.1" if is_loopback(address) else address


def is_loopback(address: str) -> bool:
    """Says whether an address reaches this very host only."""
    return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback


def interface_of(address: str) -> str | None:
    """Returns the network interface that has an address; None for loopback, and where there is none."""
    wanted = socket.gethostbyname(address)
    if is_loopback(wanted):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == wanted:
                return name
    return None
