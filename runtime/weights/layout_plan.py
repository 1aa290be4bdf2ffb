"""A layout resolved for one shape and element size: where each element lies.

The logical tensor, padded where the layout pads, has a dense index. A plan lists the axes of the
memory, outermost first, each with its size and its step in that index; everything else (the block
that a fold stays within, the inverse, strides where they can say it) follows from the list. It
moves no bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import Bytes, Factor, Layout, Pad, Permute, Stride


@dataclass(frozen=True)
class Axis:
    """`size` steps of `step` elements in the logical index, `apart` elements apart in memory."""

    size: int
    step: int
    apart: int = 0


@dataclass(frozen=True)
class Plan:
    """Where the elements of a logical tensor lie in memory. Shapes are in elements."""

    layout: Layout
    logical: tuple[int, ...]
    padded: tuple[int, ...]
    memory: tuple[Axis, ...]
    shown: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.padded)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The strides of the logical tensor in the logical index."""
        return dense(self.padded)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """As few axes as possible, in logical order, outermost first."""
        merged: list[Axis] = []
        for axis in self.memory:
            if axis.size == 1:
                continue
            if merged and merged[-1].step == axis.size * axis.step:
                axis = Axis(merged.pop().size * axis.size, axis.step)
            merged.append(axis)
        placed = _with_places(merged)
        return tuple(sorted(placed, key=lambda axis: -axis.step))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The axes as they lie in memory: memory is logical.view(sizes).permute(order)."""
        return tuple(sorted(range(len(self.axes)), key=lambda i: -self.axes[i].apart))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def block(self) -> int:
        """How many elements lie within the block that the fold never leaves."""
        fixed = 0
        while fixed < len(self.order) and self.order[fixed] == fixed:
            fixed += 1
        return prod(self.sizes[fixed:])

    @property
    def moves(self) -> bool:
        """Whether any byte has to move."""
        return self.order != tuple(range(len(self.order)))

    @cached_property
    def logical_strides(self) -> tuple[int, ...] | None:
        """Strides in memory of the logical view, or None where no strides say it."""
        found = []
        for size, step in zip(self.padded, self.steps, strict=True):
            parts = [a for a in _with_places(self.memory) if step <= a.step < step * size]
            parts = sorted((a for a in parts if a.size > 1), key=lambda axis: -axis.step)
            for outer, inner in pairwise(parts):
                if outer.apart != inner.size * inner.apart:
                    return None
            found.append(parts[-1].apart if parts else step)
        return tuple(found)


@lru_cache(4096)
def resolve(layout: Layout, shape: tuple[int, ...], itemsize: int) -> Plan:
    """The plan of `layout` for a logical shape; LayoutError where it does not fit."""
    if layout.reversible is False or any(_kind(fold) == "Alias" for fold in layout.folds):
        raise LayoutError(f"layout {layout}: made of several tensors or lossy, so it has no plan")
    if 0 in shape:
        raise _refuse(layout, shape, "it has no elements")
    padded = shape
    memory: list[Axis] = []
    shown: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    for fold in layout.folds:
        if isinstance(fold, Pad):
            padded = _pad(layout, fold, shape)
        elif isinstance(fold, Permute):
            memory = _permute(layout, fold, padded, memory or _rows(padded), itemsize)
        elif isinstance(fold, Stride):
            memory, shown, strides = _stride(layout, fold, padded)
    if shown is None:
        shown, strides = padded, dense(padded)
    return Plan(layout, shape, padded, tuple(memory or _rows(padded)), shown, strides)


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor; a size of 0 counts as 1, as torch counts it."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return tuple(reversed(steps))[: len(shape)]


def _kind(fold: object) -> str:
    return type(fold).__name__


def _rows(shape: Sequence[int]) -> list[Axis]:
    return [Axis(size, step) for size, step in zip(shape, dense(shape), strict=True)]


def _with_places(memory: Sequence[Axis]) -> list[Axis]:
    apart = dense([axis.size for axis in memory])
    return [Axis(a.size, a.step, place) for a, place in zip(memory, apart, strict=True)]


def _refuse(layout: Layout, shape: Sequence[int], why: str) -> LayoutError:
    return LayoutError(f"layout {layout} does not fit shape {tuple(shape)}: {why}")


def _pad(layout: Layout, fold: Pad, shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = len(shape) - len(fold.multiples)
    if kept < 0:
        raise _refuse(layout, shape, f"it pads {len(fold.multiples)} dimensions")
    padded = [-(-s // m) * m for s, m in zip(shape[kept:], fold.multiples, strict=True)]
    return (*shape[:kept], *padded)


def _stride(
    layout: Layout, fold: Stride, shape: tuple[int, ...]
) -> tuple[list[Axis], tuple[int, ...], tuple[int, ...]]:
    kept = len(shape) - len(fold.shown)
    if kept < 0:
        raise _refuse(layout, shape, f"it orders {len(fold.shown)} dimensions")
    stored = [*range(kept), *(kept + dim for dim in fold.stored)]
    shown = [*range(kept), *(kept + dim for dim in fold.shown)]
    rows = _rows(shape)
    memory = [rows[dim] for dim in stored]
    apart = dense([axis.size for axis in memory])
    place = {dim: apart[index] for index, dim in enumerate(stored)}
    return memory, tuple(shape[dim] for dim in shown), tuple(place[dim] for dim in shown)


def _permute(
    layout: Layout, fold: Permute, shape: tuple[int, ...], memory: list[Axis], itemsize: int
) -> list[Axis]:
    kept = len(shape) - len(fold.split)
    if kept < 0:
        raise _refuse(layout, shape, f"it splits {len(fold.split)} dimensions")
    for size, multiple in zip(shape[kept:], fold.whole or (1,) * len(fold.split), strict=True):
        if size % multiple:
            raise _refuse(layout, shape, f"{size} is no multiple of {multiple}")
    wanted = [
        factor
        for size, split in zip(shape[kept:], fold.split, strict=True)
        for factor in _factors(layout, shape, size, split, itemsize)
    ]
    if sorted(fold.order) != list(range(len(wanted))):
        raise _refuse(layout, shape, f"{fold.order} is no order of {len(wanted)} factors")
    groups = _regroup(layout, shape, memory, [*shape[:kept], *wanted])
    order = [*range(kept), *(kept + index for index in fold.order)]
    return [axis for index in order for axis in groups[index]]


def _factors(
    layout: Layout, shape: Sequence[int], size: int, split: tuple[Factor, ...], itemsize: int
) -> list[int]:
    found = []
    for part in split:
        if isinstance(part, Bytes):
            if part.count % itemsize:
                raise _refuse(layout, shape, f"{part.count} bytes hold no whole elements")
            part = part.count // itemsize
        found.append(part)
    known = prod(part for part in found if part != -1)
    if size % known or (-1 not in found and size != known):
        raise _refuse(layout, shape, f"{size} is no multiple of its block of {known}")
    return [size // known if part == -1 else part for part in found]


def _regroup(
    layout: Layout, shape: Sequence[int], memory: list[Axis], sizes: list[int]
) -> list[list[Axis]]:
    """The axes of memory cut so that each run of them has one of `sizes`."""
    left = list(reversed(memory))
    groups = []
    for size in sizes:
        group: list[Axis] = []
        while size > 1:
            axis = left.pop()
            if axis.size > size:
                if axis.size % size:
                    raise _refuse(layout, shape, "its folds cut the same dimension differently")
                rest = axis.size // size
                left.append(Axis(rest, axis.step))
                axis = Axis(size, axis.step * rest)
            if size % axis.size:
                raise _refuse(layout, shape, "its folds cut the same dimension differently")
            size //= axis.size
            group.append(axis)
        groups.append(group)
    return groups
