"""What agents say to each other on TCP: a mutual HMAC handshake, then fixed-size frames, some with a payload.

Nothing is unpickled, every length is capped, every frame carries its own checksum, and no byte is looked at before the
peer has proved that it knows the job's secret.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass

import xxhash

from lightning_gemini.core.recovery import VersionId
from lightning_gemini.errors import AuthenticationError, ProtocolError

PROTOCOL = 3
MAX_CHUNK_BYTES = 1 << 30
MAX_SHARD_BYTES = 1 << 42  # in chunks of MAX_CHUNK_BYTES it fills a buffer's checksum table
MAX_REASON_BYTES = 4096
MAX_PROBE_BYTES = 1 << 26
_TRICKLE_BYTES, _TRICKLE_S = 32 << 10, 0.001
HANDSHAKE_TIMEOUT_S = 5.0
DEAD_AFTER_S = 19  # of silence of a peer's kernel
_PROBES, _BETWEEN_PROBES_S = 3, 3
_MAGIC = b"LGGEMINI"
_HELLO = struct.Struct("<8sHI16s32s")
_PROOF = struct.Struct("<32s32s")
_FRAME = struct.Struct("<4sBxxxIQQQQIQQQQ")
_FRAME_CHECKSUM = struct.Struct("<Q")
FRAME_BYTES = _FRAME.size + _FRAME_CHECKSUM.size
_FRAME_MAGIC = b"LGFR"
_NO_VERSION = VersionId(0, 0)
_NOTHING_KEPT = 2**64 - 1


class Kind(enum.IntEnum):
    """What a frame asks for or says."""

    BEGIN = 1  # sender: shard (owner, id) of `size` bytes in chunks of `chunk_bytes` follows
    CHUNK = 2  # sender: chunk `size` (its index) with its checksum; payload follows
    END = 3  # sender: all chunks sent
    ABORT = 4  # sender: the version will not be finished
    FETCH = 5  # asks for a complete shard
    WANT = 6  # receiver: send it
    HAVE = 7  # receiver: already complete here
    ACK = 8  # receiver: complete and verified
    REFUSE = 9  # either: no; payload is the reason in UTF-8
    PROBE = 10  # sender: measures the link with a payload that nobody keeps; answered with ACK and a time


_LIMITS = {Kind.CHUNK: MAX_CHUNK_BYTES, Kind.PROBE: MAX_PROBE_BYTES}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; ``size`` and ``chunk_bytes`` mean what ``kind`` says.

    ``sender_generation`` is the generation that the sender is in: one that was declared dead may still be talking,
    about versions old and new. ``kept`` is the version that the sender keeps while it writes ``id``: the last one
    committed.
    """

    kind: Kind
    owner: int = 0
    id: VersionId = _NO_VERSION
    size: int = 0
    chunk_bytes: int = 0
    length: int = 0
    checksum: int = 0
    sender_generation: int = 0
    kept: VersionId | None = None

    def pack(self) -> bytes:
        """The frame as bytes with their checksum, without its payload."""
        body = _FRAME.pack(
            _FRAME_MAGIC,
            self.kind,
            self.owner,
            self.id.generation,
            self.id.version,
            self.size,
            self.chunk_bytes,
            self.length,
            self.checksum,
            self.sender_generation,
            self.kept.generation if self.kept else 0,
            self.kept.version if self.kept else _NOTHING_KEPT,
        )
        return body + _FRAME_CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def send(sock: socket.socket, frame: Frame, payload: memoryview | bytes = b"") -> None:
    """Send one frame and its payload without copying the payload."""
    send_all(sock, frame.pack(), payload)


def send_all(sock: socket.socket, header: bytes, payload: memoryview | bytes) -> None:
    """Send two pieces behind each other, either of which may be empty, without copying the second one."""
    if not header or not payload:
        sock.sendall(header or payload)
        return
    sent = sock.sendmsg([header, payload])
    if sent < len(header):
        sock.sendall(header[sent:])
        sent = len(header)
    sock.sendall(memoryview(payload)[sent - len(header) :])


def receive(sock: socket.socket) -> Frame:
    """Read one frame header.

    Raises:
        ProtocolError: The bytes are no frame, or a damaged one, or a length is beyond its cap.
        EOFError: The peer closed the connection between two frames.
    """
    raw = bytearray(FRAME_BYTES)
    receive_into(sock, memoryview(raw), eof_ok=True)
    return unpack(raw)


def unpack(raw: bytes | bytearray) -> Frame:
    """The frame that :meth:`Frame.pack` made these bytes of.

    Raises:
        ProtocolError: The bytes are no frame, or a damaged one, or a length is beyond its cap.
    """
    fields = _FRAME.unpack_from(raw)
    magic, kind, owner, generation, version, size, chunk_bytes, length, checksum, sender, *kept = fields
    if magic != _FRAME_MAGIC:
        raise ProtocolError("the peer sent something that is no frame; is another program using this port?")
    if _FRAME_CHECKSUM.unpack_from(raw, _FRAME.size)[0] != xxhash.xxh3_64_intdigest(raw[: _FRAME.size]):
        raise ProtocolError("the peer sent a frame that was damaged on the way")
    if kind not in Kind._value2member_map_:
        raise ProtocolError(f"the peer sent a frame of kind {kind}, which is no frame of protocol {PROTOCOL}")
    named = VersionId(generation, version)
    kept_id = None if kept[1] == _NOTHING_KEPT else VersionId(*kept)
    frame = Frame(Kind(kind), owner, named, size, chunk_bytes, length, checksum, sender, kept_id)
    if length > _LIMITS.get(frame.kind, MAX_REASON_BYTES) or size > MAX_SHARD_BYTES or chunk_bytes > MAX_CHUNK_BYTES:
        raise ProtocolError(f"the peer announced {length} bytes in a {frame.kind.name} frame, more than is allowed")
    return frame


