"""Contracts: what a kernel asks of the site it is called for, and the verdict on one site.

Only a proved clause lets a contract pass; an open one is reported as not proved and never becomes
a guard. Constraints are in `constraints.py`, the table in `contract_table.py`.
"""

from dataclasses import dataclass

from fixpass.lowering.constraints import Clause, OperandClause
from fixpass.lowering.layout import Known
from fixpass.lowering.site import Site


@dataclass(frozen=True)
class Verdict:
    """What a contract says of a site; falsy unless every clause is proved."""

    contract: "Contract"
    clause: Clause | None
    answer: Known
    site: Site

    def __bool__(self) -> bool:
        return self.answer is True

    def __str__(self) -> str:
        if self.answer is True:
            return f"{self.contract.kernel}: every clause holds"
        word = "does not hold" if self.answer is False else "is not proved"
        operand = self.clause.operand if isinstance(self.clause, OperandClause) else "x"
        layout = self.site.layouts.get(operand, self.site.x)
        return f"{self.contract.kernel}: {self.clause} {word} for {layout}"


@dataclass(frozen=True)
class Contract:
    """A kernel, the op it computes, and the clauses under which it computes it."""

    kernel: str
    op: str
    clauses: tuple[Clause, ...]
    source: str = ""
    generation: str = ""
    """Which generation of the library the row is for; empty for every one."""

    def check(self, site: Site) -> Verdict:
        """The first clause that is not proved, a refuted one before an open one."""
        open_clause: Clause | None = None
        for clause in self.clauses:
            answer = clause.holds(site)
            if answer is False:
                return Verdict(self, clause, False, site)
            if answer is None:
                open_clause = open_clause or clause
        if open_clause is not None:
            return Verdict(self, open_clause, None, site)
        return Verdict(self, None, True, site)
