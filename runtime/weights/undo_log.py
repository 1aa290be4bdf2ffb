"""The old bytes of parameters in a temporary file, to write them back when a load fails.

A file and not memory: a model's parameters may be most of the memory there is. What a loader did
to anything but the parameters that were kept is not undone.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.formats.memory import raw_bytes
from fixpass.runtime.weights.local import local_box
from fixpass.runtime.weights.read import copies, read
from fixpass.runtime.weights.stored import FilePiece, Stored

PART = 8 << 20


@dataclass(frozen=True)
class _Entry:
    param: Tensor
    data: Tensor
    attributes: dict[str, Any]
    offset: int


class UndoLog:
    """A context: on an exception, all parameters that were kept get their old bytes back."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self.restored = False
        self._file = tempfile.NamedTemporaryFile(prefix="fixpass-journal-")  # noqa: SIM115

    def keep(self, param: Tensor) -> None:
        """Write down the values on this rank of a parameter that is about to change."""
        data = local_box(param.detach())[0]
        self._entries.append(_Entry(param, data, dict(vars(param)), self._file.tell()))
        rows = data.reshape(1) if data.dim() == 0 else data
        step = max(1, PART * len(rows) // max(1, data.nbytes)) if len(rows) else 1
        for start in range(0, len(rows), step):
            self._file.write(raw_bytes(rows[start : start + step]))

    def restore(self) -> None:
        """Write the old values back, the last first."""
        self._file.flush()
        for entry in reversed(self._entries):
            shape = tuple(entry.data.shape)
            piece = FilePiece(Path(self._file.name), entry.offset, Box.whole(shape))
            stored = Stored("", entry.data.dtype, shape, (piece,), "the journal")
            read(list(copies(stored, piece.box, entry.data)), threads=1)
            if not isinstance(entry.param, DTensor):
                # A loader may have given the parameter other memory.
                entry.param.data = entry.data
            entry.param.__dict__.clear()
            entry.param.__dict__.update(entry.attributes)
        self.restored = True

    def close(self) -> None:
        """Remove the file; again is once."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                self.restore()
        finally:
            self.close()