def receive_into(
    sock: socket.socket, target: memoryview, *, eof_ok: bool = False, deadline: float | None = None
) -> None:
    """Fill ``target`` from the socket, until ``deadline`` on the monotonic clock where there is one.

    Raises:
        EOFError: The peer closed before the first byte and ``eof_ok``.
        ConnectionError: The peer closed in the middle.
        TimeoutError: The deadline, or the socket's own timeout, passed.
    """
    received = 0
    while received < len(target):
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(target[received:])
        if count == 0:
            if eof_ok and received == 0:
                raise EOFError
            raise ConnectionError(f"the peer closed the connection after {received} of {len(target)} bytes")
        received += count
        if count < _TRICKLE_BYTES < len(target) - received:
            time.sleep(_TRICKLE_S)  # a slow link would else wake this thread for every few packets


def receive_reason(sock: socket.socket, frame: Frame) -> str:
    """Read the payload of a REFUSE frame.

    Raises:
        ProtocolError: It was damaged on the way.
    """
    raw = bytearray(frame.length)
    receive_into(sock, memoryview(raw))
    if xxhash.xxh3_64_intdigest(raw) != frame.checksum:
        raise ProtocolError("the peer refused, but its reason was damaged on the way")
    return raw.decode(errors="replace")


def refuse(sock: socket.socket, owner: int, version: VersionId, reason: str) -> None:
    """Send a REFUSE frame with its reason."""
    payload = reason.encode()[:MAX_REASON_BYTES]
    checksum = xxhash.xxh3_64_intdigest(payload)
    send(sock, Frame(Kind.REFUSE, owner, version, length=len(payload), checksum=checksum), payload)


def connect(address: tuple[str, int], job: str, secret: bytes, machine: int, *, timeout_s: float) -> socket.socket:
    """Open an authenticated connection to another agent's replica server.

    Raises:
        AuthenticationError: The other side does not know the secret, or is of another job.
        OSError: It cannot be reached.
    """
    sock = socket.create_connection(address, timeout=HANDSHAKE_TIMEOUT_S)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = secrets.token_bytes(32)
        sock.sendall(_HELLO.pack(_MAGIC, PROTOCOL, machine, _job_digest(job), nonce))
        reply = _read_handshake(sock, _PROOF.size, address)
        their_nonce, proof = _PROOF.unpack(reply)
        if not hmac.compare_digest(proof, _proof(secret, b"server", nonce, their_nonce, machine)):
            raise AuthenticationError(f"the agent at {address[0]}:{address[1]} does not know this job's secret")
        sock.sendall(_proof(secret, b"client", nonce, their_nonce, machine))
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


def accept(sock: socket.socket, job: str, secret: bytes, *, timeout_s: float | None) -> int:
    """Authenticate a connection that another agent opened; returns its machine rank.

    From then on the connection breaks when the peer's machine vanishes, however long nobody has anything to say.

    Raises:
        AuthenticationError: The peer does not know the secret, or is of another job or protocol.
    """
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer = sock.getpeername()
    raw = _read_handshake(sock, _HELLO.size, peer)
    magic, protocol, machine, job_digest, nonce = _HELLO.unpack(raw)
    if magic != _MAGIC or protocol != PROTOCOL:
        raise AuthenticationError(f"{peer}: not an agent of this version (protocol {PROTOCOL})")
    if job_digest != _job_digest(job):
        raise AuthenticationError(f"{peer}: an agent of another job")
    own_nonce = secrets.token_bytes(32)
    sock.sendall(_PROOF.pack(own_nonce, _proof(secret, b"server", nonce, own_nonce, machine)))
    proof = _read_handshake(sock, 32, peer)
    if not hmac.compare_digest(proof, _proof(secret, b"client", nonce, own_nonce, machine)):
        raise AuthenticationError(f"{peer}: does not know this job's secret")
    _notice_death(sock)
    sock.settimeout(timeout_s)
    return int(machine)


def _notice_death(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_AFTER_S - _PROBES * _BETWEEN_PROBES_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _BETWEEN_PROBES_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def _read_handshake(sock: socket.socket, size: int, peer: object) -> bytes:
    raw = bytearray(size)
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S  # for all of it: a byte now and then does not hold a thread
    try:
        receive_into(sock, memoryview(raw), eof_ok=True, deadline=deadline)
    except (EOFError, ConnectionError, TimeoutError) as error:
        raise AuthenticationError(f"{peer}: closed or silent during the handshake (another job or secret?)") from error
    return bytes(raw)


def _proof(secret: bytes, role: bytes, client_nonce: bytes, server_nonce: bytes, machine: int) -> bytes:
    return hmac.digest(secret, role + client_nonce + server_nonce + machine.to_bytes(4, "little"), "sha256")


def _job_digest(job: str) -> bytes:
    return hashlib.blake2b(job.encode(), digest_size=16).digest()
