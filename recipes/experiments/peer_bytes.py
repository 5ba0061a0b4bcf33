"""Compares a rank's shard with the replica of it that a peer's agent holds, byte by byte."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_gemini.callbacks.job_state import JobState
from lightning_gemini.core.recovery import VersionId
from lightning_gemini.dataplane.slab import Buffer, Slab


class ReplicaDiffersError(Exception):
    """A committed version is not on a peer as its owner wrote it."""


class PeerBytes:
    """The replicas of one rank's shard, seen through the agents' memory. All machines must be on this host.

    Args:
        state: The rank's; collective.
    """

    def __init__(self, state: JobState) -> None:
        agents = state.group.gather(int(state.memory.client.identity["pid"]))
        machine = state.identity.machine
        holders = [holder for holder in state.memory.placement.holders(machine) if holder != machine]
        self._agents = {holder: agents[holder * state.identity.nproc_per_machine] for holder in holders}
        self._rank, self._slab = state.identity.global_rank, state.slab

    def compare(self) -> int | None:
        """Compares the newest committed version, which nobody overwrites before this rank publishes again.

        Returns:
            Its number; ``None`` if there is none yet.

        Raises:
            ReplicaDiffersError: A byte differs, or the version is not there.
        """
        version = self._slab.committed
        own = self._slab.holding(version) if version else None
        if version is None or own is None:
            return None
        for machine, pid in self._agents.items():
            slab = attach(pid, self._rank)
            try:
                self._compare(own, slab.holding(version), machine, version)
            finally:
                slab.close()
        return version.version

    def _compare(self, own: Buffer, replica: Buffer | None, machine: int, version: VersionId) -> None:
        what = f"version {version.version} of rank {self._rank}"
        if replica is None:
            raise ReplicaDiffersError(f"{what} is committed, but machine {machine} does not hold it completely")
        if own.data[: own.data_bytes] != replica.data[: replica.data_bytes]:
            raise ReplicaDiffersError(f"{what}: the bytes on machine {machine} are not those that the rank wrote")


def attach(pid: int, owner: int) -> Slab:
    """Maps the slab of global rank ``owner`` that process ``pid`` holds; needs that process's rights."""
    name = f"/memfd:lightning-gemini-{owner} (deleted)"
    paths = [path for path in Path(f"/proc/{pid}/fd").iterdir() if _target(path) == name]
    found = {path.stat().st_ino: path for path in paths}  # the process may have a buffer open more than once
    if len(found) != 2:
        raise ReplicaDiffersError(f"process {pid} has {len(found)} buffers for the shard of rank {owner}, expected 2")
    first, second = (Buffer(os.open(path, os.O_RDWR | os.O_CLOEXEC)) for path in found.values())
    return Slab(first, second)


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return ""
