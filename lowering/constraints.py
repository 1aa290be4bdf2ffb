"""Constraints: the conditions that contracts are made of.

A constraint is a frozen dataclass whose `holds` answers True, False or None (proved, refuted, open)
and whose `str` is the formula that reports print. Constraints read a site and touch nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fixpass.lowering.layout import Known, all_known, dtype_name, known, merge_leading, same_shape
from fixpass.lowering.site import Site


class Constraint(ABC):
    """One condition of a contract."""

    @abstractmethod
    def holds(self, site: Site) -> Known:
        """Whether the condition is proved (True), refuted (False) or open (None)."""


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
class SameStride(OperandConstraint):
    """Two operands have the same strides."""

    other: str

    def holds(self, site: Site) -> Known:
        if self.operand not in site.layouts:
            return True
        return site.layouts[self.operand].has_stride(site.layouts[self.other].stride)

    def __str__(self) -> str:
        return f"{self.operand}.stride == {self.other}.stride"


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
class DtypeIn(OperandConstraint):
    """The operand's dtype."""

    dtypes: tuple[torch.dtype, ...]

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.dtype in self.dtypes

    def __str__(self) -> str:
        return f"{self.operand}.dtype in ({', '.join(map(dtype_name, self.dtypes))})"


@dataclass(frozen=True)
class SameDtype(OperandConstraint):
    """The operand, where there is one, has the dtype of x."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.dtype == site.x.dtype

    def __str__(self) -> str:
        return f"{self.operand}.dtype == x.dtype"


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


@dataclass(frozen=True)
class ComputesIn(Constraint):
    """The dtype in which squares are summed and rows are scaled."""

    dtype: torch.dtype

    def holds(self, site: Site) -> Known:
        return site.compute_dtype == self.dtype

    def __str__(self) -> str:
        return f"computed in {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class WeightRule(Constraint):
    """Where the rounding to x's dtype happens, and what is added to the weight."""

    rounds_before: tuple[bool, ...]
    offsets: tuple[float, ...] = (0.0,)

    def holds(self, site: Site) -> Known:
        if site.steps.get("weight_offset", 0.0) not in self.offsets:
            return False
        if site.x.dtype == site.compute_dtype:
            return True
        return site.rounds_before_weight in self.rounds_before

    def __str__(self) -> str:
        places = " or ".join("before" if before else "after" for before in self.rounds_before)
        offsets = " or ".join(
            f"{offset:g} + weight" if offset else "weight" for offset in self.offsets
        )
        return f"rounded {places} the multiply by {offsets}"


@dataclass(frozen=True)
class FewRows(Constraint):
    """x has few rows, or a number that only the call knows: the op decides then."""

    most: int

    def holds(self, site: Site) -> Known:
        return known(site.x.shape[0] > self.most) is not True

    def __str__(self) -> str:
        return f"x has at most {self.most} rows"


@dataclass(frozen=True)
class RowsOrColumns(OperandConstraint):
    """The matrix lies row by row or column by column, and no element lies in two places."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        if layout is None:
            return True
        answers = [
            all_known(known(fact) for fact in (layout.stride[along] == 1, pitch >= size))
            for along, pitch, size in (
                (1, layout.stride[0], layout.shape[1]),
                (0, layout.stride[1], layout.shape[0]),
            )
        ]
        return True if True in answers else None if None in answers else False

    def __str__(self) -> str:
        return f"{self.operand} is dense along its rows or its columns"
