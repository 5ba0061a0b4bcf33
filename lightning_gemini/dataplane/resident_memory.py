"""Shared memory that is there before anybody uses it, gigabytes within a second or two."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lightning_gemini.dataplane.capacity import require_free
from lightning_gemini.errors import CapacityError

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # linux/mman.h; the second since Linux 5.14
_PART_BYTES = 256 << 20
_THREADS = 8


def create(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """A new ``memfd`` of zeros, closed in processes that this one starts; and its memory, as by :func:`map_whole`.

    Raises:
        CapacityError: The machine has not enough memory.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        return fd, grow(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise


def grow(fd: int, size_bytes: int) -> mmap.mmap:
    """Make it as large as that, and map it; who has mapped it already must do so again.

    Raises:
        CapacityError: The machine has not enough memory; it is as large as before.
    """
    before = os.fstat(fd).st_size
    require_free(size_bytes - before)  # the kernel would kill a process rather than refuse
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        raise _refused(size_bytes, error) from error
    try:
        return map_whole(fd)
    except BaseException:
        os.ftruncate(fd, before)
        raise


def map_whole(fd: int) -> mmap.mmap:
    """Map all of it, every page present; several threads work on a large one.

    Raises:
        CapacityError: The kernel has no memory for it after all.
    """
    size_bytes = os.fstat(fd).st_size
    mapping = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED)
    if _populate(mapping):
        return mapping
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        raise _refused(size_bytes, error) from error
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _populate(mapping: mmap.mmap) -> bool:
    """Whether every page is there; else the kernel is older than that call, or has no more memory."""
    start, size_bytes = ctypes.addressof(ctypes.c_char.from_buffer(mapping)), len(mapping)
    advise = _madvise()
    advise(start, size_bytes, _MADV_HUGEPAGE)  # taken by kernels that have huge pages for shared memory
    parts = [(start + begin, min(_PART_BYTES, size_bytes - begin)) for begin in range(0, size_bytes, _PART_BYTES)]

    def populate(part: tuple[int, int]) -> bool:
        return bool(advise(*part, _MADV_POPULATE_WRITE) == 0)

    if len(parts) == 1:
        return populate(parts[0])
    with ThreadPoolExecutor(min(_THREADS, len(parts), len(os.sched_getaffinity(0)))) as pool:
        return all(pool.map(populate, parts))


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _refused(size_bytes: int, error: OSError) -> CapacityError:
    return CapacityError(
        f"cannot allocate {size_bytes / 2**20:.0f} MiB of shared memory ({error.strerror}); "
        "use fewer replicas, more machines, or machines with more memory"
    )
