"""What the links to a machine's holders carry, measured by its agent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lightning_gemini.dataplane.link_speed import Quantity
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
        self._known: dict[tuple[Peer, Quantity], float] = {}

    def measure(self, peers: Sequence[Peer], quantity: Quantity, *, again: bool = False) -> dict[int, float]:
        """Returns a quantity of the link to every peer that could be reached, by machine rank.

        Args:
            peers: Whom to measure.
            quantity: What of it.
            again: Whether also those that are known already.
        """
        with self._lock:  # the ranks of a machine ask together: one of them measures
            missing = [(peer, quantity) for peer in peers if again or (peer, quantity) not in self._known]
            threads = [threading.Thread(target=self._measure, args=link, name="link-survey") for link in missing]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            known = [(peer.machine, self._known.get((peer, quantity))) for peer in peers]
            return {machine: found for machine, found in known if found is not None}

    def _measure(self, peer: Peer, quantity: Quantity) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            transport = self._connect(peer)
            try:
                self._known[peer, quantity] = transport.measure(quantity)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    log.warning("cannot measure the link to machine %d: %s", peer.machine, error)
                    return
            finally:
                transport.close()
            time.sleep(_RETRY_S)
