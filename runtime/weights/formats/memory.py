"""Tensors that are in this process: a state dict, or an iterator of names and tensors.

A state dict is read where it is. An iterator is first written to a file of its own, one tensor at
a time, because nothing of a model may change before all of a checkpoint is known to fit.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.local import is_freed, local_box, local_part
from fixpass.runtime.weights.stored import FilePiece, MemoryPiece, Stored


def from_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The tensors of a state dict; of a DTensor, the part that this rank holds."""
    return {name: _in_memory(name, tensor) for name, tensor in tensors.items()}


def from_iterator(tensors: Iterable[tuple[str, Tensor]], file: Path) -> dict[str, Stored]:
    """The tensors of an iterator, written to `file`, which must outlive their reading."""
    found: dict[str, Stored] = {}
    origin = "an iterator"
    with file.open("wb") as output:
        for name, tensor in tensors:
            _check(name, tensor, origin)
            if name in found:
                raise CheckpointError(f"{origin} gave {name!r} twice")
            if isinstance(tensor, DTensor):
                raise CheckpointError(
                    f"{name!r} from {origin} is a DTensor: give its full_tensor(), or a state dict"
                )
            shape = tuple(tensor.shape)
            piece = FilePiece(file, output.tell(), Box.whole(shape))
            found[name] = Stored(name, tensor.dtype, shape, (piece,), origin)
            output.write(raw_bytes(tensor))
    return found


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in dense memory."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if dense.numel() < 2:
        # Of which torch takes any stride for contiguous.
        dense = dense.clone(memory_format=torch.contiguous_format)
    data: memoryview = dense.view(torch.uint8).numpy().data
    return data


def _in_memory(name: str, tensor: Tensor) -> Stored:
    origin = "a state dict"
    _check(name, tensor, origin)
    shape = tuple(tensor.shape)
    local, box = local_box(tensor.detach())
    return Stored(name, tensor.dtype, shape, (MemoryPiece(local, box),), origin)


def _check(name: object, tensor: object, origin: str) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name!r} from {origin} is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided:
        raise CheckpointError(f"{name!r} from {origin} is {tensor.layout}: give to_dense()")
    if tensor.device.type == "meta":
        raise CheckpointError(f"{name!r} from {origin} is on the meta device: it has no values")
    if is_freed(local_part(tensor)):
        raise CheckpointError(f"{name!r} from {origin} has no memory any more: it was freed")
