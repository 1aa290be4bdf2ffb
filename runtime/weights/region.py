"""Read and write any strided part of the logical view of a folded weight.

A part that lies along the axes of the plan is one permuted view of the memory, and one copy. Any
other is moved by computed places, in pieces of a few thousand elements: slower, and as right. What
a loader does between narrowing and copying is its own affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import Plan, dense
from fixpass.runtime.weights.tile_copy import raw_dtype, wide_copy

_PIECE = 32768  # elements; their places take 8 bytes each, some times over


@dataclass(frozen=True)
class Region:
    """A strided part of the logical index: what as_strided takes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def of(plan: Plan) -> "Region":
        """The whole logical tensor, without its padding."""
        return Region(plan.logical, plan.steps)


def write(memory: Tensor, plan: Plan, region: Region, values: Tensor) -> None:
    """Write `values`, which have the region's shape, into the folded memory (flat)."""
    if 0 in region.shape:
        return
    parts = _along_axes(plan, region)
    if parts is None:
        _write_by_place(memory, plan, region, values)
        return
    wide_copy(_part_of(memory, parts), _split(values, parts))


def read(memory: Tensor, plan: Plan, region: Region) -> Tensor:
    """A dense tensor of the region's shape with its values."""
    out = torch.empty(region.shape, dtype=memory.dtype, device=memory.device)
    if 0 in region.shape:
        return out
    parts = _along_axes(plan, region)
    if parts is None:
        _read_by_place(memory, plan, region, out)
    else:
        wide_copy(_split(out, parts), _part_of(memory, parts))
    return out


@dataclass(frozen=True)
class _Parts:
    """For each dimension of a region the (size, stride in memory) it falls into; the offset."""

    dims: tuple[tuple[tuple[int, int], ...], ...]
    offset: int


def _along_axes(plan: Plan, region: Region) -> _Parts | None:
    digits = [region.offset // axis.step % axis.size for axis in plan.axes]
    extents = list(digits)
    dims = []
    for size, stride in zip(region.shape, region.strides, strict=True):
        found = _dimension(plan, digits, extents, size, stride)
        if found is None:
            return None
        dims.append(found)
    if any(extent >= axis.size for extent, axis in zip(extents, plan.axes, strict=True)):
        return None
    offset = sum(d * axis.apart for d, axis in zip(digits, plan.axes, strict=True))
    return _Parts(tuple(dims), offset)


def _dimension(
    plan: Plan, digits: list[int], extents: list[int], size: int, stride: int
) -> tuple[tuple[int, int], ...] | None:
    """How one dimension falls into axes, or None; `extents` grows by what it covers."""
    if size == 1 or stride == 0:
        return ((size, 0),)
    parts: list[tuple[int, int]] = []
    for index in reversed(range(len(plan.axes))):
        axis = plan.axes[index]
        if not axis.step <= stride < axis.step * axis.size:
            continue
        if stride % axis.step:
            return None
        times = stride // axis.step
        if digits[index] + (size - 1) * times < axis.size:
            extents[index] += (size - 1) * times
            return ((size, times * axis.apart), *parts)
        if times != 1 or digits[index] or size % axis.size:
            return None
        extents[index] += axis.size - 1
        parts.insert(0, (axis.size, axis.apart))
        size //= axis.size
        stride = axis.step * axis.size
    return None


def _part_of(memory: Tensor, parts: _Parts) -> Tensor:
    pairs = [pair for dim in parts.dims for pair in dim]
    shape, strides = [size for size, _ in pairs], [stride for _, stride in pairs]
    return memory.as_strided(shape, strides, memory.storage_offset() + parts.offset)


def _split(values: Tensor, parts: _Parts) -> Tensor:
    """The values with each dimension split as the region's is: always a view."""
    return values.view([size for dim in parts.dims for size, _ in dim])


def _write_by_place(memory: Tensor, plan: Plan, region: Region, values: Tensor) -> None:
    if values.dtype != memory.dtype:
        values = values.to(memory.dtype)
    kind = raw_dtype(memory.dtype)
    for piece, places in _pieces(plan, region, memory.device):
        memory.view(kind).index_copy_(0, places, _take(values, piece).view(kind))


def _read_by_place(memory: Tensor, plan: Plan, region: Region, out: Tensor) -> None:
    kind = raw_dtype(memory.dtype)
    for piece, places in _pieces(plan, region, memory.device):
        out.view(-1)[piece].view(kind).copy_(memory.view(kind).index_select(0, places))


def _take(values: Tensor, piece: slice) -> Tensor:
    """Elements of the values in their order, without a copy of all of them."""
    if values.is_contiguous():
        return values.view(-1)[piece]
    index = torch.arange(piece.start, piece.stop)
    return values.as_strided(
        (_span(values.shape, values.stride()),), (1,), values.storage_offset()
    ).index_select(0, _places(index, values.shape, values.stride()))


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _pieces(plan: Plan, region: Region, device: torch.device):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Slices of the region's elements in order, and where in memory each of them lies."""
    total = 1
    for size in region.shape:
        total *= size
    sizes = [axis.size for axis in plan.axes]
    apart = [axis.apart for axis in plan.axes]
    for start in range(0, total, _PIECE):
        piece = slice(start, min(total, start + _PIECE))
        index = torch.arange(piece.start, piece.stop, device=device)
        index = _places(index, region.shape, region.strides) + region.offset
        yield piece, _places(index, sizes, apart)


def _places(index: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Sum of digit times stride, the digits of the index taken by `sizes`, outermost first."""
    places = torch.zeros_like(index)
    for size, step, stride in zip(sizes, dense(sizes), strides, strict=True):
        places += index // step % size * stride
    return places
