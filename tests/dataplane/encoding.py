"""A shard's bytes without a slab: what the snapshot does, in the simplest way."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gemini.dataplane import shard
from lightning_gemini.dataplane.shard import Layout


def encode(layout: Layout) -> bytearray:
    data = bytearray(layout.total_bytes)
    head = layout.head()
    data[: len(head)] = head
    whole = torch.frombuffer(data, dtype=torch.uint8)
    for slot in layout.slots:
        place = whole[slot.offset : slot.offset + slot.nbytes].view(slot.tensor.dtype)
        place.copy_(slot.tensor.reshape(-1))
    data[layout.blob_offset :] = layout.blob
    return data


def round_trip(stable: Any, volatile: Any = None) -> tuple[Any, Any]:
    return shard.read(memoryview(encode(shard.lay_out(stable, volatile))))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.numel():
        return True
    first, second = (
        tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        for tensor in (one, other)
    )
    return torch.equal(first, second)


def same(one: Any, other: Any) -> bool:
    """Equality of nested structures, bit by bit where tensors are."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same_bits(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(first, second) for first, second in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)
