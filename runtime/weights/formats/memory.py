"""Tensors that are in this process: a state dict, or an iterator of names and tensors.

A state dict is read where it lies. The tensors of an iterator are first written to a temporary
file, one at a time: nothing of a model may change before all of a checkpoint is known to fit.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.stored import FilePiece, MemoryPiece, Stored
from fixpass.runtime.weights.targets import is_freed, local_box, local_part

A_STATE_DICT = "a state dict"
AN_ITERATOR = "an iterator"


def in_memory(name: str, tensor: Tensor, origin: str = A_STATE_DICT) -> Stored:
    """A detached tensor of a state dict; of a DTensor, the part that this rank holds."""
    local, box = local_box(tensor)
    return Stored(name, tensor.dtype, tuple(tensor.shape), (MemoryPiece(local, box),), origin)


def from_iterator(tensors: Iterable[tuple[str, Tensor]], file: OpenFile) -> dict[str, Stored]:
    """The tensors of an iterator, written to an empty temporary file, one behind another."""
    found: dict[str, Stored] = {}
    end = 0
    with os.fdopen(os.dup(file.descriptor), "wb") as output:
        for name, tensor in tensors:
            check_values(name, tensor, AN_ITERATOR)
            if name in found:
                raise CheckpointError(f"{AN_ITERATOR} gave {name!r} twice")
            if isinstance(tensor, DTensor):
                raise CheckpointError(
                    f"{name!r} from {AN_ITERATOR} is a DTensor: give its full_tensor(), or a "
                    "state dict"
                )
            shape = tuple(tensor.shape)
            piece = FilePiece(file, end, Box.whole(shape))
            found[name] = Stored(name, tensor.dtype, shape, (piece,), AN_ITERATOR)
            output.write(raw_bytes(tensor))
            end += found[name].num_bytes
    return found


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in dense memory."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if dense.numel() < 2:
        # Of which torch takes any stride for contiguous.
        dense = dense.clone(memory_format=torch.contiguous_format)
    data: memoryview = dense.view(torch.uint8).numpy().data
    return data


def check_values(name: object, tensor: object, origin: str = A_STATE_DICT) -> None:
    """Raise CheckpointError for an entry of a source that is no tensor, or one without values."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name!r} from {origin} is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided:
        raise CheckpointError(f"{name!r} from {origin} is {tensor.layout}: give to_dense()")
    if tensor.is_meta:
        raise CheckpointError(f"{name!r} from {origin} is on the meta device: it has no values")
    if is_freed(local_part(tensor)):
        raise CheckpointError(f"{name!r} from {origin} has no memory any more: it was freed")
