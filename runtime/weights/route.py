"""Find the parameter that takes each stored tensor, and list tensors that no parameter takes.

Every branch of a mapping asks whether its parameter exists. Then come checks by name: tensors that
were renamed, scales that are left out, and tied parameters that were given twice.
"""

from collections.abc import Iterable
from collections.abc import Mapping as Named
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.mapping import Candidate, Dropped, Mapping
from fixpass.runtime.weights.read import STAGING, read
from fixpass.runtime.weights.reports import LoadReport, Skipped
from fixpass.runtime.weights.stored import Box, Checkpoint, Stored
from fixpass.runtime.weights.targets import WeightTarget, is_quantised

NO_PARAMETER = "the model has no such parameter"


class Routed(NamedTuple):
    """A stored tensor, and the parameter and part that takes it."""

    stored: Stored
    candidate: Candidate


@dataclass
class Routes:
    """The stored tensors of each parameter, by the first of its names, and those without one."""

    owner: dict[str, str]
    """Each name of a target, and the first name of the same tensor."""
    taken: dict[str, list[Routed]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    twins: list[tuple[Stored, Stored]] = field(default_factory=list)
    """Stored tensors for the same place of a tied parameter; the first of a pair is loaded."""


def route(checkpoint: Checkpoint, mapping: Mapping, targets: Named[str, WeightTarget]) -> Routes:
    """The routes of all stored tensors."""
    first: dict[int, str] = {}
    routes = Routes({name: first.setdefault(id(t.tensor), name) for name, t in targets.items()})
    found: dict[str, list[Routed]] = {}
    for stored in checkpoint.values():
        candidates = mapping.candidates(stored.name)
        if isinstance(candidates, Dropped):
            routes.skipped.append(
                Skipped(stored.name, candidates.target, candidates.branch, candidates.why)
            )
            continue
        taker = next((found for found in candidates if found.target in targets), None)
        if taker is not None:
            found.setdefault(taker.target, []).append(Routed(stored, taker))
        elif split := _split(stored, mapping, targets, routes.unexpected):
            for one in split:
                found.setdefault(one.target, []).append(Routed(stored, one))
        elif (left := _left_out(stored.name, candidates, mapping)) is not None:
            routes.skipped.append(left)
        else:
            routes.unexpected.append(stored.name)
    if len(first) == len(targets):
        routes.taken = found
    else:
        _untie(routes, found)
    return routes


def _split(
    stored: Stored, mapping: Mapping, targets: Named[str, WeightTarget], unexpected: list[str]
) -> list[Candidate]:
    """The parameters that take the experts of a stored tensor, one each."""
    taken: list[Candidate] = []
    for part in mapping.entries(stored.name, stored.shape[0]) if stored.shape else ():
        here = [one for one in part if one.target in targets]
        taken.extend(here)
        if here:
            unexpected.extend(
                f"{stored.name}[{one.entry}]" for one in part if one.target not in targets
            )
    return taken


def _left_out(name: str, candidates: tuple[Candidate, ...], mapping: Mapping) -> Skipped | None:
    """The record of a tensor that a rule knows though the model has nothing for it."""
    best = candidates[0]
    if best.branch != "default":
        return Skipped(name, best.target, best.branch, NO_PARAMETER)
    return (
        Skipped(name, best.target, "scale", NO_PARAMETER) if mapping.is_scale(best.target) else None
    )


def _untie(routes: Routes, found: dict[str, list[Routed]]) -> None:
    """Of the names of one tied parameter, let one load it."""
    owner = routes.owner
    chosen: dict[str, str] = {}
    for name in found:
        if name == owner[name] or owner[name] not in chosen:
            chosen[owner[name]] = name
    for name, routed in found.items():
        if chosen[owner[name]] == name:
            routes.taken[owner[name]] = routed
            continue
        why = f"tied to {chosen[owner[name]]}, which is loaded"
        routes.skipped.extend(Skipped(item.stored.name, name, "tied", why) for item in routed)
        loaded = {(i.candidate.expert, i.candidate.part): i for i in found[chosen[owner[name]]]}
        for item in routed:
            if twin := loaded.get((item.candidate.expert, item.candidate.part)):
                routes.twins.append((twin.stored, item.stored))


def scales_left_out(scales: Iterable[str], written: Iterable[WeightTarget]) -> list[str]:
    """The scales of modules in which a quantised weight is written and the scale is not."""
    modules = {
        target.name.rpartition(".")[0] for target in written if is_quantised(target.tensor.dtype)
    }
    return [name for name in scales if name.rpartition(".")[0] in modules]


def scales_without_taker(report: LoadReport, mapping: Mapping) -> list[str]:
    """The scales of a checkpoint that the model has no parameter for."""
    return [
        skipped.name
        for skipped in report.skipped
        if skipped.why == NO_PARAMETER and mapping.is_scale(skipped.mapped)
    ]


def check_twins(twins: Iterable[tuple[Stored, Stored]]) -> None:
    """Raise CheckpointError where two names of one parameter were given different values."""
    for one, other in twins:
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not alike or not (_is_same(one, other) or _are_equal(one, other, Box.whole(one.shape))):
            raise CheckpointError(
                f"{one} and {other} are for one tied parameter, and their values differ: drop one "
                "of them with Mapping(filters=...)"
            )


def _is_same(one: Stored, other: Stored) -> bool:
    """Whether both are the same tensor in memory."""
    pairs = list(zip(one.values, other.values, strict=False))
    return bool(pairs) and all(
        (a.data_ptr(), a.stride(), a.is_neg(), a.is_conj())
        == (b.data_ptr(), b.stride(), b.is_neg(), b.is_conj())
        for a, b in pairs
    )


def _are_equal(one: Stored, other: Stored, box: Box) -> bool:
    if box.numel > 1 and box.numel * one.dtype.itemsize > STAGING // 2:
        return all(_are_equal(one, other, half) for half in box.halves())
    # Of a DTensor each holds the same part, and the rest stays zero.
    values = [
        read(stored, torch.zeros(box.shape, dtype=one.dtype, device="cpu"), box)
        for stored in (one, other)
    ]
    bits = [value.reshape(-1).view(torch.uint8) for value in values]
    return torch.equal(bits[0], bits[1])
