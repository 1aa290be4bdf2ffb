"""Bytes that follow each other in what a reload comes from, and where they go.

Addresses are given as plain numbers: who calls keeps the memory alive.
"""

import ctypes
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

from torch import Tensor

Part = tuple[int, int, int]
"""The position of a tensor, a byte of it, and how many bytes from there on."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of an origin that follow each other, few enough for one task, and where they go.

    file: which one, where there are several. A part goes to byte `inner` of the tensor at
    `positions` of a model; it has a size, and it starts so many bytes behind `offset`. given and
    given_inner: which tensor and byte of it that is, where the origin is tensors. Columns, for
    speed.
    """

    file: int
    offset: int
    num_bytes: int
    positions: tuple[int, ...]
    inner: tuple[int, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    given: tuple[int, ...] = ()
    given_inner: tuple[int, ...] = ()

    @staticmethod
    def of(file: int, offset: int, parts: Sequence[Part]) -> "Span":
        positions, inner, sizes = zip(*parts, strict=True)
        ends = tuple(accumulate(sizes))
        return Span(file, offset, ends[-1], positions, inner, sizes, (0, *ends[:-1]))

    def addresses(self, pointers: Sequence[int]) -> Iterator[int]:
        """Where the parts go, with tensors at these addresses."""
        return map(add, map(pointers.__getitem__, self.positions), self.inner)

    def within(self, memory: Tensor) -> Iterator[int]:
        """Where the parts are in memory that holds the span."""
        return map(memory.data_ptr().__add__, self.starts)

    def ranges(self, pointers: Sequence[int]) -> "array[int]":
        """Addresses and sizes of the parts in turn, with tensors at these addresses."""
        numbers = array("Q", bytes(16 * len(self.sizes)))
        numbers[::2] = array("Q", self.addresses(pointers))
        numbers[1::2] = array("Q", self.sizes)
        return numbers

    def scatter(self, memory: Tensor, pointers: Sequence[int]) -> int:
        """Bring the bytes of the span, which are all of `memory`, to where they belong."""
        move(self.addresses(pointers), self.within(memory), self.sizes)
        return self.num_bytes


def move(targets: Iterable[int], sources: Iterable[int], sizes: Iterable[int]) -> None:
    """Copy so many bytes from each source to each target."""
    deque(map(ctypes.memmove, targets, sources, sizes), maxlen=0)
