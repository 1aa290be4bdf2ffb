"""The bytes that a reload like the last one writes over, in a temporary file until it is done.

A file and not memory: a model's parameters may be most of the memory there is. Only bytes come
back; nothing else of a parameter changes in such a reload. A write that torch does not count, made
while the old bytes are written down, may be undone with the rest.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fixpass.runtime.checkpoint import vectored
from fixpass.runtime.weights.spans import Span


class OldBytes:
    """What lies where spans go, with tensors at these addresses; the file goes with the context."""

    def __init__(self, spans: Sequence[Span], pointers: Sequence[int]) -> None:
        self._spans, self._pointers = spans, pointers
        self._file = tempfile.NamedTemporaryFile(prefix="fixpass-journal-")  # noqa: SIM115

    def __enter__(self) -> Self:
        try:
            offset, path = 0, Path(self._file.name)
            for span in self._spans:
                ranges = span.ranges(self._pointers)
                vectored.write(self._file.fileno(), path, offset, span.num_bytes, ranges)
                offset += span.num_bytes
        except BaseException:
            self._file.close()
            raise
        return self

    def restore(self) -> None:
        """Bring all of it back."""
        offset = 0
        for span in self._spans:
            ranges = span.ranges(self._pointers)
            vectored.fill(Path(self._file.name), offset, span.num_bytes, ranges)
            offset += span.num_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
