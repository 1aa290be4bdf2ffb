"""Open checkpoint files, and move batches of byte ranges, read or written, in several threads.

A checkpoint that is replaced by a rename while it is read stays readable through the descriptor.
`preadv` and `pwritev` move many ranges of memory, whose addresses go to the kernel as plain
numbers: each task holds the tensors that own the memory until it ends. A batch names sources and
tensors by number.
"""

import ctypes
import os
import sys
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import add, attrgetter
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fixpass.runtime.errors import CheckpointError

_LIBC = ctypes.CDLL(None, use_errno=True)
_preadv, _pwritev = _LIBC.preadv, _LIBC.pwritev
for _call in (_preadv, _pwritev):
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    _call.restype = ctypes.c_ssize_t

TEMPORARY = Path("a temporary file")


class OpenFile:
    """A file that is open for reading until nothing refers to this object."""

    __slots__ = ("_facts", "descriptor", "path")

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open a file, or take over a descriptor. Raises OSError where that fails."""
        self.descriptor = -1
        self.path = path
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
        self.descriptor = opened
        self._facts = _facts_of(os.fstat(opened))

    @staticmethod
    def temporary() -> "OpenFile":
        """An empty file without a name, for reading and writing."""
        with tempfile.TemporaryFile(prefix="fixpass-") as file:
            return OpenFile(TEMPORARY, os.dup(file.fileno()))

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.descriptor).st_size

    def bytes_at(self, offset: int, count: int) -> bytes:
        """The bytes from `offset` on, at most `count` of them."""
        return os.pread(self.descriptor, count, offset)

    def check(self, *, is_at_path: bool) -> None:
        """Raise CheckpointError where the file was written to since it was opened.

        is_at_path: whether another file at its path is a change too, as for one shard of several.
        """
        try:
            now = [os.fstat(self.descriptor), *([os.stat(self.path)] if is_at_path else [])]
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}, while it was read") from error
        if any(_facts_of(stat) != self._facts for stat in now):
            raise CheckpointError(
                f"{self.path} was written or replaced while the checkpoint was read: load it again"
            )

    def read(self, offset: int, num_bytes: int, numbers: "array[int]") -> None:
        """Fill memory with `num_bytes` from `offset` on; `numbers` are addresses and sizes in turn.

        At most 1,024 pairs. Raises CheckpointError where the file ends before.
        """
        self._move(_preadv, offset, offset + num_bytes, numbers)

    def write(self, offset: int, num_bytes: int, numbers: "array[int]") -> None:
        """Write memory to a temporary file, from `offset` on; `numbers` as for `read`."""
        self._move(_pwritev, offset, offset + num_bytes, numbers)

    def _move(self, call: Callable[..., int], offset: int, end: int, numbers: "array[int]") -> None:
        first, count = 0, len(numbers) // 2
        while offset < end:
            address = numbers.buffer_info()[0] + 16 * first
            done = call(self.descriptor, address, count - first, offset)
            if done < 0:
                error = ctypes.get_errno()
                raise CheckpointError(f"{self.path}: {os.strerror(error)} at byte {offset:,}")
            if done == 0:
                raise CheckpointError(
                    f"{self.path}: it became shorter while it was read: no byte {offset:,}, and "
                    f"{end:,} are wanted"
                    if call is _preadv
                    else f"{self.path}: no byte was written at {offset:,}"
                )
            offset += done
            # A call may stop early, in the middle of a range.
            while done and done >= numbers[2 * first + 1]:
                done -= numbers[2 * first + 1]
                first += 1
            if done:
                numbers[2 * first] += done
                numbers[2 * first + 1] -= done


def in_turn(addresses: Iterable[int], sizes: Iterable[int]) -> "array[int]":
    """Addresses and sizes in turn, as `read` and `write` take them."""
    one, other = array("Q", addresses), array("Q", sizes)
    numbers = array("Q", bytes(16 * len(one)))
    numbers[::2], numbers[1::2] = one, other
    return numbers


_facts_of = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")


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
