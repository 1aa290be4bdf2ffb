"""Resolve a layout for one shape and element size: where in memory each element lies.

The elements of the logical tensor, padded where the layout pads, are numbered row-major: that is
the logical index. A plan lists the axes of the memory, outermost first, each with its size and its
step in that index. The inverse, and strides where strides can express the layout, follow from the
list. Nothing here moves bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import (
    Alias,
    Bytes,
    Factor,
    Pad,
    Permute,
    Stride,
    SwapHalves,
    WeightLayout,
)
from fixpass.runtime.weights.stored import dense_strides


@dataclass(frozen=True)
class Axis:
    """One axis of the memory, or of the logical index."""

    size: int
    step: int
    """From one of its elements to the next in the logical index."""
    apart: int = 0
    """From one of its elements to the next in memory; negative where it is reversed."""
    reversed: bool = False
    """Whether its last element comes first in memory."""

    @property
    def start(self) -> int:
        """Where its first element lies, from the start of the memory that it spans."""
        return -min(self.apart, 0) * (self.size - 1)


@dataclass(frozen=True)
class LayoutPlan:
    """Where the elements of a logical tensor lie in memory. Shapes are in elements."""

    layout: WeightLayout
    logical: tuple[int, ...]
    """The shape in the checkpoint."""
    padded: tuple[int, ...]
    """The logical shape with its padding."""
    memory: tuple[Axis, ...]
    """Outermost first."""
    shown: tuple[int, ...]
    """The shape that a kernel sees."""
    strides: tuple[int, ...]
    """The strides that a kernel sees."""

    @property
    def numel(self) -> int:
        return prod(self.padded)

    @cached_property
    def index_strides(self) -> tuple[int, ...]:
        """The strides of the logical tensor in the logical index."""
        return dense_strides(self.padded)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the memory, merged where they can be, in logical order, outermost first."""
        merged: list[Axis] = []
        for axis in self.memory:
            if axis.size == 1:
                continue
            alike = merged and merged[-1].reversed == axis.reversed
            if alike and merged[-1].step == axis.size * axis.step:
                axis = replace(axis, size=merged.pop().size * axis.size)
            merged.append(axis)
        placed = _with_places(merged)
        return tuple(sorted(placed, key=lambda axis: -axis.step))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The memory order of `axes`: memory is logical.view(sizes).permute(order)."""
        return tuple(sorted(range(len(self.axes)), key=lambda i: -abs(self.axes[i].apart)))

    @cached_property
    def start(self) -> int:
        """Where in memory the first element lies; 0 unless an axis is reversed."""
        return sum(axis.start for axis in self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @cached_property
    def logical_strides(self) -> tuple[int, ...] | None:
        """Strides in memory of the logical tensor, or None where no strides express the layout."""
        if self.start:
            return None
        found = []
        for size, step in zip(self.padded, self.index_strides, strict=True):
            parts = [a for a in _with_places(self.memory) if step <= a.step < step * size]
            parts = sorted((a for a in parts if a.size > 1), key=lambda axis: -axis.step)
            for outer, inner in pairwise(parts):
                if outer.apart != inner.size * inner.apart:
                    return None
            found.append(parts[-1].apart if parts else step)
        return tuple(found)


@lru_cache(4096)
def resolve(layout: WeightLayout, shape: tuple[int, ...], itemsize: int) -> LayoutPlan:
    """The plan of `layout` for a logical shape.

    Raises:
        LayoutError: the layout does not fit the shape, or is of several parameters.

    """
    if any(isinstance(step, Alias) for step in layout.steps):
        raise LayoutError(f"layout {layout} is of several parameters: fixpass.weights.pack them")
    if 0 in shape:
        raise _refuse(layout, shape, "it has no elements")
    padded = shape
    memory: list[Axis] = []
    shown: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    for step in layout.steps:
        if isinstance(step, Pad):
            padded = _pad(layout, step, shape)
        elif isinstance(step, Permute):
            groups = _permute(layout, step, padded, memory or _rows(padded), itemsize)
            memory = [axis for group in groups for axis in group]
            if step.shows_factors:
                shown = tuple(prod(axis.size for axis in group) for group in groups)
                strides = dense_strides(shown)
        elif isinstance(step, SwapHalves):
            memory = _swap(layout, step, padded, memory or _rows(padded))
        elif isinstance(step, Stride):
            memory, shown, strides = _stride(layout, step, padded)
    if shown is None:
        shown, strides = padded, dense_strides(padded)
    return LayoutPlan(layout, shape, padded, tuple(memory or _rows(padded)), shown, strides)


def _rows(shape: Sequence[int]) -> list[Axis]:
    return [Axis(size, step) for size, step in zip(shape, dense_strides(shape), strict=True)]


def _with_places(memory: Sequence[Axis]) -> list[Axis]:
    apart = dense_strides([axis.size for axis in memory])
    return [
        replace(axis, apart=-place if axis.reversed else place)
        for axis, place in zip(memory, apart, strict=True)
    ]


def _refuse(layout: WeightLayout, shape: Sequence[int], why: str) -> LayoutError:
    return LayoutError(f"layout {layout} does not fit shape {tuple(shape)}: {why}")


def _pad(layout: WeightLayout, step: Pad, shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = len(shape) - len(step.multiples)
    if kept < 0:
        raise _refuse(layout, shape, f"it pads {len(step.multiples)} dimensions")
    padded = [-(-s // m) * m for s, m in zip(shape[kept:], step.multiples, strict=True)]
    return (*shape[:kept], *padded)


def _stride(
    layout: WeightLayout, step: Stride, shape: tuple[int, ...]
) -> tuple[list[Axis], tuple[int, ...], tuple[int, ...]]:
    kept = len(shape) - len(step.shown)
    if kept < 0:
        raise _refuse(layout, shape, f"it orders {len(step.shown)} dimensions")
    stored = [*range(kept), *(kept + dim for dim in step.stored)]
    shown = [*range(kept), *(kept + dim for dim in step.shown)]
    rows = _rows(shape)
    memory = [rows[dim] for dim in stored]
    apart = dense_strides([axis.size for axis in memory])
    place = {dim: apart[index] for index, dim in enumerate(stored)}
    return memory, tuple(shape[dim] for dim in shown), tuple(place[dim] for dim in shown)


def _permute(
    layout: WeightLayout, step: Permute, shape: tuple[int, ...], memory: list[Axis], itemsize: int
) -> list[list[Axis]]:
    """The axes of each dimension that is kept and of each factor, in memory order."""
    kept = len(shape) - len(step.split)
    if kept < 0:
        raise _refuse(layout, shape, f"it splits {len(step.split)} dimensions")
    for size, multiple in zip(shape[kept:], step.whole or (1,) * len(step.split), strict=True):
        if size % multiple:
            raise _refuse(layout, shape, f"{size} is no multiple of {multiple}")
    wanted = [
        factor
        for size, split in zip(shape[kept:], step.split, strict=True)
        for factor in _factors(layout, shape, size, split, itemsize)
    ]
    if sorted(step.order) != list(range(len(wanted))):
        raise _refuse(layout, shape, f"{step.order} is no order of {len(wanted)} factors")
    groups = _regroup(layout, shape, memory, [*shape[:kept], *wanted])
    order = [*range(kept), *(kept + index for index in step.order)]
    return [groups[index] for index in order]


def _swap(
    layout: WeightLayout, step: SwapHalves, shape: tuple[int, ...], memory: list[Axis]
) -> list[Axis]:
    if not -len(shape) <= step.dim < 0 or shape[step.dim] % 2:
        raise _refuse(layout, shape, f"it has no halves along dimension {step.dim}")
    sizes = [*shape[: step.dim], 2, shape[step.dim] // 2, *shape[len(shape) + step.dim + 1 :]]
    groups = _regroup(layout, shape, memory, sizes)
    halves = len(shape) + step.dim
    groups[halves] = [replace(axis, reversed=not axis.reversed) for axis in groups[halves]]
    return [axis for group in groups for axis in group]


def _factors(
    layout: WeightLayout, shape: Sequence[int], size: int, split: tuple[Factor, ...], itemsize: int
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
    layout: WeightLayout, shape: Sequence[int], memory: list[Axis], sizes: list[int]
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
                    raise _refuse(layout, shape, "its steps split the same dimension differently")
                rest = axis.size // size
                left.append(replace(axis, size=rest))
                axis = replace(axis, size=size, step=axis.step * rest)
            if size % axis.size:
                raise _refuse(layout, shape, "its steps split the same dimension differently")
            size //= axis.size
            group.append(axis)
        groups.append(group)
    return groups
