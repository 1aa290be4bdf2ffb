"""What a reload found out and the next one may use: which bytes of it go to which parameter.

It holds as long as files have the same headers, byte for byte, or a state dict tensors of the same
names and layouts; and the model the same names, objects, layouts and attributes. It is kept only
where bytes go as they are into parameters that have memory of their own: not for folds, packs,
casts and loaders of parameters' own. Nothing is read or written here.
"""

from bisect import bisect_right
from collections.abc import Mapping as Named
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fixpass.runtime.checkpoint import vectored
from fixpass.runtime.checkpoint.local import local_part
from fixpass.runtime.checkpoint.mapping import Mapping
from fixpass.runtime.checkpoint.read import Copy, direct
from fixpass.runtime.checkpoint.report import LoadReport
from fixpass.runtime.checkpoint.stored import FilePiece
from fixpass.runtime.checkpoint.vectored import Range
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.alias import packed
from fixpass.runtime.weights.collected import Prepared
from fixpass.runtime.weights.look import Layouts, walk
from fixpass.runtime.weights.options import Options, Scope
from fixpass.runtime.weights.origins import Origin, Part, Span
from fixpass.runtime.weights.table import generation


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The plan of a reload. It holds no tensor and no module.

    ids: of all tensors of the walk. written: positions in the walk of the tensors that are.
    """

    origin: Origin
    asked: tuple[Mapping, Scope, bool]
    names: list[Any]
    layouts: Layouts
    marks: list[Any]
    ids: list[int]
    generation: int
    spans: tuple[Span, ...]
    written: tuple[int, ...]
    report: LoadReport

    def is_for(self, origin: Origin, options: Options) -> bool:
        """Whether the same is asked for."""
        able = options.mode != "journal" and not options.finite
        return able and self.origin == origin and self.asked == _asked(options)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those tensors of a walk that are written."""
        return [tensors[index] for index in self.written]

    def fits(self, names: list[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether the model, as a walk finds it, is what the plan was made for."""
        return (
            self.generation == generation()
            and self.names == names
            and self.ids == list(map(id, tensors))
            and self.layouts.hold(tensors)
            and self.marks == _marks(tensors)
        )


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept_for(model: nn.Module) -> Kept | None:
    """The plan of the last reload of a model, if it could be kept."""
    return _KEPT.get(unwrapped(model))


def keep(
    model: nn.Module,
    origin: Origin,
    prepared: Prepared,
    before: Named[int, Tensor],
    options: Options,
) -> None:
    """Keep the plan of a reload that was done, where it can be used again.

    before: the model's tensors by the addresses that they had.
    """
    inside = unwrapped(model)
    _KEPT.pop(inside, None)
    names, tensors = walk(inside)
    position = {id(tensor): index for index, tensor in enumerate(tensors)}
    if prepared.own or prepared.covered or prepared.places.foldings or not _are_apart(tensors):
        return
    starts = {pointer: position[id(t)] for pointer, t in before.items() if id(t) in position}
    spans = _spans(origin, prepared.copies, starts, tensors)
    if spans is None:
        return
    _KEPT[inside] = Kept(
        origin.bare(),
        _asked(options),
        names,
        Layouts.of(tensors),
        _marks(tensors),
        list(map(id, tensors)),
        generation(),
        origin.numbered(spans),
        tuple(sorted({each for span in spans for each in span.positions})),
        replace(prepared.report, seconds=0.0),
    )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether each has memory of its own, and none is part of a pack."""
    found = {id(tensor): tensor for tensor in tensors}.values()
    if any(packed(tensor) is not None for tensor in found):
        return False
    storages = {local_part(tensor).untyped_storage()._cdata for tensor in found}
    return len(storages) == len(found)


def _spans(
    origin: Origin, copies: Sequence[Copy], starts: Named[int, int], tensors: Sequence[Tensor]
) -> list[Span] | None:
    """What is brought from where; None where something is more than a move of bytes."""
    checkpoint = origin.checkpoint()
    ranges: dict[Path, list[Range]] = {path: [] for path in origin.paths()}
    for copy in copies:
        (piece, *more) = checkpoint[copy.stored.name].pieces
        if more or not isinstance(piece, FilePiece) or piece.box.numel != copy.piece.box.numel:
            return None
        # The same dense bytes, in the shape that the copy speaks of.
        piece = replace(piece, box=copy.piece.box)
        found = direct(replace(copy, piece=piece), piece)
        if found is None:
            return None
        ranges[piece.path].append(found)
    ordered, spans = sorted(starts), []
    for file, (path, wanted) in enumerate(ranges.items()):
        for batch in vectored.batches(path, wanted):
            parts = [_part(piece, ordered, starts, tensors) for piece in batch.ranges]
            if None in parts:
                return None
            whole = [part for part in parts if part is not None]
            spans.append(Span.of(file, batch.ranges[0].offset, whole))
    return spans


def _part(
    piece: Range, ordered: Sequence[int], starts: Named[int, int], tensors: Sequence[Tensor]
) -> Part | None:
    """Which part of which tensor a range of memory is."""
    start = ordered[bisect_right(ordered, piece.address) - 1]
    index, inner = starts[start], piece.address - start
    if inner < 0 or inner + piece.num_bytes > local_part(tensors[index]).nbytes:
        return None
    return index, inner, piece.num_bytes


def _asked(options: Options) -> tuple[Mapping, Scope, bool]:
    return options.mapping, options.scope, options.cast


def _marks(tensors: Sequence[Tensor]) -> list[Any]:
    """Attributes by name and identity; empty where no tensor has any."""
    held = [tensor.__dict__ for tensor in tensors]
    if not any(held):
        return []
    return [(tuple(own), tuple(map(id, own.values()))) for own in held]
