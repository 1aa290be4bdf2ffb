"""The planner: turns stored tensors and a model into copies, before a byte of it changes.

`make_plan` checks all of a checkpoint against all of a model. It knows mappings, tensor
parallelism, shards, ties, layouts, packs and parameters with loaders of their own. All faults of
the data are found and listed together. Nothing is written.
"""

import math
from collections.abc import Mapping as Named
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.checkpoint_view import Destination, destination
from fixpass.runtime.weights.mapping import Candidate, Mapping
from fixpass.runtime.weights.options import RAISES, Options
from fixpass.runtime.weights.own_loaders import OwnLoads, own_loader
from fixpass.runtime.weights.parameter_layout import record_of
from fixpass.runtime.weights.placement import (
    Placed,
    check_apart,
    check_dtype,
    missing_parts,
    place,
    place_part,
)
from fixpass.runtime.weights.read import Copy, copies
from fixpass.runtime.weights.renames import suggest
from fixpass.runtime.weights.reports import Initialised, LoadReport, Missing, Skipped, some
from fixpass.runtime.weights.route import Routed, route, scales_left_out
from fixpass.runtime.weights.stored import Box, Checkpoint, MemoryPiece, Shape, Stored, describe
from fixpass.runtime.weights.targets import PLAIN, WeightTarget

MOST_FAULTS = 10
NOTHING_STORED = "nothing is stored for it"

Parts = Named[str, Sequence[tuple[Stored, Shape]]]
"""Tensors for parts of parameters by the parameter's name, each with the part's start."""


@dataclass
class Plan:
    """All that a load will do."""

    written: list[int] = field(default_factory=list)
    """Which of the model's tensors change, as indices of the walk."""
    tensors: list[Tensor] = field(default_factory=list)
    """The local values of those tensors, detached: views of the memory to write."""
    copies: list[Copy] = field(default_factory=list)
    own: list[OwnLoads] = field(default_factory=list)
    covered: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes written and all bytes of each parameter that is not written whole."""
    loaded: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    initialised: list[Initialised] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    twins: list[tuple[Stored, Stored]] = field(default_factory=list)
    """Stored tensors for one parameter under two of its names; the first is loaded."""
    hints: list[str] = field(default_factory=list)

    def report(self) -> LoadReport:
        """The plan as the report of the load that does it."""
        moved = sum(
            math.prod(copy.source.shape) * copy.stored.dtype.itemsize for copy in self.copies
        )
        moved += sum(item.stored.num_bytes for own in self.own for item in own.routed)
        return LoadReport(
            tuple(self.loaded),
            tuple(self.skipped),
            tuple(self.missing),
            tuple(self.unexpected),
            tuple(self.initialised),
            moved,
        )

    def note_covered(self, covered: Named[str, tuple[int, int]], options: Options) -> None:
        """Note the bytes that loaders of parameters' own wrote; raise where too few are."""
        for name, (done, total) in covered.items():
            self.loaded = [loaded for loaded in self.loaded if loaded != name]
            if options.strict is None:
                self.covered[name] = done, total
            elif all(missing.name != name for missing in self.missing):
                why = f"its weight_loader wrote {done:,} of {total:,} bytes"
                self.missing.append(Missing(name, why))
        if covered:
            check_faults(self, options)

    def position(self, index: int, tensor: Tensor) -> int:
        """Note that a tensor of the model is written; its place among those that are."""
        self.written.append(index)
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def make_plan(
    checkpoint: Checkpoint, parts: Parts, model: Sequence[WeightTarget], options: Options
) -> Plan:
    """Plan to load `checkpoint`, and tensors for parts of parameters, into a model.

    Args:
        checkpoint: stored tensors by name.
        parts: tensors for parts of parameters.
        model: the tensors of the model, as a walk finds them.
        options: the mapping, and whether to cast, to fill and to raise for what is missing.

    Raises:
        CheckpointError: with a list of all tensors that do not fit.

    """
    mapping, cast = options.mapping, options.cast
    places = {target.name: index for index, target in enumerate(model)}
    routes = route(checkpoint, mapping, {target.name: target for target in model})
    plan = Plan(skipped=routes.skipped, unexpected=routes.unexpected)
    faults: list[str] = []
    for name, routed in routes.taken.items():
        index = places[name]
        try:
            _add(plan, index, model[index], routed, options)
        except CheckpointError as error:
            faults.append(_with_layout(str(error), model[index]))
    if faults:
        more = len(faults) - MOST_FAULTS
        faults[MOST_FAULTS:] = [f"and {more:,} more"] if more > 0 else []
        raise CheckpointError("\n".join(faults))
    for index, target in enumerate(model):
        name = target.name
        if routes.owner[name] == name and name not in routes.taken and name not in parts:
            _add_missing(plan, index, target, options)
    for name, given in parts.items():
        if name not in places:
            plan.unexpected.append(name)
        else:
            _add_parts(plan, places[name], model[places[name]], given, cast)
    lacking = [item.name for item in plan.missing] + [item.name for item in plan.initialised]
    plan.scales = [name for name in lacking if mapping.is_scale(name)]
    if options.strict is None and options.scope != "model":
        plan.scales = scales_left_out(plan.scales, [model[index] for index in plan.written])
    plan.twins = routes.twins
    if missing := [item for item in plan.missing if item.why == NOTHING_STORED]:
        shapes = {m.name: tuple(model[places[m.name]].tensor.shape) for m in missing}
        unexpected = {
            name: checkpoint[name].shape for name in plan.unexpected if name in checkpoint
        }
        plan.hints = list(map(str, suggest(shapes, unexpected)[:MOST_FAULTS]))
    check_faults(plan, options)
    return plan


