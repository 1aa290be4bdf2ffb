"""Open a source of weights: a path of any format, a state dict, or an iterator.

Of files only headers are read. A state dict is read where it lies. The tensors of an iterator are
first written to a temporary file: nothing of a model may change before all of a checkpoint is known
to fit.
"""

import ctypes
import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.formats import dcp
from fixpass.runtime.weights.formats import safetensors as safetensors_files
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.stored import Box, Checkpoint, FilePiece, MemoryPiece, Stored
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


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """The values of a tensor as they lie in dense memory."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if dense.nbytes < _SMALL:
        return ctypes.string_at(dense.data_ptr(), dense.nbytes)
    data: memoryview = dense.reshape(-1).view(torch.uint8).numpy().data
    return data


_SMALL = 1 << 16
"""Bytes up to which a copy costs less than a view in numpy."""


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


Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

StoredSource = str | Path | Mapping[str, Tensor]
"""A source that holds all of its tensors at once."""

# Files of torch.save, which are pickles.
PICKLES = (".pt", ".pth", ".bin")


def opened(
    source: str | Path, *, weights_only: bool = True
) -> Files | list[Stored] | Mapping[str, Tensor]:
    """Open a checkpoint. Of safetensors files and DCP folders only headers are read.

    Args:
        source: a safetensors file, an index of several, a glob pattern, a folder of either, a
            folder of torch.distributed.checkpoint, or a file of torch.save.
        weights_only: False lets pickles run code.

    Returns:
        The headers of safetensors files, the tensors of a DCP folder, or the state dict of a file
        of torch.save.

    Raises:
        CheckpointError: the source is none of these, or is broken.

    """
    path = Path(source)
    if not path.is_dir():
        if glob.has_magic(str(source)) and not path.exists():
            return safetensors_files.from_glob(str(source))
        if path.name.endswith(safetensors_files.INDEX_SUFFIX):
            return safetensors_files.from_index(path)
        if path.suffix in PICKLES:
            return _from_torch_save(path, weights_only)
        return safetensors_files.from_files([path])
    if (files := safetensors_files.from_folder(path)) is not None:
        return files
    if (path / dcp.METADATA).is_file():
        return list(dcp.from_dcp(path, weights_only=weights_only).values())
    raise CheckpointError(
        f"{path} holds no .safetensors file, no index of them and no {dcp.METADATA}"
    )


def checkpoint_of(source: StoredSource) -> Checkpoint:
    """The stored tensors of a path or a state dict by name, from headers where there are some."""
    found = opened(source) if isinstance(source, str | Path) else source
    if isinstance(found, Files):
        return found.tensors()
    if isinstance(found, list):
        return {stored.name: stored for stored in found}
    return {name: in_memory(name, tensor) for name, tensor in found.items()}


def _from_torch_save(path: Path, weights_only: bool) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    # A broken or unsafe file raises whatever its bytes lead to.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found
