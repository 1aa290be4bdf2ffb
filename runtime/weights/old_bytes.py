"""The bytes that a reload like the last one writes over, in a temporary file until it is done.

A file and not memory: a model's parameters may be most of the memory there is. Only bytes come
back; nothing else of a parameter changes in such a reload. A write that torch does not count, made
while the old bytes are written down, may be undone with the rest.
"""

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from fixpass.runtime.weights import vectored
from fixpass.runtime.weights.spans import Span


class OldBytes:
    """What lies where spans go, with tensors at these addresses; the file goes with the context."""

    def __init__(self, spans: Sequence[Span], pointers: Sequence[int]) -> None:
        self._spans, self._pointers = spans, pointers
        self._file = tempfile.NamedTemporaryFile(prefix="fixpass-journal-")  # noqa: SIM115
        self._path = Path(self._file.name)

    def __enter__(self) -> Self:
        try:
            for offset, num_bytes, ranges in self._batches():
                vectored.write(self._file.fileno(), self._path, offset, num_bytes, ranges)
        except BaseException:
            self._file.close()
            raise
        return self

    def restore(self) -> None:
        """Bring all of it back."""
        for offset, num_bytes, ranges in self._batches():
            vectored.fill(self._path, offset, num_bytes, ranges)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _batches(self) -> Iterator[tuple[int, int, "array[int]"]]:
        """Where in the file each span begins, its bytes, and where those are in memory."""
        offset = 0
        for span in self._spans:
            yield offset, span.num_bytes, span.ranges(self._pointers)
            offset += span.num_bytes
