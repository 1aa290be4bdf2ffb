"""Set and reset the layout of one parameter in place, and record which parameters have one.

The parameter stays the same object, with its class, attributes, requires_grad and, unless the
layout pads, its memory. `set_layout` needs a staging buffer of at most 4 MiB. It does not wait for
calls that read the parameter: `write_lock` does.

The records stand in a table by identity, not on the parameters: an attribute would get lost, be
copied to a tensor without the layout, and be guarded by Dynamo. A record dies with its parameter.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layout_plan import LayoutPlan, resolve
from fixpass.runtime.weights.layouts import Alias, Pad, Stride, WeightLayout, named
from fixpass.runtime.weights.lock import closed, over
from fixpass.runtime.weights.permute import move_in_place
from fixpass.runtime.weights.region import Region, read, write

_PATIENCE = 30.0
"""Seconds that `restride` waits for calls under way."""


@dataclass(frozen=True)
class LayoutRecord:
    """A parameter whose memory, which starts at the address `pointer`, is laid out by `plan`."""

    plan: LayoutPlan
    pointer: int
    before: tuple[tuple[int, ...], tuple[int, ...]]
    """Shape and strides that the parameter had before."""


@dataclass(frozen=True)
class PackedPart:
    """A parameter that is `pack.narrow(dim, start, size)`."""

    layout: WeightLayout
    pack: Tensor
    dim: int
    start: int
    size: int

    @property
    def view(self) -> Tensor:
        return self.pack.narrow(self.dim, self.start, self.size)


_RECORDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_PARTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_changes = [0]


def any_layout_set() -> bool:
    """Whether any parameter in this process has a layout or is part of a pack."""
    return bool(_RECORDS or _PARTS)


def record_of(param: Tensor) -> LayoutRecord | None:
    """The record of the layout that `param` has, or None."""
    if not _RECORDS:
        return None
    found: LayoutRecord | None = _RECORDS.get(param)
    return found


def packed(param: Tensor) -> PackedPart | None:
    """The part of a pack that `param` is, or None."""
    if not _PARTS:
        return None
    found: PackedPart | None = _PARTS.get(param)
    return found


def record(param: Tensor, entry: LayoutRecord | PackedPart) -> None:
    """Note that `param` has a layout, or is part of a pack."""
    before = record_of(param)
    (_RECORDS if isinstance(entry, LayoutRecord) else _PARTS)[param] = entry
    # The same layout at another address changes no plan of an update.
    if not isinstance(entry, LayoutRecord) or before is None or before.plan is not entry.plan:
        _changes[0] += 1


def forget(param: Tensor) -> None:
    """Drop the records of `param`; its memory stays as it is."""
    _RECORDS.pop(param, None)
    _PARTS.pop(param, None)
    _changes[0] += 1


def layout_generation() -> int:
    """A number that rises whenever a parameter in this process gets or loses a layout or a pack."""
    return _changes[0]


def memory_of(param: Tensor, plan: LayoutPlan) -> Tensor:
    """The elements of a parameter with a layout, in memory order: 1-D and contiguous."""
    data = param.detach()
    return data.as_strided((plan.numel,), (1,), data.storage_offset())


def owned_bytes(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its storage."""
    return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())


def layout_of(param: Tensor) -> WeightLayout | None:
    """The layout that `set_layout` gave `param`, or None."""
    found = record_of(param)
    return found.plan.layout if found else None


def set_layout(param: Tensor, layout: str | WeightLayout, name: str = "the parameter") -> bool:
    """Lay out the memory of `param` as `layout` says.

    Args:
        param: contiguous, with at least as many dimensions as the layout speaks of.
        layout: a layout, or the name of a known one.
        name: of the parameter, for errors.

    Returns:
        Whether anything was done: False where `param` has this layout already.

    Raises:
        LayoutError: `param` has another layout, or the layout does not fit.

    """
    layout = named(layout)
    found = record_of(param)
    if found is not None:
        if found.plan.layout == layout:
            return False
        raise LayoutError(
            f"{name} has layout {found.plan.layout} and cannot be given {layout}: call "
            "fixpass.weights.reset_layout first"
        )
    check_can_relayout(param, layout, name)
    plan = resolve(layout, tuple(param.shape), param.element_size())
    if not param.is_contiguous():
        raise LayoutError(
            f"{name} has shape {tuple(param.shape)} and stride {param.stride()}, and {layout} "
            "starts from a contiguous one: param.data = param.data.contiguous()"
        )
    before = tuple(param.shape), tuple(param.stride())
    with torch.no_grad():
        if plan.padded != plan.logical:
            param.data = _padded(param.detach(), plan)
        else:
            for step in _steps(plan, param.element_size()):
                move_in_place(memory_of(param, plan), step)
            _show(param, plan.shown, plan.strides)
    torch.autograd.graph.increment_version(param)
    record(param, LayoutRecord(plan, param.data_ptr(), before))
    return True


