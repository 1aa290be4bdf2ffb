"""Files of a checkpoint: one descriptor from the header to the last byte, and vectored reads.

A checkpoint that is replaced by a rename while it is read stays readable through the descriptor.
`check` tells whether the file was changed or replaced. One call of `preadv` or `pwritev` moves many
ranges of memory, whose addresses go to the kernel as plain numbers: the caller holds the tensors
that own the memory until the call returns.
"""

import ctypes
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

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


def _facts_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
