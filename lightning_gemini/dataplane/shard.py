"""A rank's state as bytes: tensors raw, and the rest as a small pickled blob that says where they are.

No tensor is pickled. Layout of a shard::

    0    u64 offset and u64 length of the blob
    64   tensors, each aligned to 64 bytes
    ...  blob: the pickled structures, with (index, dtype, shape, offset) in the place of each tensor; a small one on
         the host has its bytes there, in place of the offset

A shard describes itself, so a version can always be read, whatever the model of the process that reads it.
"""

from __future__ import annotations

import ctypes
import functools
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gemini.errors import IntegrityError, RestoreError

ALIGNMENT = 64
SMALL_BYTES = 1 << 12  # host tensors up to this size are read at once: no step has to wait for them
_BLOB_PLACE = struct.Struct("<QQ")
_MAGIC = b"GEMBLOB3"


class TensorSlot(NamedTuple):  # made for every tensor of every version, and a frozen dataclass takes 2 µs
    """Where one tensor lies in the shard.

    Attributes:
        tensor: The tensor to copy; contiguous. It may live on any device.
        offset: Byte offset in the shard.
        nbytes: Its size in bytes.
        live: Whether it is training's own tensor, to be read before the next optimizer step, and not a copy.
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


class Planner:
    """Plans one rank's shards, one after the other; a tensor that is where it was last time costs little."""

    def __init__(self) -> None:
        self._stable: list[_Placed] = []
        self._volatile: list[_Placed] = []

    def draft(self, read_stable: Callable[[], Any], volatile: Any) -> Draft:
        """Take what may change at once; the rest of the work is left to another thread, see :meth:`Draft.finish`.

        Args:
            read_stable: Returns nested state that does not change before the next optimizer step. Of its tensors,
                large ones and those on a device are referenced, not copied. Called by :meth:`Draft.finish`; it raises
                where the state cannot be told any more.
            volatile: Nested state that may change at once; its tensors are copied here, on the calling thread.

        Returns:
            The shard of ``{"stable": read_stable(), "volatile": volatile}`` in the making.
        """
        layout = Layout()
        blob, self._volatile = _pickle(volatile, layout, self._volatile, copy=True)
        return Draft(self, read_stable, blob, layout)

    def place_stable(self, stable: Any, layout: Layout) -> bytes:
        """The second half of it."""
        blob, self._stable = _pickle(stable, layout, self._stable, copy=False)
        return blob


class Draft:
    """A shard whose volatile state is taken; made by :meth:`Planner.draft`, finished once."""

    def __init__(self, planner: Planner, read_stable: Callable[[], Any], volatile: bytes, layout: Layout) -> None:
        self._planner, self._read_stable = planner, read_stable
        self._volatile, self._layout = volatile, layout

    def finish(self) -> Layout:
        """Plan the rest, before the next optimizer step and before the planner's next draft; on any thread."""
        layout = self._layout
        layout.blob = b"".join((_MAGIC, self._planner.place_stable(self._read_stable(), layout), self._volatile))
        return layout


def lay_out(stable: Any, volatile: Any) -> Layout:
    """Plan a single shard, all at once; see :meth:`Planner.draft`."""
    return Planner().draft(lambda: stable, volatile).finish()


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


def pack(value: Any) -> bytes:
    """A value that never changes as bytes, so that it is pickled once a run."""
    return zlib.compress(pickle.dumps(value))


def unpack(packed: bytes) -> Any:
    """The value that :func:`pack` was given; from a shard whose checksums were verified."""
    return pickle.loads(zlib.decompress(packed))  # noqa: S301 - see above


class _Placed(NamedTuple):
    """A tensor as the pickler met it.

    Attributes:
        tensor: The very object; kept, so that its memory is lent to no other tensor.
        key: What it shows, by which the same view of the same memory is known again.
        plain: Whether it can be copied as it lies.
        reduced: What is pickled in its place.
        slot: Where it goes; ``None`` where its bytes are in the blob, and where an equal view went before.
        end: Offset behind its slot.
    """

    tensor: Tensor
    key: tuple[Any, ...]
    plain: bool
    reduced: tuple[Any, tuple[Any, ...]]
    slot: TensorSlot | None
    end: int

    def holds(self, tensor: Tensor, offset: int) -> bool:
        """Whether it is this tensor again, shows what it did, and goes to the same place."""
        _, address, dtype, shape, *_ = self.key
        return (
            tensor is self.tensor
            and self.plain
            and (self.slot is None or self.slot.offset == offset)
            and tensor.data_ptr() == address
            and tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_contiguous()
        )


