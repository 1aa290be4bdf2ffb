"""Which addresses some tensors occupy: values that lie there are written over with the tensors.

By address and not by storage: a tensor made from a numpy view of a weight has a storage of its own.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fixpass.runtime.weights.look import parts_of


@dataclass(frozen=True)
class Occupied:
    """Ranges of addresses that do not overlap, in order."""

    starts: list[int]
    ends: list[int]

    @staticmethod
    def by(tensors: Iterable[Tensor]) -> "Occupied":
        """The memory of all of these, on this rank; sparse ones have none here."""
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(set(map(_range, parts_of(list(tensors))))):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        return Occupied(starts, ends)

    def holds_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether memory of any of the tensors, on this rank, is among it."""
        return any(map(self._holds, parts_of(list(tensors))))

    def _holds(self, tensor: Tensor) -> bool:
        start, end = _range(tensor)
        index = bisect_right(self.starts, start)
        if index and start < self.ends[index - 1]:
            return True
        return index < len(self.starts) and self.starts[index] < end


def share_memory(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether any of the others lies in the memory of these."""
    return len(others) > 0 and Occupied.by(some).holds_any(others)


def _range(tensor: Tensor) -> tuple[int, int]:
    if tensor.layout != torch.strided:
        return 0, 0
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()
