"""Run the copies of a plan: bytes go from files or memory straight to where they belong.

A copy whose source and target are dense, on the CPU and of one dtype becomes a part of a `Batch`:
one call of `preadv`, or one memmove for each part. Any other copy (strides, a column slice, another
dtype, device or layout) goes through a staging buffer of STAGING bytes in each thread. Nothing is
checked against a model here.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fixpass.runtime.weights.checkpoint_view import LogicalView
from fixpass.runtime.weights.files import (
    Advance,
    Batch,
    OpenFile,
    Source,
    Task,
    batches,
    in_turn,
    run,
)
from fixpass.runtime.weights.stored import Box, FilePiece, MemoryPiece, Stored, dense_strides, span
from fixpass.runtime.weights.targets import PLAIN

STAGING = 8 << 20
_SMALL = 1 << 20
"""Bytes below which more threads cost more than they save."""

# Bits are moved, not values: some dtypes have no copy kernel of their own.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class Copy(NamedTuple):
    """The box `source` of `piece`, in the piece's own coordinates, goes to all of `target`."""

    stored: Stored
    piece: FilePiece | MemoryPiece
    source: Box
    target: Tensor
    """A view of the memory to write, of any strides, dtype and device."""
    position: int = 0
    """The tensor, among those that are written, that `target` is a view of."""
    view: LogicalView | None = None
    """Brings values to their places where the strides of `target` only name them."""


@dataclass(frozen=True)
class Work:
    """All that is to be moved: batches from `given` sources to `tensors`, and other copies."""

    given: Sequence[Source]
    tensors: Sequence[Tensor]
    """The written tensors; batches name them by position. They own all memory that is written."""
    batches: Sequence[Batch]
    copies: Sequence[Copy]

    @staticmethod
    def of(
        copies: Iterable[Copy],
        tensors: Sequence[Tensor],
        sources: Iterable[Source] = (),
        *,
        batched: bool = True,
    ) -> "Work":
        """The work of some copies. `sources` come first among `given`, in their order.

        With batched=False each copy stays by itself.
        """
        runs, rest, given = [], [], list(sources)
        indices = {id(source): index for index, source in enumerate(given)}
        for copy in copies:
            found = _run_of(copy, tensors[copy.position]) if batched else None
            if found is None:
                rest.append(copy)
                continue
            source, start, inner, size = found
            index = indices.setdefault(id(source), len(given))
            if index == len(given):
                given.append(source)
            runs.append((index, start, copy.position, inner, size))
        return Work(given, tensors, list(batches(runs, given)), rest)

    @property
    def num_bytes(self) -> int:
        rest = sum(copy.source.numel * copy.stored.dtype.itemsize for copy in self.copies)
        return sum(batch.num_bytes for batch in self.batches) + rest

    def run(self, threads: int = 0, advance: Advance = lambda count: None) -> None:
        """Move everything with `threads` threads (0: one a processor, at most 4).

        `advance` is called with the bytes of each finished task. Raises CheckpointError where a
        file can't be read to its end; bytes that were moved until then stay.
        """
        run(self.tasks(), threads if self.num_bytes > _SMALL else 1, advance)
        # The bytes were written behind torch's back: saved values of autograd must know.
        torch.autograd.graph.increment_version([*self.tensors, *(c.target for c in self.copies)])

    def tasks(self) -> Iterator[Task]:
        """Calls that may run in any order, each of which returns the bytes that it moved."""
        for batch in self.batches:
            yield partial(batch.run, self.given, self.tensors)
        for copy in self.copies:
            if isinstance(copy.piece, MemoryPiece):
                yield partial(_copy_memory, copy)
            else:
                yield from (partial(_stage, part, copy.piece) for part in _parts(copy, copy.piece))

    def buffered(self, threads: int = 0) -> "Work":
        """Read everything that is in files into memory; the same work from there."""
        given, batches = list(self.given), []
        tasks: list[Task] = []
        for batch in self.batches:
            file = self.given[batch.sources[0]]
            if isinstance(file, OpenFile):
                # In pieces that malloc uses again: fresh pages would take longer than all the rest.
                memory = torch.empty(batch.num_bytes, dtype=torch.uint8, device="cpu")
                tasks.append(partial(batch.stage, file, memory))
                first = batch.starts[0]
                batch = batch._replace(
                    sources=(len(given),) * len(batch.sizes),
                    starts=tuple(start - first for start in batch.starts),
                )
                given.append(memory)
            batches.append(batch)
        copies = []
        for copy in self.copies:
            if isinstance(copy.piece, FilePiece):
                dtype, shape = copy.stored.dtype, copy.source.shape
                values = torch.empty(shape, dtype=dtype, device="cpu")
                staging = Work.of((copy._replace(target=values, position=0, view=None),), (values,))
                tasks.extend(staging.tasks())
                box = Box.whole(shape)
                copy = copy._replace(piece=MemoryPiece(values, box), source=box)
            copies.append(copy)
        run(tasks, threads if self.num_bytes > _SMALL else 1, lambda count: None)
        return replace(self, given=given, batches=batches, copies=copies)

    def elsewhere(self, place: Callable[[Tensor], Tensor]) -> "Work":
        """The same work into other memory; `place` gives a view of it for a view of this one."""
        moved = [
            copy._replace(
                target=place(copy.target),
                view=copy.view and copy.view._replace(memory=place(copy.view.memory)),
            )
            for copy in self.copies
        ]
        return replace(self, tensors=list(map(place, self.tensors)), copies=moved)


