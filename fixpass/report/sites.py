"""Each norm of an explained graph: its layout, and what every kernel of the target asks there."""

from dataclasses import dataclass
from itertools import islice, product
from typing import ClassVar

from torch import fx

from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.layout import Known, dtype_name
from fixpass.lowering.relayout import hint
from fixpass.lowering.site import OPS
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult, module_path
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.norm_candidates import Candidates, candidates_of
from fixpass.passes.rewrite import find_anchors

_SPANS = 64


@dataclass(frozen=True)
class KernelFacts:
    """One kernel at one norm."""

    name: str
    constraints: tuple[tuple[str, Known], ...]
    """Each constraint of its contract, and whether it holds for the operands as they are."""
    cost: str
    """Bytes and launches, with the relayout that the kernel needs; or why it cannot be called."""


@dataclass(frozen=True)
class SiteFacts:
    """One norm, before a kernel is chosen. Symbolic sizes have their traced values."""

    node: str
    where: str
    """The module that the norm came from."""
    op: str
    layout: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kernels: tuple[KernelFacts, ...]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The first rows in memory: start and length of each, in elements; at most 64."""
        outer = sorted(zip(self.strides[:-1], self.shape[:-1], strict=True), reverse=True)
        if not self.shape or 0 in self.shape:
            return ()
        length = (self.shape[-1] - 1) * self.strides[-1] + 1
        # The innermost dimension runs fastest, so the first rows are neighbours in memory.
        indices = product(*(range(min(size, _SPANS)) for _, size in outer))
        rows = islice(indices, _SPANS)
        starts = [sum(i * step for i, (step, _) in zip(row, outer, strict=True)) for row in rows]
        return tuple((start, length) for start in sorted(set(starts)))


@dataclass(frozen=True)
class RecordSites(Pass):
    """Writes down each norm; changes nothing. Stands in front of `select-norm-kernel`."""

    name: ClassVar[str] = "record-sites"

    target: Target
    sites: list[SiteFacts]

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for node in find_anchors(graph, tuple(op_overload(op) for op in OPS)):
            self.sites.append(_facts(node, self.target))


def _facts(node: fx.Node, target: Target) -> SiteFacts:
    seen = candidates_of(node, target)
    x = seen.site.x
    kernels = (_kernel(name, seen) for name in target.kernels if kernel_of(name, seen.site.op))
    return SiteFacts(
        node.name,
        module_path(node),
        seen.site.op,
        str(x),
        dtype_name(x.dtype),
        x.dtype.itemsize,
        tuple(map(hint, x.shape)),
        tuple(map(hint, x.stride)),
        tuple(kernels),
    )


def _kernel(name: str, seen: Candidates) -> KernelFacts:
    kernel = kernel_of(name, seen.site.op)
    assert kernel is not None
    constraints = tuple((str(c), c.holds(seen.site)) for c in kernel.contract.constraints)
    candidate = next((found for found in seen.found if found.kernel == name), None)
    if candidate is None:
        return KernelFacts(name, constraints, dict(seen.refused).get(name, ""))
    relayout = f", {candidate.plan}" if candidate.plan else ""
    return KernelFacts(name, constraints, f"{candidate}{relayout}")
