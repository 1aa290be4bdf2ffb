"""Layouts and the questions asked of them, answered True, False or None: proved, refuted, open.

A size or stride is an int or a SymInt, and every question goes through `known`, which reads what
the shape environment can prove and never adds a guard. The stride of a size-1 dimension is never
looked at. Nothing here knows a kernel or moves data.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import statically_known_true

Dim = int | torch.SymInt
Known = bool | None


def known(condition: bool | torch.SymBool) -> Known:
    """True when `condition` is proved, False when it is refuted, None otherwise."""
    if isinstance(condition, bool):
        return condition
    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    return None


def known_equal(left: Dim, right: Dim) -> Known:
    """Whether two sizes or strides are equal.

    Identical expressions return early, because most questions compare those, and a symbolic
    comparison costs more than the rest of a match.
    """
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        mine, other = left.node, right.node
        is_symbolic = isinstance(mine, SymNode) and isinstance(other, SymNode)
        if is_symbolic and mine.shape_env is other.shape_env and mine.expr == other.expr:
            return True
    return known(left == right)


def all_known(answers: Iterable[Known]) -> Known:
    """False when one answer is False, else None when one is open, else True."""
    result: Known = True
    for answer in answers:
        if answer is False:
            return False
        if answer is None:
            result = None
    return result


@dataclass(frozen=True)
class Layout:
    """Shape and stride, in elements, of one tensor of `dtype`."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    dtype: torch.dtype
    offset: Dim = 0

    @staticmethod
    def of(val: torch.Tensor) -> "Layout":
        """The layout of a strided tensor, real or fake."""
        return Layout(tuple(val.shape), tuple(val.stride()), val.dtype, val.storage_offset())

    @staticmethod
    def contiguous(shape: Sequence[Dim], dtype: torch.dtype) -> "Layout":
        """The contiguous layout of `shape`."""
        return Layout(tuple(shape), dense_stride(shape, range(len(shape))), dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> Dim:
        return self.numel * self.dtype.itemsize

    def is_dense(self) -> Known:
        """Whether the layout is contiguous; strides of size-1 dimensions do not count."""
        return self.has_stride(dense_stride(self.shape, range(self.rank)))

    def has_stride(self, stride: Sequence[Dim]) -> Known:
        """Whether `stride` addresses the same elements: equal except where the size is 1."""
        if len(stride) != self.rank:
            return False
        dims = list(zip(self.shape, self.stride, stride, strict=True))
        if any(type(size) is int and size == 0 for size in self.shape):
            return True
        if all(type(value) is int for dim in dims for value in dim):
            return all(size == 1 or mine == other for size, mine, other in dims)
        return all_known(_same_step(size, mine, other) for size, mine, other in dims)

    def has_unit_last_stride(self) -> Known:
        if not self.rank:
            return False
        return either(known(self.stride[-1] == 1), known(self.shape[-1] == 1))

    def is_empty(self) -> Known:
        return known(self.numel == 0)

    def rows(self) -> "Layout | None":
        """The 2-D view (num_rows, hidden_size) of the same storage, or None if it is not proved."""
        if self.rank == 2:
            return self
        merged = merge_leading((self,))
        if merged is None or len(merged) > 1:
            return None
        num_rows, (row_stride,) = merged[0] if merged else (1, (self.shape[-1],))
        return Layout(
            (num_rows, self.shape[-1]), (row_stride, self.stride[-1]), self.dtype, self.offset
        )

    def __str__(self) -> str:
        shape = f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"
        if self.is_dense() is True:
            return shape
        return f"{shape}[{', '.join(map(str, self.stride))}]"


def either(left: Known, right: Known) -> Known:
    """Three-valued or."""
    if left is True or right is True:
        return True
    return False if left is False and right is False else None


def _same_step(size: Dim, mine: Dim, other: Dim) -> Known:
    """Whether two strides of a dimension address the same elements."""
    answer = known_equal(mine, other)
    return answer if answer is True else either(answer, known(size == 1))


def dense_stride(shape: Sequence[Dim], order: Iterable[int]) -> tuple[Dim, ...]:
    """The strides of dense storage whose dimensions lie in `order`, outermost first."""
    stride: list[Dim] = [1] * len(shape)
    for inner, outer in pairwise(reversed(tuple(order))):
        stride[outer] = stride[inner] * shape[inner]
    return tuple(stride)


def dense_order(layout: Layout) -> tuple[int, ...] | None:
    """The order of dimensions, outermost first, in which it is dense; None if not proved."""
    identity = tuple(range(layout.rank))
    if layout.has_stride(dense_stride(layout.shape, identity)) is True:
        return identity
    sized = [d for d in identity if known(layout.shape[d] == 1) is not True]
    placed: list[int] = []
    step: Dim = 1
    while len(placed) < len(sized):
        left = (d for d in reversed(sized) if d not in placed)
        dim = next((d for d in left if known_equal(layout.stride[d], step) is True), None)
        if dim is None:
            return None
        placed.append(dim)
        step = step * layout.shape[dim]
    ones = tuple(d for d in identity if d not in sized)
    return ones + tuple(reversed(placed))


def merge_leading(layouts: Sequence[Layout]) -> list[tuple[Dim, tuple[Dim, ...]]] | None:
    """Merge the leading dimensions of all layouts jointly, as far as is proved.

    The layouts have one shape. Returns (size, one stride for each layout), outermost first,
    without the last dimension and without size-1 dimensions; None for rank 0.
    """
    shape = layouts[0].shape
    if not shape:
        return None
    merged: list[tuple[Dim, tuple[Dim, ...]]] = []
    for dim, size in enumerate(shape[:-1]):
        if known(size == 1) is True:
            continue
        strides = tuple(layout.stride[dim] for layout in layouts)
        if merged and _follows(merged[-1][1], size, strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _follows(outer: tuple[Dim, ...], size: Dim, inner: tuple[Dim, ...]) -> bool:
    return all(known_equal(o, i * size) is True for o, i in zip(outer, inner, strict=True))


def same_shape(left: Layout, right: Layout) -> Known:
    return same_sizes(left.shape, right.shape)


def same_sizes(left: Sequence[Dim], right: Sequence[Dim]) -> Known:
    if len(left) != len(right):
        return False
    return all_known(known_equal(a, b) for a, b in zip(left, right, strict=True))


_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `f32`, ...: the short name that graphs and reports print."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))
