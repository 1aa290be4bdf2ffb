"""What a checkpoint holds: named tensors, each in pieces that lie in files or in memory.

A safetensors file stores a tensor in one piece; a torch DCP folder in one for each rank that had
a shard. Nothing is read here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.weights.box import Box, Shape


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A box of a tensor as dense bytes at `offset` of a file."""

    path: Path
    offset: int
    box: Box


@dataclass(frozen=True, slots=True)
class MemoryPiece:
    """A box of a tensor that is a tensor in this process, of any strides and device."""

    tensor: Tensor
    box: Box


@dataclass(frozen=True, slots=True)
class Stored:
    """A named tensor of a checkpoint. `origin` says in words where it comes from."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: tuple[FilePiece, ...] | tuple[MemoryPiece, ...]
    origin: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name!r} ({describe(self.dtype, self.shape)} in {self.origin})"


Checkpoint = Mapping[str, Stored]


def describe(dtype: torch.dtype, shape: Shape) -> str:
    """A dtype and shape as in `bf16[4096, 14336]`."""
    short = str(dtype).removeprefix("torch.")
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(short, short)
    return f"{short}{list(shape)}"
