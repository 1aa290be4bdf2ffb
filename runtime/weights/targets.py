"""The tensors of a model that a checkpoint can fill: parameters and persistent buffers.

Names are those of the model without its wrappers: torch.compile, activation checkpoints and data
parallelism put their own words into them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from fixpass.runtime.modules import INNER

# A child called `module` is part of a name everywhere but in these.
_DATA_PARALLEL = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    FullyShardedDataParallel,
)


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter or buffer, its name without wrappers, and the module that holds it as `leaf`."""

    name: str
    module: nn.Module
    leaf: str
    tensor: Tensor


def targets(model: nn.Module) -> dict[str, Target]:
    """The targets of a model by name; a tied parameter has several names."""
    found: dict[str, Target] = {}
    for path, module in _walk(model, ""):
        held: dict[str, Tensor | None] = dict(module._parameters)
        skip = module._non_persistent_buffers_set
        held.update((name, value) for name, value in module._buffers.items() if name not in skip)
        for leaf, tensor in held.items():
            if tensor is not None:
                found[path + leaf] = Target(path + leaf, module, leaf, tensor)
    return found


def reshard(model: nn.Module) -> None:
    """Give FSDP2 its shards back: what is written into a gathered parameter is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether values of this dtype mean nothing without a scale."""
    return dtype in _INTEGERS or (dtype.is_floating_point and dtype.itemsize == 1)


_INTEGERS = (torch.uint8, torch.int8)


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            transparent = name in INNER and (name != "module" or isinstance(module, _DATA_PARALLEL))
            yield from _walk(child, path if transparent else f"{path}{name}.")
