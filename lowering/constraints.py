"""Constraints: the conditions that contracts are made of.

A constraint is a frozen dataclass whose `holds` answers True, False or None (proved, refuted,
open) and whose `str` is the formula that reports print. It reads a site and touches nothing.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from fixpass.lowering.layout import (
    Known,
    all_known,
    either,
    known,
    known_equal,
    merge_leading,
    same_shape,
)
from fixpass.lowering.site import Site


class Constraint(ABC):
    """One condition of a contract."""

    @abstractmethod
    def holds(self, site: Site) -> Known:
        """Whether the condition is proved (True), refuted (False) or open (None)."""

    @property
    def is_asked_at_call(self) -> bool:
        """Whether the kernel's callable checks this at each call, so that it may be open here."""
        return False


@dataclass(frozen=True)
class OperandConstraint(Constraint):
    """A condition on one operand; it holds where the site does not have that operand."""

    operand: str


@dataclass(frozen=True)
class Rank(OperandConstraint):
    """The operand's number of dimensions."""

    low: int
    high: int

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or self.low <= layout.rank <= self.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.operand} is {self.low}-D"
        return f"{self.operand} is {self.low}-D to {self.high}-D"


@dataclass(frozen=True)
class Dense2D(OperandConstraint):
    """The operand is 2-D and contiguous."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None:
            return True
        return layout.rank == 2 and layout.is_dense()

    def __str__(self) -> str:
        return f"{self.operand} is dense 2-D"


@dataclass(frozen=True)
class Dense(OperandConstraint):
    """The operand is contiguous, of any rank."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.is_dense()

    def __str__(self) -> str:
        return f"{self.operand} is dense"


@dataclass(frozen=True)
class UnitLastStride(OperandConstraint):
    """The operand's elements of a row lie side by side."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.has_unit_last_stride()

    def __str__(self) -> str:
        return f"{self.operand}.stride[-1] == 1"


@dataclass(frozen=True)
class LastStridesDivisible(OperandConstraint):
    """Every leading stride of the operand, and its offset, is a multiple of `num_bytes`."""

    num_bytes: int

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None:
            return True
        steps = self.num_bytes // layout.dtype.itemsize
        values = [
            s
            for size, s in zip(layout.shape[:-1], layout.stride[:-1], strict=True)
            if known(size == 1) is not True
        ]
        return all_known(known(value % steps == 0) for value in [*values, layout.offset])

    def __str__(self) -> str:
        return f"{self.operand}'s rows start at multiples of {self.num_bytes} bytes"


@dataclass(frozen=True)
class AlignedVector(OperandConstraint):
    """The elements of a weight or bias lie side by side, and start at a multiple of bytes."""

    num_bytes: int = 16

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None:
            return True
        steps = self.num_bytes // layout.dtype.itemsize
        return all_known((layout.is_dense(), known(layout.offset % steps == 0)))

    def __str__(self) -> str:
        return f"{self.operand} is dense and starts at a multiple of {self.num_bytes} bytes"


@dataclass(frozen=True)
class RowPitch(OperandConstraint):
    """The second stride from the end steps from row to row, also where its size is 1."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None or layout.rank < 2:
            return layout is None
        num_rows = math.prod(layout.shape[:-1])
        is_pitch = known_equal(layout.stride[-2], layout.shape[-1])
        return is_pitch if is_pitch is True else either(is_pitch, known(num_rows <= 1))

    def __str__(self) -> str:
        return f"{self.operand}.stride[-2] == hidden_size"


@dataclass(frozen=True)
class OffsetsBelow(OperandConstraint):
    """The kernel computes offsets of elements in a narrow integer.

    asked_at_call: the callable checks each call, and runs the reference where a tensor reaches
    further. The kernel is then legal also where the number of rows is unknown while compiling.
    """

    bits: int
    asked_at_call: bool = False

    @property
    def is_asked_at_call(self) -> bool:
        return self.asked_at_call

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None:
            return True
        # A stride of a dimension of size 1 is read into that integer, too, but is not multiplied.
        steps = zip(layout.shape, layout.stride, strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        return known(last < 2**self.bits)

    def __str__(self) -> str:
        return f"{self.operand}'s last element is within 2^{self.bits} of its first"


@dataclass(frozen=True)
class SameShape(OperandConstraint):
    """Two operands have the same shape: nothing is broadcast."""

    other: str

    def holds(self, site: Site) -> Known:
        if self.operand not in site.layouts:
            return True
        return same_shape(site.layouts[self.operand], site.layouts[self.other])

    def __str__(self) -> str:
        return f"{self.operand}.shape == {self.other}.shape"


@dataclass(frozen=True)
class SameHidden(OperandConstraint):
    """Two operands have rows of one size."""

    other: str

    def holds(self, site: Site) -> Known:
        ours, others = site.layouts[self.operand], site.layouts[self.other]
        return bool(ours.rank and others.rank) and known(ours.shape[-1] == others.shape[-1])

    def __str__(self) -> str:
        return f"{self.operand}.shape[-1] == {self.other}.shape[-1]"


@dataclass(frozen=True)
class LeadingDims(Constraint):
    """The rows of all operands merge to at most `most` dimensions, size-1 dimensions apart."""

    most: int

    def holds(self, site: Site) -> Known:
        layouts = [site.layouts[name] for name in site.rows]
        if any(layout.rank != site.x.rank for layout in layouts):
            return False
        merged = merge_leading(layouts)
        return merged is not None and (len(merged) <= self.most or None)

    def __str__(self) -> str:
        return f"leading dimensions merge to at most {self.most}"


@dataclass(frozen=True)
class Present(Constraint):
    """The site has this operand."""

    name: str

    def holds(self, site: Site) -> Known:
        return self.name in site.layouts

    def __str__(self) -> str:
        return f"there is a {self.name}"


@dataclass(frozen=True)
class Absent(Constraint):
    """The site does not have this operand."""

    name: str

    def holds(self, site: Site) -> Known:
        return self.name not in site.layouts

    def __str__(self) -> str:
        return f"there is no {self.name}"


@dataclass(frozen=True)
class NotEmpty(Constraint):
    """There is at least one element."""

    def holds(self, site: Site) -> Known:
        empty = site.x.is_empty()
        return None if empty is None else not empty

    def __str__(self) -> str:
        return "x is not empty"


@dataclass(frozen=True)
class HiddenAtMost(Constraint):
    """The size of the last dimension."""

    most: int

    def holds(self, site: Site) -> Known:
        return bool(site.x.rank) and known(site.x.shape[-1] <= self.most)

    def __str__(self) -> str:
        return f"hidden_size <= {self.most}"


@dataclass(frozen=True)
class HiddenEven(Constraint):
    """The size of the last dimension is even."""

    def holds(self, site: Site) -> Known:
        return bool(site.x.rank) and known(site.x.shape[-1] % 2 == 0)

    def __str__(self) -> str:
        return "hidden_size is even"
