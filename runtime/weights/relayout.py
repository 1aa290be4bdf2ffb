"""Fold a parameter into a layout and out again: in place, on the same object.

Object, class, attributes, requires_grad and, where the layout does not pad, the memory stay. What
a fold needs beside the parameter is a staging buffer of its block, at most 4 MiB. Nothing here
waits for readers: see the gate.
"""

from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.alias import packed
from fixpass.runtime.weights.layout_plan import Plan, dense, resolve
from fixpass.runtime.weights.layouts import Alias, Derived, Layout, Pad, named
from fixpass.runtime.weights.permute import permute_in_place
from fixpass.runtime.weights.region import Region, read, write
from fixpass.runtime.weights.table import Folded, forget, memory_of, record, record_of


def layout_of(param: Tensor) -> Layout | None:
    """The layout that `param` is folded into, or None."""
    found = record_of(param)
    return found.plan.layout if found else None


def set_layout(param: Tensor, layout: str | Layout, name: str = "the parameter") -> bool:
    """Fold `param` into `layout`; whether anything was done: folding twice is folding once.

    param: dense (row-major) and of the layout's rank or more. Raises LayoutError where it is
    folded into another layout, or where the layout does not fit.
    """
    layout = named(layout)
    found = record_of(param)
    if found is not None:
        if found.plan.layout == layout:
            return False
        raise LayoutError(
            f"{name} is folded into {found.plan.layout} and not {layout}: unfold it first"
        )
    check_foldable(param, layout, name)
    plan = resolve(layout, tuple(param.shape), param.element_size())
    if not param.is_contiguous():
        raise LayoutError(
            f"{name} has shape {tuple(param.shape)} and stride {param.stride()}, and {layout} "
            "starts from a dense one: param.data = param.data.contiguous()"
        )
    before = tuple(param.shape), tuple(param.stride())
    with torch.no_grad():
        if plan.padded != plan.logical:
            param.data = _padded(param.detach(), plan)
        else:
            for step in _steps(plan, param.element_size()):
                permute_in_place(memory_of(param, plan), step.sizes, step.order)
            show(param, plan.shown, plan.strides)
    torch.autograd.graph.increment_version(param)
    record(param, Folded(plan, param.data_ptr(), before))
    return True


def reset_layout(param: Tensor, name: str = "the parameter") -> bool:
    """Undo `fold`; whether anything was done. Padding leaves with a move to new memory."""
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
                permute_in_place(memory_of(param, plan), step.sizes, step.order, inverse=True)
            show(param, *found.before)
    torch.autograd.graph.increment_version(param)
    forget(param)
    return True


def logical(param: Tensor, name: str = "the parameter") -> Tensor:
    """A dense copy of the values in the checkpoint's layout, folded or not."""
    found = record_of(param)
    if found is None:
        return param.detach().clone(memory_format=torch.contiguous_format)
    check_memory(param, found, name)
    return read(memory_of(param, found.plan), found.plan, Region.of(found.plan))


def show(param: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Let `param` show its memory, from where it starts, with another shape and strides."""
    if (tuple(param.shape), tuple(param.stride())) == (shape, strides):
        return
    if param.grad is not None and tuple(param.shape) != shape:
        raise LayoutError("a parameter with a gradient cannot change its shape: set grad to None")
    data = param.detach()
    param.data = data.as_strided(shape, strides, data.storage_offset())


def check_foldable(param: Tensor, layout: Layout, name: str) -> None:
    """Raise LayoutError where `param` has no memory of its own to fold."""
    what = f"{name}, {param.dtype} {tuple(param.shape)}, cannot be folded into {layout}: "
    if isinstance(param, DTensor):
        raise LayoutError(what + "it is a DTensor. Fold the local part before it is wrapped")
    if param.device.type == "meta":
        raise LayoutError(what + "it is on the meta device. model.to_empty(device=...) first")
    if param.layout != torch.strided:
        raise LayoutError(what + f"it is {param.layout}. to_dense() first")
    if packed(param) is not None:
        raise LayoutError(what + "it is part of a pack. fixpass.weights.unpack it first")
    if any(isinstance(step, Alias) for step in layout.folds):
        raise LayoutError(what + "it is of several parameters. fixpass.weights.pack takes them")
    if any(isinstance(step, Derived) for step in layout.folds):
        raise LayoutError(what + "the layout loses values, and the parameter is their source")


def check_memory(param: Tensor, found: Folded, name: str) -> None:
    """Raise LayoutError where somebody gave a folded parameter other memory."""
    same = param.data_ptr() == found.pointer
    room = param.untyped_storage().nbytes() // param.element_size() - param.storage_offset()
    if same and room >= found.plan.numel:
        return
    raise LayoutError(
        f"{name} was folded into {found.plan.layout}, and its .data was replaced since, by "
        f"{param.dtype} {tuple(param.shape)}: unfold it before it is moved or cast, replace it in "
        "fixpass.weights.window, or call fixpass.weights.forget and fold again"
    )


def _steps(plan: Plan, itemsize: int) -> list[Plan]:
    """A plan of each fold by itself: two simple permutes in place beat one that is neither."""
    folds = [step for step in plan.layout.folds if not isinstance(step, Pad)]
    if len(folds) == 1:
        return [plan]
    return [resolve(Layout(plan.layout.name, (step,)), plan.padded, itemsize) for step in folds]


def _padded(data: Tensor, plan: Plan) -> Tensor:
    value = next(step.value for step in plan.layout.folds if isinstance(step, Pad))
    memory = torch.full((prod(plan.padded),), value, dtype=data.dtype, device=data.device)
    write(memory, plan, Region(plan.logical, dense(plan.padded)), data)
    return memory.as_strided(plan.shown, plan.strides)
