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

from fixpass.runtime.weights.look import PLAIN
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

    def read(self, kept: FromMemory, spans: Sequence[Span], memory: Sequence[Tensor]) -> None:
        """Bring each span into memory of its size, in this thread.

        Raises UnlikeError where something is not as in `kept`.
        """
        sizes = [dtype.itemsize * shape.numel() for dtype, _, shape in kept.facts]
        self._copied = copied = _Copied(kept, _targets(spans, memory, sizes), memory)
        expected = zip(kept.names, kept.facts, copied.targets, strict=True)
        move = ctypes.memmove
        for item in self._source:
            name, (dtype, _, shape), parts = next(expected, _NOTHING)
            tensor = item[1]
            if (
                item[0] != name
                or type(tensor) not in PLAIN
                or tensor.dtype is not dtype
                or tensor.shape != shape
                or not _has_values(tensor)
            ):
                copied.last = item
                raise UnlikeError
            if not parts:
                # Nothing takes it. Another plan might.
                copied.aside[copied.count] = tensor.detach().clone()
            else:
                dense = tensor if _is_dense(tensor) else _dense(tensor)
                for target, inner, size in parts:
                    move(target, dense.data_ptr() + inner, size)
            copied.count += 1
        if copied.count < len(sizes):
            raise UnlikeError


_NOTHING: tuple[None, Facts, Parts] = (None, (torch.uint8, _CPU, torch.Size()), [])


def _targets(spans: Sequence[Span], memory: Sequence[Tensor], sizes: Sequence[int]) -> list[Parts]:
    """For each tensor where its bytes go; UnlikeError where some do not, but others."""
    targets: list[Parts] = [[] for _ in sizes]
    for span, held in zip(spans, memory, strict=True):
        columns = span.given, span.given_inner, span.starts, span.sizes
        base = held.data_ptr()
        for index, inner, start, size in zip(*columns, strict=True):
            targets[index].append((base + start, inner, size))
    for parts, whole in zip(targets, sizes, strict=True):
        end = 0
        for _, inner, size in sorted(parts, key=_inner) if len(parts) > 1 else parts:
            if inner != end:
                raise UnlikeError
            end += size
        # What a rank takes in part could not be given again.
        if parts and end != whole:
            raise UnlikeError
    return targets


def _inner(part: tuple[int, int, int]) -> int:
    return part[1]


def _has_values(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return bool(tensor.data_ptr()) or not tensor.numel()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the bytes of the values are those in this process's memory."""
    is_lazy = tensor.is_neg() or tensor.is_conj()
    return tensor.is_cpu and tensor.is_contiguous() and not is_lazy


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").resolve_neg().resolve_conj().contiguous()


def _together(facts: Facts, parts: Parts) -> Tensor:
    """A tensor as it came."""
    dtype, _, shape = facts
    value = torch.empty(shape, dtype=dtype, device="cpu")
    for target, inner, size in parts:
        ctypes.memmove(value.data_ptr() + inner, target, size)
    return value
