"""Parameters that bring a `weight_loader`: an engine's own way to take a stored tensor.

It is called as engines call it: with the parameter and the tensor, for a part of a stack with the
shard's name, for an expert with the mapped name, shard_id and expert_id. A parameter that FSDP2
has sharded is stood in for by a plain one of its former class, whose local slice is then written.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.attributes import note, remembered
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.destination import destination
from fixpass.runtime.weights.read import copies, read
from fixpass.runtime.weights.route import Routed
from fixpass.runtime.weights.stored import Stored
from fixpass.runtime.weights.targets import Target
from fixpass.runtime.weights.undo_log import UndoLog


@dataclass(frozen=True)
class OwnLoads:
    """A parameter with a loader of its own, and the stored tensors that it gets."""

    target: Target
    loader: Callable[..., Any]
    routed: list[Routed]


def own_loader(target: Target) -> Callable[..., Any] | None:
    """The weight_loader of a parameter, or of the one it was before it was sharded."""
    # Engines make it a property of a class as often as an attribute.
    found = getattr(target.tensor, "weight_loader", None)
    former = remembered(target.module, target.leaf)
    if found is None and former is not None:
        found = getattr(former.like(torch.empty(0)), "weight_loader", None)
    return found if callable(found) else None


def run_own_loads(
    loads: Iterable[OwnLoads], journal: UndoLog, threads: int, advance: Callable[[int], object]
) -> None:
    """Call the loaders, one parameter after the other."""
    for load in loads:
        param = load.target.tensor
        journal.keep(param)
        stand_in = param
        if isinstance(param, DTensor):
            former = remembered(load.target.module, load.target.leaf) or note(param)
            stand_in = former.like(torch.zeros(param.shape, dtype=param.dtype, device=param.device))
        for item in load.routed:
            call(load, stand_in, item, in_memory(item.stored, threads))
            advance(item.stored.num_bytes)
        if isinstance(param, DTensor):
            place = destination(param, load.target.name)
            with torch.no_grad():
                place.tensor.copy_(place.box.of(stand_in.detach()))


def call(load: OwnLoads, param: Tensor, item: Routed, tensor: Tensor) -> None:
    """Give one stored tensor to the loader; whatever it raises becomes a CheckpointError."""
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
    # It is not our code: whatever it raises must not leave the model half loaded.
    except Exception as error:
        raise CheckpointError(
            f"the weight_loader of {load.target.name!r} did not take {item.stored}: {error!r}"
        ) from error


def in_memory(stored: Stored, threads: int) -> Tensor:
    """A stored tensor in memory of its own, which a loader may keep."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    read(list(copies(stored, Box.whole(stored.shape), tensor)), threads=threads)
    return tensor
