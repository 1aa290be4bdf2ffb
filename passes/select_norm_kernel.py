"""Choose a kernel for each norm: the first whose contract holds without a copy, else the cheapest.

The choice is written into the op's `kernel_name` argument. A copy that stands in front of the norm
counts as avoidable, so a kernel that reads the strided source is preferred to one that needs the
copy. What is saved is the copy that the target's preferred kernel would have needed. Nothing is
moved here: `insert-relayout` does that.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.lowering.contract import Contract
from fixpass.lowering.contracts import contract_of
from fixpass.lowering.relayout import Relayout, cheapest_relayout, hint, why_not
from fixpass.lowering.site import OPERANDS, OPS, Site, op_name
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.rewrite import find_anchors
from fixpass.passes.rewrites.dead_copy import copied_operands, without_copies
from fixpass.passes.rewrites.norm import op_overload

FLOOR = "inductor"


@dataclass(frozen=True)
class SelectNormKernel(Pass):
    """Reads the contract table and the target's order of preference."""

    name: ClassVar[str] = "select-norm-kernel"

    target: Target
    """Whose kernels to choose from, best first."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in find_anchors(graph, tuple(op_overload(op) for op in OPS)):
            if node.kwargs.get("kernel_name", "") == "" and result.take_fuel():
                self._select(node, result)

    def _select(self, node: fx.Node, result: PassResult) -> None:
        op = op_name(node)
        site = without_copies(Site.of(node), OPERANDS[op], copied_operands(node))
        kernel, plan, cost = FLOOR, Relayout((), False, 0), -1
        refused = 0
        for contract in self._contracts(op):
            found = cheapest_relayout(contract, site)
            if found is None or hint(found.num_bytes):
                result.missed(node, _refusal(contract, site, found))
                refused = refused or (hint(found.num_bytes) if found else 0)
            if found is not None and (cost < 0 or hint(found.num_bytes) < cost):
                kernel, plan, cost = contract.kernel, found, hint(found.num_bytes)
            if cost == 0:
                break
        node.update_kwarg("kernel_name", kernel)
        saved = max(refused - max(cost, 0), 0)
        result.applied(node, f"{kernel} reads {site.x}, {_describe(plan)}", bytes_saved=saved)

    def _contracts(self, op: str) -> list[Contract]:
        rows = (contract_of(kernel, op) for kernel in self.target.kernels)
        return [row for row in rows if row is not None]


def _refusal(contract: Contract, site: Site, plan: Relayout | None) -> str:
    if plan is None:
        return f"{why_not(contract, site)}; no relayout would help"
    return f"{contract.check(site)}; a copy would move {hint(plan.num_bytes):,} bytes"


def _describe(plan: Relayout) -> str:
    copied = f"{hint(plan.num_bytes):,} bytes copied"
    return f"{plan}, {copied}" if plan else copied
