"""Read, write and permute weights that have a layout.

A strided part that follows the axes of the plan is a permuted view of the memory: one copy. Any
other part is gathered or scattered by computed positions, 32,768 elements at a time, which is
slower. A permute in place takes at most 4 MiB of staging: it goes block by block, and a block that
is larger is a series of transposes of grids of cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.stored import dense_strides
from fixpass.runtime.weights.tile_copy import STAGING, permute_blocks, raw_dtype, wide_copy, widest

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
        wide_copy(_part_of(memory, parts), _split(values, parts))


def read(memory: Tensor, plan: LayoutPlan, region: Region) -> Tensor:
    """The values of the region of `memory` (flat), as a contiguous tensor of its shape."""
    out = torch.empty(region.shape, dtype=memory.dtype, device=memory.device)
    if 0 in region.shape:
        return out
    if (parts := _along_axes(plan, region)) is None:
        _gather(memory, plan, region, out)
    else:
        wide_copy(_split(out, parts), _part_of(memory, parts))
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
    return _Parts(tuple(dims), offset)


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
    pairs = [pair for dim in parts.dims for pair in dim]
    shape, strides = [size for size, _ in pairs], [stride for _, stride in pairs]
    return memory.as_strided(shape, strides, memory.storage_offset() + parts.offset)


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
        yield piece, _positions(index, plan.sizes, apart)


def _positions(index: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The positions of elements, which row-major `index` counts, of a view of these strides."""
    positions = torch.zeros_like(index)
    for size, step, stride in zip(sizes, dense_strides(sizes), strides, strict=True):
        positions += index // step % size * stride
    return positions


_CHUNK = 512 << 10
"""Bytes of small blocks that are moved at once: they fit a processor's second cache."""
_LARGE_CELL = 8 << 10
"""Cells of at least so many bytes are moved one by one."""


def permute_in_place(
    flat: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], *, inverse: bool = False
) -> None:
    """Reorder memory so that `flat.view(sizes)` becomes its `.permute(order)`.

    Args:
        flat: 1-D and contiguous, and not read meanwhile: see `write_lock`.
        sizes: of the axes before.
        order: the axes as they lie afterwards.
        inverse: undo that permute instead.

    """
    if inverse:
        sizes = tuple(sizes[axis] for axis in order)
        order = tuple(sorted(range(len(order)), key=lambda place: order[place]))
    if flat.numel() == 0 or order == tuple(range(len(order))):
        return
    moved = [place for place, axis in enumerate(order) if place != axis]
    first, last = moved[0], moved[-1] + 1
    batch, cell = prod(sizes[:first]), prod(sizes[last:])
    dtype = widest(cell * flat.element_size(), flat)
    cells, inner = flat.view(torch.uint8).view(dtype), cell * flat.element_size() // dtype.itemsize
    sizes = sizes[first:last]
    order = tuple(axis - first for axis in order[first:last])
    block = cells.numel() // batch
    if block * cells.element_size() <= STAGING:
        _through_staging(cells.view(batch, *sizes, inner), order)
    else:
        _by_transposes(cells, batch, sizes, order, inner)


def _through_staging(blocks: Tensor, order: tuple[int, ...]) -> None:
    """Permute the `sizes` of each block of (batch, *sizes, inner) in place."""
    nbytes = blocks[0].numel() * blocks.element_size()
    group = max(1, min(blocks.shape[0], _CHUNK // nbytes))
    moved = (0, *(axis + 1 for axis in order), blocks.dim() - 1)
    if permute_blocks(blocks, moved, STAGING):
        return
    shape = (group, *(blocks.shape[axis] for axis in moved[1:]))
    staging = torch.empty(shape, dtype=blocks.dtype, device=blocks.device)
    for start in range(0, blocks.shape[0], group):
        part = blocks[start : start + group]
        stage = staging[: part.shape[0]]
        stage.copy_(part.permute(moved))
        part.view(-1).copy_(stage.view(-1))


def _by_transposes(
    cells: Tensor, batch: int, sizes: tuple[int, ...], order: tuple[int, ...], inner: int
) -> None:
    """Bring the axes to their places one after another, each by one transpose."""
    current = list(range(len(sizes)))
    for place, axis in enumerate(order):
        found = current.index(axis)
        if found == place:
            continue
        outer = batch * prod(sizes[a] for a in current[:place])
        rows = prod(sizes[a] for a in current[place:found])
        behind = inner * prod(sizes[a] for a in current[found + 1 :])
        _transpose(cells, outer, rows, sizes[axis], behind)
        current.insert(place, current.pop(found))


def _transpose(cells: Tensor, batch: int, rows: int, columns: int, inner: int) -> None:
    """Transpose each of `batch` grids of (rows, columns) cells of `inner` elements."""
    width = cells.element_size()
    if rows * columns * inner * width <= STAGING:
        _through_staging(cells.view(batch, rows, columns, inner), (1, 0))
        return
    # One row and one column must fit, or the passes would need more than the staging buffer.
    long = max(rows, columns) * _bytes_a_cell(inner, width) > STAGING
    for grid in cells.view(batch, rows * columns, inner):
        if long or inner * width >= _LARGE_CELL:
            _follow_cycles(grid, rows, columns)
        else:
            _rotate_and_shuffle(grid, rows, columns, inner)


def _follow_cycles(grid: Tensor, rows: int, columns: int) -> None:
    """Transpose the grid (rows * columns, inner) by moving whole cells along its cycles."""
    held = torch.empty_like(grid[0])
    done = bytearray(rows * columns)
    for start in range(rows * columns):
        if done[start]:
            continue
        held.copy_(grid[start])
        place = start
        while True:
            done[place] = 1
            source = place % rows * columns + place // rows
            if source == start:
                grid[place].copy_(held)
                break
            grid[place].copy_(grid[source])
            place = source


def _rotate_and_shuffle(grid: Tensor, rows: int, columns: int, inner: int) -> None:
    """Transpose in three passes, each of which permutes within columns or within rows.

    With c = gcd(rows, columns): rotate column j by j // (columns / c); shuffle each row so that no
    two of its elements have the same target column; shuffle each column.
    """
    common = gcd(rows, columns)
    a, b = rows // common, columns // common
    square = grid.view(rows, columns, inner)
    i = torch.arange(rows, device=grid.device)[:, None]
    j = torch.arange(columns, device=grid.device)[None, :]
    per_cell = _bytes_a_cell(inner, grid.element_size())
    wide, high = STAGING // (per_cell * rows), STAGING // (per_cell * columns)
    for start in range(0, columns if common > 1 else 0, wide):
        part = j[:, start : start + wide]
        _permute_along(square[:, start : start + wide], 0, (i + part // b) % rows)
    for start in range(0, rows, high):
        part = i[start : start + high]
        target = ((part + j // b) % rows + j * rows) % columns
        _permute_along(square[start : start + high], 1, target.argsort(1))
    for start in range(0, columns, wide):
        part = j[:, start : start + wide]
        _permute_along(square[:, start : start + wide], 0, (part + i * columns - i // a) % rows)


def _bytes_a_cell(inner: int, width: int) -> int:
    """Bytes that a pass needs per cell: its copy, and its index of 8 bytes in several stages."""
    return inner * width + 48


def _permute_along(part: Tensor, dim: int, index: Tensor) -> None:
    part.copy_(part.gather(dim, index[..., None].expand(part.shape)))
