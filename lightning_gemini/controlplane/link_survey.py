"""What the links to a machine's holders carry, measured by its agent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lightning_gemini.dataplane.link_speed import LinkSpeed
from lightning_gemini.dataplane.transport import Peer, TcpTransport

log = logging.getLogger(__name__)

_PATIENCE_S = 3.0  # peers that are just starting refuse for a moment
_RETRY_S = 0.1


class LinkSurvey:
    """Measures each link once, all that are asked for at the same time: so they will be used.

    Args:
        connect: Makes a transport to a peer.
    """

    def __init__(self, connect: Callable[[Peer], TcpTransport]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._known: dict[Peer, LinkSpeed] = {}

    def measure(self, peers: Sequence[Peer], *, again: bool = False) -> dict[int, LinkSpeed]:
        """Returns the speed of the link to every peer that could be reached, by machine rank.

        Args:
            peers: Whom to measure.
            again: Whether also those that are known already.
        """
        with self._lock:  # the ranks of a machine ask together: one of them measures
            missing = [peer for peer in peers if again or peer not in self._known]
            threads = [threading.Thread(target=self._measure, args=(peer,), name="link-survey") for peer in missing]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return {peer.machine: self._known[peer] for peer in peers if peer in self._known}

    def _measure(self, peer: Peer) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            transport = self._connect(peer)
            try:
                self._known[peer] = transport.measure()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    log.warning("cannot measure the link to machine %d: %s", peer.machine, error)
                    return
            finally:
                transport.close()
            time.sleep(_RETRY_S)
