"""How workers and the command line speak to their machine's agent: length-prefixed JSON on a unix socket.

File descriptors may go with a message.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from lightning_gemini.errors import ProtocolError

_LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 8 << 20
_MAX_DESCRIPTORS = 16
UNANSWERED = ("notify",)
"""Requests that nobody waits for an answer to."""


def send_message(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message, and file descriptors with it."""
    body = json.dumps(message).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    data = _LENGTH.pack(len(body)) + body
    sent = sock.sendmsg([data], ancillary)
    sock.sendall(data[sent:])


def receive_message(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read one message and the descriptors that came with it.

    Raises:
        EOFError: The other side closed the connection.
        ProtocolError: It is no message, or too long.
    """
    data, descriptors, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_DESCRIPTORS)
    for descriptor in descriptors:  # programs that a worker starts must not keep the memory alive
        os.set_inheritable(descriptor, False)
    if not data:
        raise EOFError
    data += _read(sock, _LENGTH.size - len(data))
    (length,) = _LENGTH.unpack(data)
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {length} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message = json.loads(_read(sock, length))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message that is no JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("a message that is no JSON object")
    return message, list(descriptors)


def _read(sock: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise ProtocolError("the connection closed in the middle of a message")
        parts += part
    return bytes(parts)
