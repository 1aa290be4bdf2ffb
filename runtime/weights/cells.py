"""Copy between two views of equal shape in the widest cells that both of them allow.

A cell of 16 bytes is moved as one complex128, which torch copies bit for bit; that is what makes
a permuted copy nearly as fast as a plain one. Views that share no wider cell are copied as they
are, and so are those of different types.
"""

import torch
from torch import Tensor

from fixpass.runtime.weights.tile_copy import turn_cells

STAGING = 4 << 20
"""Bytes of staging that no fold goes beyond."""

WIDE = (torch.complex128, torch.int64, torch.int32, torch.int16)


def copy_cells(out: Tensor, source: Tensor) -> None:
    """`out.copy_(source)`, bit for bit where the types are the same."""
    if out.dtype == source.dtype:
        for dtype in WIDE:
            if dtype.itemsize < out.element_size():
                break
            if _divides(out, dtype) and _divides(source, dtype):
                wide, given = out.view(dtype), source.view(dtype)
                if not turn_cells(wide, given):
                    wide.copy_(given)
                return
        out, source = out.view(raw(out.dtype)), source.view(raw(source.dtype))
    out.copy_(source)


def raw(dtype: torch.dtype) -> torch.dtype:
    """An integer type of the same size, which every operation knows."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        dtype.itemsize, dtype
    )


def widest(nbytes: int, *tensors: Tensor) -> torch.dtype:
    """The widest type whose size divides `nbytes` and the offset of each flat tensor."""
    for dtype in WIDE:
        offsets = (t.storage_offset() * t.element_size() % dtype.itemsize for t in tensors)
        if nbytes % dtype.itemsize == 0 and not any(offsets):
            return dtype
    return torch.uint8


def _divides(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor can be viewed as `dtype`: whole cells in its last dimension."""
    if tensor.dim() == 0 or tensor.stride(-1) != 1:
        return False
    count = dtype.itemsize // tensor.element_size()
    numbers = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(number % count == 0 for number in numbers)
