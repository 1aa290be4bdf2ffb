"""Copy elements from one order to another, bit for bit, in the widest cells that both allow.

A cell of 16 bytes is copied as one complex128. torch copies such cells one by one, at half the
speed of memory, so C++ does it on CPU from 1 MiB on. Without a C++ compiler torch copies.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime import extension
from fixpass.runtime.weights.targets import PLAIN

STAGING = 4 << 20
"""The most bytes of staging that a layout takes."""
CELLS = (torch.complex128, torch.int64, torch.int32, torch.int16)
"""The dtypes of a cell, widest first."""
MIN_BYTES = 1 << 20
"""The C++ copies at least so many bytes: below, torch is as fast."""

_MAX_OUTER = 8
_CELL = 16


def wide_copy(out: Tensor, source: Tensor) -> None:
    """`out.copy_(source)` of equal shapes, bit for bit where the dtypes are the same."""
    if out.dtype == source.dtype:
        for dtype in CELLS:
            if dtype.itemsize < out.element_size():
                break
            if _divides(out, dtype) and _divides(source, dtype):
                wide, given = out.view(dtype), source.view(dtype)
                if not copy_tiles(wide, given):
                    wide.copy_(given)
                return
        out, source = out.view(raw_dtype(out.dtype)), source.view(raw_dtype(source.dtype))
    out.copy_(source)


def raw_dtype(dtype: torch.dtype) -> torch.dtype:
    """An integer dtype of the same size, which every operation supports."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        dtype.itemsize, dtype
    )


def widest(nbytes: int, *tensors: Tensor) -> torch.dtype:
    """The widest dtype whose size divides `nbytes` and the offset in bytes of each flat tensor."""
    for dtype in CELLS:
        offsets = (t.storage_offset() * t.element_size() % dtype.itemsize for t in tensors)
        if nbytes % dtype.itemsize == 0 and not any(offsets):
            return dtype
    return torch.uint8


def copy_tiles(out: Tensor, source: Tensor) -> bool:
    """`out.copy_(source)` of complex128 on CPU, where they differ in the order of two dimensions.

    The two may not overlap. Returns False, and copies nothing, for fewer bytes than MIN_BYTES, for
    other layouts, and without a C++ compiler.
    """
    if out.nbytes < MIN_BYTES or not _is_plain(out) or not _is_plain(source):
        return False
    if out.shape != source.shape or out.requires_grad:
        return False
    plan, library = _TilePlan.of(out, source), _library()
    if plan is None or library is None:
        return False
    parts = plan.parts(torch.get_num_threads())
    _call(library.copy_tiles, [(p.out, p.source, *p.numbers()) for p in parts])
    _count_write(out)
    return True


def permute_blocks(blocks: Tensor, moved: tuple[int, ...], staging: int) -> bool:
    """Permute each of the dense blocks (count, *sizes) in place into its `.permute(moved)`.

    It takes at most `staging` bytes besides. Returns False where `copy_tiles` would.
    """
    if blocks.nbytes < MIN_BYTES or not _is_plain(blocks) or not blocks.is_contiguous():
        return False
    stage = torch.empty_like(blocks[:1])
    permuted = stage.permute(moved)
    plan, library = _TilePlan.of(blocks[:1].view(permuted.shape), permuted), _library()
    if plan is None or library is None:
        return False
    threads = max(1, min(torch.get_num_threads(), staging // stage.nbytes))
    step = -(-len(blocks) // threads)
    parts = [(part, torch.empty_like(stage)) for part in blocks.split(step)]
    calls = [
        (part.data_ptr(), own.data_ptr(), len(part), stage.numel(), *plan.numbers())
        for part, own in parts
    ]
    _call(library.permute_blocks, calls)
    _count_write(blocks)
    return True


def _divides(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor can be viewed as `dtype`: whole cells in its last dimension."""
    if tensor.dim() == 0 or tensor.stride(-1) != 1:
        return False
    count = dtype.itemsize // tensor.element_size()
    numbers = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(number % count == 0 for number in numbers)


def _call(function: Callable[..., None], calls: Sequence[tuple[object, ...]]) -> None:
    if len(calls) == 1:
        function(*calls[0])
        return
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda call: function(*call), calls))


def _count_write(tensor: Tensor) -> None:
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True)
class _TilePlan:
    """A copy as the C++ takes it; sizes and strides are in cells."""

    out: int
    source: int
    """Addresses."""
    rows: int
    """Size of the dimension that lies together in `out`."""
    columns: int
    """Size of the dimension that lies together in `source`."""
    row: int
    """Stride of the rows in `source`."""
    column: int
    """Stride of the columns in `out`."""
    outer: tuple[tuple[int, int, int], ...]
    """Size, stride in `out` and stride in `source` of the other dimensions."""

    @staticmethod
    def of(out: Tensor, source: Tensor) -> "_TilePlan | None":
        triples = list(zip(out.shape, out.stride(), source.stride(), strict=True))
        dims = [triple for triple in triples if triple[0] != 1]
        rows = next((dim for dim in dims if dim[1] == 1), None)
        columns = next((dim for dim in dims if dim[2] == 1), None)
        if rows is None or columns is None or rows is columns or len(dims) > _MAX_OUTER + 2:
            return None
        if any(step == 0 for _, step, _ in dims):
            return None
        outer = tuple(dim for dim in dims if dim is not rows and dim is not columns)
        out_at, source_at = out.data_ptr(), source.data_ptr()
        if not out_at or not source_at or out_at % _CELL:
            return None
        return _TilePlan(out_at, source_at, rows[0], columns[0], rows[2], columns[1], outer)

    def parts(self, count: int) -> list["_TilePlan"]:
        """The copy in about `count` parts: by the longest outer dimension, or by columns."""
        dims = [*self.outer, (self.columns, self.column, 1)]
        index = max(range(len(dims)), key=lambda i: dims[i][0])
        size, out_step, source_step = dims[index]
        step = -(-size // count)
        found = []
        for start in range(0, size, step):
            dims[index] = min(step, size - start), out_step, source_step
            out = self.out + start * out_step * _CELL
            source = self.source + start * source_step * _CELL
            columns, outer = dims[-1][0], tuple(dims[:-1])
            found.append(replace(self, out=out, source=source, columns=columns, outer=outer))
        return found

    def numbers(self) -> tuple[object, ...]:
        """The arguments of the C++ but for the addresses."""
        columns = list(zip(*self.outer, strict=True)) or [(), (), ()]
        outer = [(ctypes.c_int64 * len(self.outer))(*column) for column in columns]
        return self.rows, self.columns, self.row, self.column, len(self.outer), *outer


def _is_plain(tensor: Tensor) -> bool:
    is_known = type(tensor) in PLAIN and tensor.layout is torch.strided
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return is_known and not is_lazy and tensor.is_cpu and tensor.dtype == torch.complex128


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled C++; None where it cannot be built."""
    library = extension.load("tile_copy").library
    if library is None:
        return None
    integer, address = ctypes.c_int64, ctypes.c_void_p
    numbers: list[Any] = [*[integer] * 5, address, address, address]
    library.copy_tiles.argtypes = [address, address, *numbers]
    library.permute_blocks.argtypes = [address, address, integer, integer, *numbers]
    library.copy_tiles.restype = library.permute_blocks.restype = None
    return library
