"""The tensors of a checkpoint: each has a name and one or more pieces, in files or in memory.

A safetensors file stores a tensor in one piece; a torch DCP folder in one piece for each rank that
had a shard. Nothing is read here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.files import OpenFile


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
