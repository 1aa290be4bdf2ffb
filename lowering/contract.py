"""A kernel, its contract, and the verdict of a contract on one call site.

A contract holds where every constraint is proved. An open constraint is reported as not proved
and never becomes a guard. Constraints are in `constraints.py`, our kernels in `contract_table.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fixpass.lowering.constraints import Constraint, OperandConstraint
from fixpass.lowering.layout import Known
from fixpass.lowering.site import Site
from fixpass.runtime.providers import meets


@dataclass(frozen=True)
class Verdict:
    """The answer of a kernel's contract for a site; falsy unless every constraint is proved."""

    kernel: str
    constraint: Constraint | None
    answer: Known
    site: Site

    def __bool__(self) -> bool:
        return self.answer is True

    def __str__(self) -> str:
        if self.answer is True:
            return f"{self.kernel}: every constraint holds"
        word = "does not hold" if self.answer is False else "is not proved"
        constraint = self.constraint
        operand = constraint.operand if isinstance(constraint, OperandConstraint) else "x"
        layout = self.site.layouts.get(operand, self.site.x)
        return f"{self.kernel}: {self.constraint} {word} for {layout}"


@dataclass(frozen=True)
class Contract:
    """The constraints under which a kernel computes its op."""

    constraints: tuple[Constraint, ...] = ()
    source: str = ""
    """The library, version and file that show the constraints."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that computes one of the ops in `fixpass.lowering.site.OPS`.

    The same literal describes our kernels and yours. Pass yours as `options={"kernels": (kernel,)}`
    or offer it through the entry point group `fixpass.kernels`, and name it in the option
    `norm_kernels` or in the `kernels` of a `Target`:

        Kernel(
            "my_rms_norm",
            "rms_norm",
            Contract((Dense2D("x"), Dense2D("out"), *PLAIN), "mylib 1.2, norm.cu"),
            "mylib.norm:rms_norm",
            needs="mylib::rms_norm",
        )
    """

    name: str
    op: str
    contract: Contract
    callable: str | Callable[..., Any] = field(repr=False)
    """The function, or "module:function", imported at its first call. It takes the op's tensors
    and eps in the order of the op's schema, the rounding steps as keywords, and returns the op's
    results, dense in the step `order`."""
    needs: str = ""
    """The requirement of the kernel: an op as "namespace::op", an op with an argument as
    "namespace::op(argument)", or an importable package. Empty: the kernel is always there."""
    overwrites: tuple[str, ...] = ()
    """The operands that the kernel writes its results to. The callable copies them first, and the
    cost model counts these copies."""

    def check(self, site: Site) -> Verdict:
        """The first constraint that is not proved, a refuted one before an open one."""
        open_constraint: Constraint | None = None
        for constraint in self.contract.constraints:
            answer = constraint.holds(site)
            if answer is False:
                return Verdict(self.name, constraint, False, site)
            if answer is None and not constraint.is_asked_at_call:
                open_constraint = open_constraint or constraint
        if open_constraint is not None:
            return Verdict(self.name, open_constraint, None, site)
        return Verdict(self.name, None, True, site)

    @property
    def is_installed(self) -> bool:
        """Whether this process has what the kernel needs."""
        return meets(self.needs)
