"""A rank's state as bytes: tensors raw, and the rest as a small pickled blob that says where they are.

No tensor is pickled. Layout of a shard::

    0    u64 offset and u64 length of the blob
    64   tensors, each aligned to 64 bytes
    ...  blob: the pickled structures, with (index, dtype, shape, offset) in the place of each tensor

A shard describes itself, so a version can always be read, whatever the model of the process that reads it.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_gemini.errors import IntegrityError, RestoreError

ALIGNMENT = 64
SMALL_BYTES = 1 << 12  # host tensors up to this size are cloned at once: no step has to wait for them
_BLOB_PLACE = struct.Struct("<QQ")
_MAGIC = b"GEMBLOB2"
_Place: TypeAlias = tuple[int, str, tuple[int, ...], int]


class TensorSlot(NamedTuple):  # made for every tensor of every version, and a frozen dataclass takes 2 µs
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
        blob: The pickled structures.
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
    layout, stream = Layout(), io.BytesIO()
    stream.write(_MAGIC)
    pickler = _TensorPickler(stream, layout)
    pickler.dump(stable)
    pickler.clone = True
    pickler.clear_memo()
    pickler.dump(volatile)
    layout.blob = stream.getvalue()
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
    except struct.error as error:
        raise IntegrityError("the stored bytes are no shard of this package") from error
    if blob[: len(_MAGIC)] != _MAGIC:
        raise IntegrityError("the stored bytes are no shard of this version of the package")
    stream = io.BytesIO(blob[len(_MAGIC) :])
    try:
        return _TensorUnpickler(stream, data, device).load(), _TensorUnpickler(stream, data, device).load()
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
    """Pickles everything but tensors, which get a slot in the layout.

    Tensors are reduced to where they are: only they and other instances of classes lead out of C, where
    ``persistent_id`` would be asked for every number, too.
    """

    def __init__(self, stream: io.BytesIO, layout: Layout) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.clone = False
        self._layout = layout
        # The tensors are kept too: memory that was freed meanwhile would lend its address to another tensor.
        self._seen: dict[tuple[Any, ...], tuple[_Place, Tensor]] = {}

    def reducer_override(self, obj: Any) -> Any:
        return (_tensor, self._place(obj.detach())) if isinstance(obj, Tensor) else NotImplemented

    def _place(self, tensor: Tensor) -> _Place:
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, self.clone, *view)
        if key in self._seen:
            return self._seen[key][0]
        layout, nbytes = self._layout, tensor.nbytes
        clone = self.clone or (nbytes <= SMALL_BYTES and not tensor.is_cuda)
        kept = tensor.clone(memory_format=torch.contiguous_format) if clone else tensor.contiguous()
        offset = layout.blob_offset
        place = len(self._seen), _name(kept.dtype), tuple(kept.shape), offset
        # Those without elements have no address to be known by.
        self._seen[key if nbytes else (place,)] = place, tensor
        if nbytes:
            layout.slots.append(TensorSlot(kept, offset, nbytes, live=not clone))
            layout.blob_offset = offset + -(-nbytes // ALIGNMENT) * ALIGNMENT
        return place


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(*place: Any) -> Tensor:
    """Stands in the pickled structure for a tensor; the unpickler has its own in this place."""
    raise RestoreError(
        f"tensor {place} of a shard was read without the shard: use lightning_gemini.dataplane.shard.read"
    )


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, data: memoryview, device: torch.device | None) -> None:
        super().__init__(stream)
        self._data, self._device = data, device
        self._loaded: dict[int, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_tensor.__module__, _tensor.__name__):
            return self._load_tensor
        return super().find_class(module, name)

    def _load_tensor(self, index: int, dtype_name: str, shape: tuple[int, ...], offset: int) -> Tensor:
        if index not in self._loaded:
            dtype = getattr(torch, dtype_name)
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            if nbytes := tensor.numel() * tensor.element_size():
                source = torch.frombuffer(self._data, dtype=torch.uint8, count=nbytes, offset=offset)
                tensor.copy_(source.view(dtype).view(tensor.shape))
            self._loaded[index] = tensor
        return self._loaded[index]
