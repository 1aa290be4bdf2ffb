"""Permute memory in place, with at most 4 MiB of staging.

A permute goes block by block. A block larger than the staging buffer is a series of transposes of
grids of cells.
"""

from math import gcd, prod

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.tile_copy import STAGING, permute_blocks, widest

_CHUNK = 512 << 10
"""Bytes of small blocks that are moved at once: they fit a processor's second cache."""
_LARGE_CELL = 8 << 10
"""Cells of at least so many bytes are moved one by one."""


def move_in_place(flat: Tensor, step: LayoutPlan, *, inverse: bool = False) -> None:
    """Reorder memory by a plan of one step; see `permute_in_place`."""
    permute_in_place(flat, step.sizes, step.order, inverse=inverse)
    for index, axis in enumerate(step.axes):
        if axis.reversed:
            halves = flat.view(prod(step.sizes[:index]), axis.size, prod(step.sizes[index + 1 :]))
            _swap(halves[:, 0], halves[:, 1])


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors of shape (count, size), in parts of a staging buffer."""
    if one.numel() and one.nbytes > STAGING:
        dim = 0 if len(one) > 1 else 1
        for a, b in zip(one.tensor_split(2, dim), other.tensor_split(2, dim), strict=True):
            _swap(a, b)
        return
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


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
