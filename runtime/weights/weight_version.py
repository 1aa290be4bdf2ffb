"""Whether a weight is still what it was when something was derived from it: half a microsecond.

Seen are another object in its place, a write that torch counts, and other memory. On CPU a few
words spread over the weight are compared as well: a write through `.data` or numpy, which torch
does not count, changes them unless it is small. Nothing is held of a weight, not even a weak
reference, with which `swap_tensors` would refuse it: an object that was destroyed is told from one
made at its address over its memory by the count of writes and by those words alone.
"""

import ctypes

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

WORDS = 16
"""How many words of 8 bytes are compared."""


class Source:
    """One weight as it was. `is_same(tensor)` is asked at every call."""

    __slots__ = ("_cdata", "_impl", "_pointer", "_sampled", "_storage", "_version", "_words")

    def __init__(self, tensor: Tensor) -> None:
        self._impl = tensor._cdata
        self._version = tensor._version
        self._pointer = tensor.data_ptr()
        # While it is held, even weakly, no other storage has this one's own address: memory that
        # was freed and taken again at the same place is told apart.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._cdata = tensor.untyped_storage()._cdata
        self._words = _words_of(tensor)
        self._sampled = b"" if self._words is None else self._words.tobytes()

    def is_same(self, tensor: Tensor) -> bool:
        """Whether `tensor` is that weight and nothing was seen to change it."""
        return (
            tensor._cdata == self._impl
            and tensor._version == self._version
            and tensor.data_ptr() == self._pointer
            and tensor.untyped_storage()._cdata == self._cdata
            # Last: the words lie in this memory.
            and (self._words is None or self._words.tobytes() == self._sampled)
        )

    def has_memory_of(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self._pointer and tensor.untyped_storage()._cdata == self._cdata

    @property
    def is_gone(self) -> bool:
        """Whether the memory was freed."""
        return bool(self._storage.expired())


def can_be_watched(tensor: object) -> bool:
    """Whether changes of a tensor can be seen at all."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
        return False
    return tensor.layout == torch.strided and not tensor.is_inference()


def _words_of(tensor: Tensor) -> "memoryview[int] | None":
    """Words spread over the memory of a tensor on CPU, as a view that reads them anew each time."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = (1 + sum((size - 1) * step for size, step in pairs)) * tensor.element_size()
    skipped = -tensor.data_ptr() % 8
    count = (span - skipped) // 8
    if count < 1:
        return None
    block = (ctypes.c_char * (count * 8)).from_address(tensor.data_ptr() + skipped)
    # An odd step: an even one would look into the same few columns of every row.
    return memoryview(block).cast("B").cast("q")[:: count // WORDS | 1]
