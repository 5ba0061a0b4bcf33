"""Memory of a slab: there at once in one piece or in many, on old kernels too, and refused in words."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterator

import pytest

from lightning_gemini.dataplane import resident_memory
from lightning_gemini.errors import CapacityError

PAGE = mmap.PAGESIZE
SIZE = 37 * PAGE + 5


@pytest.fixture
def fd() -> Iterator[int]:
    made, mapping = resident_memory.create("a-test", SIZE)
    assert all(present(mapping))
    yield made
    os.close(made)


def present(mapping: mmap.mmap) -> list[bool]:
    """For every page, whether using it faults no more."""
    pages = -(-len(mapping) // PAGE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert libc.mincore(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), len(mapping), found) == 0
    return [bool(page & 1) for page in found]


def test_what_nobody_has_used_is_not_there() -> None:
    fd = os.memfd_create("a-test")
    os.ftruncate(fd, SIZE)
    assert not any(present(mmap.mmap(fd, SIZE, flags=mmap.MAP_SHARED))), "this kernel cannot tell what is there"
    os.close(fd)


@pytest.mark.parametrize("part_bytes", [PAGE, 5 * PAGE, 64 * PAGE])
def test_every_page_is_there_once_it_is_mapped(fd: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_memory, "_PART_BYTES", part_bytes)
    mapping = resident_memory.map_whole(fd)
    assert len(mapping) == SIZE
    assert all(present(mapping))
    mapping[:5] = b"hello"
    assert resident_memory.map_whole(fd)[:5] == b"hello"


def test_what_grew_keeps_its_bytes(fd: int) -> None:
    resident_memory.map_whole(fd)[-5:] = b"hello"
    mapping = resident_memory.grow(fd, 2 * SIZE)
    assert mapping[SIZE - 5 : SIZE + 5] == b"hello" + bytes(5)
    assert all(present(mapping))


def test_a_kernel_without_the_call_makes_room_in_another_way(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_memory, "_madvise", lambda: lambda *_: -1)
    mapping = resident_memory.grow(fd, 2 * SIZE)
    assert all(present(mapping))
    mapping[:5] = b"hello"


def test_memory_that_could_not_grow_is_as_large_as_before(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(resident_memory, "_madvise", lambda: lambda *_: -1)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError, match="Cannot allocate memory"):
        resident_memory.grow(fd, 2 * SIZE)
    assert os.fstat(fd).st_size == SIZE, "the next attempt looks again at what is free"


def test_a_limit_of_the_kernel_is_said(fd: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SIZE, hard))
    try:
        with pytest.raises(CapacityError, match=r"cannot allocate 0 MiB of shared memory \(File too large\)"):
            resident_memory.grow(fd, 3 * SIZE)
        with pytest.raises(CapacityError, match="use fewer replicas"):
            resident_memory.create("another", 3 * SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
