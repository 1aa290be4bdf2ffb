"""Batches: many parts of tensors that one call moves, from a file or from memory.

A batch names sources and tensors by number. Addresses are taken from the tensors when it runs, and
each task holds its tensors until it ends.
"""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import add
from typing import NamedTuple

from torch import Tensor

from fixpass.runtime.weights.files import OpenFile, in_turn

MOST_PARTS = 512
"""Parts of a batch. Linux takes at most 1,024 a call; past some hundred no part gets cheaper."""
MOST_BYTES = 16 << 20
"""Bytes of a batch: enough that a call costs nothing, few enough to share between threads."""

Task = Callable[[], int]
Advance = Callable[[int], object]
Source = OpenFile | Tensor
Run = tuple[int, int, int, int, int]
"""Bytes that go as they are: source, start, position, inner and size as in a batch."""


class Batch(NamedTuple):
    """Parts of tensors that are moved together: columns with one entry for each part.

    Parts from a file follow one another there. A batch has numbers only and holds no tensor.
    """

    num_bytes: int
    sources: tuple[int, ...]
    starts: tuple[int, ...]
    """The byte of the source at which the part begins."""
    positions: tuple[int, ...]
    inner: tuple[int, ...]
    """The byte of the tensor at which the part begins."""
    sizes: tuple[int, ...]

    def run(self, given: Sequence[Source], tensors: Sequence[Tensor]) -> int:
        """Move the parts from the sources to the tensors; the number of bytes."""
        places = map(Tensor.data_ptr, map(tensors.__getitem__, self.positions))
        targets = map(add, places, self.inner)
        first = given[self.sources[0]]
        if isinstance(first, OpenFile):
            first.read(self.starts[0], self.num_bytes, in_turn(targets, self.sizes))
        else:
            held: Iterator[Tensor] = map(given.__getitem__, self.sources)  # type: ignore[arg-type]
            move(targets, map(add, map(Tensor.data_ptr, held), self.starts), self.sizes)
        return self.num_bytes

    def stage(self, file: OpenFile, memory: Tensor) -> int:
        """Read the parts as they follow one another into memory of this size."""
        numbers = in_turn((memory.data_ptr(),), (self.num_bytes,))
        file.read(self.starts[0], self.num_bytes, numbers)
        return self.num_bytes


def batches(runs: Iterable[Run], given: Sequence[Source]) -> Iterator[Batch]:
    """Runs in as few batches as the limits allow; long runs are cut."""
    held: list[Run] = []
    size = end = 0
    for part in sorted(_cut(runs)):
        source, start, _, _, length = part
        if held:
            file = isinstance(given[source], OpenFile)
            apart = file and (source != held[-1][0] or start != end)
            mixed = file is not isinstance(given[held[-1][0]], OpenFile)
            if apart or mixed or len(held) == MOST_PARTS or size + length > MOST_BYTES:
                yield Batch(size, *zip(*held, strict=True))
                held, size = [], 0
        held.append(part)
        size += length
        end = start + length
    if held:
        yield Batch(size, *zip(*held, strict=True))


def _cut(runs: Iterable[Run]) -> Iterator[Run]:
    for part in runs:
        source, start, position, inner, size = part
        if size <= MOST_BYTES:
            yield part
            continue
        for done in range(0, size, MOST_BYTES):
            length = min(MOST_BYTES, size - done)
            yield source, start + done, position, inner + done, length


def default_threads() -> int:
    """Threads that read where the caller does not say: the processors this process may use."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(4, count)


def run(work: Iterable[Task], threads: int, advance: Advance) -> None:
    """Run tasks with this many threads; the first exception is raised and ends it.

    An exception in the calling thread may leave tasks running: each holds the memory that it
    writes.
    """
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


def move(targets: Iterable[int], sources: Iterable[int], sizes: Iterable[int]) -> None:
    """Copy so many bytes from each source address to each target address."""
    deque(map(ctypes.memmove, targets, sources, sizes), maxlen=0)