def copies(
    stored: Stored,
    source: Box,
    target: Tensor,
    position: int = 0,
    view: LogicalView | None = None,
) -> Iterator[Copy]:
    """The copies that fill `target` with the box `source` of a stored tensor."""
    if 0 in source.shape:
        return
    for piece in stored.pieces:
        if piece.box == source:
            yield Copy(stored, piece, Box.whole(source.shape), target, position, view)
        elif part := piece.box.intersection(source):
            inside = part.relative(source.start).of(target)
            yield Copy(stored, piece, part.relative(piece.box.start), inside, position, view)


def read(stored: Stored, target: Tensor, source: Box | None = None, *, threads: int = 1) -> Tensor:
    """Fill `target` with a stored tensor, or with a box of it."""
    work = copies(stored, source or Box.whole(stored.shape), target)
    Work.of(work, (target,)).run(threads)
    return target


def in_memory(stored: Stored, threads: int = 1) -> Tensor:
    """A stored tensor in memory of its own."""
    empty = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    return read(stored, empty, threads=threads)


def _run_of(copy: Copy, base: Tensor) -> tuple[Source, int, int, int] | None:
    """A copy as one run of bytes: source, start, byte of `base`, size; None where it is not one."""
    stored, piece, source, target, _, view = copy
    itemsize = stored.dtype.itemsize
    if target.dtype != stored.dtype or view is not None or not target.is_cpu:
        return None
    if not target.is_contiguous() or type(target) not in PLAIN or not (at := target.data_ptr()):
        return None
    first, length = 0, math.prod(source.shape)
    if source.shape != piece.box.shape:
        first, length = span(source, piece.box.shape)
        if length != math.prod(source.shape):
            return None
    inner, size = at - base.data_ptr(), length * itemsize
    if isinstance(piece, FilePiece):
        return piece.file, piece.offset + first * itemsize, inner, size
    tensor = piece.tensor
    if not tensor.is_cpu or not tensor.is_contiguous() or type(tensor) not in PLAIN:
        return None
    if tensor.is_conj() or tensor.is_neg() or not tensor.data_ptr():
        return None
    return tensor, first * itemsize, inner, size


def _parts(copy: Copy, piece: FilePiece) -> Iterator[Copy]:
    """The copy in parts whose bytes in the file fit into the staging buffer."""
    _, length = span(copy.source, piece.box.shape)
    if length * copy.stored.dtype.itemsize <= STAGING or copy.source.numel == 1:
        yield copy
        return
    for half in copy.source.halves():
        inside = half.relative(copy.source.start).of(copy.target)
        yield from _parts(copy._replace(source=half, target=inside), piece)


class _Buffers(threading.local):
    """A staging buffer for each thread, made when first needed and used again."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")


_buffers = _Buffers()


def _stage(copy: Copy, piece: FilePiece) -> int:
    if not _buffers.buffer.numel():
        _buffers.buffer = torch.empty(STAGING, dtype=torch.uint8, device="cpu")
    dtype = copy.stored.dtype
    first, length = span(copy.source, piece.box.shape)
    buffer = _buffers.buffer[: length * dtype.itemsize]
    numbers = in_turn((buffer.data_ptr(),), (buffer.numel(),))
    piece.file.read(piece.offset + first * dtype.itemsize, buffer.numel(), numbers)
    strides = dense_strides(piece.box.shape)
    _put(buffer.view(dtype).as_strided(copy.source.shape, strides), copy)
    return copy.source.numel * dtype.itemsize


def _copy_memory(copy: Copy) -> int:
    assert isinstance(copy.piece, MemoryPiece)
    _put(copy.source.of(copy.piece.tensor), copy)
    return copy.source.numel * copy.stored.dtype.itemsize


def _put(values: Tensor, copy: Copy) -> None:
    if copy.view is not None:
        copy.view.put(values, copy.target)
        return
    with torch.no_grad():
        if values.dtype == copy.target.dtype:
            bits = _BITS[values.dtype.itemsize]
            copy.target.view(bits).copy_(values.resolve_conj().resolve_neg().view(bits))
        else:
            copy.target.copy_(values)
