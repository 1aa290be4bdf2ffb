"""The kernels that a target has for one norm, with what each would cost there, or why it cannot.

This looks and counts; `select-norm-kernel` chooses, and reports show the same figures.
"""

from dataclasses import dataclass

from torch import fx

from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.relayout import Relayout, cheapest_relayout, copy_bytes, hint, why_not
from fixpass.lowering.site import OPERANDS, Site, op_name
from fixpass.lowering.target import FALLBACK, Target
from fixpass.passes.cost import Fusion, fusion_of, launches_of_inductor
from fixpass.passes.drop_dead_copies.dead_copy import copied_operands, without_copies
from fixpass.runtime.providers import describe_needs


@dataclass(frozen=True)
class KernelCandidate:
    """A kernel with the relayout that it needs, and what the norm then costs."""

    kernel: str
    plan: Relayout
    num_bytes: int
    """Bytes read and written, with those of all copies."""
    launches: int
    overwrites: tuple[str, ...] = ()
    """The operands that are copied because the kernel writes to them."""

    def __str__(self) -> str:
        plural = "" if self.launches == 1 else "es"
        return f"{self.num_bytes:,} bytes in {self.launches} launch{plural}"


@dataclass(frozen=True)
class Candidates:
    """What a target has for one norm."""

    site: Site
    """The norm's layouts, read through the copies that a kernel may not need."""
    fusion: Fusion
    found: tuple[KernelCandidate, ...]
    """In the target's order of preference; at least one."""
    refused: tuple[tuple[str, str], ...]
    """Each kernel that is not installed or would need a copy, with the reason."""


def candidates_of(node: fx.Node, target: Target) -> Candidates:
    """Compare the norm's operands with the contract of each kernel of the target."""
    op = op_name(node)
    site = without_copies(Site.of(node), OPERANDS[op], copied_operands(node))
    fusion = fusion_of(node)
    found: list[KernelCandidate] = []
    refused: list[tuple[str, str]] = []
    for name in target.kernels:
        if (kernel := kernel_of(name, op)) is None:
            continue
        if name in target.missing:
            needs = describe_needs(kernel.needs)
            refused.append((name, f"{name} is not installed: it needs {needs}"))
            continue
        plan = cheapest_relayout(kernel, site)
        if plan is None or plan.copied:
            refused.append((name, _refusal(kernel, site, plan)))
        if plan is not None:
            found.append(_candidate(kernel, site, plan, fusion))
    if not found:
        found = [_inductors(op, Relayout((), False, 0), fusion)]
    return Candidates(site, fusion, tuple(found), tuple(refused))


def _candidate(kernel: Kernel, site: Site, plan: Relayout, fusion: Fusion) -> KernelCandidate:
    if kernel.name == FALLBACK:
        return _inductors(kernel.op, plan, fusion)
    written = tuple(name for name in kernel.overwrites if name in site.layouts)
    num_bytes = fusion.opaque_bytes + hint(plan.num_bytes + copy_bytes(site, written))
    launches = 1 + len(plan.copied) + len(written)
    return KernelCandidate(kernel.name, plan, num_bytes, launches, written)


def _inductors(op: str, plan: Relayout, fusion: Fusion) -> KernelCandidate:
    return KernelCandidate(FALLBACK, plan, fusion.fused_bytes, launches_of_inductor(op))


def _refusal(kernel: Kernel, site: Site, plan: Relayout | None) -> str:
    if plan is None:
        return f"{why_not(kernel, site)}; no relayout would help"
    return f"{kernel.check(site)}; a copy would move {hint(plan.num_bytes):,} bytes"
