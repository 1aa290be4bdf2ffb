"""Bring each stored tensor to the parameter that takes it, and to its place in that parameter.

`route` asks for every branch of a mapping whether its parameter exists; shapes are not looked at.
`place` gives the box of the parameter that each stored tensor fills. Experts go by their index and
parts by their name, never by the order in which they come. Nothing is written.
"""

import math
from collections.abc import Mapping as Named
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.mapping import Candidate, Dropped, Mapping, TensorParallel
from fixpass.runtime.weights.report import Skipped
from fixpass.runtime.weights.stored import Checkpoint, FilePiece, MemoryPiece, Stored, describe
from fixpass.runtime.weights.targets import Target, is_quantised

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Slot = tuple[int | None, int]  # an expert and a part


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
    why = "the model has no such parameter"
    if best.branch != "default":
        return Skipped(name, best.target, best.branch, why)
    return Skipped(name, best.target, "scale", why) if mapping.is_scale(best.target) else None


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


class Placed(NamedTuple):
    """The box `source` of a stored tensor, which has the parameter's rank, fills `box` of it."""

    stored: Stored
    source: Box
    box: Box


@dataclass
class Placement:
    """What fills a parameter, what has no place for want of other parts, and what is missing."""

    placed: list[Placed] = field(default_factory=list)
    unplaced: list[Routed] = field(default_factory=list)
    missing: str = ""


def check_dtype(stored: Stored, name: str, dtype: torch.dtype, *, cast: bool) -> None:
    """Raise CheckpointError where a parameter of `dtype` cannot take a stored tensor."""
    if stored.dtype == dtype:
        return
    both = f"{name!r} is {dtype} and {stored} is {stored.dtype}"
    if is_quantised(stored.dtype) and dtype in _FLOATS:
        raise CheckpointError(
            f"{both}: its values mean nothing without their scale, and a load does not dequantise. "
            "Make the model with quantised parameters, or dequantise the checkpoint"
        )
    if not (stored.dtype in _FLOATS and dtype in _FLOATS):
        raise CheckpointError(f"{both}: one is not the other's dtype")
    if not cast:
        raise CheckpointError(f"{both}: cast=True rounds to the parameter's dtype")


def place(
    name: str, whole: Shape, routed: Sequence[Routed], parallel: TensorParallel | None
) -> Placement:
    """Where the stored tensors of parameter `name` of shape `whole` go.

    Raises CheckpointError where one does not fit or two want one place.
    """
    sliced = None if parallel is None else parallel.dim(name)
    fitted: dict[Slot, tuple[Routed, Stored, Box]] = {}
    for item in routed:
        slot = item.candidate.expert, item.candidate.part[0]
        if slot in fitted:
            raise CheckpointError(
                f"{fitted[slot][0].stored} and {item.stored} are for the same place of {name!r}"
            )
        stored = _lifted(item, whole)
        if len(stored.shape) != len(whole):
            raise _unfit(name, whole, item)
        source = Box.whole(stored.shape)
        if sliced is not None and parallel is not None:
            source = _slice(source, sliced, parallel, item)
        fitted[slot] = item, stored, source
    result = Placement()
    for item, stored, source in fitted.values():
        start = _start(name, whole, item, source, fitted)
        if start is None:
            result.unplaced.append(item)
        else:
            result.placed.append(Placed(stored, source, Box(start, source.shape)))
    result.missing = _missing(whole, fitted)
    return result


def missing_parts(routed: Sequence[Routed]) -> str:
    """Which parts of a stack a parameter with a loader of its own does not get, in words."""
    slots = {(item.candidate.expert, item.candidate.part[0]) for item in routed}
    parts = range(routed[0].candidate.part[1])
    gone = [(e, p) for e in sorted({e or 0 for e, _ in slots}) for p in parts]
    gone = [(e, p) for e, p in gone if not slots & {(e, p), (None, p)}]
    return f"no part {gone[0][1]} of {len(parts)}" if gone else ""


def _lifted(item: Routed, whole: Shape) -> Stored:
    """The stored tensor with the rank that it has in the parameter."""
    stored, rank = item.stored, len(whole)
    more = 0 if item.candidate.expert is None else 1
    if math.prod(stored.shape) == 1 and len(stored.shape) + more != rank:
        # A scale is stored as [] or [1], and kept as either.
        return _reshaped(stored, (1,) * rank)
    return _reshaped(stored, (1, *stored.shape)) if more else stored


