"""What a reload found out and the next one may use: which bytes of it go to which parameter.

It holds as long as files have the same headers, byte for byte, or a state dict or an iterator
tensors of the same names and layouts in the same order; and the model the same names, objects,
layouts and attributes. It is kept only where bytes go as they are into parameters that have memory
of their own: not for folds, packs, casts and loaders of parameters' own. Nothing is read or written
here.
"""

from bisect import bisect_right
from collections.abc import Mapping as Named
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights import vectored
from fixpass.runtime.weights.collected import Prepared
from fixpass.runtime.weights.local import local_part
from fixpass.runtime.weights.look import Layouts, pointers_of, walk
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.options import Options, Scope
from fixpass.runtime.weights.origins import FromMemory, Origin
from fixpass.runtime.weights.read import Copy, direct
from fixpass.runtime.weights.relayout import layout_generation, packed
from fixpass.runtime.weights.report import LoadReport
from fixpass.runtime.weights.spans import Part, Span
from fixpass.runtime.weights.stored import FilePiece
from fixpass.runtime.weights.stream import Stream, may_stream
from fixpass.runtime.weights.vectored import Range

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A model as a walk finds it: names, and ids, layouts and marks of its tensors; no tensor."""

    names: list[Any]
    ids: list[int]
    layouts: Layouts
    marks: list[Any]
    generation: int

    @staticmethod
    def of(names: list[Any], tensors: Sequence[Tensor]) -> "Seen":
        ids = list(map(id, tensors))
        return Seen(names, ids, Layouts.of(tensors), _marks(tensors), layout_generation())

    def holds(self, names: list[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether the model is still so, as a walk finds it now."""
        return (
            self.generation == layout_generation()
            and self.names == names
            and self.ids == list(map(id, tensors))
            and self.layouts.hold(tensors)
            and self.marks == _marks(tensors)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The plan of a reload. It holds no tensor and no module.

    seen: the model that it is for. written: positions in the walk of the tensors that are; `ids`
    and `layouts` are theirs. streams: whether tensors may come one after another.
    """

    origin: Origin
    asked: tuple[Mapping, Scope, bool]
    seen: Seen
    spans: tuple[Span, ...]
    written: tuple[int, ...]
    ids: list[int]
    layouts: Layouts
    report: LoadReport
    streams: bool

    def is_for(self, origin: Origin | Stream, options: Options) -> bool:
        """Whether the same is asked for, as far as that is known before it is read."""
        if options.finite or self.asked != _asked(options):
            return False
        if isinstance(origin, Stream):
            return options.mode != "undo_log" and self.streams
        return self.origin == origin

    def of(self, column: Sequence[T]) -> list[T]:
        """Of something for each tensor of a walk, that for those that are written."""
        return [column[index] for index in self.written]

    def others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those tensors of a walk that are not, by any name."""
        if len(self.ids) == len(tensors):
            return []
        mine = set(self.ids)
        return [tensor for tensor in tensors if id(tensor) not in mine]


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept_for(model: nn.Module) -> Kept | None:
    """The plan of the last reload of a model, if it could be kept."""
    return _KEPT.get(unwrapped(model))


class Keeping:
    """A reload whose plan may be kept: what the model is before it, and `keep` for when it is done.

    Made when the update is open. What is kept is what was there then, and what the commit found
    to be there still: what becomes of the model later is seen by the next reload.
    """

    def __init__(self, model: nn.Module, origin: Origin | Stream) -> None:
        names, tensors, _ = walk(unwrapped(model))
        self._model, self._origin, self._tensors = unwrapped(model), origin, tensors
        self._seen = Seen.of(names, tensors)
        self._starts = {p: index for index, p in enumerate(pointers_of(tensors)) if p}
        self._apart = _are_apart(tensors)
        _KEPT.pop(self._model, None)

    def keep(self, prepared: Prepared, options: Options) -> None:
        """Keep the plan, where bytes go as they are into parameters with memory of their own."""
        if prepared.own or prepared.covered or prepared.places.foldings or not self._apart:
            return
        origin = self._origin.bare()
        spans = origin and _spans(origin, prepared.copies, self._starts, self._tensors)
        if not origin or not spans:
            return
        numbered = origin.numbered(spans)
        written = tuple(sorted({each for span in spans for each in span.positions}))
        _KEPT[self._model] = Kept(
            origin,
            _asked(options),
            self._seen,
            numbered,
            written,
            [self._seen.ids[index] for index in written],
            self._seen.layouts.of_some(written),
            replace(prepared.report, seconds=0.0),
            isinstance(origin, FromMemory) and may_stream(origin, numbered),
        )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether each has dense memory of its own, and none is part of a pack."""
    found = {id(tensor): tensor for tensor in tensors}.values()
    if any(t.layout != torch.strided or packed(t) is not None for t in found):
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
