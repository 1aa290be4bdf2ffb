"""Read or write part of a weight that has a layout, with values in the checkpoint's order.

A strided part that follows the axes of the plan is a permuted view of the memory: one copy. Any
other part is gathered or scattered by computed positions, 32,768 elements at a time, which is
slower.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.stored import dense_strides
from fixpass.runtime.weights.tile_copy import raw_dtype, wide_copy

_PIECE = 32768
"""Elements. Their positions take 8 bytes each, and several copies of them exist at a time."""


@dataclass(frozen=True)
class Region:
    """A strided part of the logical index; the fields are the arguments of `as_strided`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def of(plan: LayoutPlan) -> "Region":
        """The whole logical tensor, without its padding."""
        return Region(plan.logical, plan.index_strides)


def write(memory: Tensor, plan: LayoutPlan, region: Region, values: Tensor) -> None:
    """Write `values`, which have the region's shape, into `memory` (flat), as `plan` orders it."""
    if 0 in region.shape:
        return
    if (parts := _along_axes(plan, region)) is None:
        _scatter(memory, plan, region, values)
    else:
        wide_copy(_part_of(memory, parts), _in_order(_split(values, parts), parts))


def read(memory: Tensor, plan: LayoutPlan, region: Region) -> Tensor:
    """The values of the region of `memory` (flat), as a contiguous tensor of its shape."""
    out = torch.empty(region.shape, dtype=memory.dtype, device=memory.device)
    if 0 in region.shape:
        return out
    if (parts := _along_axes(plan, region)) is None:
        _gather(memory, plan, region, out)
    else:
        wide_copy(_split(out, parts), _in_order(_part_of(memory, parts), parts))
    return out


@dataclass(frozen=True)
class _Parts:
    """A region as a view of the memory."""

    dims: tuple[tuple[tuple[int, int], ...], ...]
    """For each dimension of the region (size, stride in memory) of the axes that it covers."""
    offset: int


def _along_axes(plan: LayoutPlan, region: Region) -> _Parts | None:
    """The region as a view of the memory, or None where it does not follow the axes of the plan."""
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
    return _Parts(tuple(dims), plan.start + offset)


def _dimension(
    plan: LayoutPlan, digits: list[int], extents: list[int], size: int, stride: int
) -> tuple[tuple[int, int], ...] | None:
    """The axes that one dimension covers, or None; `extents` grows by its last position."""
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
    """A view of the memory; dimensions of negative strides are in reverse order."""
    pairs = [pair for dim in parts.dims for pair in dim]
    shape, strides = [size for size, _ in pairs], [abs(stride) for _, stride in pairs]
    offset = parts.offset + sum((size - 1) * min(stride, 0) for size, stride in pairs)
    return memory.as_strided(shape, strides, memory.storage_offset() + offset)


def _in_order(values: Tensor, parts: _Parts) -> Tensor:
    """The values with the order of the other side of a copy; torch has no negative strides."""
    strides = [stride for dim in parts.dims for _, stride in dim]
    backwards = [dim for dim, stride in enumerate(strides) if stride < 0]
    return values.flip(backwards) if backwards else values


def _split(values: Tensor, parts: _Parts) -> Tensor:
    """A view of the values with each dimension split as that of the region is."""
    return values.view([size for dim in parts.dims for size, _ in dim])


def _scatter(memory: Tensor, plan: LayoutPlan, region: Region, values: Tensor) -> None:
    if values.dtype != memory.dtype:
        values = values.to(memory.dtype)
    kind = raw_dtype(memory.dtype)
    for piece, positions in _pieces(plan, region, memory.device):
        memory.view(kind).index_copy_(0, positions, _take(values.view(kind), piece))


def _gather(memory: Tensor, plan: LayoutPlan, region: Region, out: Tensor) -> None:
    kind = raw_dtype(memory.dtype)
    for piece, positions in _pieces(plan, region, memory.device):
        out.view(-1)[piece].view(kind).copy_(memory.view(kind).index_select(0, positions))


def _take(values: Tensor, piece: slice) -> Tensor:
    """Elements `piece` of the values in row-major order, without a copy of all of them."""
    if values.is_contiguous():
        return values.view(-1)[piece]
    index = torch.arange(piece.start, piece.stop, device=values.device)
    return values[torch.unravel_index(index, values.shape)]


def _pieces(
    plan: LayoutPlan, region: Region, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the region's elements in row-major order, and their positions in memory."""
    total = prod(region.shape)
    apart = [axis.apart for axis in plan.axes]
    for start in range(0, total, _PIECE):
        piece = slice(start, min(total, start + _PIECE))
        index = torch.arange(piece.start, piece.stop, device=device)
        index = _positions(index, region.shape, region.strides) + region.offset
        yield piece, _positions(index, plan.sizes, apart) + plan.start


def _positions(index: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The positions of elements, which row-major `index` counts, of a view of these strides."""
    positions = torch.zeros_like(index)
    for size, step, stride in zip(sizes, dense_strides(sizes), strides, strict=True):
        positions += index // step % size * stride
    return positions