def reset_layout(param: Tensor, name: str = "the parameter") -> bool:
    """Undo `set_layout`; returns whether anything was done. Without its padding `param` moves."""
    found = record_of(param)
    if found is None:
        return False
    plan = found.plan
    check_memory(param, found, name)
    with torch.no_grad():
        if plan.padded != plan.logical:
            param.data = logical(param)
        else:
            for step in reversed(_steps(plan, param.element_size())):
                move_in_place(memory_of(param, plan), step, inverse=True)
            _show(param, *found.before)
    torch.autograd.graph.increment_version(param)
    forget(param)
    return True


def logical(param: Tensor, name: str = "the parameter") -> Tensor:
    """A contiguous copy of the values in the checkpoint's layout, whatever layout `param` has."""
    found = record_of(param)
    if found is None:
        return param.detach().clone(memory_format=torch.contiguous_format)
    check_memory(param, found, name)
    return read(memory_of(param, found.plan), found.plan, Region.of(found.plan))


def check_can_relayout(param: Tensor, layout: WeightLayout, name: str) -> None:
    """Raise LayoutError where `param` has no memory of its own that a layout could order."""
    what = f"{name}, {param.dtype} {tuple(param.shape)}, cannot be given layout {layout}: "
    if isinstance(param, DTensor):
        raise LayoutError(what + "it is a DTensor. Set the layout of the local part before")
    if param.device.type == "meta":
        raise LayoutError(what + "it is on the meta device. model.to_empty(device=...) first")
    if param.layout != torch.strided:
        raise LayoutError(what + f"it is {param.layout}. to_dense() first")
    if packed(param) is not None:
        raise LayoutError(what + "it is part of a pack. fixpass.weights.unpack it first")
    if any(isinstance(step, Alias) for step in layout.steps):
        raise LayoutError(what + "it is of several parameters. fixpass.weights.pack takes them")


def check_memory(param: Tensor, found: LayoutRecord, name: str) -> None:
    """Raise LayoutError where a parameter with a layout was given other memory since."""
    same = param.data_ptr() == found.pointer
    if same and owned_bytes(param) >= found.plan.numel * param.element_size():
        return
    raise LayoutError(
        f"{name} was given layout {found.plan.layout}, and then other memory, by "
        f"{param.dtype} {tuple(param.shape)} as its .data: call fixpass.weights.reset_layout "
        "before a parameter is moved or cast, replace it in fixpass.weights.checkpoint_layout, "
        "or call fixpass.weights.forget and set_layout again"
    )


def restride(param: Tensor, order: tuple[int, ...], name: str) -> None:
    """Store `param` with its dimensions in `order`, outermost first; its values and shape stay.

    Eager code, `state_dict` and loaders see the same numbers at other strides. So nothing is
    recorded, and nobody has to undo it. `param` is contiguous before.

    Raises:
        LayoutError: `param` has no memory of its own.
        UpdateError: the thread is inside a call that reads `param`.

    """
    layout = WeightLayout(f"stored {order}", (Stride(tuple(range(len(order))), order),))
    with closed(over((param,)), timeout=_PATIENCE):
        set_layout(param, layout, name)
        forget(param)


def obstacle_to_restride(param: Tensor) -> str:
    """Why `restride` must not touch the memory of `param`, or ""."""
    if record_of(param) is not None:
        return "it has a layout already"
    if not param.is_contiguous():
        return "it is not row-major"
    storage = param.untyped_storage()
    if storage.nbytes() != param.nbytes:
        return "it is a part of a larger storage"
    if param.device.type == "cpu" and storage.is_shared():
        return "other processes share its memory"
    if _users(param) > _users(torch.empty(1, device=param.device)):
        return "another tensor shares its memory"
    return ""


def _users(tensor: Tensor) -> int:
    """The reference count of the storage; this function's own reference is counted too."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _show(param: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Give `param` another shape and strides over the memory that it has."""
    if (tuple(param.shape), tuple(param.stride())) == (shape, strides):
        return
    if param.grad is not None and tuple(param.shape) != shape:
        raise LayoutError("a parameter with a gradient cannot change its shape: set grad to None")
    data = param.detach()
    param.data = data.as_strided(shape, strides, data.storage_offset())


def _steps(plan: LayoutPlan, itemsize: int) -> list[LayoutPlan]:
    """A plan of each step of the layout: two simple permutes in place beat one complicated one."""
    steps = [step for step in plan.layout.steps if not isinstance(step, Pad)]
    if len(steps) == 1:
        return [plan]
    return [
        resolve(WeightLayout(plan.layout.name, (step,)), plan.padded, itemsize) for step in steps
    ]


def _padded(data: Tensor, plan: LayoutPlan) -> Tensor:
    value = next(step.value for step in plan.layout.steps if isinstance(step, Pad))
    memory = torch.full((prod(plan.padded),), value, dtype=data.dtype, device=data.device)
    write(memory, plan, Region.of(plan), data)
    return memory.as_strided(plan.shown, plan.strides)
