"""The box of a parameter that each of its stored tensors fills, and whether dtype and shape fit.

Experts go by their index and parts by their name, never by the order in which they come. Nothing is
written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.mapping import Candidate, TensorParallel
from fixpass.runtime.weights.route import Routed
from fixpass.runtime.weights.stored import Box, FilePiece, MemoryPiece, Shape, Stored, describe
from fixpass.runtime.weights.targets import is_quantised

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Slot = tuple[int | None, int]  # an expert and a part


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
