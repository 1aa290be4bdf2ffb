"""Choose a kernel for each norm: the first whose contract holds without a copy, else the cheapest.

The choice is written into the op's `kernel_name` argument. A copy that stands in front of the norm
counts as avoidable, so a kernel that reads the strided source is preferred to one that needs the
copy. Where Inductor would fuse the norm with pointwise neighbours, its code is the default: an
opaque kernel would move those bytes. Nothing is moved here: `insert-relayout` does that.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.relayout import Relayout, cheapest_relayout, hint, why_not
from fixpass.lowering.site import OPERANDS, OPS, Site, op_name
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.cost import fusion_of
from fixpass.passes.drop_dead_copies.dead_copy import copied_operands, without_copies
from fixpass.passes.rewrite import find_anchors
from fixpass.runtime.providers import describe_needs

FALLBACK = "inductor"


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, the relayout that it needs, and the copy that a preferred kernel needed."""

    kernel: str
    plan: Relayout
    refused_bytes: int

    @property
    def num_bytes(self) -> int:
        return hint(self.plan.num_bytes)


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
        choice = self._choose(node, site, result)
        if choice.kernel == FALLBACK:
            node.update_kwarg("kernel_name", FALLBACK)
            result.applied(node, f"{FALLBACK} reads {site.x}, {_describe(choice.plan)}")
            return
        fusion = fusion_of(node)
        opaque = fusion.opaque_bytes + choice.num_bytes
        if self.target.prefers_fusion and fusion.fused_bytes < opaque and fusion.names:
            node.update_kwarg("kernel_name", FALLBACK)
            moved = f"{fusion.fused_bytes:,} bytes moved, {opaque:,} by {choice.kernel}"
            text = f"{FALLBACK} reads {site.x}, fused with {', '.join(fusion.names)}, {moved}"
            result.applied(node, text, bytes_saved=opaque - fusion.fused_bytes)
            return
        node.update_kwarg("kernel_name", choice.kernel)
        moved = f"{opaque:,} bytes moved, {fusion.fused_bytes:,} by {FALLBACK}"
        text = f"{choice.kernel} reads {site.x}, {_describe(choice.plan)}, {moved}"
        saved = max(choice.refused_bytes - choice.num_bytes, 0)
        result.applied(node, text, bytes_saved=saved)

    def _choose(self, node: fx.Node, site: Site, result: PassResult) -> KernelChoice:
        """The first kernel that needs no copy, else the one whose copy is the cheapest."""
        best: KernelChoice | None = None
        refused = 0
        for name in self.target.kernels:
            kernel = kernel_of(name, site.op)
            if kernel is None:
                continue
            if name in self.target.missing:
                needs = describe_needs(kernel.needs)
                result.missed(node, f"{name} is not installed: it needs {needs}")
                continue
            plan = cheapest_relayout(kernel, site)
            if plan is None or hint(plan.num_bytes):
                result.missed(node, _refusal(kernel, site, plan))
                refused = refused or (hint(plan.num_bytes) if plan else 0)
            if plan is not None and (best is None or hint(plan.num_bytes) < best.num_bytes):
                best = KernelChoice(name, plan, refused)
            if best is not None and best.num_bytes == 0:
                break
        return best or KernelChoice(FALLBACK, Relayout((), False, 0), refused)


def _refusal(kernel: Kernel, site: Site, plan: Relayout | None) -> str:
    if plan is None:
        return f"{why_not(kernel, site)}; no relayout would help"
    return f"{kernel.check(site)}; a copy would move {hint(plan.num_bytes):,} bytes"


def _describe(plan: Relayout) -> str:
    copied = f"{hint(plan.num_bytes):,} bytes copied"
    return f"{plan}, {copied}" if plan else copied
