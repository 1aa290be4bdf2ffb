"""The old bytes of parameters in a temporary file, to write them back when a commit fails.

A file and not memory: a model's parameters may take most of the memory.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.files import OpenFile, in_turn
from fixpass.runtime.weights.read import Work, copies
from fixpass.runtime.weights.stored import FilePiece, Stored

PART = 8 << 20
"""Bytes of a tensor that are made dense at once."""


class UndoLog:
    """The values of some tensors at the time when it was made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Write the values down. Raises CheckpointError where the file has no room."""
        self._tensors = tensors
        self._stored: list[Stored] = []
        file, end = OpenFile.temporary(), 0
        for tensor in tensors:
            shape = tuple(tensor.shape)
            piece = FilePiece(file, end, Box.whole(shape))
            self._stored.append(Stored("", tensor.dtype, shape, (piece,), "the undo log"))
            for part in _parts(tensor):
                dense = part.cpu().resolve_conj().resolve_neg().contiguous()
                file.write(end, dense.nbytes, in_turn((dense.data_ptr(),), (dense.nbytes,)))
                end += dense.nbytes

    def restore(self) -> None:
        """Write the old values back."""
        work = (
            copy
            for position, (stored, tensor) in enumerate(
                zip(self._stored, self._tensors, strict=True)
            )
            for copy in copies(stored, Box.whole(stored.shape), tensor, position)
        )
        Work.of(work, self._tensors).run(threads=1)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_cpu and tensor.is_contiguous():
        yield tensor
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, PART * len(rows) // max(1, tensor.nbytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
