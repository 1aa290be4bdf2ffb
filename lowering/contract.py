"""Contracts: the constraints of a kernel on its call site, and the verdict on one site.

A contract holds where every constraint is proved. An open constraint is reported as not proved
and never becomes a guard. Constraints are in `constraints.py`, the table in `contract_table.py`.
"""

from dataclasses import dataclass

from fixpass.lowering.constraints import Constraint, OperandConstraint
from fixpass.lowering.layout import Known
from fixpass.lowering.site import Site


@dataclass(frozen=True)
class Verdict:
    """What a contract says of a site; falsy unless every constraint is proved."""

    contract: "Contract"
    constraint: Constraint | None
    answer: Known
    site: Site

    def __bool__(self) -> bool:
        return self.answer is True

    def __str__(self) -> str:
        if self.answer is True:
            return f"{self.contract.kernel}: every constraint holds"
        word = "does not hold" if self.answer is False else "is not proved"
        operand = self.constraint.operand if isinstance(self.constraint, OperandConstraint) else "x"
        layout = self.site.layouts.get(operand, self.site.x)
        return f"{self.contract.kernel}: {self.constraint} {word} for {layout}"


@dataclass(frozen=True)
class Contract:
    """A kernel, the op it computes, and the constraints under which it computes it."""

    kernel: str
    op: str
    constraints: tuple[Constraint, ...]
    source: str = ""
    generation: str = ""
    """Which generation of the library the row is for; empty for every one."""

    def check(self, site: Site) -> Verdict:
        """The first constraint that is not proved, a refuted one before an open one."""
        open_constraint: Constraint | None = None
        for constraint in self.constraints:
            answer = constraint.holds(site)
            if answer is False:
                return Verdict(self, constraint, False, site)
            if answer is None:
                open_constraint = open_constraint or constraint
        if open_constraint is not None:
            return Verdict(self, open_constraint, None, site)
        return Verdict(self, None, True, site)