def _with_layout(fault: str, target: WeightTarget) -> str:
    found = record_of(target.tensor)
    return fault if found is None else f"{fault} (its layout is {found.plan.layout})"


def _add(
    plan: Plan, index: int, target: WeightTarget, routed: Sequence[Routed], options: Options
) -> None:
    loader = own_loader(target)
    for item in routed:
        if item.stored.dtype != target.tensor.dtype:
            # A loader of its own may round, but no loader knows a scale that it is not given.
            rounds = options.cast or loader is not None
            check_dtype(item.stored, target.name, target.tensor.dtype, cast=rounds)
    if loader is not None:
        where = destination(target.tensor, repr(target.name))
        position = plan.position(index, where.memory)
        plan.own.append(OwnLoads(target, loader, list(routed), where, position))
        lacks = missing_parts(routed)
    elif _add_plain(plan, index, target.tensor, routed, options.mapping):
        lacks = ""
    else:
        lacks = _add_placed(plan, index, target, routed, options.mapping)
    if lacks:
        plan.missing.append(Missing(target.name, lacks))
    else:
        plan.loaded.append(target.name)


def _add_plain(
    plan: Plan, index: int, tensor: Tensor, routed: Sequence[Routed], mapping: Mapping
) -> bool:
    """Add the copy of a tensor that is all of a plain parameter, the most common case.

    Whether it is that. `_add_placed` finds the same copy in three times as long.
    """
    (stored, candidate), *more = routed
    is_whole = candidate == Candidate("default", candidate.target)
    if more or not is_whole or mapping.tensor_parallel is not None:
        return False
    if type(tensor) not in PLAIN or len(stored.pieces) != 1 or record_of(tensor) is not None:
        return False
    (piece,) = stored.pieces
    if tensor.shape != stored.shape or piece.box.shape != stored.shape:
        return False
    if tensor.layout is not torch.strided or not tensor.is_contiguous() or not tensor.data_ptr():
        return False
    data = tensor.detach()
    plan.copies.append(Copy(stored, piece, piece.box, data, plan.position(index, data)))
    return True


def _add_placed(
    plan: Plan, index: int, target: WeightTarget, routed: Sequence[Routed], mapping: Mapping
) -> str:
    where = destination(target.tensor, repr(target.name))
    placement = place(target.name, where.whole, routed, mapping.tensor_parallel)
    for item in placement.unplaced:
        why = "its place depends on a part that is not there"
        candidate = item.candidate
        plan.skipped.append(Skipped(item.stored.name, target.name, candidate.branch, why))
    position = plan.position(index, where.memory)
    for placed in placement.placed:
        plan.copies.extend(placed_copies(placed, where, target.name, position))
    return placement.missing


