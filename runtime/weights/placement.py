"""Find the box of a parameter that each stored tensor fills; check that dtype and shape fit.

Experts go by their index and parts by their name, never by the order in which they come. Nothing is
written.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.mapping import Candidate
from fixpass.runtime.weights.mapping_rules import TensorParallel
from fixpass.runtime.weights.route import Routed
from fixpass.runtime.weights.stored import Box, FilePiece, MemoryPiece, Shape, Stored, describe
from fixpass.runtime.weights.targets import is_quantised

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Slot = tuple[int | None, int]  # an expert and a part


class Placed(NamedTuple):
    """The box `source` of a stored tensor fills `box` of a parameter, which has the same rank."""

    stored: Stored
    source: Box
    """In the order of the parameter's dimensions; see `as_stored`."""
    box: Box
    candidate: Candidate | None = None

    def as_stored(self, source: Box, view: Tensor) -> tuple[Box, Tensor]:
        """A part of `source`, and the view of the parameter that takes it, as they are stored."""
        start, shape = source
        if self.candidate is not None and self.candidate.entry is not None:
            start, shape = (self.candidate.entry, *start), (1, *shape)
            view = view.unsqueeze(0)
        if self.candidate is not None and self.candidate.transposed:
            start, shape, view = _transposed(start), _transposed(shape), view.mT
        return Box(start, shape), view


def taken(shape: Shape, candidate: Candidate) -> Box:
    """The box of a stored tensor of this shape that a parameter takes, in the parameter's order."""
    if candidate.transposed:
        shape = _transposed(shape)
    if candidate.entry is not None:
        shape = shape[1:]
    which, many = candidate.half
    if many == 1 or not shape or shape[0] % many:
        return Box.whole(shape)
    length, rest = shape[0] // many, shape[1:]
    return Box((which * length, *(0 for _ in rest)), (length, *rest))


def _transposed(shape: Shape) -> Shape:
    return (*shape[:-2], *reversed(shape[-2:]))


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
        source = taken(stored.shape, item.candidate)
        if len(source.shape) != len(whole):
            raise _unfit(name, whole, item)
        if item.candidate.broadcast and source.numel == 1:
            source = Box.whole(_room(whole, item.candidate))
        elif sliced is not None and parallel is not None:
            source = _slice(source, sliced, parallel, item)
        fitted[slot] = item, stored, source
    result = Placement()
    for item, stored, source in fitted.values():
        start = _start(name, whole, item, source, fitted)
        if start is None:
            result.unplaced.append(item)
        else:
            result.placed.extend(_placed(stored, source, start, item.candidate))
    result.missing = _missing(whole, fitted)
    return result


def _room(whole: Shape, candidate: Candidate) -> Shape:
    """The shape that one of equal parts, or an expert, has in a parameter."""
    room = list(whole)
    if candidate.expert is not None:
        room[0] = 1
    if (dim := _part_dim(candidate)) < len(room):
        room[dim] //= candidate.part[1]
    return tuple(room)


def _placed(stored: Stored, source: Box, start: Shape, candidate: Candidate) -> Iterator[Placed]:
    if math.prod(stored.shape) == source.numel or not candidate.broadcast:
        yield Placed(stored, source, Box(start, source.shape), candidate)
        return
    one = (1,) * len(start)
    for index in itertools.product(*map(range, source.shape)):
        yield Placed(stored, Box.whole(one), Box(start, one).moved(index), candidate)


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
    if item.candidate.entry is not None:
        return stored
    more = 0 if item.candidate.expert is None else 1
    if math.prod(stored.shape) == 1 and len(stored.shape) + more != rank:
        # A scale is stored as [] or [1], and kept as either.
        return _reshaped(stored, (1,) * rank)
    return _reshaped(stored, (1, *stored.shape)) if more else stored


def _reshaped(stored: Stored, shape: Shape) -> Stored:
    if shape == stored.shape:
        return stored
    cut = len(shape) - len(stored.shape)

    def reshaped(piece: FilePiece | MemoryPiece) -> Any:
        is_one = cut < 0 or math.prod(shape) == 1
        box = Box((0,) * cut + piece.box.start, (1,) * cut + piece.box.shape)
        box = Box.whole(shape) if is_one else box
        if isinstance(piece, MemoryPiece):
            return MemoryPiece(piece.tensor.reshape(box.shape), box)
        return piece._replace(box=box)

    return stored._replace(shape=shape, pieces=tuple(map(reshaped, stored.pieces)))


def _slice(source: Box, dim: int, parallel: TensorParallel, item: Routed) -> Box:
    length, rest = divmod(source.shape[dim], parallel.size)
    if rest:
        raise CheckpointError(f"{item.stored} has no {parallel.size} equal parts along dim {dim}")
    start, shape = list(source.start), list(source.shape)
    start[dim], shape[dim] = start[dim] + parallel.rank * length, length
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


def place_part(stored: Stored, start: Shape, whole: Shape, name: str) -> Placed:
    """The place of a tensor that fills a part of parameter `name`, which begins at `start`."""
    rank = len(whole)
    shape = (1,) * (rank - len(stored.shape)) + stored.shape
    start = (*start, *(0,) * (rank - len(start)))
    box = Box(start, shape)
    if len(shape) != rank or len(start) != rank or not box.within(whole):
        raise CheckpointError(
            f"{stored} at {list(start)} is not within {name!r}, {describe(stored.dtype, whole)}"
        )
    pieces = [MemoryPiece(values.reshape(shape), Box.whole(shape)) for values in stored.values]
    return Placed(stored._replace(shape=shape, pieces=tuple(pieces)), Box.whole(shape), box)


def check_apart(placed: list[Placed], name: str) -> None:
    """Raise CheckpointError where two parts of a parameter overlap."""
    ordered = sorted(placed, key=lambda item: item.box.start)
    for index, item in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.box.start and other.box.start[0] >= item.box.stop[0]:
                break
            if item.box.intersection(other.box):
                raise CheckpointError(
                    f"two parts of {name!r} overlap: from {list(item.box.start)} and from "
                    f"{list(other.box.start)} on"
                )
