"""Undoes an engine's rearrangement of a parameter, which is found by comparing bytes.

Known are views of the same storage, permuted dimensions, aiter's shuffle of 16 rows, and scales of
which only the largest was kept. For any other change the answer is None: the values before it are
lost. No tensor is changed here.
"""

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from fixpass.runtime.weights.layout_plan import resolve
from fixpass.runtime.weights.layouts import named
from fixpass.runtime.weights.region import Region, read

Undo = Callable[[Tensor], Tensor]
"""From the processed tensor to one of the checkpoint's shape and dtype."""

BAND, BLOCK = 16, 32
# Weights have two or three dimensions; more would be a long search.
MOST_DIMS = 3
PIECE_BYTES = 32 << 20


def undo_of(before: Tensor, after: Tensor) -> Undo | None:
    """A function from `after` to `before`; None where no known rearrangement does it."""
    found = (find(before, after) for find in (_view, _permuted, _shuffled, _largest))
    return next((undo for undo in found if undo is not None), None)


def _view(before: Tensor, after: Tensor) -> Undo | None:
    """The same elements of the same storage under other dimensions."""
    same = before.data_ptr() == after.data_ptr() and before.dtype == after.dtype
    if not same or not (_steps(before) == _steps(after) or _are_contiguous(before, after)):
        return None
    shape, stride, offset = before.shape, before.stride(), before.storage_offset()
    return lambda x: x.as_strided(shape, stride, offset)


def _steps(x: Tensor) -> list[tuple[int, int]]:
    dims = zip(x.shape, x.stride(), strict=True)
    return sorted((size, stride) for size, stride in dims if size != 1)


def _are_contiguous(before: Tensor, after: Tensor) -> bool:
    return before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel()


def _permuted(before: Tensor, after: Tensor) -> Undo | None:
    if before.dim() != after.dim() or before.dim() > MOST_DIMS:
        return None
    for order in permutations(range(before.dim())):
        if same_bytes(before.permute(order), after):
            inverse = [order.index(dim) for dim in range(before.dim())]
            return lambda x, inverse=inverse: x.permute(inverse)  # type: ignore[misc]
    return None


def _shuffled(before: Tensor, after: Tensor) -> Undo | None:
    fits = 2 <= before.dim() <= MOST_DIMS and before.shape == after.shape
    if not fits or before.shape[-2] % BAND or before.shape[-1] % BLOCK:
        return None
    # Bands do not reach over experts, so all rows are one long column of bands.
    rows, shuffled = (x.reshape(-1, x.shape[-1]) for x in (before, after))
    return unshuffled if _same_pieces(rows, shuffled, unshuffled) else None


def unshuffled(x: Tensor) -> Tensor:
    """Rows of `x` (..., rows, columns) as they were before aiter's shuffle of 16 x 16."""
    plan = resolve(named("aiter_16x16"), tuple(x.shape), x.element_size())
    return read(x.reshape(-1), plan, Region.of(plan))


def _largest(before: Tensor, after: Tensor) -> Undo | None:
    """Undo the merge of all scales into the largest; unset scales stay unset."""
    if after.numel() != 1 or not before.dtype.is_floating_point or before.element_size() < 2:
        return None
    if not before.numel() or before.dtype != after.dtype or before.max() != after.reshape(()):
        return None
    shape, unset = before.shape, before == torch.finfo(before.dtype).min

    def undo(x: Tensor) -> Tensor:
        scales = x.reshape(()).expand(shape).clone()
        scales[unset] = torch.finfo(x.dtype).min
        return scales

    return undo


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bytes; a NaN equals itself."""
    return _same_pieces(left, right, lambda piece: piece)


def _same_pieces(left: Tensor, right: Tensor, undo: Undo) -> bool:
    """Whether `undo` turns `right` into `left`, byte for byte.

    Rows are compared piece by piece, so that no copy of a whole weight is made.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.numel():
        return True
    if not left.dim():
        left, right = left.reshape(1), right.reshape(1)
    row_bytes = left.nbytes // len(left)
    step = max(PIECE_BYTES // row_bytes // BAND, 1) * BAND
    for start in range(0, len(left), step):
        mine, theirs = left[start : start + step], undo(right[start : start + step])
        if not torch.equal(as_bytes(mine.contiguous()), as_bytes(theirs.contiguous())):
            return False
    return True


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return x.reshape(-1).view(torch.uint8)
