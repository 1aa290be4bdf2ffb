"""`python -m fixpass passes`, `targets`, `kernels` and `doctor`: lists, as tables or as JSON."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fixpass.config import Config
from fixpass.installation import findings, known_kernels
from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import rows_of
from fixpass.lowering.target import CPU, TARGETS
from fixpass.passes import default_passes, entry_passes
from fixpass.pipelines import installed_passes, known_targets
from fixpass.report.tables import progress, show_json, show_records

_STATES = {"works": "works", "absent": "not installed", "broken": "does not work"}


def passes(arguments: argparse.Namespace) -> int:
    """List the passes in the order in which they run."""
    stages = {
        "Dynamo": entry_passes(),
        "ATen": default_passes(CPU),
        "ATen, of an installed package": installed_passes(),
    }
    records = [
        {"pass": step.name, "graph": stage, "what it does": _first_line(step)}
        for stage, steps in stages.items()
        for step in steps
    ]
    show_records(records, as_json=arguments.json)
    return 0


def _first_line(step: object) -> str:
    return (type(step).__doc__ or "").partition("\n")[0]


def kernels(arguments: argparse.Namespace) -> int:
    """List the kernels with the source that shows what each one needs."""
    records = [
        {**_kernel(row, arguments.full or arguments.json), "source": row.contract.source}
        for row in known_kernels()
    ]
    show_records(records, as_json=arguments.json)
    return 0


def targets(arguments: argparse.Namespace) -> int:
    """List the targets with their kernels, the preferred one first."""
    known_kernels()
    groups: dict[tuple[str, ...], list[str]] = {}
    for target in known_targets(Config.resolve()) + TARGETS:
        groups.setdefault(target.kernels, []).append(target.name)
    # In a table, lists below each other would look like pairs of a target and a kernel.
    listed: Callable[[Sequence[str]], Any] = list if arguments.json else ", ".join
    records: list[dict[str, Any]] = []
    for names, of_targets in groups.items():
        first = {"targets": listed(of_targets)}
        if not arguments.full:
            records.append(first | {"kernels": listed(names)})
            continue
        rows = (row for name in names for row in rows_of(name))
        records += [first | _kernel(row, with_constraints=True) for row in rows]
    show_records(records, as_json=arguments.json)
    return 0


def _kernel(row: Kernel, with_constraints: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"kernel": row.name, "computes": row.op}
    if with_constraints:
        facts["constraints"] = [str(c) for c in row.contract.constraints] or ["any layout"]
    return facts


def doctor(arguments: argparse.Namespace) -> int:
    """Say what works on this machine, and what to do about the rest."""
    with progress() as say:
        say("trying torch, the compiler, our C++ part, libraries and devices")
        found = list(findings())
    if arguments.json:
        show_json([asdict(finding) for finding in found])
        return 0
    records = [
        {
            "part": finding.name,
            "state": title,
            "found": finding.detail,
            "what to do": finding.way_out,
        }
        for state, title in _STATES.items()
        for finding in found
        if finding.state == state
    ]
    show_records(records)
    return 0
