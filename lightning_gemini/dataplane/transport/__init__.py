"""How replicas travel between machines: one interface, one module an implementation."""

from lightning_gemini.dataplane.transport.base import Peer, ReplicaTransport
from lightning_gemini.dataplane.transport.tcp import TcpTransport

__all__ = ["Peer", "ReplicaTransport", "TcpTransport"]
