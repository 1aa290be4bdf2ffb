"""Rows of a norm's operands as integers: sizes, strides and vector width, the kernels' arguments.

Leading dimensions of all operands are merged jointly, bases are moved back to a 16-byte
boundary, and strides are divided by the largest vector that divides them all: the kernel
multiplies by that vector as a constant, so the compiler knows how wide it may load.

Everything is integers, and cached; no kernel, device or value is read.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from torch import Tensor

# Which of an operand's tile dimensions has stride one: the hidden one, the innermost
# leading one (channels first), or neither. A constant in the kernels.
UNIT_COLUMN, UNIT_ROW, UNIT_NONE = 0, 1, 2

BOUNDARY = 16  # bytes: what a base pointer is aligned to for the widest load
MAX_LEADING = 4  # leading dimensions left after merging that one launch takes
MAX_VECTOR = 8  # elements: 16 bytes of a 16-bit type


@dataclass(frozen=True)
class Operand:
    """Where a tensor's elements lie, counted in elements; `skew` from a 16-byte boundary."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    skew: int


@dataclass(frozen=True)
class OperandPlacement:
    """One operand as a kernel's arguments: strides outermost first, all but `unit` run-time."""

    start: int
    column: int
    strides: tuple[int, ...]
    unit: int


@dataclass(frozen=True)
class RowGeometry:
    """The rows that several operands have in common, and the placement of each operand."""

    hidden_size: int
    num_rows: int
    sizes: tuple[int, ...]
    vector: int
    size_unit: int
    placements: tuple[OperandPlacement, ...]


def aligned_base(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor`, or a tensor that starts on the boundary before it, and the distance.

    Where that boundary lies before the storage the tensor itself is the base, and the
    compiler, which sees an unaligned pointer, falls back to narrow loads.
    """
    excess = tensor.data_ptr() % BOUNDARY
    if excess == 0:
        return tensor, 0
    skew = excess // tensor.element_size()
    offset = tensor.storage_offset() - skew
    if offset < 0:
        return tensor, 0
    return tensor.as_strided((1,), (1,), offset), skew


def operand(tensor: Tensor, skew: int) -> Operand:
    return Operand(tuple(tensor.shape), tuple(tensor.stride()), skew)


@lru_cache(maxsize=4096)
def lay_out(operands: tuple[Operand, ...]) -> RowGeometry:
    """The joint geometry of operands of one shape."""
    shape = operands[0].shape
    hidden_size = shape[-1]
    sizes, strides = merge(shape[:-1], tuple(op.stride[:-1] for op in operands))
    columns = tuple(op.stride[-1] if hidden_size > 1 else 1 for op in operands)
    units = tuple(map(_unit, columns, strides))
    by_rows = UNIT_ROW in units
    multiples = [sizes[-1]] if by_rows else []
    for op, column, leading, unit in zip(operands, columns, strides, units, strict=True):
        multiples += [op.skew, *_counted(column, leading, unit)]
    vector = gcd(MAX_VECTOR, *multiples)
    placements = tuple(
        _place(op.skew, column, leading, unit, vector)
        for op, column, leading, unit in zip(operands, columns, strides, units, strict=True)
    )
    num_rows = prod(sizes)
    # Loads along rows need to know that a vector of rows never straddles two of them.
    size_unit = vector if by_rows else 1
    told_sizes = (*sizes[:-1], sizes[-1] // size_unit)
    return RowGeometry(hidden_size, num_rows, told_sizes, vector, size_unit, placements)


def merge(
    sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge leading dimensions to the fewest: the same sizes for all operands, strides for each.

    A dimension of size one goes first, whatever its stride. Rows may be visited in any
    order, so the rest are sorted, outermost first by the first operand's strides.
    """
    dims = [(size, tuple(each[i] for each in strides)) for i, size in enumerate(sizes) if size != 1]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, inner in dims:
        if merged and all(o == i * size for o, i in zip(merged[-1][1], inner, strict=True)):
            merged[-1] = (merged[-1][0] * size, inner)
            continue
        merged.append((size, inner))
    if not merged:
        merged = [(1, (0,) * len(strides))]
    return (
        tuple(size for size, _ in merged),
        tuple(tuple(dim[1][k] for dim in merged) for k in range(len(strides))),
    )


def _unit(column: int, leading: tuple[int, ...]) -> int:
    if column == 1:
        return UNIT_COLUMN
    return UNIT_ROW if leading[-1] == 1 else UNIT_NONE


def _counted(column: int, leading: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The strides that the vector has to divide: all but the one that is 1."""
    if unit == UNIT_COLUMN:
        return leading
    return (column, *leading[:-1]) if unit == UNIT_ROW else (column, *leading)


def _place(
    skew: int, column: int, leading: tuple[int, ...], unit: int, vector: int
) -> OperandPlacement:
    told = [stride // vector for stride in leading]
    if unit == UNIT_ROW:
        told[-1] = 1
    column = 1 if unit == UNIT_COLUMN else column // vector
    return OperandPlacement(skew // vector, column, tuple(told), unit)


def describe(tensor: Tensor) -> str:
    """A layout on one line: dtype, shape, and strides where it is not contiguous."""
    name = str(tensor.dtype).removeprefix("torch.")
    short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
    text = f"{short.get(name, name)}{list(tensor.shape)}"
    return text if tensor.is_contiguous() else f"{text}{list(tensor.stride())}"


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may name one element; exact for views that torch itself makes."""
    reach = 0
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def overlap_partly(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share elements without being the same view."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.numel() == 0 or b.numel() == 0 or _same_view(a, b):
        return False
    low_a, low_b = a.data_ptr(), b.data_ptr()
    return _may_meet(low_a, _byte_dims(a), a.element_size(), low_b, _byte_dims(b), b.element_size())


def _same_view(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or s == t for size, s, t in dims)


def _byte_dims(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(stride in bytes, size), largest stride first."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    item = tensor.element_size()
    return tuple(sorted(((s * item, n) for s, n in dims if n > 1), reverse=True))


def _may_meet(
    low_a: int,
    dims_a: tuple[tuple[int, int], ...],
    item_a: int,
    low_b: int,
    dims_b: tuple[tuple[int, int], ...],
    item_b: int,
) -> bool:
    """Interval test, then the same test within one period of a common outermost stride."""
    extent_a = item_a + sum(s * (n - 1) for s, n in dims_a)
    extent_b = item_b + sum(s * (n - 1) for s, n in dims_b)
    if low_a + extent_a <= low_b or low_b + extent_b <= low_a:
        return False
    if not dims_a or not dims_b or dims_a[0][0] != dims_b[0][0] or dims_a[0][0] == 0:
        return True
    period = dims_a[0][0]
    inner_a, inner_b = dims_a[1:], dims_b[1:]
    span_a = item_a + sum(s * (n - 1) for s, n in inner_a)
    span_b = item_b + sum(s * (n - 1) for s, n in inner_b)
    start = min(low_a, low_b)
    at_a, at_b = (low_a - start) % period, (low_b - start) % period
    if at_a + span_a > period or at_b + span_b > period:
        return True
    return _may_meet(at_a, inner_a, item_a, at_b, inner_b, item_b)
