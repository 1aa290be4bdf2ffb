"""Take out each constraint of the contract table in turn, and say which call goes wrong then.

python contract_removal.py called|compiled opaque|ours

"called" calls the kernels themselves. "compiled" compiles the norm op and runs its graph op by op,
with the kernel that the passes choose. Ours run in Triton's interpreter. A line is "found", "MISSED" or "WRONG", the kernel, its library or
generation, the constraint and the fault. "WRONG": a call goes wrong with all the constraints.
"""

import sys
from dataclasses import replace

import torch

from fixpass.lowering import contract_table
from fixpass.lowering.contract import Contract
from fixpass.runtime import providers
from fixpass.runtime.kernels import (  # noqa: F401
    add_rms_norm,
    gated_rms_norm,
    qk_norm,
    rms_norm,
    rms_norm_quant,
)
from fixpass.testing.kernel_memory import trace_memory
from helpers import pointer_kernels
from helpers.compiling import compiled_anew
from helpers.contract_sites import call_sites, fault, good_site


def without(kernel, constraint):
    rest = tuple(each for each in kernel.contract.constraints if each is not constraint)
    return replace(kernel, contract=Contract(rest))


def caller(kernel):
    """The function of a kernel; ours launch in Triton's interpreter."""
    function = providers.load(kernel.callable)
    if kernel.needs != providers.TRITON:
        return function

    def interpreted(*tensors_and_eps, **steps):
        results = []
        report = trace_memory(lambda _: results.append(function(*tensors_and_eps, **steps)),
                              [each for each in tensors_and_eps if isinstance(each, torch.Tensor)])  # fmt: skip
        if report.faults:
            raise RuntimeError(str(report.faults[0]))
        return results[0]

    return interpreted


def compiler(kernel):
    """The op, compiled so that passes choose this kernel where its row in the table allows it."""
    op = getattr(torch.ops.fixpass, kernel.op)

    def run(*tensors_and_eps, **steps):
        def model(*tensors):
            return op(*tensors, tensors_and_eps[-1], **steps)

        return compiled_anew(model, norm_kernels=(kernel.name,))(*tensors_and_eps[:-1])

    return run


def tried(kernel):
    """(constraint, site, fault) where a call without a constraint goes wrong, or without a site."""
    call, faults = caller(kernel), {}
    sites = list(call_sites(good_site(kernel)))

    def fault_of(row):
        for number, site in enumerate(sites):
            if row.check(site):
                faults.setdefault(number, None)
                if faults[number] is None:
                    faults[number] = fault(site, call)
                if faults[number]:
                    return site, faults[number]
        return None, ""

    yield None, *fault_of(kernel)
    for constraint in kernel.contract.constraints:
        yield constraint, *fault_of(without(kernel, constraint))


def with_row(kernel, row, site):
    """The fault of a compiled call where the table has `row` for the kernel."""
    key = kernel.name, kernel.op
    rows, contract_table._table[key] = contract_table._table[key], (row,)
    try:
        return fault(site, compiler(kernel))
    finally:
        contract_table._table[key] = rows


def report(way, kernel):
    for constraint, site, text in tried(kernel):
        if way == "compiled" and site is not None and constraint is not None:
            if wrong := with_row(kernel, kernel, site):
                print(f"WRONG|{kernel.name}|{kernel.needs}|{constraint}|{wrong}")
            text = with_row(kernel, without(kernel, constraint), site)
        if constraint is None:
            word = "WRONG" if text else "right"
        else:
            word = "found" if text else "MISSED"
        print(f"{word}|{kernel.name}|{kernel.needs}|{constraint}|{text}", flush=True)


def main(way, whose):
    rows = [row for row in contract_table.KERNELS if row.contract.constraints]
    for generation in ("", "2026"):
        libraries = pointer_kernels.register(generation)
        for row in rows:
            is_ours = row.needs == providers.TRITON
            if is_ours == (whose == "ours") and ("gemma" in row.needs) == bool(generation):
                report(way, row)
        for library in libraries:
            library._destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
