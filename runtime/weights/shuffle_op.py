"""The op `fixpass::shuffle_weight(weight, layout)`: a weight as the kernels of a layout read it.

A function of its argument: it gives a tensor of its own. A weight that `fold` has brought into the
layout already gives its bytes as they are, so a model may call it before and after folding. In a
compiled graph `fold-weights` takes it out of every call. Only layouts that keep the shape; it has
no gradient.
"""

import torch
from torch import Tensor

from fixpass.runtime import ops
from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layout_plan import Plan, dense, resolve
from fixpass.runtime.weights.layouts import named
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.relayout import layout_of


def shuffle_weight(weight: Tensor, layout: str) -> Tensor:
    """The values of `weight`, row-major, in the order of `layout`; same shape and dtype.

    Raises LayoutError for an unknown layout, one that does not fit or changes the shape, and for a
    weight that is folded into another one.
    """
    result: Tensor = torch.ops.fixpass.shuffle_weight(weight, layout)
    return result


def is_folded(weight: Tensor, layout: str) -> bool:
    """Whether `weight` lies in `layout` already."""
    return layout_of(weight) == named(layout)


def _run(weight: Tensor, layout: str) -> Tensor:
    found = layout_of(weight)
    if found is not None and found != named(layout):
        raise LayoutError(
            f"a weight {tuple(weight.shape)} folded into {found} was to be shuffled into {layout}: "
            "unfold it first"
        )
    if found is not None:
        return weight.clone(memory_format=torch.contiguous_format)
    plan = _plan(weight, layout)
    memory = torch.empty(plan.numel, dtype=weight.dtype, device=weight.device)
    write(memory, plan, Region.of(plan), weight)
    return memory.view(weight.shape)


def _fake(weight: Tensor, layout: str) -> Tensor:
    _plan(weight, layout)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _plan(weight: Tensor, layout: str) -> Plan:
    shape = tuple(int(size) for size in weight.shape)
    plan = resolve(named(layout), shape, weight.element_size())
    if (plan.shown, plan.strides, plan.padded) != (shape, dense(shape), shape):
        raise LayoutError(
            f"layout {layout} makes {plan.shown} of {shape}: fixpass.weights.fold can do that, and "
            "fixpass::shuffle_weight keeps shapes"
        )
    return plan


def _define(library: torch.library.Library) -> None:
    library.define(
        "shuffle_weight(Tensor weight, str layout) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
    library.impl("shuffle_weight", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("fixpass::shuffle_weight", _fake, lib=library)


_define(ops.DEFINITIONS)