def placed_copies(placed: Placed, where: Destination, name: str, position: int) -> list[Copy]:
    """The copies that bring a placed tensor into the part of the parameter that is here."""
    part = placed.box.intersection(where.box)
    if part is None:
        return []
    source = part.relative(placed.box.start).moved(placed.source.start)
    inside = part.relative(where.box.start).of(where.tensor)
    source, inside = placed.as_stored(source, inside)
    found = list(copies(placed.stored, source, inside, position, where.view))
    if sum(copy.source.numel for copy in found) != source.numel:
        # Only a state dict of DTensors holds less than all of a tensor.
        assert all(isinstance(piece, MemoryPiece) for piece in placed.stored.pieces)
        raise CheckpointError(
            f"{placed.stored} is a DTensor, of which this rank holds another part than it needs "
            f"for {name!r}, {describe(where.tensor.dtype, where.whole)}: give its full_tensor()"
        )
    return found


def _add_missing(plan: Plan, index: int, target: WeightTarget, options: Options) -> None:
    wish = getattr(target.tensor, "missing_param_init", options.missing)
    if wish == "error":
        plan.missing.append(Missing(target.name, NOTHING_STORED))
        return
    if wish not in ("ones", "zeros"):
        raise CheckpointError(
            f"{target.name!r}: missing parameters become 'error', 'ones' or 'zeros', not {wish!r}"
        )
    where = destination(target.tensor, repr(target.name))
    value = torch.full((), float(wish == "ones"), dtype=where.tensor.dtype, device="cpu")
    shape, box = tuple(where.tensor.shape), Box.whole(tuple(where.tensor.shape))
    stored = Stored(target.name, value.dtype, shape, (MemoryPiece(value.expand(shape), box),), wish)
    position = plan.position(index, where.memory)
    plan.copies.extend(copies(stored, box, where.tensor, position, where.view))
    plan.initialised.append(Initialised(target.name, wish))


def _add_parts(
    plan: Plan, index: int, target: WeightTarget, parts: Sequence[tuple[Stored, Shape]], cast: bool
) -> None:
    name, dtype = target.name, target.tensor.dtype
    where = destination(target.tensor, repr(name))
    placed = []
    for stored, start in parts:
        check_dtype(stored, name, dtype, cast=cast)
        placed.append(place_part(stored, start, where.whole, name))
    check_apart(placed, name)
    position = plan.position(index, where.memory)
    for item in placed:
        plan.copies.extend(placed_copies(item, where, name, position))
    done = sum(item.box.numel for item in placed) * dtype.itemsize
    total = math.prod(where.whole) * dtype.itemsize
    if done == total:
        plan.loaded.append(name)
    else:
        plan.covered[name] = done, total


def check_faults(plan: Plan, options: Options) -> None:
    """Raise for what is missing or left over, at the level of `strict`, or else of `scope`."""
    scope, said = options.scope, f"strict={options.strict!r} raises for these"
    level = options.strict or ("complete" if scope == "model" else "none")
    faults = [f"{what}: {some(found)}" for what in RAISES[level] if (found := vars(plan)[what])]
    if options.strict is None:
        said = f"scope={scope!r} raises for these"
        partial = [missing for missing in plan.missing if missing.why != NOTHING_STORED]
        if scope != "model":
            # A parameter that this update does not touch is not missing.
            plan.missing = partial
            faults += [f"unexpected: {some(plan.unexpected)}"] if plan.unexpected else []
        if scope == "parameters" and partial:
            faults.append(f"missing: {some(tuple(partial))}")
        if scope != "parts" and plan.covered:
            texts = [f"{name} ({a:,} of {b:,} bytes)" for name, (a, b) in plan.covered.items()]
            faults.append(f"not covered: {some(texts)}")
    if faults:
        raise CheckpointError("\n".join([*faults, *plan.hints, said]))
