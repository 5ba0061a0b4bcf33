"""How much host memory the buffers may take."""

from __future__ import annotations

from pathlib import Path

from lightning_gemini.config import MEMORY_FLOOR_BYTES
from lightning_gemini.errors import CapacityError

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Memory that can still be taken on this machine: what the kernel calls available, capped by the cgroup's limit."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        text = (cgroup / "memory.max").read_text().strip()
        limit = None if text == "max" else int(text)
        used = int((cgroup / "memory.current").read_text()) - _reclaimable_bytes(cgroup)
    except (OSError, ValueError):
        return available
    return available if limit is None else min(available, max(0, limit - used))


def _reclaimable_bytes(cgroup: Path) -> int:
    """Cached files count as used, but the kernel drops them when memory is wanted."""
    pairs = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))


def require_free(more_bytes: int) -> None:
    """Check that ``more_bytes`` of shared memory can be taken now.

    Raises:
        CapacityError: They cannot; the message has the sizes.
    """
    available = available_bytes()
    if more_bytes + MEMORY_FLOOR_BYTES > available:
        mib = 2**20
        raise CapacityError(
            f"cannot allocate {more_bytes / mib:.0f} MiB of shared memory: {available / mib:.0f} MiB available "
            f"({MEMORY_FLOOR_BYTES / mib:.0f} MiB stay free); "
            "use fewer replicas, more machines, or machines with more memory"
        )


def require_memory(shard_bytes: int, replicas: int, nproc_per_machine: int, *, already_bytes: int = 0) -> None:
    """Check that 2 buffers x ``replicas`` x the shards of one machine fit (GEMINI, SOSP '23, section 4).

    Args:
        shard_bytes: Bytes of one rank's shard.
        replicas: Copies of every shard, the owner's included.
        nproc_per_machine: Ranks on a machine.
        already_bytes: What this agent has allocated before.

    Raises:
        CapacityError: It does not fit; the message has the sizes.
    """
    needed = 2 * replicas * shard_bytes * nproc_per_machine - already_bytes
    available = available_bytes()
    if needed + MEMORY_FLOOR_BYTES > available:
        mib = 2**20
        total_mib = 2 * replicas * shard_bytes * nproc_per_machine / mib
        raise CapacityError(
            f"not enough memory for checkpoints: 2 buffers x {replicas} replicas x {nproc_per_machine} ranks x "
            f"{shard_bytes / mib:.0f} MiB = {total_mib:.0f} MiB per machine, "
            f"{available / mib:.0f} MiB available ({MEMORY_FLOOR_BYTES / mib:.0f} MiB stay free); "
            "use fewer replicas, more machines, or machines with more memory"
        )
