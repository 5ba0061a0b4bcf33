"""Sees every collective that DeepSpeed issues, and when it is truly complete.

All communication of DeepSpeed goes through one object, ``deepspeed.comm.comm.cdb``. A tap takes its place. What is sent
with ``torch.distributed`` directly (Lightning's ``sync_dist``, this package's own commit) is not seen.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "inference_all_reduce",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)
"""Methods of DeepSpeed's back end that use the network."""

# NCCL gives the handle of coalesced operations no future, and asking it for one can crash the process.
_WITHOUT_FUTURE = frozenset({"all_gather_coalesced", "all_reduce_coalesced", "batch_isend_irecv"})


class CollectiveListener(Protocol):
    """Is told of every collective. Both methods are quick, and may be called on any thread."""

    def began(self, name: str, size_bytes: int) -> int:
        """A collective is about to be issued, on the calling thread.

        Args:
            name: The back end's method, one of :data:`COLLECTIVES`.
            size_bytes: Bytes of the largest argument: what a gather yields, or what a reduction takes.

        Returns:
            What :meth:`ended` is given.
        """
        ...

    def ended(self, token: int) -> None:
        """It is complete, or has failed; exactly once. For CUDA: complete where the current stream has got to."""
        ...


class CollectiveTap:
    """Reports the collectives of DeepSpeed to a listener, from :meth:`install` to :meth:`remove`.

    A blocking collective ends when the call returns; an asynchronous one when its work completes: then gloo's thread
    reports it. NCCL's future completes at once, and calls back with a stream that waits for the collective. (Waiting
    with a stream of our own, by ``work.wait()``, would tell NCCL that its tensors may be freed: they would be
    overwritten while they are sent.) Point-to-point and coalesced operations without a future end when they return.

    A listener that raises is told nothing more; training never sees it.

    Args:
        listener: Who is told.
    """

    def __init__(self, listener: CollectiveListener) -> None:
        self._listener: CollectiveListener | None = listener
        self._tapped: _TappedBackend | None = None

    def install(self) -> None:
        """Take the place of DeepSpeed's back end, which must be initialised; idempotent.

        Raises:
            RuntimeError: DeepSpeed has no back end yet.
        """
        from deepspeed.comm import comm

        if self._tapped is not None:
            return
        if comm.cdb is None:
            raise RuntimeError(
                "a tap needs DeepSpeed's communication, found none: call deepspeed.init_distributed() first"
            )
        comm.cdb = self._tapped = _TappedBackend(comm.cdb, self)

    def remove(self) -> None:
        """Put the back end back, and fall silent; idempotent."""
        from deepspeed.comm import comm

        tapped, self._tapped, self._listener = self._tapped, None, None
        # Where another tap sits on top of this one, this one stays below it and passes everything on.
        if tapped is not None and comm.cdb is tapped:
            comm.cdb = tapped.tapped_backend

    def reporting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, reported."""

        @functools.wraps(call)
        def reported(*args: Any, **kwargs: Any) -> Any:
            token = self._began(name, args, kwargs)
            if token is None:
                return call(*args, **kwargs)
            try:
                result = call(*args, **kwargs)
            except BaseException:
                self._ended(token)
                raise
            self._follow(name, result, token)
            return result

        return reported

    def _began(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
        listener = self._listener
        if listener is None:
            return None
        try:
            return listener.began(name, _largest_bytes((*args, *kwargs.values())))
        except Exception as error:
            self._fall_silent(error)
            return None

    def _follow(self, name: str, result: Any, token: int) -> None:
        future = None if name in _WITHOUT_FUTURE else _future_of(result)
        if future is None:
            self._ended(token)
        else:
            future.add_done_callback(lambda _: self._ended(token))

    def _ended(self, token: int) -> None:
        listener = self._listener
        if listener is None:
            return
        try:
            listener.ended(token)
        except Exception as error:
            self._fall_silent(error)

    def _fall_silent(self, error: Exception) -> None:
        if self._listener is not None:
            self._listener = None
            log.warning("collectives are no longer observed (%s); training goes on", error, exc_info=error)


class _TappedBackend:
    """Stands in for DeepSpeed's back end."""

    def __init__(self, backend: Any, tap: CollectiveTap) -> None:
        self.tapped_backend = backend
        for name in COLLECTIVES:
            call = getattr(backend, name, None)
            if callable(call):
                setattr(self, name, tap.reporting(name, call))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tapped_backend, name)


def _largest_bytes(values: Iterable[Any]) -> int:
    """Bytes of the largest tensor or list of tensors. It runs before every collective: a loop is quicker than `max`."""
    largest = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            size_bytes = value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            size_bytes = sum(_largest_bytes((part,)) for part in value)
        else:
            continue
        if size_bytes > largest:
            largest = size_bytes
    return largest


def _future_of(work: Any) -> Any:
    if work is None:
        return None
    try:
        return work.get_future()
    except (AttributeError, RuntimeError, ValueError):  # no work, or one that has none
        return None