def _reshaped(stored: Stored, shape: Shape) -> Stored:
    if shape == stored.shape:
        return stored
    cut = len(shape) - len(stored.shape)

    def boxed(box: Box) -> Box:
        if cut < 0 or math.prod(shape) == 1:
            return Box.whole(shape)
        return Box((0,) * cut + box.start, (1,) * cut + box.shape)

    pieces: list[FilePiece] | list[MemoryPiece]
    if stored.pieces and isinstance(stored.pieces[0], MemoryPiece):
        pieces = [
            MemoryPiece(piece.tensor.reshape(box.shape), box)
            for piece in stored.pieces
            if isinstance(piece, MemoryPiece) and (box := boxed(piece.box))
        ]
        return stored._replace(shape=shape, pieces=tuple(pieces))
    pieces = [
        piece._replace(box=boxed(piece.box))
        for piece in stored.pieces
        if isinstance(piece, FilePiece)
    ]
    return stored._replace(shape=shape, pieces=tuple(pieces))


def _slice(source: Box, dim: int, parallel: TensorParallel, item: Routed) -> Box:
    length, rest = divmod(source.shape[dim], parallel.size)
    if rest:
        raise CheckpointError(f"{item.stored} has no {parallel.size} equal parts along dim {dim}")
    start, shape = list(source.start), list(source.shape)
    start[dim], shape[dim] = parallel.rank * length, length
    return Box(tuple(start), tuple(shape))


def _part_dim(candidate: Candidate) -> int:
    return candidate.dim + (candidate.expert is not None)


def _start(
    name: str,
    whole: Shape,
    item: Routed,
    source: Box,
    fitted: dict[Slot, tuple[Routed, Stored, Box]],
) -> Shape | None:
    """Where in the parameter the tensor begins; None where one that is not there decides that."""
    expert, dim = item.candidate.expert, _part_dim(item.candidate)
    start, free = [0] * len(whole), set()
    if expert is not None:
        if expert >= whole[0]:
            raise CheckpointError(
                f"{item.stored} is expert {expert} and {name!r} has {whole[0]} experts"
            )
        start[0] = expert
        free.add(0)
    if item.candidate.part[1] > 1:
        if dim >= len(whole):
            raise _unfit(name, whole, item)
        offset = _offset(name, whole, item, source.shape[dim], fitted)
        if offset is None:
            return None
        start[dim] = offset
        free.add(dim)
    if any(d not in free and source.shape[d] != whole[d] for d in range(len(whole))):
        raise _unfit(name, whole, item)
    return tuple(start)


def _offset(
    name: str,
    whole: Shape,
    item: Routed,
    size: int,
    fitted: dict[Slot, tuple[Routed, Stored, Box]],
) -> int | None:
    """Where a part of `size` begins: behind the parts before it, if their sizes are known."""
    which, many = item.candidate.part
    dim = _part_dim(item.candidate)
    found = [fitted.get((item.candidate.expert, part)) for part in range(many)]
    if size * many == whole[dim] and None in found:
        return which * size
    sizes = [other[2].shape[dim] for other in found if other is not None]
    if sum(sizes) > whole[dim] or (None not in found and sum(sizes) != whole[dim]):
        raise _unfit(name, whole, item)
    return None if None in found[:which] else sum(sizes[:which])


def _missing(whole: Shape, fitted: dict[Slot, tuple[Routed, Stored, Box]]) -> str:
    """What a parameter lacks, in words."""
    candidate = next(iter(fitted.values()))[0].candidate
    experts = [None] if candidate.expert is None else list(range(whole[0]))
    many = candidate.part[1]
    gone = [slot for e in experts for p in range(many) if (slot := (e, p)) not in fitted]
    if not gone:
        return ""
    expert, part = gone[0]
    words = [f"expert {expert}"] if expert is not None else []
    words += [f"part {part} of {many}"] if many > 1 else []
    more = f" and {len(gone) - 1:,} more" if len(gone) > 1 else ""
    return f"nothing is stored for {', '.join(words)}{more}"


def _unfit(name: str, whole: Shape, item: Routed) -> CheckpointError:
    candidate, notes = item.candidate, []
    if candidate.expert is not None:
        notes.append(f"expert {candidate.expert}")
    if candidate.part[1] > 1:
        notes.append(f"part {candidate.part[0]} of {candidate.part[1]} along dim {candidate.dim}")
    as_what = f" as {', '.join(notes)}" if notes else ""
    shape = describe(item.stored.dtype, whole)
    return CheckpointError(f"{item.stored} does not fit{as_what} into {name!r}, {shape}")
