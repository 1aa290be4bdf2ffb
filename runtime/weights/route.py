"""Bring each stored tensor to the parameter that takes it, or say why none does.

Every branch of a mapping asks whether its parameter exists. Shapes are not looked at.
"""

from collections.abc import Mapping as Named
from dataclasses import dataclass, field
from typing import NamedTuple

from fixpass.runtime.weights.mapping import Candidate, Dropped, Mapping
from fixpass.runtime.weights.report import Skipped
from fixpass.runtime.weights.stored import Checkpoint, Stored
from fixpass.runtime.weights.targets import Target

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


def route(checkpoint: Checkpoint, mapping: Mapping, targets: Named[str, Target]) -> Routes:
    """The routes of all stored tensors."""
    routes = Routes(owners(targets))
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
        elif (left := _left_out(stored.name, candidates, mapping)) is not None:
            routes.skipped.append(left)
        else:
            routes.unexpected.append(stored.name)
    _untie(routes, found)
    return routes


def owners(targets: Named[str, Target]) -> dict[str, str]:
    """Each name of a target and the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(target.tensor), name) for name, target in targets.items()}


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
