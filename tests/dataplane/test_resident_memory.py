"""Memory of a slab: there at once in one piece or in many, on old kernels too, and refused in words."""

from __future__ import annotations

import ctypes
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
    made = resident_memory.create("a-test", SIZE)
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


def test_nothing_is_there_until_it_is_mapped(fd: int) -> None:
    assert not any(present(mmap.mmap(fd, SIZE, flags=mmap.MAP_SHARED))), "this kernel cannot tell"


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
    resident_memory.grow(fd, 2 * SIZE)
    mapping = resident_memory.map_whole(fd)
    assert mapping[SIZE - 5 : SIZE + 5] == b"hello" + bytes(5)
    assert all(present(mapping))


def test_a_kernel_without_the_call_makes_room_in_another_way(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_memory, "_madvise", lambda: lambda *_: -1)
    mapping = resident_memory.map_whole(fd)
    assert os.fstat(fd).st_blocks * 512 >= SIZE
    mapping[:5] = b"hello"


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
