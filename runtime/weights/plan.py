"""Check all of a checkpoint against all of a model, before a byte of the model changes.

`make_plan` gives what is to be copied, what goes to loaders of parameters' own, and a report. All
faults of the data are found and listed together. Nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.destination import Destination, destination
from fixpass.runtime.weights.local import is_freed
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.own_loaders import OwnLoads, own_loader
from fixpass.runtime.weights.place import Placed, check_dtype, missing_parts, place
from fixpass.runtime.weights.read import Copy, copies
from fixpass.runtime.weights.report import Initialised, LoadReport, Missing, Skipped
from fixpass.runtime.weights.route import Routed, route
from fixpass.runtime.weights.stored import Checkpoint, MemoryPiece, describe
from fixpass.runtime.weights.targets import Target

Missed = Literal["error", "ones", "zeros"]

MOST_FAULTS = 10
NOTHING_STORED = "nothing is stored for it"


@dataclass
class Plan:
    """What a load will do. `fills` are the parameters that are filled with one value."""

    copies: list[Copy] = field(default_factory=list)
    own: list[OwnLoads] = field(default_factory=list)
    fills: list[tuple[Destination, float]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    initialised: list[Initialised] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank moves."""
        read = sum(copy.source.numel * copy.stored.dtype.itemsize for copy in self.copies)
        return read + sum(item.stored.num_bytes for own in self.own for item in own.routed)

    def report(self, seconds: float = 0.0) -> LoadReport:
        """The plan as the report of a load that did it."""
        return LoadReport(
            tuple(self.loaded),
            tuple(self.skipped),
            tuple(self.missing),
            tuple(self.unexpected),
            tuple(self.initialised),
            self.num_bytes,
            seconds,
        )


def make_plan(
    checkpoint: Checkpoint,
    mapping: Mapping,
    targets: dict[str, Target],
    *,
    missing: Missed = "error",
    cast: bool = False,
) -> Plan:
    """What it takes to load `checkpoint`; raises CheckpointError that lists all that does not fit.

    missing: what becomes of a parameter that nothing is stored for; an attribute
    missing_param_init on the parameter says it for that one.
    """
    routes = route(checkpoint, mapping, targets)
    plan = Plan(skipped=routes.skipped, unexpected=routes.unexpected)
    faults: list[str] = []
    for name, routed in routes.taken.items():
        try:
            _add(plan, targets[name], routed, mapping, cast)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        more = len(faults) - MOST_FAULTS
        faults[MOST_FAULTS:] = [f"and {more:,} more"] if more > 0 else []
        raise CheckpointError("\n".join(faults))
    for name in targets:
        if routes.owner[name] == name and name not in routes.taken:
            _add_missing(plan, targets[name], missing)
    lacking = [item.name for item in plan.missing] + [item.name for item in plan.initialised]
    plan.scales = [name for name in lacking if mapping.is_scale(name)]
    return plan


def _add(
    plan: Plan, target: Target, routed: Sequence[Routed], mapping: Mapping, cast: bool
) -> None:
    loader = own_loader(target)
    for item in routed:
        # A loader of its own may round, but no loader knows a scale that it is not given.
        check_dtype(item.stored, target.name, target.tensor.dtype, cast=cast or loader is not None)
    if loader is not None:
        plan.own.append(OwnLoads(target, loader, list(routed)))
        lacks = missing_parts(routed)
    else:
        lacks = _add_copies(plan, target, routed, mapping)
    if lacks:
        plan.missing.append(Missing(target.name, lacks))
    else:
        plan.loaded.append(target.name)


def _add_copies(plan: Plan, target: Target, routed: Sequence[Routed], mapping: Mapping) -> str:
    if (plain := _plain_copy(target, routed, mapping)) is not None:
        plan.copies.append(plain)
        return ""
    where = destination(target.tensor, repr(target.name))
    placement = place(target.name, where.whole, routed, mapping.tensor_parallel)
    for item in placement.unplaced:
        why = "its place depends on a part that is not there"
        candidate = item.candidate
        plan.skipped.append(Skipped(item.stored.name, target.name, candidate.branch, why))
    for placed in placement.placed:
        plan.copies.extend(placed_copies(placed, where, target.name))
    return placement.missing


def _plain_copy(target: Target, routed: Sequence[Routed], mapping: Mapping) -> Copy | None:
    """The copy of a tensor that is all of a parameter; None where there is more to it.

    What is found below for this, the most common case, takes three times as long.
    """
    tensor, item = target.tensor, routed[0]
    if len(routed) > 1 or item.candidate.branch != "default" or mapping.tensor_parallel:
        return None
    if isinstance(tensor, DTensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    if is_freed(tensor):
        return None
    shape, pieces = item.stored.shape, item.stored.pieces
    if tuple(tensor.shape) != shape or not tensor.is_contiguous() or not tensor.numel():
        return None
    if len(pieces) != 1 or pieces[0].box.shape != shape:
        return None
    return Copy(item.stored, pieces[0], pieces[0].box, tensor.detach())


def placed_copies(placed: Placed, where: Destination, name: str) -> list[Copy]:
    """What it takes to bring a placed tensor into the part of the parameter that is here."""
    part = placed.box.intersection(where.box)
    if part is None:
        return []
    source = part.relative(placed.box.start).moved(placed.source.start)
    view = part.relative(where.box.start).of(where.tensor)
    found = list(copies(placed.stored, source, view))
    if sum(copy.source.numel for copy in found) != source.numel:
        # Only a state dict of DTensors holds less than all of a tensor.
        assert all(isinstance(piece, MemoryPiece) for piece in placed.stored.pieces)
        raise CheckpointError(
            f"{placed.stored} is a DTensor, of which this rank holds another part than it needs "
            f"for {name!r}, {describe(where.tensor.dtype, where.whole)}: give its full_tensor()"
        )
    return found


def _add_missing(plan: Plan, target: Target, missing: Missed) -> None:
    wish = getattr(target.tensor, "missing_param_init", missing)
    match wish:
        case "error":
            plan.missing.append(Missing(target.name, NOTHING_STORED))
        case "ones" | "zeros":
            where = destination(target.tensor, repr(target.name))
            plan.fills.append((where, 1.0 if wish == "ones" else 0.0))
            plan.initialised.append(Initialised(target.name, wish))
        case _:
            raise CheckpointError(
                f"{target.name!r}: missing parameters become 'error', 'ones' or 'zeros', "
                f"not {wish!r}"
            )


def fill(plan: Plan) -> None:
    """Fill what is missing and was asked to be filled."""
    with torch.no_grad():
        for where, value in plan.fills:
            where.tensor.fill_(value)
