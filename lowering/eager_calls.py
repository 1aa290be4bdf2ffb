"""Plans for eager calls of opaque norm kernels, from the rows of CONTRACTS.

The passes ask the table about nodes of a graph; here it is asked about the tensors of one call,
whose sizes are known. What is planned is run by `fixpass.runtime.guards`; nothing is moved here.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fixpass.lowering.constraints import LastStridesDivisible, SameShape
from fixpass.lowering.contract import Contract
from fixpass.lowering.contract_table import CONTRACTS, contract_of
from fixpass.lowering.layout import Layout
from fixpass.lowering.relayout import Relayout, apply_relayout, cheapest_relayout, why_not
from fixpass.lowering.site import Site
from fixpass.runtime.errors import KernelError
from fixpass.runtime.guards import NOTHING, NormCall, Plan, Planner

log = logging.getLogger("fixpass")


def planner(kernel: str, call: NormCall) -> Planner:
    """What makes the contract of `kernel` hold for the operands of a call.

    Raises KernelError where the table has no row for the kernel and the op of the call.
    """
    _contract(kernel, call)

    def plan(operands: Mapping[str, Tensor]) -> Plan | None:
        # Asked at each new layout: the library is there by then, and says its generation.
        contract = _contract(kernel, call)
        sites = _sites(call, operands)
        found = _plan(contract, call, sites)
        site = next(iter(sites.values()))
        if found is None:
            log.info("%s; the reference runs", why_not(contract, site))
        elif found != NOTHING:
            copied = f"copies {', '.join(sorted(found.copied)) or 'nothing'}"
            rows = ", views rows" if found.as_rows else ""
            log.info("%s: %s%s", contract.check(site), copied, rows)
        return found

    return plan


def minds_offsets(kernel: str, op: str) -> bool:
    """Whether some row for `kernel` asks where in its storage an operand starts."""
    rows = (row for row in CONTRACTS if row.kernel == kernel and row.op == op)
    return any(isinstance(c, LastStridesDivisible) for row in rows for c in row.constraints)


def _contract(kernel: str, call: NormCall) -> Contract:
    found = contract_of(kernel, call.op)
    if found is None:
        known = ", ".join(dict.fromkeys(row.kernel for row in CONTRACTS if row.op == call.op))
        raise KernelError(f"no contract of {kernel!r} for {call.op}; there are those of {known}")
    # The table does not ask for it, because what a pass lets a kernel write has the shape of x.
    return replace(found, constraints=(SameShape("out", "x"), *found.constraints))


def _sites(call: NormCall, operands: Mapping[str, Tensor]) -> dict[str, Site]:
    """The call as contracts see it, by the role that is written there.

    A contract asks of what is written under the name of `out`. It asks the same of the sum, so
    that a sum that is not written in place has a site of its own.
    """
    x = operands["x"]
    layouts = {role: Layout.of(value) for role, value in operands.items() if role != "total"}
    # A kernel that returns its result allocates it dense.
    layouts.setdefault("out", Layout.contiguous(tuple(x.shape), x.dtype))
    before = call.rounds_before if isinstance(call.rounds_before, bool) else False
    site = Site(call.op, layouts, x.device.type, call.steps(x.dtype, before))
    if "total" not in operands or _is_in_place(call, "total"):
        return {"out": site}
    return {"out": site, "total": site.with_layouts(out=Layout.of(operands["total"]))}


def _plan(contract: Contract, call: NormCall, sites: Mapping[str, Site]) -> Plan | None:
    """The cheapest relayouts of all sites as one, where it is legal for each."""
    copied: set[str] = set()
    as_rows = False
    for written, site in sites.items():
        relayout = cheapest_relayout(contract, site)
        if relayout is None:
            return None
        copied.update(written if name == "out" else name for name in relayout.copied)
        as_rows = as_rows or relayout.as_rows
    for read, written in (("x", "out"), ("residual", "total")):
        # What is read and written in place is copied for both or for none.
        if _is_in_place(call, written) and copied & {read, written}:
            copied |= {read, written}
    for written, site in sites.items():
        names = tuple(name for name in site.rows if (written if name == "out" else name) in copied)
        changed = apply_relayout(site, Relayout(names, as_rows, 0))
        if changed is None or not contract.check(changed):
            return None
    return Plan(frozenset(copied), as_rows) if copied or as_rows else NOTHING


def _is_in_place(call: NormCall, written: str) -> bool:
    read = {"out": "x", "total": "residual"}[written]
    return written in call.roles and call.roles[written] == call.roles.get(read)
