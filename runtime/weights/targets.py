"""Walk a model: the tensors that a checkpoint can fill, and the part of each on this rank.

Names are those of the model without its wrappers: torch.compile, activation checkpoints and data
parallelism add words of their own.
"""

import gc
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.modules import INNER
from fixpass.runtime.weights.stored import Box

PLAIN = frozenset((nn.Parameter, Tensor))
"""Classes whose memory is their own."""

# A child called `module` is part of a name everywhere but in these.
_DATA_PARALLEL = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    FullyShardedDataParallel,
)


class WeightTarget(NamedTuple):
    """A parameter or persistent buffer."""

    name: str
    """Without the words of wrappers."""
    module: nn.Module
    """The module that holds the tensor under `leaf`."""
    leaf: str
    tensor: Tensor


@contextmanager
def gc_paused() -> Iterator[None]:
    """A context without garbage collection, which would look at thousands of new tuples in vain."""
    resume = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        resume()


def walk(model: nn.Module) -> tuple[list[WeightTarget], list[Tensor]]:
    """Find all tensors of a model in one pass.

    Returns:
        The parameters and persistent buffers in the model's order, a tied tensor under each of its
        names, and the buffers that are not persistent.

    """
    found: list[WeightTarget] = []
    transient: list[Tensor] = []
    _walk(model, "", set(), found, transient)
    return found, transient


def targets(model: nn.Module) -> dict[str, WeightTarget]:
    """The parameters and persistent buffers by name."""
    return {target.name: target for target in walk(model)[0]}


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module; a tied one comes more than once."""
    found, transient = walk(model)
    return [*(target.tensor for target in found), *transient]


def _walk(
    module: nn.Module,
    path: str,
    outer: set[int],
    found: list[WeightTarget],
    transient: list[Tensor],
) -> None:
    for leaf, param in module._parameters.items():
        if param is not None:
            found.append(WeightTarget(path + leaf, module, leaf, param))
    if module._buffers:
        skip = module._non_persistent_buffers_set
        for leaf, tensor in module._buffers.items():
            if tensor is not None and leaf in skip:
                transient.append(tensor)
            elif tensor is not None:
                found.append(WeightTarget(path + leaf, module, leaf, tensor))
    if not module._modules:
        return
    outer.add(id(module))
    for name, child in module._modules.items():
        # A module may hold a module that holds it.
        if child is not None and id(child) not in outer:
            hidden = name in INNER and (name != "module" or isinstance(module, _DATA_PARALLEL))
            _walk(child, path if hidden else f"{path}{name}.", outer, found, transient)
    outer.discard(id(module))


def reshard(model: nn.Module) -> None:
    """Let FSDP2 free its gathered parameters: a write into those would be lost."""
    # fully_shard makes a class for each class of modules: without one there is nothing to look for.
    if not FSDPModule.__subclasses__():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether values of this dtype mean nothing without a scale."""
    return dtype in _INTEGERS or (dtype.is_floating_point and dtype.itemsize == 1)


_INTEGERS = (torch.uint8, torch.int8)


def local_part(tensor: Tensor) -> Tensor:
    """The values of a tensor on this rank. No gradient flows through the result."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The values of each tensor on this rank."""
    if PLAIN.issuperset(map(type, tensors)):
        return tensors
    return [local_part(tensor) for tensor in tensors]


def local_box(tensor: Tensor) -> tuple[Tensor, Box]:
    """The values of a tensor on this rank, and the box of the whole tensor that they fill.

    A plain tensor fills all of its box. Raises CheckpointError for a DTensor whose placements
    include Partial: its values are a sum that is not computed yet.
    """
    if not isinstance(tensor, DTensor):
        return tensor, Box.whole(tuple(tensor.shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"a DTensor with placements {tensor.placements} has no values yet")
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), Box(tuple(start), tuple(shape))


def is_freed(tensor: Tensor) -> bool:
    """Whether a plain tensor has elements and no memory: torch itself would read at address 0."""
    return type(tensor) in PLAIN and tensor.numel() > 0 and not tensor.untyped_storage().nbytes()


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses on this rank; 0 where a tensor has none."""
    parts = local_parts(tensors)
    try:
        return list(map(Tensor.data_ptr, parts))
    # Sparse tensors, and those of some subclasses, have no address.
    except RuntimeError:
        return [part.data_ptr() if part.layout == torch.strided else 0 for part in parts]


def same_part(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """The part of another storage that `tensor` is of its own."""
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@dataclass(frozen=True)
class MemoryRanges:
    """Ranges of addresses in order, which do not overlap.

    Addresses are compared and not storages: a tensor made from a numpy view of a weight has a
    storage of its own over the same memory.
    """

    starts: list[int]
    ends: list[int]

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> "MemoryRanges":
        """The memory of the tensors on this rank; sparse tensors count as empty."""
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(set(map(_range, local_parts(list(tensors))))):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        return MemoryRanges(starts, ends)

    def holds(self, tensor: Tensor) -> bool:
        """Whether memory of a tensor, on this rank, lies in the ranges."""
        start, end = _range(local_part(tensor))
        index = bisect_right(self.starts, start)
        if index and start < self.ends[index - 1]:
            return True
        return index < len(self.starts) and self.starts[index] < end


def _range(tensor: Tensor) -> tuple[int, int]:
    if tensor.layout != torch.strided:
        return 0, 0
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return start, start + storage.nbytes()
