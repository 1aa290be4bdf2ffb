"""Describe stored tensors, and boxes: rectangular parts of a tensor, in elements.

A stored tensor, the part of a parameter that it fills and the shard that a rank holds are boxes;
their intersection is copied. Nothing here touches data.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fixpass.runtime.weights.files import OpenFile

Shape = tuple[int, ...]


class Box(NamedTuple):
    """The elements `start[i] <= index[i] < start[i] + shape[i]` of a tensor."""

    start: Shape
    shape: Shape

    @staticmethod
    def whole(shape: Shape) -> "Box":
        """All of a tensor of this shape."""
        return Box((0,) * len(shape), shape)

    @property
    def stop(self) -> Shape:
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def moved(self, offset: Shape) -> "Box":
        """The same box where the origin lies at `offset` of another tensor."""
        return Box(tuple(a + b for a, b in zip(self.start, offset, strict=True)), self.shape)

    def relative(self, origin: Shape) -> "Box":
        """The same box as seen from `origin`."""
        return self.moved(tuple(-a for a in origin))

    def intersection(self, other: "Box") -> "Box | None":
        """What two boxes of one tensor share; None where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        shape = tuple(b - a for a, b in zip(start, map(min, self.stop, other.stop), strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def within(self, shape: Shape) -> bool:
        """Whether a tensor of this shape has all of the box."""
        return len(shape) == len(self.shape) and all(
            a >= 0 and b <= n for a, b, n in zip(self.start, self.stop, shape, strict=True)
        )

    def of(self, tensor: Tensor) -> Tensor:
        """The box as a view of a tensor."""
        if self.shape == tuple(tensor.shape):
            return tensor
        for dim, (start, length) in enumerate(zip(self.start, self.shape, strict=True)):
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def halves(self) -> "tuple[Box, Box]":
        """The box cut in two across the first dimension that has more than one element."""
        dim = next(dim for dim, length in enumerate(self.shape) if length > 1)
        left = self.shape[dim] // 2
        shapes = [
            (*self.shape[:dim], n, *self.shape[dim + 1 :]) for n in (left, self.shape[dim] - left)
        ]
        middle = (*self.start[:dim], self.start[dim] + left, *self.start[dim + 1 :])
        return Box(self.start, shapes[0]), Box(middle, shapes[1])


def span(box: Box, shape: Shape) -> tuple[int, int]:
    """The first element of `box` in a dense tensor of `shape`, and elements to behind its last.

    The box lies in one run exactly where the second number is `box.numel`.
    """
    first = last = 0
    step = 1
    for start, length, size in zip(
        reversed(box.start), reversed(box.shape), reversed(shape), strict=True
    ):
        first += start * step
        last += (start + length - 1) * step
        step *= size
    return first, last - first + 1


def dense_strides(shape: Sequence[int]) -> Shape:
    """The strides of a dense tensor; a size of 0 counts as 1, as it does in torch."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class FilePiece(NamedTuple):
    """A box of a tensor as dense bytes at `offset` of a file."""

    file: OpenFile
    offset: int
    box: Box

    @property
    def path(self) -> Path:
        return self.file.path


class MemoryPiece(NamedTuple):
    """A box of a tensor that is a tensor in this process, of any strides and device."""

    tensor: Tensor
    box: Box


class Stored(NamedTuple):
    """A named tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: tuple[FilePiece, ...] | tuple[MemoryPiece, ...]
    origin: str
    """The file or the kind of source, for messages."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def values(self) -> list[Tensor]:
        """The tensors that hold it in memory; none where it is in files."""
        return [piece.tensor for piece in self.pieces if isinstance(piece, MemoryPiece)]

    def __str__(self) -> str:
        return f"{self.name!r} ({describe(self.dtype, self.shape)} in {self.origin})"


Checkpoint = Mapping[str, Stored]


def describe(dtype: torch.dtype, shape: Shape) -> str:
    """A dtype and shape as in `bf16[4096, 14336]`."""
    short = str(dtype).removeprefix("torch.")
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(short, short)
    return f"{short}{list(shape)}"
