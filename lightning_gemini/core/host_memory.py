"""Host memory that checkpoints need (GEMINI, SOSP '23, section 4)."""

from __future__ import annotations

__all__ = ["BYTES_PER_PARAMETER", "host_memory_bytes"]

BYTES_PER_PARAMETER = 12
"""Adam in mixed precision: fp32 master weight, first and second moment."""


def host_memory_bytes(checkpoint_bytes: int, machines: int, replicas: int) -> int:
    """Returns the bytes that every machine needs: 2 buffers x ``replicas`` x the checkpoint bytes of one machine.

    Args:
        checkpoint_bytes: Checkpoint of the whole job, which is spread evenly.
        machines: Machines of the job.
        replicas: Copies of every shard, the owner's included.
    """
    return 2 * replicas * -(-checkpoint_bytes // machines)
