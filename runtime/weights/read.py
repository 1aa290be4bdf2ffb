"""Move bytes of a checkpoint to where they belong: straight from the file where that can be.

A destination that is dense, in this machine's memory and of the stored dtype is read into with no
step between. Anything else (strides, a column slice, another dtype or device) goes through a
staging buffer of STAGING bytes a thread. What belongs where is decided before; here nothing is
checked against a model.
"""

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.weights import vectored
from fixpass.runtime.weights.box import Box, dense_strides, span
from fixpass.runtime.weights.stored import FilePiece, MemoryPiece, Stored
from fixpass.runtime.weights.vectored import Range

STAGING = 8 << 20

Task = Callable[[], int]
Advance = Callable[[int], object]
Put = Callable[[Tensor, Tensor], None]

# Bits are moved, not values: some dtypes have no copy kernel of their own.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True, slots=True)
class Copy:
    """`source`, a box of `piece` in the piece's own coordinates, goes to all of `target`.

    `target` is a view of the memory to write, of the shape of `source` and of any strides, dtype
    and device; values are cast where its dtype is not the stored one. `put` writes the values
    (first) into the target (second) where that is more than a copy, as into a folded weight.
    """

    stored: Stored
    piece: FilePiece | MemoryPiece
    source: Box
    target: Tensor
    put: Put | None = None


def default_threads() -> int:
    """Threads that read where the caller does not say: the processors this process may use."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(4, count)


def copies(stored: Stored, source: Box, target: Tensor) -> Iterator[Copy]:
    """What it takes to fill `target` with the box `source` of a stored tensor."""
    if not source.numel:
        return
    for piece in stored.pieces:
        if piece.box == source:
            yield Copy(stored, piece, Box.whole(source.shape), target)
        elif part := piece.box.intersection(source):
            view = part.relative(source.start).of(target)
            yield Copy(stored, piece, part.relative(piece.box.start), view)


def read(work: Sequence[Copy], *, threads: int = 0, advance: Advance = lambda count: None) -> None:
    """Do all copies with `threads` threads (0: one a processor, at most 4).

    `advance` is called with the bytes of each finished part. Raises CheckpointError where a file
    cannot be read to its end; what was copied until then stays.
    """
    targets = [copy.target for copy in work]
    run(tasks(work), threads, advance)
    # The kernel wrote behind torch's back: saved values of autograd must know.
    torch.autograd.graph.increment_version(targets)


def run(work: Iterable[Task], threads: int, advance: Advance) -> None:
    """Run tasks with this many threads; the first exception is raised and ends it."""
    threads = threads or default_threads()
    if threads == 1:
        for task in work:
            advance(task())
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="fixpass-read") as pool:
        futures: list[Future[int]] = []
        try:
            futures.extend(pool.submit(task) for task in work)
            for future in futures:
                advance(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def tasks(work: Iterable[Copy]) -> Iterator[Task]:
    """The copies as calls that may run in any order, each returning the bytes it moved."""
    whole: defaultdict[Path, list[Range]] = defaultdict(list)
    for copy in work:
        if isinstance(copy.piece, MemoryPiece):
            yield partial(_copy_memory, copy)
        elif (found := direct(copy, copy.piece)) is not None:
            whole[copy.piece.path].append(found)
        else:
            yield from (partial(_stage, part, copy.piece) for part in _parts(copy, copy.piece))
    for path, ranges in whole.items():
        for batch in vectored.batches(path, ranges):
            yield partial(_read_batch, batch)


def direct(copy: Copy, piece: FilePiece) -> Range | None:
    """The copy from a piece as one range of a file and of memory; None where it is not one."""
    target, item = copy.target, copy.stored.dtype.itemsize
    if target.dtype != copy.stored.dtype or target.device.type != "cpu":
        return None
    if copy.put is not None or not target.is_contiguous():
        return None
    if copy.source.shape == piece.box.shape:
        return Range(piece.offset, target.data_ptr(), copy.source.numel * item)
    first, length = span(copy.source, piece.box.shape)
    if length != copy.source.numel:
        return None
    return Range(piece.offset + first * item, target.data_ptr(), length * item)


def _read_batch(batch: vectored.Batch) -> int:
    vectored.read(batch)
    return batch.num_bytes


def _parts(copy: Copy, piece: FilePiece) -> Iterator[Copy]:
    """The copy in parts whose bytes in the file fit into the staging buffer."""
    _, length = span(copy.source, piece.box.shape)
    if length * copy.stored.dtype.itemsize <= STAGING or copy.source.numel == 1:
        yield copy
        return
    for half in copy.source.halves():
        view = half.relative(copy.source.start).of(copy.target)
        yield from _parts(Copy(copy.stored, piece, half, view, copy.put), piece)


class _Buffers(threading.local):
    """A staging buffer for each thread, made when first needed and used again."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")


_buffers = _Buffers()


def _buffer() -> Tensor:
    if not _buffers.buffer.numel():
        _buffers.buffer = torch.empty(STAGING, dtype=torch.uint8, device="cpu")
    return _buffers.buffer


def _stage(copy: Copy, piece: FilePiece) -> int:
    dtype = copy.stored.dtype
    first, length = span(copy.source, piece.box.shape)
    buffer = _buffer()[: length * dtype.itemsize]
    source = Range(piece.offset + first * dtype.itemsize, buffer.data_ptr(), buffer.numel())
    for batch in vectored.batches(piece.path, [source]):
        vectored.read(batch)
    strides = dense_strides(piece.box.shape)
    (copy.put or _copy)(buffer.view(dtype).as_strided(copy.source.shape, strides), copy.target)
    return copy.source.numel * dtype.itemsize


def _copy_memory(copy: Copy) -> int:
    piece = copy.piece
    assert isinstance(piece, MemoryPiece)
    (copy.put or _copy)(copy.source.of(piece.tensor), copy.target)
    return copy.source.numel * copy.stored.dtype.itemsize


def _copy(source: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        if source.dtype == target.dtype:
            bits = _BITS[source.dtype.itemsize]
            target.view(bits).copy_(source.resolve_conj().resolve_neg().view(bits))
        else:
            target.copy_(source)
