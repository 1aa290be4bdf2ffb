"""Vectored reads and writes: many memory ranges by few calls of `preadv` and `pwritev`.

Addresses go to the kernel as plain numbers: a memoryview a tensor would cost more than the read of
a small one. Nothing here knows of tensors; who calls keeps the memory alive.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fixpass.runtime.errors import CheckpointError

# Linux takes at most 1,024 ranges a call; past some hundred a call is no cheaper a range.
MOST_RANGES = 512
# Large enough that a call costs nothing, small enough to share out between threads.
MOST_BYTES = 16 << 20

_LIBC = ctypes.CDLL(None, use_errno=True)
_preadv, _pwritev = _LIBC.preadv, _LIBC.pwritev
for _call in (_preadv, _pwritev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    _call.restype = ctypes.c_ssize_t


@dataclass(frozen=True, slots=True)
class Range:
    """`num_bytes` at `offset` of a file, and the address in memory that they go to."""

    offset: int
    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Ranges that follow each other in a file: one call."""

    path: Path
    ranges: tuple[Range, ...]

    @property
    def num_bytes(self) -> int:
        last = self.ranges[-1]
        return last.offset + last.num_bytes - self.ranges[0].offset


def batches(path: Path, ranges: Iterable[Range]) -> Iterator[Batch]:
    """Ranges in as few batches as the limits allow; long ranges are cut."""
    held: list[Range] = []
    size = end = 0
    for piece in _cut(sorted(ranges, key=lambda item: item.offset)):
        full = len(held) == MOST_RANGES or size + piece.num_bytes > MOST_BYTES
        if held and (piece.offset != end or full):
            yield Batch(path, tuple(held))
            held, size = [], 0
        held.append(piece)
        size += piece.num_bytes
        end = piece.offset + piece.num_bytes
    if held:
        yield Batch(path, tuple(held))


def read(batch: Batch) -> None:
    """Fill the batch's memory; raises CheckpointError where the file ends too early."""
    numbers = array("Q")
    for piece in batch.ranges:
        numbers.extend((piece.address, piece.num_bytes))
    fill(batch.path, batch.ranges[0].offset, batch.num_bytes, numbers)


def fill(path: Path, offset: int, num_bytes: int, numbers: "array[int]") -> None:
    """Fill memory from a file, from `offset` on; `numbers` are addresses and sizes in turn.

    At most 1,024 pairs, of `num_bytes` in all. Raises CheckpointError where the file ends before.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _move(_preadv, descriptor, path, offset, offset + num_bytes, numbers)
    finally:
        os.close(descriptor)


def write(descriptor: int, path: Path, offset: int, num_bytes: int, numbers: "array[int]") -> None:
    """Write memory to an open file, from `offset` on; `numbers` as for `fill`."""
    _move(_pwritev, descriptor, path, offset, offset + num_bytes, numbers)


def _move(
    call: Callable[..., int],
    descriptor: int,
    path: Path,
    offset: int,
    end: int,
    numbers: "array[int]",
) -> None:
    first, count = 0, len(numbers) // 2
    while offset < end:
        address = numbers.buffer_info()[0] + 16 * first
        done = call(descriptor, address, count - first, offset)
        if done < 0:
            error = ctypes.get_errno()
            raise CheckpointError(f"{path}: {os.strerror(error)} at byte {offset:,}")
        if done == 0:
            raise CheckpointError(
                f"{path}: it became shorter while it was read: no byte {offset:,}, and "
                f"{end:,} are wanted"
                if call is _preadv
                else f"{path}: no byte was written at {offset:,}"
            )
        offset += done
        # A call may stop early, in the middle of a range.
        while done and done >= numbers[2 * first + 1]:
            done -= numbers[2 * first + 1]
            first += 1
        if done:
            numbers[2 * first] += done
            numbers[2 * first + 1] -= done


def _cut(ranges: Iterable[Range]) -> Iterator[Range]:
    for piece in ranges:
        if piece.num_bytes <= MOST_BYTES:
            yield piece
            continue
        for start in range(0, piece.num_bytes, MOST_BYTES):
            length = min(MOST_BYTES, piece.num_bytes - start)
            yield Range(piece.offset + start, piece.address + start, length)