def _pickle(value: Any, layout: Layout, expected: list[_Placed], *, copy: bool) -> tuple[bytes, list[_Placed]]:
    """Pickles a value, gives its tensors slots in the layout, and returns the bytes and the tensors."""
    stream = io.BytesIO()
    pickler = _TensorPickler(stream, layout, expected, copy)
    pickler.dump(value)
    return stream.getvalue(), pickler.placed


class _TensorPickler(pickle.Pickler):
    """Pickles everything but tensors, which get a slot in the layout.

    Tensors are reduced to where they are: only they and other instances of classes lead out of C, where
    ``persistent_id`` would be asked for every number, too.

    Args:
        stream: Takes the bytes.
        layout: Takes the slots.
        expected: Tensors of the shard before. As long as the same ones come, in this order, they keep their places.
        copy: Whether every tensor is copied.

    Attributes:
        placed: Tensors that came.
    """

    def __init__(self, stream: io.BytesIO, layout: Layout, expected: list[_Placed], copy: bool) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.placed: list[_Placed] = []
        self._layout, self._copies = layout, copy
        self._expected = iter(expected)
        self._as_expected = True
        self._seen: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        placed = self._place_as_before(obj) if self._as_expected else None
        if placed is None:
            placed = self._place(obj)
        self.placed.append(placed)
        return placed.reduced

    def _place_as_before(self, tensor: Tensor) -> _Placed | None:
        placed = next(self._expected, None)
        if placed is None or not placed.holds(tensor, self._layout.blob_offset):
            self._as_expected = False
            self._seen = {known.key: known.reduced for known in self.placed}
            return None
        function, (index, dtype, shape, where) = placed.reduced
        if isinstance(where, bytes):
            return placed._replace(reduced=(function, (index, dtype, shape, _bytes(tensor))))
        if (slot := placed.slot) is not None:
            self._layout.slots.append(slot if slot.live else slot._replace(tensor=_copy(tensor)))
            self._layout.blob_offset = placed.end
        return placed

    def _place(self, tensor: Tensor) -> _Placed:
        layout, nbytes = self._layout, tensor.nbytes
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        # Those without elements have no address to be known by.
        key = (tensor.device, *view, None if nbytes else len(self.placed))
        slot = None
        if (reduced := self._seen.get(key)) is None:
            where: int | bytes = layout.blob_offset
            if nbytes <= SMALL_BYTES and tensor.is_cpu:
                where = _bytes(tensor if plain else _copy(tensor))
            else:
                kept = _copy(tensor) if self._copies else tensor.detach().contiguous()
                slot = TensorSlot(kept, layout.blob_offset, nbytes, live=not self._copies)
                layout.slots.append(slot)
                layout.blob_offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
            reduced = self._seen[key] = _tensor, (len(self._seen), _name(tensor.dtype), tuple(tensor.shape), where)
        return _Placed(tensor, key, plain, reduced, slot, layout.blob_offset)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _bytes(tensor: Tensor) -> bytes:
    """What a tensor on the host holds, if it lies there as it is shown; in a tenth of the time of a clone."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


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

    def _load_tensor(self, index: int, dtype_name: str, shape: tuple[int, ...], where: int | bytes) -> Tensor:
        if index not in self._loaded:
            dtype = getattr(torch, dtype_name)
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            if nbytes := tensor.numel() * tensor.element_size():
                data, offset = (bytearray(where), 0) if isinstance(where, bytes) else (self._data, where)
                source = torch.frombuffer(data, dtype=torch.uint8, count=nbytes, offset=offset)
                tensor.copy_(source.view(dtype).view(tensor.shape))
            self._loaded[index] = tensor
        return self._loaded[index]
