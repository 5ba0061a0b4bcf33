"""A rank's state as bytes: tensors raw, the rest as a small pickled blob, and a table that ties them together.

No tensor is pickled. Layout of a shard::

    0    u64 offset and u64 length of the blob
    64   tensors, each aligned to 64 bytes
    ...  blob: u64 length of the table, the table (JSON: dtype, shape, offset), the pickled structure

A shard describes itself, so a version can always be read, whatever the model of the process that reads it.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gemini.errors import IntegrityError, RestoreError

ALIGNMENT = 64
SMALL_BYTES = 1 << 16  # host tensors up to this size are cloned at once: cheaper than making a step wait for them
_BLOB_PLACE = struct.Struct("<QQ")
_TABLE_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies in the shard.

    Attributes:
        tensor: The tensor to copy; contiguous. It may live on any device.
        offset: Byte offset in the shard.
        nbytes: Its size in bytes.
        live: Whether it is training's own tensor, to be read before the next optimizer step, and not a clone.
    """

    tensor: Tensor
    offset: int
    nbytes: int
    live: bool = True


@dataclass(slots=True)
class Layout:
    """A shard that is ready to be copied: the tensors' places, and the blob with everything else.

    Attributes:
        slots: Tensors in the order of their offsets.
        blob: Table and pickled structure.
        blob_offset: Byte offset of the blob, behind the last tensor.
    """

    slots: list[TensorSlot] = field(default_factory=list)
    blob: bytes = b""
    blob_offset: int = ALIGNMENT

    @property
    def total_bytes(self) -> int:
        """Size of the whole shard."""
        return self.blob_offset + len(self.blob)

    def head(self) -> bytes:
        """The first bytes of the shard, which say where the blob is."""
        return _BLOB_PLACE.pack(self.blob_offset, len(self.blob))


def lay_out(stable: Any, volatile: Any) -> Layout:
    """Plan a shard.

    Args:
        stable: Nested state whose tensors do not change before the next optimizer step; large ones, and those on a
            device, are referenced, not copied.
        volatile: Nested state that may change at once; its tensors are cloned here, on the calling thread.

    Returns:
        The layout of ``{"stable": stable, "volatile": volatile}``.
    """
    layout = Layout()
    table: list[tuple[str, list[int], int]] = []
    stream = io.BytesIO()
    pickler = _TensorPickler(stream, layout, table)
    pickler.dump(stable)
    pickler.clone = True
    pickler.clear_memo()
    pickler.dump(volatile)
    encoded_table = json.dumps(table).encode()
    layout.blob = _TABLE_LENGTH.pack(len(encoded_table)) + encoded_table + stream.getvalue()
    return layout


def read(data: memoryview, device: torch.device | None = None) -> tuple[Any, Any]:
    """Decode a shard whose checksums were verified; tensors are copies, nothing refers to ``data`` afterwards.

    Args:
        data: The shard's bytes.
        device: Where tensors go; the CPU by default.

    Returns:
        The ``stable`` and ``volatile`` state that :func:`lay_out` was given.

    Raises:
        IntegrityError: The bytes are no shard.
        RestoreError: The structure cannot be unpickled: the script lacks a class that it had.
    """
    try:
        offset, length = _BLOB_PLACE.unpack_from(data)
        blob = data[offset : offset + length]
        (table_length,) = _TABLE_LENGTH.unpack_from(blob)
        table = json.loads(bytes(blob[_TABLE_LENGTH.size : _TABLE_LENGTH.size + table_length]))
    except (struct.error, ValueError) as error:
        raise IntegrityError("the stored bytes are no shard of this package") from error
    stream = io.BytesIO(blob[_TABLE_LENGTH.size + table_length :])
    unpickler = _TensorUnpickler(stream, data, table, device)
    try:
        return unpickler.load(), _TensorUnpickler(stream, data, table, device).load()
    except Exception as error:  # unpickling runs the classes' own code
        raise RestoreError(
            f"the stored state cannot be read by this script ({type(error).__name__}: {error}): start the script that "
            "wrote it, or run 'lightning-gemini stop --agents' to discard what memory holds"
        ) from error


def pack(value: Any) -> Tensor:
    """A value that never changes as a small tensor of bytes, so that it is pickled once a run."""
    return torch.frombuffer(bytearray(zlib.compress(pickle.dumps(value))), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """The value that :func:`pack` was given; from a shard whose checksums were verified."""
    return pickle.loads(zlib.decompress(packed.cpu().numpy().tobytes()))  # noqa: S301 - see above


class _TensorPickler(pickle.Pickler):
    """Pickles everything but tensors, which get a slot in the layout."""

    def __init__(self, stream: io.BytesIO, layout: Layout, table: list[tuple[str, list[int], int]]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.clone = False
        self._layout, self._table = layout, table
        # The tensors are kept too: memory that was freed meanwhile would lend its address to another tensor.
        self._seen: dict[tuple[Any, ...], tuple[int, Tensor]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        tensor = obj.detach()
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, self.clone, *view)
        if tensor.numel() and key in self._seen:
            return self._seen[key][0]
        index = len(self._table)
        self._seen[key] = index, tensor
        nbytes = tensor.numel() * tensor.element_size()
        clone = self.clone or (not tensor.is_cuda and nbytes <= SMALL_BYTES)
        kept = tensor.clone(memory_format=torch.contiguous_format) if clone else tensor.contiguous()
        offset = self._layout.blob_offset
        self._table.append((str(kept.dtype).removeprefix("torch."), list(kept.shape), offset))
        if nbytes:
            self._layout.slots.append(TensorSlot(kept, offset, nbytes, live=not clone))
        self._layout.blob_offset = offset + -(-nbytes // ALIGNMENT) * ALIGNMENT
        return index


class _TensorUnpickler(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, data: memoryview, table: list[tuple[str, list[int], int]], device: torch.device | None
    ) -> None:
        super().__init__(stream)
        self._data, self._table, self._device = data, table, device
        self._loaded: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        if pid not in self._loaded:
            name, shape, offset = self._table[pid]
            dtype = getattr(torch, name)
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            if nbytes := tensor.numel() * tensor.element_size():
                source = torch.frombuffer(self._data, dtype=torch.uint8, count=nbytes, offset=offset)
                tensor.copy_(source.view(dtype).view(tensor.shape))
            self._loaded[pid] = tensor
        return self._loaded[pid]
