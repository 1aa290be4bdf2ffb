"""Choose a kernel for each norm: fewest bytes, then fewest launches, then the target's order.

The choice is written into the op's `kernel_name` argument. Inductor's code counts as it runs: fused
with the pointwise neighbours of the norm, whose results an opaque kernel would write and read. A
copy that stands in front of the norm counts as avoidable, so a kernel that reads the strided source
is preferred to one that needs the copy. Nothing is moved here: `insert-relayout` does that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.relayout import Relayout, cheapest_relayout, hint, why_not
from fixpass.lowering.site import OPERANDS, OPS, Site, op_name
from fixpass.lowering.target import FALLBACK, Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.cost import Fusion, fusion_of, launches_of_inductor
from fixpass.passes.drop_dead_copies.dead_copy import copied_operands, without_copies
from fixpass.passes.rewrite import find_anchors
from fixpass.runtime.providers import describe_needs


@dataclass(frozen=True)
class Candidate:
    """A kernel with the relayout that it needs, and what the norm then costs."""

    kernel: str
    plan: Relayout
    num_bytes: int
    """Bytes read and written, with those of the relayout's copies."""
    launches: int

    def __str__(self) -> str:
        plural = "" if self.launches == 1 else "es"
        return f"{self.num_bytes:,} bytes in {self.launches} launch{plural}"


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
        fusion = fusion_of(node)
        refused: list[tuple[int, str]] = []
        found: list[Candidate] = []
        for rank, name in enumerate(self.target.kernels):
            if (kernel := kernel_of(name, op)) is None:
                continue
            if name in self.target.missing:
                needs = describe_needs(kernel.needs)
                refused.append((rank, f"{name} is not installed: it needs {needs}"))
                continue
            plan = cheapest_relayout(kernel, site)
            if plan is None or plan.copied:
                refused.append((rank, _refusal(kernel, site, plan)))
            if plan is not None:
                found.append(_candidate(name, op, plan, fusion))
        found = found or [_candidate(FALLBACK, op, Relayout((), False, 0), fusion)]
        best = min(found, key=self._cost)
        names = list(self.target.kernels)
        last = names.index(best.kernel) if best.kernel in names else len(names)
        for rank, text in refused:
            if rank <= last:
                result.missed(node, text)
        node.update_kwarg("kernel_name", best.kernel)
        saved = max(found[0].num_bytes - best.num_bytes, 0)
        text = "".join(_describe(best, found, site, fusion))
        is_same = best.kernel == FALLBACK and not best.plan
        result.applied(node, text, bytes_saved=saved, same_code=is_same)

    def _cost(self, candidate: Candidate) -> tuple[int, int]:
        """What `min` compares; the first of equals is the target's first."""
        if self.target.prefers_fusion:
            return candidate.num_bytes, candidate.launches
        return hint(candidate.plan.num_bytes), 0


def _candidate(name: str, op: str, plan: Relayout, fusion: Fusion) -> Candidate:
    if name == FALLBACK:
        return Candidate(name, plan, fusion.fused_bytes, launches_of_inductor(op))
    num_bytes = fusion.opaque_bytes + hint(plan.num_bytes)
    return Candidate(name, plan, num_bytes, 1 + len(plan.copied))


def _refusal(kernel: Kernel, site: Site, plan: Relayout | None) -> str:
    if plan is None:
        return f"{why_not(kernel, site)}; no relayout would help"
    return f"{kernel.check(site)}; a copy would move {hint(plan.num_bytes):,} bytes"


def _describe(best: Candidate, found: list[Candidate], site: Site, fusion: Fusion) -> Iterator[str]:
    """The remark: the kernel, what it reads, what that costs, and the best of the others."""
    yield f"{best.kernel} reads {site.x}; "
    if not best.plan.copied:
        yield "no copy; "
    if best.plan:
        yield f"{best.plan}; "
    if best.kernel == FALLBACK and fusion.names:
        yield f"fused with {', '.join(fusion.names)}; "
    yield f"reads and writes {best}"
    others = [other for other in found if other is not best]
    if others:
        other = min(others, key=lambda other: (other.num_bytes, other.launches))
        yield f" ({other.kernel}: {other})"
