"""Parameters that bring a `weight_loader`: an engine's own way to take a stored tensor.

The loader is called as engines call it: with a parameter and a tensor, for a part of a stack with
the shard's name, for an expert with the mapped name, shard_id and expert_id. The parameter is a
stand-in of the same class and attributes, in the checkpoint's layout and with the present values.
The live parameter is written later, with the rest of the update, from the stand-in's values: a
loader that raises changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.attributes import note, remembered
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.checkpoint_view import shows_checkpoint
from fixpass.runtime.weights.destination import Destination
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.formats.memory import from_iterator
from fixpass.runtime.weights.placement import Routed
from fixpass.runtime.weights.read import Copy, copies, in_memory
from fixpass.runtime.weights.relayout import logical
from fixpass.runtime.weights.stored import MemoryPiece, Stored
from fixpass.runtime.weights.targets import Target


class OwnLoads(NamedTuple):
    """A parameter with a loader of its own, and the stored tensors that it gets."""

    target: Target
    loader: Callable[..., Any]
    routed: list[Routed]
    where: Destination
    position: int
    """The place of the parameter among the tensors that are written."""


def own_loader(target: Target) -> Callable[..., Any] | None:
    """The weight_loader of a parameter, or of the parameter it was before it was sharded."""
    # Engines make it a property of a class as often as an attribute.
    found = getattr(target.tensor, "weight_loader", None)
    former = remembered(target.module, target.leaf)
    if found is None and former is not None:
        found = getattr(former.like(torch.empty(0)), "weight_loader", None)
    return found if callable(found) else None


def run_own_loaders(loads: Iterable[OwnLoads], threads: int, *, in_file: bool) -> Iterator[Copy]:
    """Call the loaders, one parameter after the other; the copies of their results.

    in_file: keep the results in a temporary file, so that one of them is in memory at a time.
    """
    waiting = list(loads)
    results = ((str(index), _result(load, threads)) for index, load in enumerate(waiting))
    kept: Iterable[Stored]
    if in_file:
        kept = list(from_iterator(results, OpenFile.temporary()).values())
    else:
        kept = (_in_memory(values) for _, values in results)
    for load, stored in zip(waiting, kept, strict=True):
        where = load.where
        yield from copies(stored, where.box, where.tensor, load.position, where.view)


def _result(load: OwnLoads, threads: int) -> Tensor:
    """The values that a loader gives a parameter; parts that it leaves alone keep theirs."""
    param, where = load.target.tensor, load.where
    if isinstance(param, DTensor):
        whole = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    elif shows_checkpoint(param):
        whole = param.detach().clone(memory_format=torch.contiguous_format)
    else:
        whole = logical(param)
    former = remembered(load.target.module, load.target.leaf) or note(param)
    stand_in = former.like(whole)
    for item in load.routed:
        _call(load, stand_in, item, in_memory(item.stored, threads))
    values = stand_in.detach()
    if tuple(values.shape) != where.whole or values.dtype != where.tensor.dtype:
        raise CheckpointError(f"the weight_loader of {load.target.name!r} changed its layout")
    return values


def _call(load: OwnLoads, param: Tensor, item: Routed, tensor: Tensor) -> None:
    """Give one stored tensor to the loader; any exception becomes a CheckpointError."""
    candidate = item.candidate
    try:
        if candidate.branch == "expert":
            load.loader(
                param,
                tensor,
                candidate.target,
                shard_id=candidate.shard,
                expert_id=candidate.expert,
            )
        elif candidate.branch == "stacked":
            load.loader(param, tensor, candidate.shard)
        else:
            load.loader(param, tensor)
    # The loader is not our code, and may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"the weight_loader of {load.target.name!r} did not take {item.stored}: {error!r}"
        ) from error


def _in_memory(values: Tensor) -> Stored:
    box = Box.whole(tuple(values.shape))
    return Stored("", values.dtype, box.shape, (MemoryPiece(values, box),), "its weight_loader")
