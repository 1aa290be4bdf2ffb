"""Run a parameter's own `weight_loader` on a stand-in, whose values the update writes later.

The loader is called as engines call it: with a parameter and a tensor, for a part of a stack with
the shard's name, for an expert with the mapped name, shard_id and expert_id. The parameter is a
stand-in of the same class and attributes, in the checkpoint's layout and with the present values.
The live parameter is written later, with the rest of the update, from the stand-in's values: a
loader that raises changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fixpass.runtime.attributes import note, remembered
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.checkpoint_view import Destination, shows_checkpoint, written_arguments
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.formats.open import from_iterator
from fixpass.runtime.weights.parameter_layout import logical
from fixpass.runtime.weights.placement import Placed, taken
from fixpass.runtime.weights.read import Copy, copies, read
from fixpass.runtime.weights.route import Routed
from fixpass.runtime.weights.stored import Box, MemoryPiece, Stored
from fixpass.runtime.weights.targets import WeightTarget


class OwnLoads(NamedTuple):
    """A parameter with a loader of its own, and the stored tensors that it gets."""

    target: WeightTarget
    loader: Callable[..., Any]
    routed: list[Routed]
    where: Destination
    position: int
    """The place of the parameter among the tensors that are written."""


def own_loader(target: WeightTarget) -> Callable[..., Any] | None:
    """The weight_loader of a parameter, or of the parameter it was before it was sharded."""
    # Engines make it a property of a class as often as an attribute.
    found = getattr(target.tensor, "weight_loader", None)
    if found is None and (former := remembered(target.module, target.leaf)) is not None:
        found = getattr(former.like(torch.empty(0)), "weight_loader", None)
    return found if callable(found) else None


def run_own_loaders(
    loads: Iterable[OwnLoads], threads: int, *, in_file: bool
) -> tuple[list[Copy], dict[str, tuple[int, int]]]:
    """Call the loaders, one parameter after the other.

    in_file: keep the results in a temporary file, so that one of them is in memory at a time.

    Returns:
        The copies of the results into the parameters, and of each parameter that was not written
        whole the bytes that its loader wrote, and all of its bytes.

    """
    waiting, covered = list(loads), dict[str, tuple[int, int]]()
    results = ((str(index), _result(load, threads, covered)) for index, load in enumerate(waiting))
    kept: Iterable[Stored]
    if in_file:
        kept = from_iterator(results, OpenFile.temporary()).values()
    else:
        kept = (_in_memory(values) for _, values in results)
    made: list[Copy] = []
    for load, stored in zip(waiting, kept, strict=True):
        where, box = load.where, Box.whole(stored.shape)
        made.extend(copies(stored, box, where.tensor, load.position, where.view))
    return made, covered


def _result(load: OwnLoads, threads: int, covered: dict[str, tuple[int, int]]) -> Tensor:
    """The local values that a loader gives a parameter; bytes that it leaves alone keep theirs."""
    param, where = load.target.tensor, load.where
    if isinstance(param, DTensor):
        before = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    elif shows_checkpoint(param):
        before = param.detach().clone(memory_format=torch.contiguous_format)
    else:
        before = logical(param)
    former = remembered(load.target.module, load.target.leaf) or note(param)
    stand_in = former.like(before.clone())
    with _Coverage(stand_in) as coverage:
        for item in load.routed:
            _call(load, stand_in, item, _value(item, threads))
    values = stand_in.detach()
    if tuple(values.shape) != where.whole or values.dtype != where.tensor.dtype:
        raise CheckpointError(f"the weight_loader of {load.target.name!r} changed its layout")
    written = where.box.of(coverage.of(values, before))
    values = where.box.of(values)
    if not written.all():
        size = values.dtype.itemsize
        covered[load.target.name] = int(written.sum()) * size, values.numel() * size
        if isinstance(param, DTensor):
            values = torch.where(written.to(values.device), values, where.tensor)
    return values


def _value(item: Routed, threads: int) -> Tensor:
    """The values of a stored tensor that a loader gets, in the order of its parameter."""
    part = taken(item.stored.shape, item.candidate)
    values = torch.empty(part.shape, dtype=item.stored.dtype, device="cpu")
    whole = Placed(item.stored, part, part, item.candidate)
    source, as_stored = whole.as_stored(part, values)
    read(item.stored, as_stored, source, threads=threads)
    return values


class _Coverage(TorchDispatchMode):
    """A context that notes the bytes of a tensor that are written in it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storage = tensor.untyped_storage()
        self._bytes = torch.zeros(self._storage.nbytes(), dtype=torch.bool, device="cpu")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(written_arguments(func, args, kwargs or {})):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and self._holds(leaf):
                size = leaf.element_size()
                strides = [stride * size for stride in leaf.stride()]
                self._bytes.as_strided(
                    (*leaf.shape, size), (*strides, 1), leaf.storage_offset() * size
                ).fill_(True)
        return result

    def _holds(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata == self._storage._cdata

    def of(self, now: Tensor, before: Tensor) -> Tensor:
        """Whether each element was written. A kernel of the loader's own is seen by its values."""
        if not self._holds(now):
            # The loader gave the parameter other memory, as a whole.
            return torch.ones(now.shape, dtype=torch.bool, device="cpu")
        size = now.element_size()
        seen = self._bytes.view(*now.shape, size).all(-1)
        bits = [dense.reshape(-1).view(torch.uint8) for dense in (now, before)]
        return seen | (bits[0] != bits[1]).view(*now.shape, size).any(-1).cpu()


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
