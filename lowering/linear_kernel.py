"""SKINNY_LINEAR: the kernel of linear layers on CPU, and the constraints of its contract.

The weight is (K, N), as `torch.mm` takes it, so the weight of `nn.Linear` is dense along columns.
"""

from dataclasses import dataclass

from fixpass.lowering.constraints import Constraint, OperandConstraint, Rank
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.dtype_constraints import DtypeIn, SameDtype
from fixpass.lowering.layout import Known, all_known, known
from fixpass.lowering.site import Site
from fixpass.runtime.linear import DTYPES, MOST_ROWS


@dataclass(frozen=True)
class FewRows(Constraint):
    """x has few rows. A number of rows that only the call knows is allowed: the op decides then."""

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


SKINNY_LINEAR = Kernel(
    "skinny_linear",
    "linear",
    Contract(
        (
            Rank("x", 2, 2),
            Rank("weight", 2, 2),
            Rank("bias", 1, 1),
            FewRows(MOST_ROWS),
            DtypeIn("x", DTYPES),
            SameDtype("weight"),
            SameDtype("bias"),
            RowsOrColumns("weight"),
        ),
        "csrc/skinny_linear.cpp: x of any strides; rows or columns of the weight with any pitch",
    ),
    "fixpass.runtime.linear:skinny_linear",
)
