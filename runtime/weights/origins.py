"""Where the bytes of a reload come from: files, or tensors in memory.

Two origins are equal where they hold tensors of equal names, dtypes and shapes at equal places:
a plan that was made for one then holds for the other, whatever the values are. Nothing is known
here of the model that the bytes go to, but addresses.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import add, eq
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights import vectored
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.collected import add_cut_off
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.local import PLAIN, is_freed
from fixpass.runtime.weights.look import Facts, facts_of
from fixpass.runtime.weights.read import Task
from fixpass.runtime.weights.spans import Span, move
from fixpass.runtime.weights.stored import Checkpoint, FilePiece, Stored


class UnlikeError(Exception):
    """A reload is not like the one that a plan was made for."""


@dataclass(frozen=True, slots=True)
class FromFiles:
    """Safetensors files."""

    files: Files

    def checkpoint(self) -> Checkpoint:
        """The tensors."""
        return self.files.tensors()

    def paths(self) -> list[Path]:
        """The files, in the order in which spans number them."""
        return [header.path for header in self.files.headers]

    def bare(self) -> Self:
        """The origin for later comparisons."""
        return self

    def numbered(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """The spans as they are: their offsets say all."""
        return tuple(spans)

    def into(self, spans: Sequence[Span], memory: Sequence[Tensor]) -> Iterator[Task]:
        """What brings each span as it is into memory of its size."""
        for span, held in zip(spans, memory, strict=True):
            yield partial(_fill_all, self._path(span), span, held)

    def to(self, spans: Sequence[Span], pointers: Sequence[int]) -> Iterator[Task]:
        """What brings the parts of each span to tensors at these addresses."""
        for span in spans:
            yield partial(_fill, self._path(span), span, span.ranges(pointers))

    def explain(self, error: CheckpointError) -> None:
        """Say in a note which tensors cannot be read."""
        add_cut_off(error, self.checkpoint().values())

    def _path(self, span: Span) -> Path:
        return self.files.headers[span.file].path


@dataclass(frozen=True, slots=True)
class FromMemory:
    """Dense tensors in this process, as if they were one file, each behind the one before."""

    names: list[str]
    facts: list[Facts]
    tensors: Sequence[Tensor] = field(default=(), compare=False)
    pointers: list[int] = field(default_factory=list, compare=False)
    """Where the tensors are."""

    @staticmethod
    def of(source: Mapping[str, Tensor], like: object = None) -> "FromMemory | None":
        """The tensors of a state dict; None where their values are not just their bytes.

        like: an origin that they may be equal to, whose columns are used then: of thousands of
        tuples that are kept, Python's garbage collector would look at each.
        """
        names, tensors = list(source), list(source.values())
        if not PLAIN.issuperset(map(type, tensors)) or not all(map(_is_strided, tensors)):
            return None
        if isinstance(like, FromMemory) and like._are_like(names, tensors):
            names, facts = like.names, like.facts
        else:
            facts = list(map(facts_of, tensors))
            if any(dtype.is_complex or device.type != "cpu" for dtype, device, _ in facts):
                return None
        pointers = list(map(Tensor.data_ptr, tensors))
        able = (
            all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
            and (all(pointers) or not any(map(is_freed, tensors)))
        )
        return FromMemory(names, facts, tensors, pointers) if able else None

    def _are_like(self, names: list[str], tensors: Sequence[Tensor]) -> bool:
        return self.names == names and all(map(eq, map(facts_of, tensors), self.facts))

    def checkpoint(self) -> Checkpoint:
        """The tensors, as that file would have them."""
        found, offset = {}, 0
        for name, (dtype, _, shape) in zip(self.names, self.facts, strict=True):
            piece = FilePiece(_MEMORY, offset, Box.whole(tuple(shape)))
            found[name] = Stored(name, dtype, tuple(shape), (piece,), "memory")
            offset += found[name].num_bytes
        return found

    def paths(self) -> list[Path]:
        """The file, as spans number it."""
        return [_MEMORY]

    def bare(self) -> "FromMemory":
        """The origin for later comparisons, without its tensors."""
        return FromMemory(self.names, self.facts)

    def into(self, spans: Sequence[Span], memory: Sequence[Tensor]) -> Iterator[Task]:
        """What brings each span as it is into memory of its size."""
        for span, held in zip(spans, memory, strict=True):
            yield partial(_gather_all, span, self.pointers, held)

    def to(self, spans: Sequence[Span], pointers: Sequence[int]) -> Iterator[Task]:
        """What brings the parts of each span to tensors at these addresses."""
        for span in spans:
            yield partial(_gather, span, self.pointers, span.addresses(pointers))

    def explain(self, error: CheckpointError) -> None:
        """Memory cannot break."""

    def numbered(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """The spans with the tensors here that their parts come from."""
        ends = list(accumulate(stored.num_bytes for stored in self.checkpoint().values()))
        result = []
        for span in spans:
            given = [bisect_right(ends, span.offset + start) for start in span.starts]
            first = [ends[index - 1] if index else 0 for index in given]
            inner = [span.offset + s - f for s, f in zip(span.starts, first, strict=True)]
            result.append(replace(span, given=tuple(given), given_inner=tuple(inner)))
        return tuple(result)


Origin = FromFiles | FromMemory

_MEMORY = Path("memory")


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _fill_all(path: Path, span: Span, memory: Tensor) -> int:
    return _fill(path, span, array("Q", (memory.data_ptr(), span.num_bytes)))


def _gather_all(span: Span, pointers: Sequence[int], memory: Tensor) -> int:
    return _gather(span, pointers, span.within(memory))


def _fill(path: Path, span: Span, numbers: "array[int]") -> int:
    vectored.fill(path, span.offset, span.num_bytes, numbers)
    return span.num_bytes


def _gather(span: Span, pointers: Sequence[int], targets: Iterable[int]) -> int:
    sources = map(add, map(pointers.__getitem__, span.given), span.given_inner)
    move(targets, sources, span.sizes)
    return span.num_bytes
