"""Host memory that a CUDA device reads and writes by itself, at full speed and without a wait of the host."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

log = logging.getLogger(__name__)

_CLOSE_S = 5.0
_abandoned: list[dict[int, torch.Tensor]] = []


# -- CUDA only: nothing of this runs on the CPU ------------------------------------------------------------------------


class PinnedMemory:
    """Registers memory with CUDA until :meth:`close`. Any thread, though not two at once.

    What is registered stays mapped: if its address were given to other memory, the device would go on with the old.

    Args:
        device: Which device is to see it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: dict[int, torch.Tensor] = {}
        self._refused: set[int] = set()

    def pin(self, memory: torch.Tensor) -> bool:
        """Register memory, unless it is already; takes about a second for 10 GiB that are present.

        Args:
            memory: Host memory in one piece.

        Returns:
            Whether the device sees it. If not, that is logged, and copies still work: the host waits for them.
        """
        address = memory.data_ptr()
        if address in self._registered or address in self._refused:
            return address in self._registered
        status = self._call(lambda: torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
        if status == 0:
            self._registered[address] = memory
            return True
        self._refused.add(address)
        log.warning("cannot pin %d bytes of memory (CUDA error %d); copies will be slower", memory.nbytes, status)
        return False

    def close(self, stream: torch.cuda.Stream) -> None:
        """Let go of it all when a stream is through; idempotent. With a device that hangs or failed it stays mapped."""
        registered, self._registered = self._registered, {}
        if registered and not _is_through(stream):
            _abandoned.append(registered)
            return
        for address in registered:
            self._call(partial(torch.cuda.cudart().cudaHostUnregister, address))

    def _call(self, action: Callable[[], object]) -> int:
        """The status of a call, on a thread of its own: on this one CUDA would tell the next caller of its failure."""
        found: list[int] = []

        def call() -> None:
            torch.cuda.set_device(self._device)
            found.append(int(action()))  # type: ignore[call-overload]

        thread = threading.Thread(target=call, name="gemini-pin")
        thread.start()
        thread.join()
        return found[0] if found else -1


def _is_through(stream: torch.cuda.Stream) -> bool:
    """Whether it is within some seconds."""
    deadline = time.monotonic() + _CLOSE_S
    try:
        while not stream.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
    except RuntimeError as error:  # the device's, from any work before: whoever waits for that work is told
        log.debug("the device failed: %s", error)
        return False
    return True
