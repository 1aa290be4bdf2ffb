"""Plans for eager calls of opaque norm kernels, from the rows of the kernel table.

The passes ask the table about nodes of a graph; here it is asked about the tensors of one call,
whose sizes are known. `fixpass.runtime.wrapped_kernel` runs the plans; nothing is moved here.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fixpass.lowering.constraints import LastStridesDivisible, SameShape
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.contract_table import kernel_of, rows_of
from fixpass.lowering.layout import Layout, dense_stride
from fixpass.lowering.relayout import Relayout, apply_relayout, cheapest_relayout, why_not
from fixpass.lowering.site import OPERANDS, Site
from fixpass.runtime.errors import KernelError
from fixpass.runtime.opaque_norms import OpaqueNorm
from fixpass.runtime.providers import TRITON
from fixpass.runtime.wrapped_kernel import NOTHING, CallPlan, Planner

log = logging.getLogger("fixpass")


def planner(call: OpaqueNorm) -> Planner:
    """A function that plans calls of `call`, so that the contract of `call.kernel` holds."""

    def plan(operands: Mapping[str, Tensor]) -> CallPlan | None:
        # Asked at each new layout: by then the library is loaded, and its generation is known.
        kernel = _kernel(call)
        sites = _sites(call, operands)
        found = _plan(kernel, call, sites)
        site = next(iter(sites.values()))
        if found is None:
            log.info("%s; the reference runs", why_not(kernel, site))
        elif found != NOTHING:
            copied = f"copies {', '.join(sorted(found.copied)) or 'nothing'}"
            rows = ", views rows" if found.as_rows else ""
            log.info("%s: %s%s", kernel.check(site), copied, rows)
        return found

    return plan


def check_call(op: str, kernel: str, args: tuple[Any, ...], steps: Mapping[str, Any]) -> None:
    """Check the contract of a kernel on the tensors of one call of `fixpass::op`.

    Raises:
        KernelError: compiled code handed over other layouts than the graph recorded.

    """
    row = kernel_of(kernel, op)
    if row is None or row.needs == TRITON:
        return  # Our own kernels refuse by themselves what they cannot compute.
    layouts = {
        name: Layout.of(value)
        for name, value in zip(OPERANDS[op], args, strict=False)
        if isinstance(value, Tensor)
    }
    x = args[0]
    order = steps.get("order") or range(x.dim())
    dtype = steps.get("quant_dtype") or steps.get("out_dtype") or x.dtype
    layouts["out"] = Layout(tuple(x.shape), dense_stride(x.shape, order), dtype)
    verdict = row.check(Site(op, layouts, x.device.type, steps))
    if verdict.constraint is not None and not verdict.constraint.is_asked_at_call:
        raise KernelError(
            f"fixpass::{op} is called with another layout than its graph records: {verdict}; "
            'leave the kernel out of options={"norm_kernels": ...}'
        )


def minds_offsets(call: OpaqueNorm) -> bool:
    """Whether a row of the kernel has a constraint on the storage offset of a row operand."""
    rows = rows_of(call.kernel, call.op)
    return any(
        isinstance(c, LastStridesDivisible) for row in rows for c in row.contract.constraints
    )


def _kernel(call: OpaqueNorm) -> Kernel:
    found = kernel_of(call.kernel, call.op)
    assert found is not None, f"the table has no row {call.kernel!r} for {call.op}"
    # The table does not ask for this: in a graph the result always has the shape of x.
    constraints = (SameShape("out", "x"), *found.contract.constraints)
    return replace(found, contract=Contract(constraints, found.contract.source))


def _sites(call: OpaqueNorm, operands: Mapping[str, Tensor]) -> dict[str, Site]:
    """The call as contracts see it, by the role that is written there.

    A contract has constraints on `out`. The same constraints apply to the sum, so a sum that is
    not written in place has a site of its own.
    """
    x = operands["x"]
    layouts = {role: Layout.of(value) for role, value in operands.items() if role != "total"}
    # A kernel that returns its result allocates it dense.
    layouts.setdefault("out", Layout.contiguous(tuple(x.shape), x.dtype))
    site = Site(call.op, layouts, x.device.type, call.steps(x.dtype, {}))
    if "total" not in operands or call.is_in_place("total"):
        return {"out": site}
    return {"out": site, "total": site.with_layouts(out=Layout.of(operands["total"]))}


def _plan(kernel: Kernel, call: OpaqueNorm, sites: Mapping[str, Site]) -> CallPlan | None:
    """The cheapest relayouts of all sites as one, where it is legal for each."""
    copied: set[str] = set()
    as_rows = False
    for written, site in sites.items():
        relayout = cheapest_relayout(kernel, site)
        if relayout is None:
            return None
        copied.update(written if name == "out" else name for name in relayout.copied)
        as_rows = as_rows or relayout.as_rows
    for read, written in (("x", "out"), ("residual", "total")):
        # An operand that is written in place is copied for the read and the write, or not at all.
        if call.is_in_place(written) and copied & {read, written}:
            copied |= {read, written}
    for written, site in sites.items():
        names = tuple(n for n in site.layouts if (written if n == "out" else n) in copied)
        changed = apply_relayout(site, Relayout(names, as_rows, 0))
        if changed is None or not kernel.check(changed):
            return None
    return CallPlan(frozenset(copied), as_rows) if copied or as_rows else NOTHING
