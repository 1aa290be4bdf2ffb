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

from fixpass.lowering.relayout import hint
from fixpass.lowering.site import OPS
from fixpass.lowering.target import FALLBACK, Target
from fixpass.passes.base import JOINED_MODULES, Choice, Pass, PassResult
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.norm_candidates import Candidates, KernelCandidate, candidates_of
from fixpass.passes.rewrite import find_anchors


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
        seen = candidates_of(node, self.target)
        best = min(seen.found, key=self._cost)
        names = list(self.target.kernels)
        last = names.index(best.kernel) if best.kernel in names else len(names)
        for name, text in seen.refused:
            if names.index(name) <= last:
                result.missed(node, text)
        node.update_kwarg("kernel_name", best.kernel)
        first = seen.found[0]
        is_strided = seen.site.x.is_dense() is not True
        sites = node.meta.get(JOINED_MODULES, ())
        choice = Choice(
            best.kernel, best.launches, first.launches, is_strided, best.plan.copied, sites
        )
        saved = max(first.num_bytes - best.num_bytes, 0)
        result.applied(node, "".join(_describe(best, seen)), bytes_saved=saved, choice=choice)

    def _cost(self, candidate: KernelCandidate) -> tuple[int, int]:
        """What `min` compares; the first of equals is the target's first."""
        if self.target.prefers_fusion:
            return candidate.num_bytes, candidate.launches
        return hint(candidate.plan.num_bytes), 0


def _describe(best: KernelCandidate, seen: Candidates) -> Iterator[str]:
    """The remark: the kernel, what it reads, what that costs, and the best of the others."""
    yield f"{best.kernel} reads {seen.site.x}; "
    if best.overwrites:
        yield f"copies {' and '.join(best.overwrites)}, which the kernel overwrites; "
    elif not best.plan.copied:
        yield "no copy; "
    if best.plan:
        yield f"{best.plan}; "
    if best.kernel == FALLBACK and seen.fusion.names:
        yield f"fused with {', '.join(seen.fusion.names)}; "
    yield f"reads and writes {best}"
    others = [other for other in seen.found if other is not best]
    if others:
        other = min(others, key=lambda other: (other.num_bytes, other.launches))
        yield f" ({other.kernel}: {other})"
