"""A second set of memory for an update: written while calls go on, then put in place at once.

The old memory is kept for the next update, so it takes twice the bytes of what is updated, for
good. Addresses change at each commit: not for captured graphs, and not for memory that is shared
with other processes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.lock import tensors_of
from fixpass.runtime.weights.look import Layouts, pointers_of
from fixpass.runtime.weights.relayout import any_layout_set, packed, record, record_of

_address = attrgetter("_cdata")


@dataclass(frozen=True)
class Spare:
    """Memory that was in use before the last update.

    views: what tensors were, given their ids and the addresses that they have since; only where
    each tensor is all of its memory. rest: other memory. plan: for which it is known to lie right.
    """

    ids: Sequence[int] = ()
    pointers: Sequence[int] = ()
    views: Sequence[Tensor] = ()
    rest: Sequence[Tensor] = ()
    plan: object = None

    def memory(self) -> list[Tensor]:
        """As bytes, what nobody else holds: tensors of the user may lie there by now."""
        mine = [*self.views, *self.rest]
        return [_bytes_of(t) for t, alone in zip(mine, _are_alone(mine), strict=True) if alone]


_SPARE: WeakKeyDictionary[nn.Module, Spare] = WeakKeyDictionary()


def take_spare(
    model: nn.Module, ids: Sequence[int], layouts: Layouts, plan: object
) -> Spare | None:
    """What just the tensors of these ids were before the last update, in this order, or None.

    None also where they did not lie as `layouts` say, or where anybody else holds that memory. It
    is the caller's now.
    """
    spare = _SPARE.pop(unwrapped(model), Spare())
    if spare.ids != ids:
        place = {each: index for index, each in enumerate(spare.ids)}
        if not spare.views or place.keys() != set(ids):
            return None
        order = [place[each] for each in ids]
        pointers, views = [spare.pointers[i] for i in order], [spare.views[i] for i in order]
        spare = Spare(ids, pointers, views)
    alone = all(_are_alone(spare.views))
    return spare if alone and (spare.plan is plan or layouts.lie_as(spare.views)) else None


def _are_alone(tensors: Sequence[Tensor]) -> Iterator[bool]:
    """Of each whether no other tensor or storage object holds its memory."""
    lone = torch.empty(1, device="cpu")
    # All are held while they are counted, as the address of one that is not may be used again.
    storages = list(map(Tensor.untyped_storage, (lone, *tensors)))
    counts = map(torch._C._storage_Use_Count, map(_address, storages))
    # A storage has one object in Python, however many hold that.
    once, *held = zip(counts, map(sys.getrefcount, storages), strict=True)
    return map(once.__eq__, held)


def keep_spare(
    model: nn.Module,
    tensors: Sequence[Tensor],
    pointers: Sequence[int],
    views: Sequence[Tensor],
    plan: object = None,
) -> None:
    """Tensors were given memory at these addresses: keep what they were for the next update."""
    _SPARE[unwrapped(model)] = Spare(list(map(id, tensors)), pointers, views, plan=plan)


def exchange(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Give each tensor the memory of a view; what they were. The caller has closed the gate."""
    before = [tensor.data for tensor in tensors]
    try:
        _point(tensors, views)
    except BaseException:
        _point(tensors, before)
        raise
    return before


class DoubleBuffer:
    """Other memory for some tensors of a model, and all tensors of the model that share it."""

    def __init__(self, model: nn.Module, written: Iterable[Tensor]) -> None:
        self._model = model
        self._live: dict[int, Tensor] = {}
        self._back: dict[int, Tensor] = {}
        spare = _SPARE.pop(unwrapped(model), Spare()).memory()
        for tensor in written:
            _check(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._back:
                live = _bytes_of(tensor)
                self._live[storage.data_ptr()] = live
                self._back[storage.data_ptr()] = _fresh(live, spare)
        moved = {
            id(t): t for t in tensors_of(model) if t.untyped_storage().data_ptr() in self._back
        }
        self._moved = list(moved.values())

    @property
    def back(self) -> dict[int, Tensor]:
        """For the id of each tensor, what it will be."""
        return {id(tensor): self.on_back(tensor) for tensor in self._moved}

    def keep_the_rest(self, covered: int) -> None:
        """Copy the old bytes where fewer than all of the memory, `covered` bytes, are written."""
        if covered < sum(live.nbytes for live in self._live.values()):
            for pointer, live in self._live.items():
                self._back[pointer].copy_(live)

    def flip(self) -> None:
        """Put the other memory in place; again, the first. The caller has closed the gate."""
        packs = {id(p.pack): p.pack for t in self._moved if (p := packed(t)) is not None}
        tensors = [*self._moved, *packs.values()]
        before = exchange(tensors, [self.on_back(tensor) for tensor in tensors])
        pairs = [(live, self._back[pointer]) for pointer, live in self._live.items()]
        self._live = {back.data_ptr(): back for _, back in pairs}
        self._back = {back.data_ptr(): live for live, back in pairs}
        whole = all(view.nbytes == view.untyped_storage().nbytes() for view in before)
        if whole and len(tensors) == len(self._back):
            keep_spare(self._model, tensors, pointers_of(tensors), before)
        else:
            _SPARE[unwrapped(self._model)] = Spare(rest=list(self._back.values()))

    def on_back(self, tensor: Tensor) -> Tensor:
        """The same part of the other memory."""
        back = self._back[tensor.untyped_storage().data_ptr()]
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(
            back.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for tensor, data in zip(tensors, views, strict=True):
        tensor.data = data
    torch.autograd.graph.increment_version(tensors)
    for tensor in tensors if any_layout_set() else ():
        if (found := record_of(tensor)) is not None:
            record(tensor, replace(found, pointer=tensor.data_ptr()))


def _bytes_of(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _fresh(live: Tensor, spare: list[Tensor]) -> Tensor:
    for index, tensor in enumerate(spare):
        if (tensor.nbytes, tensor.device) == (live.nbytes, live.device):
            return spare.pop(index)
    return torch.empty_like(live)


def _check(tensor: Tensor) -> None:
    what = f"a parameter of {tuple(tensor.shape)} "
    if tensor.is_inference():
        raise UpdateError(
            what + "was made in inference mode, and its memory cannot be exchanged: use "
            "mode='buffered' or 'undo_log'"
        )
    if isinstance(tensor, DTensor):
        raise UpdateError(
            what + "is a DTensor, whose memory FSDP2 holds too: not mode='double_buffer'"
        )
    if tensor.device.type == "cpu" and tensor.untyped_storage().is_shared():
        raise UpdateError(
            what + "is in shared memory or in a file, which others go on to read: use "
            "mode='buffered' or 'undo_log'"
        )
