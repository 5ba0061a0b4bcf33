"""A stand-in for what the data plane asks of the kernel: ``memfd``, ``mmap``, process ids and variables."""

from __future__ import annotations

import itertools
import os as real_os
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

from tests.simulation.scheduler import this_process

_SLACK = 2  # memory cannot move while somebody maps it, so what may grow is reserved at once


class SharedMemory:
    """One anonymous file."""

    __slots__ = ("content", "size")

    def __init__(self) -> None:
        self.content, self.size = bytearray(), 0


_descriptors = itertools.count(1000)
_open: dict[int, SharedMemory] = {}


def forget_all() -> None:
    """The simulation is over."""
    _open.clear()


def duplicate(fd: int) -> int:
    """What happens to a descriptor that is sent to another process."""
    copy = next(_descriptors)
    _open[copy] = _open[fd]
    return copy


def _create(_: str, __: int = 0) -> int:
    fd = next(_descriptors)
    _open[fd] = SharedMemory()
    return fd


def _resize(fd: int, size: int) -> None:
    memory = _open[fd]
    if not memory.content:
        memory.content = bytearray(_SLACK * size)
    assert size <= len(memory.content), "a shard of the simulation outgrew its memory"
    memory.size = max(memory.size, size)


def _status(fd: int) -> SimpleNamespace:
    return SimpleNamespace(st_size=_open[fd].size)


def _map(fd: int, size: int, flags: int = 0) -> memoryview:
    return memoryview(_open[fd].content)[:size]


def _close(fd: int) -> None:
    _open.pop(fd, None)


class _Environment(MutableMapping[str, str]):
    """The variables of the running simulated process."""

    def __getitem__(self, name: str) -> str:
        return this_process().environ[name]

    def __setitem__(self, name: str, value: str) -> None:
        this_process().environ[name] = value

    def __delitem__(self, name: str) -> None:
        del this_process().environ[name]

    def __iter__(self) -> Any:
        return iter(this_process().environ)

    def __len__(self) -> int:
        return len(this_process().environ)


def _replace_link(source: Any, target: Any) -> None:
    links = this_process().machine.links
    links[str(target)] = links.pop(str(source), str(source))


def _link(source: Any, link: Any) -> None:
    this_process().machine.links[str(link)] = str(source)


os = SimpleNamespace(
    MFD_CLOEXEC=1,
    WEXITSTATUS=real_os.WEXITSTATUS,
    WIFSIGNALED=real_os.WIFSIGNALED,
    WTERMSIG=real_os.WTERMSIG,
    close=_close,
    environ=_Environment(),
    fstat=_status,
    ftruncate=_resize,
    getpid=lambda: this_process().pid,
    memfd_create=_create,
    path=real_os.path,
    replace=_replace_link,
    set_inheritable=lambda fd, inheritable: None,
    symlink=_link,
)
mmap = SimpleNamespace(MAP_SHARED=1, mmap=_map)
