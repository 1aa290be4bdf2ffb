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

from fixpass.runtime.weights.look import PLAIN, facts_of
from fixpass.runtime.weights.origins import Facts, FromMemory, UnlikeError
from fixpass.runtime.weights.spans import Span

_CPU = torch.device("cpu")

Item = tuple[str, Tensor]
Parts = list[tuple[int, int, int]]
"""Addresses, each with the byte of a tensor that comes there and how many from there on."""


@dataclass
class _Copied:
    """What was taken from an iterator: for each of `kept`, as far as it came, where it lies.

    memory: what the addresses are of. aside: tensors that the plan has no place for. last: what
    was taken and is not as it was.
    """

    kept: FromMemory
    targets: list[Parts]
    memory: Sequence[Tensor]
    count: int = 0
    aside: dict[int, Tensor] = field(default_factory=dict)
    last: Item | None = None

    def __iter__(self) -> Iterator[Item]:
        for index in range(self.count):
            name, facts = self.kept.names[index], self.kept.facts[index]
            yield name, self.aside.get(index, _together(facts, self.targets[index]))
        if self.last is not None:
            yield self.last


class Stream:
    """Names and tensors that come one after another. Iterating gives them all, once."""

    def __init__(self, source: Iterable[Item]) -> None:
        self._source = iter(source)
        self._copied: Iterable[Item] = ()
        self._names: list[str] = []
        self._facts: list[Facts] = []
        self._is_plain = True

    def __iter__(self) -> Iterator[Item]:
        for items in (self._copied, self._source):
            for name, tensor in items:
                if type(tensor) in PLAIN and tensor.layout is torch.strided:
                    self._names.append(name)
                    self._facts.append((tensor.dtype, _CPU, tensor.shape))
                else:
                    self._is_plain = False
                yield name, tensor

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
        targets = _targets(spans, addresses, kept.facts)
        self._copied = copied = _Copied(kept, targets, memory)
        expected = zip(kept.names, kept.facts, targets, strict=True)
        move, plain, strided = ctypes.memmove, PLAIN, torch.strided
        for item in self._source:
            name, tensor = item
            wanted, facts, parts = next(expected, _NOTHING)
            if name != wanted or type(tensor) not in plain or tensor.layout is not strided:
                copied.last = item
                raise UnlikeError
            pointer, is_lazy = 0, tensor.is_neg() or tensor.is_conj()
            if facts_of(tensor) == facts and tensor.is_contiguous() and not is_lazy:
                pointer = tensor.data_ptr()
            elif (dense := _dense(tensor, facts)) is not None:
                tensor, pointer = dense, dense.data_ptr()
            if not pointer and facts[2].numel():
                copied.last = item
                raise UnlikeError
            if not parts:
                # Nothing takes it. Another plan might.
                copied.aside[copied.count] = tensor.detach().clone()
            for target, inner, size in parts:
                move(target, pointer + inner, size)
            copied.count += 1
        if copied.count < len(targets):
            raise UnlikeError


_NOTHING: tuple[None, Facts, Parts] = (None, (torch.uint8, _CPU, torch.Size()), [])


def may_stream(origin: FromMemory, spans: Sequence[Span]) -> bool:
    """Whether each tensor of an origin goes somewhere as a whole, or nowhere.

    What is taken in part, as by a rank, could not be given again.
    """
    sizes = [dtype.itemsize * shape.numel() for dtype, _, shape in origin.facts]
    for parts, whole in zip(_targets(spans, [s.starts for s in spans], sizes), sizes, strict=True):
        end = 0
        for _, inner, size in sorted(parts, key=_inner):
            if inner != end:
                return False
            end += size
        if parts and end != whole:
            return False
    return True


def _targets(
    spans: Sequence[Span], addresses: Iterable[Iterable[int]], tensors: Sequence[object]
) -> list[Parts]:
    """For each of the tensors where its bytes go."""
    targets: list[Parts] = [[] for _ in tensors]
    for span, goals in zip(spans, addresses, strict=True):
        columns = span.given, goals, span.given_inner, span.sizes
        for index, target, inner, size in zip(*columns, strict=True):
            targets[index].append((target, inner, size))
    return targets


def _inner(part: tuple[int, int, int]) -> int:
    return part[1]


def _dense(tensor: Tensor, facts: Facts) -> Tensor | None:
    """Its values in dense memory of this process, if it has any and is of this dtype and shape."""
    alike = (tensor.dtype, tensor.shape) == (facts[0], facts[2])
    if not alike or tensor.is_meta or not tensor.data_ptr():
        return None
    return tensor.detach().to("cpu").resolve_neg().resolve_conj().contiguous()


def _together(facts: Facts, parts: Parts) -> Tensor:
    """A tensor as it came."""
    dtype, _, shape = facts
    value = torch.empty(shape, dtype=dtype, device="cpu")
    for target, inner, size in parts:
        ctypes.memmove(value.data_ptr() + inner, target, size)
    return value
