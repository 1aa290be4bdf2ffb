"""A reload from an iterator, whose tensors may use their memory again when the next one comes.

They are copied as they come, to where the plan of the last reload puts them; nothing of the model
is touched. Where it turns out to be another reload, iterating gives all of them again, those that
were copied first, to one that is planned.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fixpass.runtime.weights.local import PLAIN
from fixpass.runtime.weights.look import Facts, facts_of
from fixpass.runtime.weights.origins import FromMemory, UnlikeError
from fixpass.runtime.weights.spans import Span

_CPU = torch.device("cpu")

Item = tuple[str, Tensor]


@dataclass
class Targets:
    """For each of some tensors where its bytes go.

    at: the address for all of a tensor, which are so many bytes as `sizes` says; 0 where it goes
    nowhere, or to the several places in `parts`: addresses, each with the byte of the tensor that
    comes there and how many from there on. Columns, for speed.
    """

    at: list[int]
    sizes: list[int]
    parts: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    @staticmethod
    def of(spans: Sequence[Span], addresses: Iterable[Iterable[int]], count: int) -> "Targets":
        """Of `count` tensors in spans, whose parts go to these addresses."""
        found = Targets([0] * count, [0] * count)
        for span, goals in zip(spans, addresses, strict=True):
            first, end = span.given[0], span.given[-1] + 1
            given = range(first, end)
            apart = not any(span.given_inner) and not any(found.sizes[first:end])
            apart = apart and found.parts.keys().isdisjoint(given)
            if apart and span.given == tuple(given):
                found.at[first:end], found.sizes[first:end] = goals, span.sizes
                continue
            columns = span.given, goals, span.given_inner, span.sizes
            for part in zip(*columns, strict=True):
                found._add(*part)
        return found

    def of_one(self, index: int) -> list[tuple[int, int, int]]:
        """The parts of one tensor."""
        if self.sizes[index]:
            return [(self.at[index], 0, self.sizes[index])]
        return self.parts.get(index, [])

    def _add(self, index: int, target: int, inner: int, size: int) -> None:
        before = self.of_one(index)
        if not before and not inner:
            self.at[index], self.sizes[index] = target, size
            return
        self.at[index] = self.sizes[index] = 0
        self.parts[index] = [*before, (target, inner, size)]


@dataclass
class _Copied:
    """What was taken from an iterator: for each of `kept`, as far as it came, where it lies.

    memory: what the addresses are of. aside: tensors that the plan has no place for. last: what
    came after them and is not copied.
    """

    kept: FromMemory
    targets: Targets
    memory: Sequence[Tensor]
    count: int = 0
    aside: dict[int, Tensor] = field(default_factory=dict)
    last: Item | None = None

    def __iter__(self) -> Iterator[Item]:
        for index in range(self.count):
            value = self.aside.get(index)
            yield self.kept.names[index], self._together(index) if value is None else value
        if self.last is not None:
            yield self.last

    def _together(self, index: int) -> Tensor:
        """A tensor as it came."""
        dtype, _, shape = self.kept.facts[index]
        value = torch.empty(shape, dtype=dtype, device="cpu")
        for target, inner, size in self.targets.of_one(index):
            ctypes.memmove(value.data_ptr() + inner, target, size)
        return value


class Stream:
    """Names and tensors that come one after another. Iterating gives them all, once."""

    def __init__(self, source: Iterable[Item]) -> None:
        self._source = iter(source)
        self._copied: Iterable[Item] = ()
        self._names: list[str] = []
        self._facts: list[Facts] = []
        self._is_plain = True

    def __iter__(self) -> Iterator[Item]:
        for items in (self._again(), self._source):
            for name, tensor in items:
                if _is_bytes(tensor):
                    self._names.append(name)
                    self._facts.append((tensor.dtype, _CPU, tensor.shape))
                else:
                    self._is_plain = False
                yield name, tensor

    def _again(self) -> Iterable[Item]:
        # Given away, so that what was copied goes when it was given.
        copied, self._copied = self._copied, ()
        return copied

    def bare(self) -> FromMemory | None:
        """What came by iterating, as tensors in memory; None where one was not just its bytes."""
        return FromMemory(self._names, self._facts) if self._is_plain else None

    def read(
        self,
        kept: FromMemory,
        spans: Sequence[Span],
        addresses: Iterable[Iterable[int]],
        memory: Sequence[Tensor],
    ) -> None:
        """Bring the parts of each span to addresses, which are those of `memory`, in this thread.

        Raises UnlikeError where something is not as in `kept`.
        """
        targets = Targets.of(spans, addresses, len(kept.facts))
        self._copied = copied = _Copied(kept, targets, memory)
        expected = zip(kept.names, kept.facts, targets.at, targets.sizes, strict=True)
        over = object(), (torch.uint8, _CPU, torch.Size()), 0, 0
        move, plain, strided = ctypes.memmove, PLAIN, torch.strided
        for item in self._source:
            copied.last, (name, tensor) = item, item
            wanted, facts, target, size = next(expected, over)
            if name != wanted or type(tensor) not in plain or tensor.layout is not strided:
                raise UnlikeError
            if facts_of(tensor) != facts or tensor.is_neg() or not tensor.is_contiguous():
                if (tensor.dtype, tensor.shape) != facts[::2] or tensor.is_meta:
                    raise UnlikeError
                if tensor.data_ptr():
                    tensor = tensor.detach().to("cpu").resolve_neg().contiguous()
            pointer = tensor.data_ptr()
            if not pointer and tensor.numel():
                raise UnlikeError
            if size:
                move(target, pointer, size)
            elif parts := targets.parts.get(copied.count):
                for target, inner, size in parts:
                    move(target, pointer + inner, size)
            else:
                # Nothing takes it. Another plan might.
                copied.aside[copied.count] = tensor.detach().clone()
            copied.count, copied.last = copied.count + 1, None
        if copied.count < len(kept.facts):
            raise UnlikeError


def may_stream(origin: FromMemory, spans: Sequence[Span]) -> bool:
    """Whether each tensor of an origin goes somewhere as a whole, or nowhere.

    What is taken in part, as by a rank, could not be given again.
    """
    targets = Targets.of(spans, [span.starts for span in spans], len(origin.facts))
    for index, (dtype, _, shape) in enumerate(origin.facts):
        end, parts = 0, targets.of_one(index)
        for _, inner, size in sorted(parts, key=_inner):
            if inner != end:
                return False
            end += size
        if parts and end != dtype.itemsize * shape.numel():
            return False
    return True


def _inner(part: tuple[int, int, int]) -> int:
    return part[1]


def _is_bytes(tensor: Tensor) -> bool:
    """Whether a dense copy of a tensor has all of it. Complex ones may be conjugated."""
    strided = type(tensor) in PLAIN and tensor.layout is torch.strided
    return strided and not tensor.dtype.is_complex
